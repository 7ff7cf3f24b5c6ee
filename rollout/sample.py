"""The denoising loop: from initial noise to final latents, stochastic where the plan says so.

Letters: B samples, S states, P distinct rows, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flowsteer.rollout.data.prompts import Row
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.several import Prepared
from flowsteer.rollout.steps import kernels
from flowsteer.rollout.steps.noise import initial_noise, stream_noise
from flowsteer.rollout.steps.solvers import SOLVERS, remember
from flowsteer.rollout.types import SharedStates, Trajectory


def prepare_rows(pipeline: Pipeline, rows: Sequence[Row], **settings: Any) -> Prepared:
    """Prepared for rows of prompts, in their order; equal ones are prepared once. ``settings`` are those of ``prepare``."""
    distinct = list(dict.fromkeys(rows))
    if any(row.inputs for row in distinct):
        settings["inputs"] = [dict(row.inputs) for row in distinct]
    prepared = pipeline.prepare([row.text for row in distinct], **settings)
    return prepared.take([distinct.index(row) for row in rows])


def prepare_ahead(pipeline: Pipeline, rows: Sequence[Row], **settings: Any) -> None:
    """Let the pipeline encode all these rows together, before batches of them are asked for; an adapter does as it likes."""
    if isinstance(pipeline, FlowPipeline):
        pipeline.prepare_ahead(rows, **settings)


@torch.no_grad()
def sample(
    pipeline: Pipeline,
    conditioning: Prepared,
    *,
    seeds: Tensor,
    noise_levels: Sequence[float],
    path: Sequence[int] | None = None,
    kernel: str = "flow_sde",
    log_prob_weight: Literal["gaussian", "variance"] = "gaussian",
    solver: str = "euler",
    initial_seeds: Tensor | None = None,
    groups: Tensor | None = None,
    keep_mean: bool = False,
    training_graph: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Trajectory | None]:
    """Draw one sample per row of the conditioning.

    Args:
        pipeline: what predicts the velocity.
        conditioning: B rows.
        seeds: [B], of each sample's noise.
        initial_seeds: [B], where they differ from ``seeds``: row b starts from ``randn`` of a generator with that seed, as
            diffusers does. Rows with equal ones (a group with shared noise) are one sample until the first stochastic step
            and are computed once until then; they must have the same conditioning.
        groups: [B], where rows with equal ``initial_seeds`` may have another conditioning: rows of different groups are
            never merged.
        noise_levels: one per denoising step, 0 where the step is deterministic.
        path: the denoising indices to visit, increasing, all of them unless given. Deterministic steps lead from one to the
            next, however far that is; a stochastic step leads to the next index.
        kernel: of the stochastic steps.
        log_prob_weight: convention of the stored log density, see `kernels.log_prob`.
        solver: of the deterministic steps. A multistep one also remembers what stochastic steps predicted (MixGRPO-Flash).
        keep_mean: store the kernel's means, too.
        training_graph: predict stochastic steps with gradients enabled, as training does, and drop the graph. A compiled
            network rounds differently without.
        dtype: storage type of the latents.
        device: where they live.

    Returns:
        The final latents [B, *X] and the stochastic transitions, None if there were none.
    """
    schedule, shape = conditioning.schedule, conditioning.latent_shape
    if len(noise_levels) != schedule.num_steps:
        raise ValueError(
            f"{len(noise_levels)} noise levels for rows that take {schedule.num_steps} denoising steps; all rows of a run "
            "must take as many"
        )
    start = next((i for i, level in enumerate(noise_levels) if level > 0), len(noise_levels))
    first, rows = distinct(seeds if initial_seeds is None else initial_seeds, groups)
    shares = initial_seeds is not None and len(first) < len(seeds) and start > 0
    initial_seeds = seeds if initial_seeds is None else initial_seeds
    noise = initial_noise(initial_seeds[first], shape).to(device, dtype)  # [P, *X]
    if shares:
        latents, prefix = conditioning.take(first).start(noise)
        _, conditioning = conditioning.start(noise[rows])
    else:
        latents, conditioning = conditioning.start(noise[rows])
        prefix = conditioning

    path = range(schedule.num_steps) if path is None else path
    walk = schedule.along(path)
    history = None
    stored: list[Transition] = []
    for place, index in enumerate(path):
        if shares and index == start:  # the samples of a group part here
            latents, prefix, history, shares = latents[rows], conditioning, None, False
        with torch.set_grad_enabled(training_graph and noise_levels[index] > 0):
            step = pipeline.begin(latents, index, prefix)
        velocity = step.velocity.detach()
        if noise_levels[index] > 0:
            gaussian = kernels.KERNELS[kernel](velocity, latents, schedule, index, noise_levels[index])
            next_latents = kernels.draw(gaussian, stream_noise(seeds, index, shape).to(device), dtype)
            log_prob = kernels.log_prob(gaussian, next_latents, weight=log_prob_weight)
            mean = gaussian.mean if keep_mean else None
            stored.append(Transition(index, noise_levels[index], latents, next_latents, log_prob, mean))
            history = remember(velocity, latents, schedule, index)
        else:
            stepped, history = SOLVERS[solver](velocity, latents, walk, place, history)
            next_latents = stepped.to(dtype)
        latents = step.finish(next_latents)
        del step  # and with it the activations of a training graph
    if shares:
        latents = latents[rows]
    return latents, trajectory_of(stored) if stored else None


class Transition(NamedTuple):
    """One stochastic step of a batch."""

    index: int
    noise_level: float
    latents: Tensor  # [S, *X]
    next_latents: Tensor  # [B, *X]
    log_prob: Tensor  # [B]
    mean: Tensor | None  # [B, *X]


def trajectory_of(stored: Sequence[Transition], shared: SharedStates | None = None) -> Trajectory:
    """The transitions of a batch, in order."""
    indices, noise_levels, latents, next_latents, log_probs, means = zip(*stored)
    return Trajectory(
        indices=indices,
        noise_levels=noise_levels,
        latents=torch.stack(latents, dim=1),
        next_latents=torch.stack(next_latents, dim=1),
        log_prob=torch.stack(log_probs, dim=1),
        mean=None if means[0] is None else torch.stack(means, dim=1),
        shared=shared,
    )


def distinct(seeds: Tensor, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first row of each distinct seed (in each group) in order of appearance [P], and each row's place among them [B]."""
    places: dict[tuple[int, int], int] = {}
    keys = zip(seeds.tolist(), [0] * len(seeds) if groups is None else groups.tolist(), strict=True)
    rows = [places.setdefault(key, len(places)) for key in keys]
    first = [rows.index(place) for place in range(len(places))]
    return torch.tensor(first), torch.tensor(rows)
