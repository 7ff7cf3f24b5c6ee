"""What algorithms that learn on the forward process have in common: the final latents are noised again.

They need no likelihood, so any solver may draw the rollouts. Training happens at the sampler's own noise levels, because a
lifted pipeline is asked by denoising index; published codes that draw levels from a continuum differ there.

Letters: B samples, R of them that take part in a loss, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from flowsteer.rl.types import AlgorithmSettings, Comparison, PolicyView, schedule_of
from flowsteer.rollout.noise import mix, stream_noise
from flowsteer.rollout.types import Rollout, Schedule, flat_mean

_NOISE_STREAM = 1 << 20  # apart from the sampler's streams, which are denoising indices


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """One noise level of one rollout batch."""

    rollout: Rollout
    comparison: Comparison
    index: int
    noise_seeds: Tensor  # [R] int64: samples with equal ones get the same noise

    rows: Tensor | None = None  # [R] int64, the rollout's samples that take part; None: all, R = B

    @property
    def schedule(self) -> Schedule:
        """Of the rollout."""
        return schedule_of(self.rollout)

    @property
    def conditioning(self) -> Any:
        """R rows."""
        return self.rollout.conditioning if self.rows is None else self.rollout.conditioning.take(self.rows)

    def of_rows(self, rows: Tensor, *, noise_from: Tensor) -> ForwardBatch:
        """Only these samples [R], each with the noise of the sample ``noise_from`` [R]."""
        return replace(self, rows=rows, noise_seeds=self.rollout.seeds[noise_from])

    def noised(self) -> tuple[Tensor, Tensor]:
        """The final latents noised to the batch's level [R, *X], and the model's target there [R, *X] float32."""
        schedule, clean = self.schedule, self.rollout.latents
        clean = clean if self.rows is None else clean[self.rows]
        sigma, alpha = float(schedule.sigma[self.index]), float(schedule.alpha[self.index])
        noise = stream_noise(self.noise_seeds, _NOISE_STREAM + self.index, clean.shape[1:]).to(clean.device)
        noised = (alpha * clean.float() + sigma * noise).to(clean.dtype)
        if schedule.prediction == "epsilon":
            return noised, noise
        if schedule.prediction == "v_prediction":  # arXiv 2202.00512, appendix D
            return noised, alpha * noise - sigma * clean.float()
        return noised, noise - clean.float()


class NoiseLevels:
    """Which of the sampler's noise levels a training step uses.

    Args:
        num_inference_steps: T, denoising steps of the rollout's schedule.
        count: noise levels of each rollout batch.
        first, end: the range of denoising indices, ``first <= index < end``; ``end`` None leaves out the last step.
        seed: of the choice.
        common: all batches of a step get the same ones.

    Raises:
        ValueError: the range holds fewer noise levels than ``count``.
    """

    def __init__(
        self,
        num_inference_steps: int,
        *,
        count: int,
        first: int = 0,
        end: int | None = None,
        seed: int,
        common: bool = False,
    ) -> None:
        end = max(num_inference_steps - 1, 1) if end is None else end
        if not 0 <= first < end <= num_inference_steps:
            raise ValueError(
                f"noise levels {first} to {end - 1} are not among the {num_inference_steps} of the schedule; set "
                "algorithm.first_level and algorithm.end_level (exclusive) within them"
            )
        if count > end - first:
            raise ValueError(
                f"algorithm.noise_levels_per_sample={count}, but {end - first} noise levels are there to train at (indices "
                f"{first} to {end - 1} of {num_inference_steps}); take at most as many"
            )
        self.count, self.first, self.end, self.seed, self.common = count, first, end, seed, common

    def spread(self, step: int, sample: int | None = None) -> list[int]:
        """``count`` different indices, uniformly, for the batch that begins with a sample; None: for all of the step."""
        generator = self._generator(step, sample)
        return [self.first + int(place) for place in generator.permutation(self.end - self.first)[: self.count]]

    def stratified(self, step: int, sample: int | None = None) -> list[int]:
        """``count`` indices, one from each of as many equal strata (AWM)."""
        generator = self._generator(step, sample)
        edges = np.linspace(self.first, self.end, self.count + 1).astype(int)
        return [int(generator.integers(low, high)) for low, high in pairwise(edges)]

    def _generator(self, step: int, sample: int | None) -> np.random.Generator:
        return np.random.default_rng(mix(self.seed, step, *([] if sample is None or self.common else [sample])))


class ForwardSettings(AlgorithmSettings):
    """What the configurations of forward-process algorithms have."""

    noise_levels_per_sample: PositiveInt = 1
    """How many of the sampler's noise levels each rollout batch is trained at."""
    first_level: Annotated[int, Field(ge=0)] = 0
    end_level: PositiveInt | None = None
    """Denoising indices to train at, ``first_level <= index < end_level``; null leaves out the last one."""


def forward_batches(
    rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], indices: Sequence[Sequence[int]]
) -> Iterator[ForwardBatch]:
    """Every rollout batch at its own noise levels, each sample with noise of its own."""
    for rollout, comparison, own in zip(rollouts, comparisons, indices):
        for index in own:
            yield ForwardBatch(rollout=rollout, comparison=comparison, index=index, noise_seeds=rollout.seeds)


def matching_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The squared error of a prediction, as the mean over the latent: [B, *X] -> [B]."""
    return flat_mean((prediction.float() - target) ** 2)


@torch.no_grad()
def prediction_of(policy: PolicyView, name: str, noised: Tensor, batch: ForwardBatch) -> Tensor:
    """What another policy predicts, [B, *X] float32, without a gradient."""
    with policy.using(name):
        return policy.velocity(noised, batch.index, batch.conditioning).float()
