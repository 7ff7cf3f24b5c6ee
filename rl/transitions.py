"""What algorithms that learn from stochastic transitions have in common.

Letters: B samples, K stored transitions, S states that samples left, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from flowsteer.rl.types import Comparison, Metrics, PolicyView, schedule_of
from flowsteer.rollout import kernels
from flowsteer.rollout.noise import mix
from flowsteer.rollout.types import Rollout, Trajectory


@dataclass(frozen=True, kw_only=True)
class TransitionBatch:
    """One stochastic step of one rollout batch."""

    rollout: Rollout
    comparison: Comparison
    transition: int  # k, the place in the trajectory

    @property
    def trajectory(self) -> Trajectory:
        """The rollout's trajectory, which a configuration for these algorithms guarantees."""
        assert self.rollout.trajectory is not None
        return self.rollout.trajectory

    @property
    def index(self) -> int:
        """The denoising index."""
        return self.trajectory.indices[self.transition]

    @property
    def next_latents(self) -> Tensor:
        """[B, *X]."""
        return self.trajectory.next_latents[:, self.transition]

    @property
    def old_log_prob(self) -> Tensor:
        """[B], under the policy that drew it."""
        return self.trajectory.log_prob[:, self.transition]


def transition_batches(
    rollouts: Sequence[Rollout],
    comparisons: Sequence[Comparison],
    *,
    step: int,
    seed: int = 0,
    each: int | None = None,
) -> Iterator[TransitionBatch]:
    """Every transition of every batch once, or ``each`` of its transitions, drawn anew for each batch and step.

    Rollouts that share their trajectory are one pool that was finished in several ways (G2RPO's granularities): their
    advantages add up.
    """
    for _, same in groupby(zip(rollouts, comparisons), key=lambda pair: id(pair[0].trajectory)):
        ways = list(same)
        rollout, comparison = ways[0]
        if len(ways) > 1:
            comparison = Comparison(
                score=torch.stack([other.score for _, other in ways]).mean(0),
                advantage=torch.stack([other.advantage for _, other in ways]).sum(0),
                weight=torch.stack([other.weight for _, other in ways]).mean(0),
            )
        assert rollout.trajectory is not None, "the configuration guarantees stochastic steps"
        count = len(rollout.trajectory.indices)
        generator = np.random.default_rng(mix(seed, step, int(rollout.sample[0])))
        chosen = range(count) if each is None else sorted(generator.permutation(count)[:each].tolist())
        for transition in chosen:
            yield TransitionBatch(rollout=rollout, comparison=comparison, transition=transition)


def gaussian(policy: PolicyView, batch: TransitionBatch, kernel: str) -> kernels.Gaussian:
    """The step under the active policy, mean [B, *X]. One network pass over the states serves all samples that left them."""
    return spread(state_gaussian(policy, batch, kernel), batch)


def state_gaussian(policy: PolicyView, batch: TransitionBatch, kernel: str) -> kernels.Gaussian:
    """The step under the active policy, mean [S, *X]: one for each state."""
    trajectory, k = batch.trajectory, batch.transition
    # contiguous as when they were drawn: strided ones take other kernels in half precision, and the ratio leaves 1
    latents = trajectory.latents[:, k].contiguous()  # [S, *X]
    shared = trajectory.shared
    conditioning = batch.rollout.conditioning if shared is None else shared.conditioning
    velocity = policy.velocity(latents, batch.index, conditioning)
    return kernels.KERNELS[kernel](
        velocity, latents, schedule_of(batch.rollout), batch.index, trajectory.noise_levels[k]
    )


def spread(of_states: kernels.Gaussian, batch: TransitionBatch) -> kernels.Gaussian:
    """From the states [S, *X] to the samples that left them [B, *X]."""
    shared = batch.trajectory.shared
    return of_states if shared is None else replace(of_states, mean=of_states.mean[shared.state])


def clipped_objective(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic clipped loss per sample, and the ratio (arXiv 1707.06347, equation 7; all [B])."""
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio


def ratio_metrics(log_ratio: Tensor, weight: Tensor, clip_range: float) -> Metrics:
    """What to report of [B] log ratios.

    ``ratio``: mean. ``ratio_deviation``: mean absolute log ratio. ``clip_fraction``: of samples beyond the clip range.
    """
    log_ratio, count = log_ratio.detach(), float(weight.sum())
    ratio = torch.exp(log_ratio)
    return {
        "ratio": ((ratio * weight).sum(), count),
        "ratio_deviation": ((log_ratio.abs() * weight).sum(), count),
        "clip_fraction": ((((ratio - 1).abs() > clip_range) * weight).sum(), count),
    }


def loss_metrics(loss: Tensor, weight: Tensor, **per_sample: Tensor) -> Metrics:
    """The batch's loss, and means over the samples that carry a comparison, of values [B]."""
    count = float(weight.sum())
    return {
        "loss": (loss.detach() * len(weight), float(len(weight))),
        **{name: ((value.detach() * weight).sum(), count) for name, value in per_sample.items()},
    }
