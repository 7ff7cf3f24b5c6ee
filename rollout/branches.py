"""Pools of candidates: the samples of a group part at one denoising step only, and that step alone is judged.

A trunk leads through the schedule, one state per group. At each stochastic step of the plan the group leaves the trunk's state
as a pool of candidates, and each pool is finished and scored by itself, so every step has rewards of its own:

- G2RPO (arXiv 2510.01982): the trunk is deterministic (an anchor), candidates are led deterministically to the end, at
  several granularities;
- step-aware preference optimisation, SPO (arXiv 2406.04314): the trunk goes on from a random candidate, which keeps its states
  on-policy, and candidates are judged by the clean image that the model predicts from them.

Letters: B samples, S groups (states of the trunk), X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.several import Prepared
from flowsteer.rollout.sample import Transition, distinct, trajectory_of
from flowsteer.rollout.steps import kernels
from flowsteer.rollout.steps.kernels import LogProbWeight
from flowsteer.rollout.steps.noise import initial_noise, mix, stream_noise
from flowsteer.rollout.steps.plan import strided_path
from flowsteer.rollout.steps.solvers import SOLVERS, History, remember
from flowsteer.rollout.types import SharedStates, Trajectory

_CHOICE_STREAM = 1 << 21  # apart from the denoising indices, which number the streams of noise


@dataclass(frozen=True, kw_only=True)
class Branching:
    """How groups branch at the stochastic steps of a plan.

    Raises:
        ValueError: granularities that are no granularities, or several of them where nothing is led to the end.
    """

    trunk: Literal["deterministic", "resampled"] = "deterministic"
    """``resampled``: the trunk goes on from one of the candidates, drawn at random."""
    finish: Literal["deterministic", "denoised"] = "deterministic"
    """``deterministic``: candidates are led to the end. ``denoised``: the clean latents that the model predicts from them."""
    granularities: tuple[int, ...] = (1,)
    """How many denoising steps are taken in one on the way to the end; each gives a finished sample of its own."""
    first: int = 0
    """Stochastic steps before this one have no pool: the trunk draws them once."""

    def __post_init__(self) -> None:
        if (
            not self.granularities
            or min(self.granularities) < 1
            or len({*self.granularities}) < len(self.granularities)
        ):
            raise ValueError(f"granularities are different numbers of 1 or more, got {list(self.granularities)}")
        if self.finish == "denoised" and self.granularities != (1,):
            raise ValueError("with finish=denoised nothing is led to the end; leave granularities out")


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A pool, finished in one way."""

    latents: Tensor  # [B, *X], finished
    trajectory: Trajectory  # one transition; the same object for every way in which a pool is finished
    sigma: float  # the noise level at which the finished latents were predicted, 0 at the end


@torch.no_grad()
def sample_branches(
    pipeline: Pipeline,
    conditioning: Prepared,
    branching: Branching,
    *,
    seeds: Tensor,
    initial_seeds: Tensor,
    groups: Tensor | None = None,
    trunk_seeds: Tensor | None = None,
    noise_levels: tuple[float, ...],
    kernel: str = "flow_sde",
    log_prob_weight: LogProbWeight = "gaussian",
    solver: str = "euler",
    keep_mean: bool = False,
    training_graph: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[Branch]:
    """Draw the pools of every stochastic step, in the order of the steps and, within each, of the granularities.

    ``conditioning`` has B rows, equal ones within a group; ``seeds`` [B] are of each candidate's noise, ``initial_seeds``
    [B] of each group's initial noise: equal ones make the group, unless ``groups`` [B] says that they are
    of different ones. ``trunk_seeds`` [B] are of the trunk's further noise and choices, where they differ from
    ``initial_seeds``. ``noise_levels`` has one entry per denoising step, 0 where the step is deterministic. The other
    arguments are those of `sample`.
    """
    schedule, shape = conditioning.schedule, conditioning.latent_shape
    first, state = distinct(initial_seeds, groups)
    trunk_seeds = (initial_seeds if trunk_seeds is None else trunk_seeds)[first]
    noise = initial_noise(initial_seeds[first], shape).to(device, dtype)  # [S, *X]
    latents, trunk = conditioning.take(first).start(noise)
    _, conditioning = conditioning.start(noise[state])
    shared = SharedStates(conditioning=trunk, state=state)
    history = None
    for index, level in enumerate(noise_levels):
        with torch.set_grad_enabled(training_graph and level > 0):
            step = pipeline.begin(latents, index, trunk)
        velocity = step.velocity.detach()
        following, history = SOLVERS[solver](velocity, latents, schedule, index, history)
        if level > 0:
            gaussian = kernels.KERNELS[kernel](velocity, latents, schedule, index, level)
        if level > 0 and index < branching.first:
            following = kernels.draw(gaussian, stream_noise(trunk_seeds, index, shape).to(device), dtype)
        elif level > 0:
            pool = replace(gaussian, mean=gaussian.mean[state])  # [B, *X]
            candidates = kernels.draw(pool, stream_noise(seeds, index, shape).to(device), dtype)
            log_prob = kernels.log_prob(pool, candidates, weight=log_prob_weight)
            mean = pool.mean if keep_mean else None
            trajectory = trajectory_of([Transition(index, level, latents, candidates, log_prob, mean)], shared)
            before = remember(velocity, latents, schedule, index)
            before = replace(before, denoised=before.denoised[state])
            yield from _finished(pipeline, conditioning, branching, trajectory, solver, before)
            if branching.trunk == "resampled":
                following = candidates[_choices(trunk_seeds, state, index)]
        latents = step.finish(following.to(dtype))
        del step  # and with it the activations of a training graph


def _finished(
    pipeline: Pipeline,
    conditioning: Prepared,
    branching: Branching,
    trajectory: Trajectory,
    solver: str,
    before: History,
) -> Iterator[Branch]:
    """The pool of a transition, finished in every way that is asked for."""
    schedule, (index,), candidates = conditioning.schedule, trajectory.indices, trajectory.next_latents[:, 0]
    if branching.finish == "denoised" and index + 1 < schedule.num_steps:
        velocity = pipeline.begin(candidates, index + 1, conditioning).velocity
        predicted = kernels.denoised(velocity, candidates, schedule, index + 1).to(candidates.dtype)
        yield Branch(latents=predicted, trajectory=trajectory, sigma=schedule.sigma[index + 1].item())
        return
    for granularity in branching.granularities:
        path = strided_path(schedule.num_steps, index, granularity)
        walk, latents = schedule.along(path), candidates
        history: History | None = before
        for place in range(index + 1, len(path)):
            step = pipeline.begin(latents, path[place], conditioning)
            following, history = SOLVERS[solver](step.velocity, latents, walk, place, history)
            latents = step.finish(following.to(latents.dtype))
        yield Branch(latents=latents, trajectory=trajectory, sigma=0.0)


def _choices(groups: Tensor, state: Tensor, index: int) -> Tensor:
    """One candidate of each group, uniformly, by the group's seed: their rows [S]."""
    rows = [torch.nonzero(state == place).flatten().tolist() for place in range(len(groups))]
    chosen = [own[mix(seed, _CHOICE_STREAM, index) % len(own)] for seed, own in zip(groups.tolist(), rows)]
    return torch.tensor(chosen)
