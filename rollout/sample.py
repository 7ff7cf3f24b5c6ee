"""The denoising loop: from initial noise to final latents, stochastic where the plan says so.

Letters: B samples, K stored transitions, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flowsteer.rollout import kernels
from flowsteer.rollout.noise import initial_noise, stream_noise
from flowsteer.rollout.pipeline import Pipeline
from flowsteer.rollout.solvers import SOLVERS
from flowsteer.rollout.types import Trajectory


@torch.no_grad()
def sample(
    pipeline: Pipeline,
    conditioning: Any,
    *,
    seeds: Tensor,
    noise_levels: Sequence[float],
    kernel: str = "flow_sde",
    log_prob_weight: Literal["gaussian", "variance"] = "gaussian",
    solver: str = "euler",
    initial_seeds: Tensor | None = None,
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
        noise_levels: one per denoising step, 0 where the step is deterministic.
        kernel: of the stochastic steps.
        log_prob_weight: convention of the stored log density, see `kernels.log_prob`.
        solver: of the deterministic steps.
        dtype: storage type of the latents.
        device: where they live.

    Returns:
        The final latents [B, *X] and the stochastic transitions, None if there were none.
    """
    schedule, shape = conditioning.schedule, conditioning.latent_shape
    start = next((i for i, level in enumerate(noise_levels) if level > 0), len(noise_levels))
    first, rows = _distinct(seeds if initial_seeds is None else initial_seeds)
    shares = initial_seeds is not None and len(first) < len(seeds) and start > 0
    initial_seeds = seeds if initial_seeds is None else initial_seeds
    prefix = conditioning.take(first) if shares else conditioning
    latents = initial_noise(initial_seeds[first] if shares else initial_seeds, shape)
    latents = latents.to(device, dtype)

    history = None
    stored: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for index, noise_level in enumerate(noise_levels):
        if shares and index == start:  # the samples of a group part here
            latents, prefix = latents[rows], conditioning
        velocity = pipeline.velocity(latents, index, prefix)
        if noise_level > 0:
            gaussian = kernels.KERNELS[kernel](velocity, latents, schedule, index, noise_level)
            noise = stream_noise(seeds, index, shape).to(device)
            next_latents = kernels.draw(gaussian, noise, dtype)
            log_prob = kernels.log_prob(gaussian, next_latents, weight=log_prob_weight)
            stored.append((index, latents, next_latents, log_prob))
            history = None  # a multistep solver starts afresh after noise
        else:
            stepped, history = SOLVERS[solver](velocity, latents, schedule, index, history)
            next_latents = stepped.to(dtype)
        latents = pipeline.advance(latents, next_latents, index, prefix)
    if shares and start == len(noise_levels):
        latents = latents[rows]
    return latents, _trajectory(stored, noise_levels)


def _distinct(seeds: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each distinct seed in order of appearance [P], and each row's place among them [B]."""
    places: dict[int, int] = {}
    rows = [places.setdefault(seed, len(places)) for seed in seeds.tolist()]
    first = [rows.index(place) for place in range(len(places))]
    return torch.tensor(first), torch.tensor(rows)


def _trajectory(stored: list[tuple[int, Tensor, Tensor, Tensor]], noise_levels: Sequence[float]) -> Trajectory | None:
    if not stored:
        return None
    indices, latents, next_latents, log_probs = zip(*stored)
    return Trajectory(
        indices=indices,
        noise_levels=tuple(noise_levels[index] for index in indices),
        latents=torch.stack(latents, dim=1),
        next_latents=torch.stack(next_latents, dim=1),
        log_prob=torch.stack(log_probs, dim=1),
    )
