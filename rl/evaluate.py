"""How good a policy is: fixed prompts, fixed seeds, the deterministic sampler.

Letters: P prompts, S noise seeds of each.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.hosts.inprocess import Scorer, collect
from flowsteer.rewards.pixels import to_uint8
from flowsteer.rewards.types import Scores
from flowsteer.rl.intervals import Estimate, estimate, mean_and_interval
from flowsteer.rl.metrics import all_names
from flowsteer.rl.sounds import envelopes
from flowsteer.rl.thumbnails import RATE, thumbnails
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.pipeline import Pipeline, UnlikeConditioning
from flowsteer.rollout.lifting.several import Prepared
from flowsteer.rollout.sample import prepare_ahead, prepare_rows, sample

logger = logging.getLogger(__name__)

_AHEAD = 64  # prompts that are encoded together; an evaluation may have too many to hold all of their encodings


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of every prompt and seed, and pictures of the first seed, as `flowsteer.rl.thumbnails` makes them small."""

    prompts: tuple[str, ...]  # P
    parts: dict[str, Tensor]  # name -> [P, S] float32, NaN where missing; "total" is the weighted sum
    images: Tensor  # uint8 [P, 3, H, W] or [P, T, 3, H, W], of the first seed, small; none but on the main process
    frame_rate: float | None = None  # of these videos, in frames a second, where the pipeline has one
    ranges: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # name -> lowest and highest score, where known

    def summary(self) -> dict[str, Estimate]:
        """Name -> mean and 95 % interval over prompts, see `flowsteer.rl.intervals`."""
        return {name: estimate(values, self.ranges.get(name)) for name, values in self.parts.items()}

    def table(self) -> dict[str, Any]:
        """What is kept as JSON: ``summary``, ``prompts`` [P], and ``scores``, name -> [P][S], null where missing."""
        return {
            "summary": {name: own.table() for name, own in self.summary().items()},
            "prompts": list(self.prompts),
            "scores": {
                name: [[None if math.isnan(score) else score for score in row] for row in values.tolist()]
                for name, values in self.parts.items()
            },
        }


@torch.no_grad()
def evaluate(
    pipeline: Pipeline,
    prompts: Prompts,
    rewards: RewardSet,
    *,
    num_prompts: int,
    num_seeds: int,
    num_inference_steps: int,
    guidance_scale: float,
    negative_prompt: str | None = None,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    process_index: int = 0,
    num_processes: int = 1,
    timeout_s: float | None = None,
    gather: Callable[[Tensor], Tensor] = lambda values: values,
    to_main: Callable[[Tensor], Tensor | None] = lambda values: values,
    progress: Callable[[int], object] = lambda done: None,
) -> Evaluation:
    """Draw ``num_prompts`` prompts, spread evenly over the file, with the seeds 0 .. num_seeds - 1, and score them.

    Seed s of prompt p is ``num_seeds * p + s``, or s more than the row's own seed. It is given to
    ``torch.Generator().manual_seed``: plain diffusers draws the same pictures, but for pipelines that pack their latents
    (FLUX, Qwen-Image), which draw before they pack. Scores that are not there ``timeout_s`` seconds after the last picture
    are missing.

    Processes share the prompts. Each gets all scores (``gather``), and the main one thumbnails of the first seed
    (``to_main``); whole pictures stay where they were drawn, until they have been scored. Under ZeRO-3 all must make
    as many network passes: where prompts of one cannot share a batch, all take their prompts one by one.
    """
    count = min(num_prompts, len(prompts))
    chosen = [place * len(prompts) // count for place in range(count)]
    mine = list(range(count))[process_index::num_processes]
    mine += [0] * (math.ceil(count / num_processes) - len(mine))  # equal work, equal collectives
    together = max(batch_size // num_seeds, 1)  # prompts: a reward that compares sees all pictures of each
    ahead = math.ceil(_AHEAD / together) * together
    settings: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }

    drawing = _Drawing(
        pipeline=pipeline,
        prompts=prompts,
        chosen=chosen,
        num_seeds=num_seeds,
        batch_size=batch_size,
        prepared=settings,
        dtype=dtype,
        device=device,
        gather=gather,
    )
    pending, thumbs, jobs, step = [], [], [], 1
    with Scorer(rewards) as scorer:
        for start in range(0, len(mine), together):
            if start % ahead == 0:
                prepare_ahead(pipeline, [prompts.row(chosen[p]) for p in mine[start : start + ahead]], **settings)
            own = [(p, s) for p in mine[start : start + together] for s in range(num_seeds)]
            images = drawing.draw(own)
            extra, shown = (
                {name: [values[chosen[p]] for p, _ in own] for name, values in all_.items()}
                for all_ in (prompts.columns, prompts.pictures)
            )
            texts = [prompts.texts[chosen[p]] for p, _ in own]
            pending.append(scorer.submit(images, texts, extra, group=[p for p, _ in own], pictures=shown))
            small, step = thumbnails(images[::num_seeds])
            thumbs.append(small)
            jobs += own
            progress(len(jobs))
        results = collect(pending, timeout_s)
    _warn_of_missing(results, len(jobs))
    order = gather(torch.tensor([num_seeds * p + s for p, s in jobs]))
    names, table = _gathered(results, gather)
    whole = torch.full((count * num_seeds, len(names)), float("nan"))
    whole[order] = table
    return Evaluation(
        prompts=tuple(prompts.texts[row] for row in chosen),
        parts={name: whole[:, column].view(count, num_seeds) for column, name in enumerate(names)},
        images=_collected(thumbs, gather(torch.tensor(mine)), to_main),
        frame_rate=rewards.frame_rate if step == 1 else (rewards.frame_rate or RATE) / step,
        ranges={name: known for name in names if (known := rewards.range_of(name)) is not None},
    )


Job = tuple[int, int]  # prompt, seed


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """Draws pictures of an evaluation; the fields are arguments of `evaluate`, ``prepared`` those of ``prepare``."""

    pipeline: Pipeline
    prompts: Prompts
    chosen: Sequence[int]  # P, rows of the prompt file
    num_seeds: int
    batch_size: int
    prepared: dict[str, Any]
    dtype: torch.dtype
    device: torch.device | str
    gather: Callable[[Tensor], Tensor]

    def draw(self, own: Sequence[Job]) -> Tensor:
        """Pictures [B, 3, H, W] of whole prompts, each with all its seeds, in batches that the network takes."""
        images = []
        for first in range(0, len(own), self.batch_size):
            places = range(first, min(first + self.batch_size, len(own)))
            batch = [own[place] for place in places]
            rows = self._rows_together(batch)
            unlike = self.gather(torch.tensor([int(rows is None)]))  # by process
            if rows is None or unlike.any():  # one splits, so all do, for as many network passes
                by_prompt = itertools.groupby(places, key=lambda place: place // self.num_seeds)
                parts = [[own[place] for place in same] for _, same in by_prompt]
                images += [self._pictures(part, self._rows(part)) for part in parts]
            else:
                images.append(self._pictures(batch, rows))
        return torch.cat(images)

    def _rows_together(self, batch: Sequence[Job]) -> Prepared | None:
        """None where a model that does not pad cannot take these prompts in one batch, but each of them alone."""
        try:
            return self._rows(batch)
        except UnlikeConditioning:
            if len({p for p, _ in batch}) == 1:
                raise
            return None

    def _rows(self, batch: Sequence[Job]) -> Prepared:
        return prepare_rows(self.pipeline, [self.prompts.row(self.chosen[p]) for p, _ in batch], **self.prepared)

    def _pictures(self, batch: Sequence[Job], rows: Prepared) -> Tensor:
        firsts = [self.prompts.seed(self.chosen[p]) for p, _ in batch]
        seeds = [self.num_seeds * p + s if first is None else first + s for first, (p, s) in zip(firsts, batch)]
        latents, _ = sample(
            self.pipeline,
            rows,
            seeds=torch.tensor(seeds),
            noise_levels=[0.0] * rows.schedule.num_steps,
            dtype=self.dtype,
            device=self.device,
        )
        return self.pipeline.decode(latents, rows).float().cpu()


def _collected(thumbs: Sequence[Tensor], order: Tensor, to_main: Callable[[Tensor], Tensor | None]) -> Tensor:
    """The pictures of all processes by prompt [P, ...] on the main process, of which one batch travels at a time; else none."""
    received = [to_main(own) for own in thumbs]
    pieces = [own for own in received if own is not None]
    if not pieces:
        return thumbs[0][:0]
    processes = len(order) // sum(map(len, thumbs))
    by_process = [own.unflatten(0, (processes, -1)) for own in pieces]  # [processes, prompts of a batch, ...]
    images = torch.cat(by_process, dim=1).flatten(0, 1)  # as `order` has them
    whole = torch.empty((int(order.max()) + 1, *images.shape[1:]), dtype=torch.uint8)
    whole[order] = images
    return whole


def _warn_of_missing(results: Sequence[Scores], pictures: int) -> None:
    reasons = [reason for scores in results for reason in scores.failures.values()]
    if reasons:
        common = max(set(reasons), key=reasons.count)
        logger.warning("%d of %d pictures have no score; the most frequent reason: %s", len(reasons), pictures, common)


def _gathered(results: Sequence[Scores], gather: Callable[[Tensor], Tensor]) -> tuple[list[str], Tensor]:
    """The names of the total and of all parts, and their scores [pictures of all processes, names]."""
    scored = [{"total": scores.total, **scores.parts} for scores in results]  # for each batch, name -> [B]
    names = all_names({name for batch in scored for name in batch}, gather)
    columns = [
        torch.cat([batch.get(name, torch.full_like(batch["total"], math.nan)) for batch in scored]) for name in names
    ]
    return names, gather(torch.stack(columns, dim=1))


def image_grid(rows: Sequence[Tensor], *, scale: int = 1, columns: int = 12) -> Image.Image:
    """Pictures side by side: each of ``rows`` [P, 3, H, W], in [0, 1] or uint8, is drawn in lines of ``columns``, one set below
    another.

    With two sets (before and after) the lines alternate, so that a picture stands above its successor.
    """
    count, _, height, width = rows[0].shape[0], *rows[0].shape[1:]
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    sheet = np.full((lines * len(rows) * (height + 2), columns * (width + 2), 3), 255, dtype=np.uint8)
    for kind, images in enumerate(rows):
        levels = images if images.dtype == torch.uint8 else (images.clamp(0, 1) * 255).round().byte()
        pixels = levels.permute(0, 2, 3, 1).numpy()
        for place, picture in enumerate(pixels):
            top = ((place // columns) * len(rows) + kind) * (height + 2)
            left = (place % columns) * (width + 2)
            sheet[top : top + height, left : left + width] = picture
    grid = Image.fromarray(sheet)
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def save_grid(images: Tensor, path: Path, *, columns: int = 12) -> None:
    """Write a sheet of pictures as PNG, small ones enlarged; of videos the first frames (`films.save_film_grid`: all), of
    sound its loudness over time.
    """
    first_frames = envelopes(images) if images.dim() == 3 else images[:, 0] if images.dim() == 5 else images
    image_grid([first_frames], scale=max(1, 128 // first_frames.shape[-1]), columns=columns).save(path)


def save_files(images: Tensor, prompts: Sequence[str], folder: Path) -> None:
    """Write each picture as a PNG and a ``metadata.jsonl`` with their prompts into a new folder; of videos the first frames."""
    folder.mkdir()
    lines = []
    for number, (picture, prompt) in enumerate(zip(to_uint8(images[:, 0] if images.dim() == 5 else images), prompts)):
        name = f"{number:04d}.png"
        Image.fromarray(picture).save(folder / name)
        lines.append(json.dumps({"file_name": name, "prompt": prompt}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


__all__ = ["Evaluation", "evaluate", "image_grid", "mean_and_interval", "save_files", "save_grid"]
