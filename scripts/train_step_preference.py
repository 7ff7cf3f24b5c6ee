"""Train the step-aware preference model of SPO (Liang et al. 2024, arXiv 2406.04314) for any diffusers pipeline.

    python scripts/train_step_preference.py runs/preference --prompts shapes_train.txt --held-out shapes_reserved.txt

It scores what a pipeline's *prediction of the clean image* at a noise level shows, against the prompt: the reward
`step_preference`, whose option `path` is the folder written here. Where pairs of a better and a worse image come from:

* by default the pipeline draws several images of each prompt, and any reward says which is better;
* with --pairs from people: a .jsonl file (or a folder with a pairs.jsonl) in the format of Pick-a-Pic, a line per pair
  with caption, image_0 and image_1 (paths, relative to the file) and label_0: 1 if the first is better, 0 if the second,
  .5 for a tie.

A step of training, as published: the images of a prompt get the same noise at a level of the sampler's own schedule, one
pass of the frozen pipeline predicts the clean images, these are decoded, and the model's scores are fitted to the labels by
binary cross-entropy of softmax(score_0, score_1). What differs: all pairs among the images of a prompt are used, not
one; some images are shown clean, for the last step; and a model that begins without --init also learns to tell the
prompts of a step apart (CLIP's loss, less and less of it), which a published CLIP has learnt before.

The defaults are for the embedded pipeline: 12 minutes of one CPU thread, after which pairs of reserved captions are in the
right order in 57 % of the cases at sigma .8 (where the reward itself, shown the predictions, gets 59 %), 70 % at .6 and 73 %
from .4 down to finished images. At sigma 1 all predictions of a prompt are one, and there is nothing to compare.

Letters: B images, G images of one prompt, P prompts of a step, X latent shape of one image.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from flowsteer.rewards.combine import RewardSet, to_uint8
from flowsteer.rewards.registry import load_reward
from flowsteer.rewards.step_preference import StepPreferenceModel
from flowsteer.rl.build import DTYPES
from flowsteer.rl.config import parse_overrides
from flowsteer.rl.options import (
    CallOption,
    Chosen,
    DeviceOption,
    DTypeOption,
    HeightOption,
    ModelOption,
    NegativeOption,
    WidthOption,
    choose,
)
from flowsteer.rollout.kernels import denoised
from flowsteer.rollout.noise import mix
from flowsteer.rollout.pipeline import Conditioning, FlowPipeline, UnlikeConditioning
from flowsteer.rollout.prompts import Prompts, read_prompts
from flowsteer.rollout.sample import sample

DRAW, STEP, HELD_OUT = 1, 2, 3  # streams of randomness
CACHED_PROMPTS = 4096  # whose embeddings are kept in memory
MAX_FRESH_SIZE = 64  # pixels that a new vision tower sees; a larger one is not learnt from nothing
PAIR_COLUMNS = ("caption", "image_0", "image_1", "label_0")

console = Console()


@dataclass(frozen=True, kw_only=True)
class Group:
    """Images of one prompt and which of them are better."""

    prompt: str
    latents: Tensor  # [G, *X], finished
    preference: Tensor  # [G, G] float32: how likely the row's image is better than the column's; NaN: not a pair
    weight: float = 1.0


# --------------------------------------------------------------------------------------------------- the frozen pipeline


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

    def _prepared(self, prompts: Sequence[str]) -> Iterator[tuple[slice, Conditioning]]:
        """Conditioning of B rows in one batch, or where prompts are unlike one another in one of each run of equal ones."""
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


# ------------------------------------------------------------------------------------------------------- pairs of images


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


# -------------------------------------------------------------------------------------------------------------- training


def new_model(
    base: Base, *, image_size: int | None, patch_size: int, width: int, num_blocks: int, projection: int
) -> StepPreferenceModel:
    """A small CLIP with fresh weights whose text tower begins as the pipeline's own, if that is a CLIP text model."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

    pipe = base.pipeline.pipe
    encoder, tokenizer = getattr(pipe, "text_encoder", None), getattr(pipe, "tokenizer", None)
    if not isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
        raise ValueError(
            f"the pipeline's text_encoder is a {type(encoder).__name__}, and a new model begins with a CLIP text model: give a "
            "CLIP checkpoint with --init"
        )
    size = image_size or min(*base.image_shape, MAX_FRESH_SIZE)
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": max(1, width // 32),
        "image_size": max(1, round(size / patch_size)) * patch_size,
        "patch_size": patch_size,
    }
    text: Any = encoder.config
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=projection))
    tower = encoder.text_model if isinstance(encoder, CLIPTextModelWithProjection) else encoder
    clip.text_model.load_state_dict(tower.state_dict())
    return StepPreferenceModel(clip.float(), tokenizer)


def pretrained_model(path: str) -> StepPreferenceModel:
    """A published CLIP, such as PickScore_v1. Only safetensors are read."""
    from transformers import AutoTokenizer, CLIPModel

    try:
        clip: Any = CLIPModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        return StepPreferenceModel(clip, AutoTokenizer.from_pretrained(path))
    except OSError as error:
        raise ValueError(f"--init {path}: no CLIP checkpoint with safetensors and a tokenizer ({error})") from None


def split_by_level(
    groups: Sequence[Group], indices: Sequence[int], clean_share: float, generator: torch.Generator
) -> dict[int | None, list[Group]]:
    """Give each group a noise level, evenly over all of them; None stands for finished images, a share of the groups."""
    count = len(groups)
    places = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count  # in [0, 1)
    split: dict[int | None, list[Group]] = {}
    for group, place in zip(groups, places.tolist()):
        noised = (place - clean_share) / (1 - clean_share) if clean_share < 1 else -1.0
        index = indices[min(int(noised * len(indices)), len(indices) - 1)] if noised >= 0 and indices else None
        split.setdefault(index, []).append(group)
    return split


def show(base: Base, groups: Sequence[Group], index: int | None, generator: torch.Generator) -> np.ndarray:
    """The predictions of all images of some groups at one level, with the same noise within a group: uint8 [B, H, W, 3]."""
    texts = [group.prompt for group in groups for _ in group.latents]
    noise = [torch.randn(base.latent_shape, generator=generator).expand_as(group.latents) for group in groups]
    return base.predict(texts, torch.cat([group.latents for group in groups]), torch.cat(noise), index)


def pair_loss(scores: Tensor, groups: Sequence[Group]) -> tuple[Tensor, float]:
    """Binary cross-entropy of softmax over each pair, and the share of pairs in the order of their labels.

    ``scores`` [B] of all images of the groups, one group after another. The mean over a group's pairs, then over groups.
    """
    losses, weights, right, count = [], [], 0.0, 0
    for own, group in zip(scores.split([len(group.latents) for group in groups]), groups):
        known = ~group.preference.isnan()
        difference = (own[:, None] - own[None])[known.to(own.device)]
        label = group.preference[known].to(own.device)
        losses.append(F.binary_cross_entropy_with_logits(difference, label))
        weights.append(group.weight)
        clear = label != 0.5
        right += ((difference > 0) == (label > 0.5))[clear].sum().item()
        count += int(clear.sum())
    weight = torch.tensor(weights, device=scores.device)
    return (torch.stack(losses) * weight).sum() / weight.sum(), right / max(count, 1)


def step_loss(
    model: StepPreferenceModel,
    base: Base,
    groups: Sequence[Group],
    *,
    clean_share: float,
    contrastive: float,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """The loss on some groups, each at a level of its own, and the share of pairs that are ordered as their labels say."""
    by_level = split_by_level(groups, base.indices, clean_share, generator)
    groups = [group for some in by_level.values() for group in some]
    images = [show(base, some, index, generator) for index, some in by_level.items()]
    sigma = torch.tensor([base.sigma(index) for (index, _), shown in zip(by_level.items(), images) for _ in shown])
    texts = list(dict.fromkeys(group.prompt for group in groups))
    own = torch.tensor([texts.index(group.prompt) for group in groups for _ in group.latents])  # [B]
    embedded, prompts = model.embed_images(np.concatenate(images), sigma), model.embed_prompts(texts)
    loss, right = pair_loss(model.score(embedded, prompts[own]), groups)
    if contrastive:
        logits = model.clip.logit_scale.exp() * embedded @ prompts.T  # [B, P]
        loss = loss + contrastive * F.cross_entropy(logits, own.to(logits.device))
    return loss, right


def train(
    model: StepPreferenceModel,
    loss: Callable[[int], tuple[Tensor, float]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
) -> None:
    """Fit the model to ``loss(step)`` by AdamW; the learning rate rises linearly, then falls along a cosine."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_decay(step, steps, warmup_steps))
    losses: list[float] = []
    order: list[float] = []
    with bar() as progress:
        task = progress.add_task("training", total=steps, note="")
        for step in range(steps):
            value, right = loss(step)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(value.item())
            order.append(right)
            note = f"loss {np.mean(losses[-20:]):.3f}, pairs in order {np.mean(order[-20:]):.1%}"
            progress.update(task, advance=1, note=note)
    model.eval().requires_grad_(False)


def warmup_then_decay(step: int, steps: int, warmup: int) -> float:
    """A learning rate's factor: linearly up, then along a cosine down to one fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def bar() -> Progress:
    """A progress bar with a place for a note."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    return Progress(TextColumn("{task.description}"), *columns, console=console)


# ------------------------------------------------------------------------------------------------------------- accuracy

Scorer = Callable[[np.ndarray, list[str], float], Tensor]
"""(uint8 [B, H, W, 3], B prompts, noise level) -> scores [B], NaN where missing"""


def accuracy_by_level(
    base: Base, groups: Sequence[Group], scorers: dict[str, Scorer], *, seed: int, batch_size: int
) -> list[dict[str, float]]:
    """For each noise level, finished images last, the share of pairs that each scorer orders as people or the reward did.

    Equal and missing scores count half; ties among the labels are left out. The noise is the same for all scorers.
    """
    table = []
    per_batch = max(1, batch_size // max(len(group.latents) for group in groups))
    with bar() as progress:
        task = progress.add_task("accuracy", total=(len(base.indices) + 1) * len(groups), note="")
        for index in (*base.indices, None):
            generator = torch.Generator().manual_seed(mix(seed, HELD_OUT, -1 if index is None else index))
            right, count = dict.fromkeys(scorers, 0.0), 0
            for start in range(0, len(groups), per_batch):
                some = groups[start : start + per_batch]
                images = show(base, some, index, generator)
                texts = [group.prompt for group in some for _ in group.latents]
                for name, scorer in scorers.items():
                    right[name] += pairs_in_order(scorer(images, texts, base.sigma(index)), some)
                count += sum(int((group.preference > 0.5).sum()) for group in some)
                progress.advance(task, len(some))
            row: dict[str, float] = {"sigma": round(base.sigma(index), 4), "pairs": count}
            table.append({**row, **{name: value / max(count, 1) for name, value in right.items()}})
    return table


def pairs_in_order(scores: Tensor, groups: Sequence[Group]) -> float:
    """How many of the pairs have the better image's score above the other's; half for those that are equal or missing."""
    right = 0.0
    for own, group in zip(scores.split([len(group.latents) for group in groups]), groups):
        difference = (own[:, None] - own[None])[group.preference > 0.5]
        right += ((difference > 0).double() + 0.5 * (~(difference > 0) & ~(difference < 0)).double()).sum().item()
    return right


def model_scorer(model: StepPreferenceModel) -> Scorer:
    """The model as it is now; later training does not change it."""
    kept = copy.deepcopy(model).eval()

    @torch.no_grad()
    def score(images: np.ndarray, prompts: list[str], sigma: float) -> Tensor:
        return kept(images, torch.full((len(images),), sigma), prompts).float().cpu()

    return score


def reward_scorer(rewards: RewardSet) -> Scorer:
    """The reward on the predictions: what a preference model has to be better than."""

    def score(images: np.ndarray, prompts: list[str], sigma: float) -> Tensor:
        return rewards.score(torch.from_numpy(images).movedim(-1, -3).float() / 255, prompts).total

    return score


def show_table(table: list[dict[str, float]], title: str) -> None:
    """Print accuracy by noise level."""
    shares = [name for name in table[0] if name not in ("sigma", "pairs")]
    printed = Table("sigma", "pairs", *shares, title=title)
    for row in table:
        printed.add_row(f"{row['sigma']:.3f}", str(row["pairs"]), *(f"{row[name]:.1%}" for name in shares))
    console.print(printed)


# ---------------------------------------------------------------------------------------------------------- the command


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


def expected_minutes(model: StepPreferenceModel, loss: Callable[[int], tuple[Tensor, float]], steps: int) -> float:
    """How long training takes, from two passes whose gradients are dropped; the first pays for preparations."""
    model.train().requires_grad_(True)
    loss(0)[0].backward()
    began = time.perf_counter()
    loss(1)[0].backward()
    model.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) * steps / 60


def load_base(chosen: Chosen, num_inference_steps: int, guidance_scale: float, negative_prompt: str | None) -> Base:
    """The frozen pipeline that the options ask for."""
    dtype = DTYPES[chosen.dtype]
    arguments: dict[str, Any] = {"call_kwargs": chosen.call, "cache_size": CACHED_PROMPTS, **chosen.size}
    return Base(
        FlowPipeline.load(chosen.model, dtype=dtype, device=chosen.device, **arguments),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        dtype=dtype,
    )


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


def default(value: float | None, otherwise: float) -> float:
    """What was given, or else the other."""
    return otherwise if value is None else value


_PAIRS, _MODEL, _TRAINING = "Pairs", "New model (without --init)", "Training"


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write: the model and accuracy.json.")],
    model: ModelOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    call: CallOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = "auto",
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Of the rollouts that it shall judge.")] = 6,
    guidance_scale: Annotated[float, typer.Option(help="Of those rollouts; 1 is without guidance.")] = 1.0,
    negative_prompt: NegativeOption = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt file to draw images of.", rich_help_panel=_PAIRS)] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="Prompt file for the accuracy; default a tenth of the prompts.", rich_help_panel=_PAIRS),
    ] = None,
    reward: Annotated[
        str, typer.Option(help="What says which image is better.", rich_help_panel=_PAIRS)
    ] = "composition",
    reward_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Option of the reward; may be repeated.", rich_help_panel=_PAIRS),
    ] = None,
    min_difference: Annotated[
        float, typer.Option(min=0, help="Of the rewards of a pair; what differs less is a tie.", rich_help_panel=_PAIRS)
    ] = 0.05,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many to train on.", rich_help_panel=_PAIRS)] = 3000,
    num_held_out: Annotated[int, typer.Option(min=1, help="How many for the accuracy.", rich_help_panel=_PAIRS)] = 264,
    images_per_prompt: Annotated[int, typer.Option(min=2, help="Of each prompt.", rich_help_panel=_PAIRS)] = 6,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Pairs from people instead: Pick-a-Pic's columns in JSON lines.", rich_help_panel=_PAIRS),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="CLIP checkpoint to begin with, such as PickScore_v1; for real use.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels; default the pipeline's, at most 64.", rich_help_panel=_MODEL)
    ] = None,
    patch_size: Annotated[int, typer.Option(min=1, help="Pixels of a token.", rich_help_panel=_MODEL)] = 8,
    tower_width: Annotated[int, typer.Option(min=32, help="Of the vision tower.", rich_help_panel=_MODEL)] = 128,
    num_blocks: Annotated[int, typer.Option(min=1, help="Of the vision tower.", rich_help_panel=_MODEL)] = 4,
    projection: Annotated[int, typer.Option(min=1, help="Width of the joint space.", rich_help_panel=_MODEL)] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser updates.", rich_help_panel=_TRAINING)] = 700,
    prompts_per_step: Annotated[int, typer.Option(min=1, help="Groups (pairs).", rich_help_panel=_TRAINING)] = 32,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default 1.5e-3, with --init 3e-6.", rich_help_panel=_TRAINING)
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, help="Default .05, with --init .3.", rich_help_panel=_TRAINING)
    ] = None,
    contrastive: Annotated[
        float | None,
        typer.Option(
            min=0, help="First weight of CLIP's loss, falls to 0; default 3, with --init 0.", rich_help_panel=_TRAINING
        ),
    ] = None,
    clean_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the groups, shown without noise.", rich_help_panel=_TRAINING)
    ] = 0.15,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a pass without gradient.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
) -> None:
    """Train a step-aware preference model and print its accuracy by noise level."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    began = time.perf_counter()
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder")
    if (prompts is None) == (pairs is None):
        raise ValueError("give a prompt file with --prompts, or pairs from people with --pairs")
    torch.manual_seed(seed)
    chosen = choose(model=model, height=height, width=width, call=call, dtype=dtype, device=device)
    base = load_base(chosen, num_inference_steps, guidance_scale, negative_prompt)
    new = {"image_size": image_size, "patch_size": patch_size, "width": tower_width, "num_blocks": num_blocks}
    scorer = pretrained_model(init) if init else new_model(base, **new, projection=projection)
    scorer.to(chosen.device)
    if pairs is not None:
        rewards = None
        trained, tested = split_pairs(read_pairs(pairs, base), seed)
    else:
        rewards = RewardSet([(reward, load_reward(reward, **parse_overrides(reward_option or [])), 1.0)])
        trained, tested = draw_pairs(
            base,
            split_prompts(
                read_prompts(prompts or ""),
                read_prompts(held_out) if held_out else None,
                num_train=num_prompts,
                num_held_out=num_held_out,
                seed=seed,
            ),
            rewards,
            group_size=images_per_prompt,
            batch_size=batch_size,
            min_difference=min_difference,
            seed=seed,
        )
    console.print(f"{describe(trained)} for training, {describe(tested)} for the accuracy")

    def loss(step: int) -> tuple[Tensor, float]:
        generator = torch.Generator().manual_seed(mix(seed, STEP, step))
        rows = torch.randint(len(trained), (prompts_per_step,), generator=generator).tolist()
        share = default(contrastive, 0.0 if init else 3.0) * (1 - step / steps)
        groups = [trained[row] for row in rows]
        return step_loss(scorer, base, groups, clean_share=clean_share, contrastive=share, generator=generator)

    scorers = {"before": model_scorer(scorer)}
    console.print(f"training takes about {expected_minutes(scorer, loss, steps):.1f} minutes")
    train(
        scorer,
        loss,
        steps=steps,
        learning_rate=default(learning_rate, 3e-6 if init else 1.5e-3),
        weight_decay=default(weight_decay, 0.3 if init else 0.05),
        warmup_steps=steps // 10,
    )
    scorers["after"] = model_scorer(scorer)
    if rewards is not None:
        scorers["the reward"] = reward_scorer(rewards)
    table = accuracy_by_level(base, tested, scorers, seed=seed, batch_size=batch_size)
    scorer.save(out)
    report = {"minutes": (time.perf_counter() - began) / 60, "accuracy": table, "settings": settings}
    (out / "accuracy.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    show_table(table, f"pairs of held-out prompts in the right order; {report['minutes']:.1f} minutes in all")


if __name__ == "__main__":
    run = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    run.command(help=__doc__)(main)
    try:
        run()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
