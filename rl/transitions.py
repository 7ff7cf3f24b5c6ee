"""What algorithms that learn from stochastic transitions have in common.

Letters: B samples, R of them that take part in a loss, K stored transitions, S states that samples left, X latent shape of one
sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from flowsteer.rl.types import Comparison, PolicyView, schedule_of
from flowsteer.rollout import kernels
from flowsteer.rollout.noise import mix
from flowsteer.rollout.types import Rollout, Trajectory


@dataclass(frozen=True, kw_only=True)
class TransitionBatch:
    """One stochastic step of one rollout batch."""

    rollout: Rollout
    comparison: Comparison
    transition: int  # k, the place in the trajectory

    rows: Tensor | None = None  # [R] int64, the rollout's samples that take part; None: all, R = B

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
        """[R, *X]."""
        latents = self.trajectory.next_latents[:, self.transition]
        return latents if self.rows is None else latents[self.rows]

    @property
    def old_log_prob(self) -> Tensor:
        """[R], under the policy that drew it."""
        log_prob = self.trajectory.log_prob[:, self.transition]
        return log_prob if self.rows is None else log_prob[self.rows]


def transition_batches(
    rollouts: Sequence[Rollout],
    comparisons: Sequence[Comparison],
    *,
    step: int,
    seed: int = 0,
    each: int | None = None,
    common: bool = False,
) -> Iterator[TransitionBatch]:
    """Every transition of every batch once, or ``each`` of its transitions, drawn for each step and batch.

    Rollouts that share their trajectory are one pool that was finished in several ways (G2RPO's granularities): their
    advantages add up. With ``common`` the draw is for all batches of a step.
    """
    for _, same in groupby(zip(rollouts, comparisons), key=lambda pair: id(pair[0].trajectory)):
        ways = list(same)
        rollout, comparison = ways[0]
        if len(ways) > 1:
            comparison = _of_all_ways([other for _, other in ways])
        assert rollout.trajectory is not None, "the configuration guarantees stochastic steps"
        count = len(rollout.trajectory.indices)
        generator = np.random.default_rng(mix(seed, step, *([] if common else [int(rollout.sample[0])])))
        chosen = range(count) if each is None else sorted(generator.permutation(count)[:each].tolist())
        for transition in chosen:
            yield TransitionBatch(rollout=rollout, comparison=comparison, transition=transition)


def _of_all_ways(ways: Sequence[Comparison]) -> Comparison:
    """One comparison of a pool that was finished in several ways: what weight times advantage comes to in all of them."""
    weights = torch.stack([comparison.weight for comparison in ways])  # [W, B], 0 where one was not compared
    advantages = torch.stack([comparison.advantage for comparison in ways])
    weight = weights.mean(0)
    return Comparison(
        score=torch.stack([comparison.score for comparison in ways]).mean(0),
        advantage=torch.where(weight > 0, (weights * advantages).sum(0) / weight.clamp(min=1e-12), 0.0),
        weight=weight,
    )


def gaussian(policy: PolicyView, batch: TransitionBatch, kernel: str) -> kernels.Gaussian:
    """The step under the active policy, mean [R, *X]. One network pass over the states serves all samples that left them."""
    of_states, shared = state_gaussian(policy, batch, kernel), batch.trajectory.shared
    if shared is None:
        return of_states
    return replace(of_states, mean=of_states.mean[shared.state if batch.rows is None else shared.state[batch.rows]])


def state_gaussian(policy: PolicyView, batch: TransitionBatch, kernel: str) -> kernels.Gaussian:
    """The step under the active policy, mean [S, *X]: one for each state, of those that take part where none is shared."""
    trajectory, k = batch.trajectory, batch.transition
    # contiguous as when they were drawn: strided ones take other kernels in half precision, and the ratio leaves 1
    latents = trajectory.latents[:, k].contiguous()  # [S, *X]
    shared = trajectory.shared
    conditioning = batch.rollout.conditioning if shared is None else shared.conditioning
    if shared is None and batch.rows is not None:
        latents, conditioning = latents[batch.rows], conditioning.take(batch.rows)
    velocity = policy.velocity(latents, batch.index, conditioning)
    return kernels.KERNELS[kernel](
        velocity, latents, schedule_of(batch.rollout), batch.index, trajectory.noise_levels[k]
    )


def kl_to_reference(policy: PolicyView, batch: TransitionBatch, kernel: str, current: kernels.Gaussian) -> Tensor:
    """The KL of the current policy's step to the reference's, [R]; its gradient is the current policy's."""
    with torch.no_grad(), policy.using("reference"):
        reference = gaussian(policy, batch, kernel)
    return kernels.kl(current, reference)
