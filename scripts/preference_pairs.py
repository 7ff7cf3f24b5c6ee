"""Pairs of a better and a worse image for `train_step_preference.py`, drawn and compared by a reward or from people.

Letters: B images, G images of one prompt, X latent shape of one image.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.pixels import to_uint8
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.pipeline import FlowPipeline, Prepared, UnlikeConditioning
from flowsteer.rollout.sample import sample
from flowsteer.rollout.steps.kernels import denoised
from flowsteer.rollout.steps.noise import mix

DRAW, STEP, HELD_OUT = 1, 2, 3  # streams of randomness
PAIR_COLUMNS = ("caption", "image_0", "image_1", "label_0")

console = Console()


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images of one prompt and which of them are better."""

    prompt: str
    latents: Tensor  # [G, *X], finished
    preference: Tensor  # [G, G] float32: how likely the row's image is better than the column's; NaN: not a pair
    weight: float = 1.0


class Base:
    """The frozen pipeline with the settings of the rollouts that the model shall judge."""

    def __init__(
        self,
        pipeline: FlowPipeline,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.pipeline = pipeline
        self.dtype = dtype
        self._settings: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
        }
        probe = pipeline.prepare(["a photo"], **self._settings)
        self.schedule, self.latent_shape = probe.schedule, probe.latent_shape
        # where no data is left in the latents, all predictions of a prompt are one
        self.indices = [index for index, alpha in enumerate(self.schedule.alpha[:-1].tolist()) if alpha > 0]
        noise = torch.zeros(1, *probe.latent_shape, dtype=dtype, device=pipeline.device)
        with torch.no_grad():
            decoded = pipeline.decode(noise, probe)
        if decoded.dim() != 4:
            raise ValueError("this script trains on images; the pipeline decodes to videos")
        self.image_shape: tuple[int, int] = (decoded.shape[-2], decoded.shape[-1])

    def _prepared(self, prompts: Sequence[str]) -> Iterator[tuple[slice, Prepared]]:
        """Prepared rows, B in one batch, or where prompts are unlike one another in one of each run of equal ones."""
        distinct = list(dict.fromkeys(prompts))
        try:
            joined = self.pipeline.prepare(distinct, **self._settings)
            yield slice(0, len(prompts)), joined.take([distinct.index(prompt) for prompt in prompts])
        except UnlikeConditioning:
            start = 0
            while start < len(prompts):
                end = start + 1
                while end < len(prompts) and prompts[end] == prompts[start]:
                    end += 1
                alone = self.pipeline.prepare([prompts[start]], **self._settings)
                yield slice(start, end), alone.take([0] * (end - start))
                start = end

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Final latents [B, *X] of the deterministic sampler and images [B, 3, H, W] in [0, 1], both on the CPU."""
        latents, images = [], []
        levels = [0.0] * self.schedule.num_steps
        for rows, conditioning in self._prepared(prompts):
            drawn, _ = sample(
                self.pipeline,
                conditioning,
                seeds=seeds[rows],
                noise_levels=levels,
                dtype=self.dtype,
                device=self.pipeline.device,
            )
            latents.append(drawn.cpu())
            images.append(self.pipeline.decode(drawn, conditioning).cpu())
        return torch.cat(latents), torch.cat(images)

    @torch.no_grad()
    def predict(self, prompts: Sequence[str], latents: Tensor, noise: Tensor, index: int | None) -> np.ndarray:
        """What the pipeline takes for the clean image when ``latents`` [B, *X] are noised to ``index``: uint8 [B, H, W, 3].

        ``index`` None: the finished images themselves.
        """
        images = []
        for rows, conditioning in self._prepared(prompts):
            clean = latents[rows].to(self.pipeline.device)
            if index is not None:
                drawn = self.schedule.sigma[index] * noise[rows].to(clean.device)
                noisy = (self.schedule.alpha[index] * clean.float() + drawn).to(self.dtype)
                velocity = self.pipeline.velocity(noisy, index, conditioning)
                clean = denoised(velocity, noisy, self.schedule, index).to(self.dtype)
            images.append(self.pipeline.decode(clean, conditioning))
        return to_uint8(torch.cat(images))

    def sigma(self, index: int | None) -> float:
        """The noise level at an index, 0 for None."""
        return 0.0 if index is None else self.schedule.sigma[index].item()


Split = tuple[tuple[Prompts, list[int]], tuple[Prompts, list[int]]]
"""(prompts, rows) for training and for the accuracy"""


def split_prompts(prompts: Prompts, held_out: Prompts | None, *, num_train: int, num_held_out: int, seed: int) -> Split:
    """What is drawn for training and what for the accuracy, without a text in common."""
    order = sorted(range(len(prompts)), key=lambda row: mix(seed, DRAW, row))
    if held_out is None:
        texts = list(dict.fromkeys(prompts.texts[row] for row in order))
        away = set(texts[: min(num_held_out, max(1, len(texts) // 10))])
        tested = (prompts, [row for row in order if prompts.texts[row] in away])
    else:
        away = set(held_out.texts)
        rows = sorted(range(len(held_out)), key=lambda row: mix(seed, HELD_OUT, row))
        tested = (held_out, rows[:num_held_out])
    trained = [row for row in order if prompts.texts[row] not in away][:num_train]
    if not trained:
        raise ValueError(f"of {len(prompts)} prompts none is left for training once the held-out ones are taken away")
    return (prompts, trained), tested


def split_pairs(groups: Sequence[Group], seed: int) -> tuple[list[Group], list[Group]]:
    """Pairs for training and every tenth caption's pairs for the accuracy."""
    captions = sorted(dict.fromkeys(group.prompt for group in groups), key=lambda text: mix(seed, *text.encode()))
    if len(captions) < 2:
        raise ValueError("pairs of at least two captions are needed, some of them for the accuracy")
    away = set(captions[: max(1, len(captions) // 10)])
    parts: tuple[list[Group], list[Group]] = [], []
    for group in groups:
        parts[group.prompt in away].append(group)
    return parts


def draw_pairs(base: Base, split: Split, rewards: RewardSet, **how: Any) -> tuple[list[Group], list[Group]]:
    """Groups for training and for the accuracy, drawn under a progress bar that says how long it takes."""
    parts: list[list[Group]] = []
    with bar() as progress:
        for name, (prompts, rows) in zip(("drawing", "drawing held-out"), split):
            task = progress.add_task(name, total=len(rows), note="prompts")
            groups = draw_groups(
                base,
                prompts,
                rows,
                rewards,
                **how,
                progress=lambda done, task=task: progress.update(task, completed=done),
            )
            if not groups:
                raise ValueError(
                    f"{name}: the reward finds no image better than another of its prompt; nothing to learn"
                )
            parts.append(groups)
    return parts[0], parts[1]


def describe(groups: Sequence[Group]) -> str:
    """How many images and pairs there are."""
    images = sum(len(group.latents) for group in groups)
    pairs = sum(int((~group.preference.isnan()).triu().sum()) for group in groups)
    return f"{images} images of {len(dict.fromkeys(group.prompt for group in groups))} prompts in {pairs} pairs"


def draw_groups(
    base: Base,
    prompts: Prompts,
    rows: Sequence[int],
    rewards: RewardSet,
    *,
    group_size: int,
    batch_size: int,
    min_difference: float,
    seed: int,
    progress: Callable[[int], object],
) -> list[Group]:
    """``group_size`` images of each prompt in ``rows``, compared by a reward; prompts whose images tie are left out."""
    groups = []
    per_batch = max(1, batch_size // group_size)
    for start in range(0, len(rows), per_batch):
        chosen = [row for row in rows[start : start + per_batch] for _ in range(group_size)]
        texts = [prompts.texts[row] for row in chosen]
        seeds = torch.tensor([mix(seed, DRAW, row, place % group_size) for place, row in enumerate(chosen)])
        latents, images = base.draw(texts, seeds)
        columns = {name: [values[row] for row in chosen] for name, values in prompts.columns.items()}
        scores = rewards.score(images, texts, columns).total.view(-1, group_size)
        for place, preference in enumerate(preferences(scores, min_difference)):
            if not preference.isnan().all():
                mine = slice(place * group_size, (place + 1) * group_size)
                groups.append(Group(prompt=texts[mine.start], latents=latents[mine].clone(), preference=preference))
        progress(min(start + per_batch, len(rows)))
    return groups


def preferences(scores: Tensor, min_difference: float) -> Tensor:
    """Scores [P, G], NaN where missing, to [P, G, G]: 1 where the row's is larger, 0 where smaller, NaN where they tie."""
    difference = scores[:, :, None] - scores[:, None]
    nothing = torch.full_like(difference, math.nan)
    larger = difference.abs() > max(min_difference, 0.0)  # false for NaN
    return torch.where(larger, (difference > 0).float(), nothing)


def read_pairs(path: Path, base: Base) -> list[Group]:
    """Pairs from people, encoded by the pipeline's autoencoder. Raises ValueError with the file and the line."""
    file = path / "pairs.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"there is no file {file}; give a .jsonl file, or a folder with a pairs.jsonl")
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    rows = [_read_pair(line, f"{file}, line {number}") for number, line in enumerate(lines, 1)]
    count = Counter(row["caption"] for row in rows)
    groups = []
    for number, row in enumerate(rows, 1):
        images = []
        for name in ("image_0", "image_1"):
            place = file.parent / row[name]
            if not place.is_file():
                raise ValueError(f"{file}, line {number}: there is no image {place}")
            images.append(_read_image(place, base.image_shape))
        label = float(row["label_0"])
        preference = torch.tensor([[math.nan, label], [1 - label, math.nan]])
        latents = encode_images(base, torch.stack(images))
        # Pick-a-Pic's 1 / num_examples_per_prompt: a prompt counts once
        groups.append(
            Group(prompt=row["caption"], latents=latents, preference=preference, weight=1 / count[row["caption"]])
        )
    return groups


def _read_pair(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    lacking = [name for name in PAIR_COLUMNS if not isinstance(row, dict) or name not in row]
    if lacking:
        raise ValueError(f"{where}: lacks {', '.join(lacking)}; a pair has {', '.join(PAIR_COLUMNS)}")
    if isinstance(row["label_0"], bool) or row["label_0"] not in (0, 0.5, 1):
        raise ValueError(f"{where}: label_0 is {row['label_0']!r}; it must be 1, 0, or .5 for a tie")
    return row


def _read_image(file: Path, shape: tuple[int, int]) -> Tensor:
    """[3, H, W] in [-1, 1], brought to the pipeline's size."""
    height, width = shape
    image = Image.open(file).convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


@torch.no_grad()
def encode_images(base: Base, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] to latents [B, *X]. Raises ValueError where the pipeline has no plain image latents."""
    from diffusers.models import AutoencoderKL

    vae = getattr(base.pipeline.pipe, "vae", None)
    if not isinstance(vae, AutoencoderKL) or len(base.latent_shape) != 3:
        raise ValueError(
            f"images of people are encoded for pipelines with an AutoencoderKL and latents [B, C, H, W]; this one has "
            f"{type(vae).__name__} and latents {list(base.latent_shape)}: use images that the pipeline draws (--reward)"
        )
    config: Any = vae.config
    encoded: Any = vae.encode(images.to(vae.device, vae.dtype))
    latents = encoded.latent_dist.mean
    latents = (latents - (config.shift_factor or 0.0)) * config.scaling_factor
    if tuple(latents.shape[1:]) != tuple(base.latent_shape):
        raise ValueError(
            f"encoded images are {list(latents.shape[1:])}, the pipeline's latents {list(base.latent_shape)}"
        )
    return latents.to(base.dtype).cpu()


def bar() -> Progress:
    """A progress bar with a place for a note."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    return Progress(TextColumn("{task.description}"), *columns, console=console)
