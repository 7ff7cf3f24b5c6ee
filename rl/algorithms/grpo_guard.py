"""GRPO-Guard: Flow-GRPO with ratios whose mean is 1 and whose spread is the same at every step (arXiv 2510.22319).

The mean log ratio of a Gaussian step is biased below 0 by b = <(mean - mean_old)^2> / (2 q^2), and its spread goes like 1 / q,
so that one clip range means another thing at each step. Guard's log ratio is q (log_prob - log_prob_old + b), which is
<z (mean - mean_old)> for the noise z that was drawn: of mean 0 and without q. The loss of each step is divided by its length,
because a change of the velocity moves the mean by that times as much.

As in the published code b carries a gradient. Differences: the division by the step's length, which Flow-Factory leaves out,
and any kernel of a flow may be used. Left out: the variance convention of the log density, which has no q to remove.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.losses import clipped_objective, loss_metrics, ratio_metrics
from flowsteer.rl.transitions import TransitionBatch, gaussian, kl_to_reference, transition_batches
from flowsteer.rl.types import AlgorithmSettings, Comparison, Metrics, PolicyView, Requirements, schedule_of
from flowsteer.rollout import kernels
from flowsteer.rollout.types import Rollout


class GRPOGuardConfig(AlgorithmSettings):
    """GRPO-Guard's hyper-parameters."""

    needs: ClassVar[Requirements] = Requirements(transitions=True, means=True, flow=True, gaussian_log_prob=True)

    name: Literal["grpo_guard"] = "grpo_guard"
    clip_range: PositiveFloat = 2e-6
    """Of the normalised ratio, whose logarithm is the mean over the latent of noise times shift of the mean."""
    kl_coef: NonNegativeFloat = 0.0
    updates_per_rollout: PositiveInt = 2


class GRPOGuard:
    """See the module's docstring.

    Args:
        kernel: name of the kernel that drew the rollouts.
        num_transitions: K, stored transitions per sample.
        clip_range, kl_coef: as in `GRPOGuardConfig`.
    """

    acting = "current"

    def __init__(self, *, kernel: str, num_transitions: int, clip_range: float, kl_coef: float) -> None:
        self.kernel = kernel
        self.passes_per_batch = num_transitions
        self.clip_range = clip_range
        self.kl_coef = kl_coef

    @property
    def variants(self) -> frozenset[str]:
        """The reference policy, when the KL asks for it."""
        return frozenset({"reference"} if self.kl_coef else ())

    def old_decay(self, num_updates: int) -> float:
        """There is no old policy: the rollout keeps the means of the one that drew it."""
        return 0.0

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[TransitionBatch]:
        """Every transition of every rollout batch."""
        yield from transition_batches(rollouts, comparisons, step=step)

    def loss(self, policy: PolicyView, batch: TransitionBatch) -> tuple[Tensor, Metrics]:
        """The clipped objective of one transition over its length, and the KL to the reference."""
        means = batch.trajectory.mean
        assert means is not None, "the configuration asks for the means"
        current = gaussian(policy, batch, self.kernel)
        old = kernels.Gaussian(mean=means[:, batch.transition], std=current.std)
        log_prob = kernels.log_prob(current, batch.next_latents)  # [B]
        log_ratio = current.std * (log_prob - batch.old_log_prob + kernels.kl(current, old))
        per_sample, _ = clipped_objective(log_ratio, batch.comparison.advantage.to(log_prob.device), self.clip_range)
        kl = torch.zeros_like(per_sample)
        if self.kl_coef:
            kl = kl_to_reference(policy, batch, self.kernel, current)
        sigma = schedule_of(batch.rollout).sigma
        length = float(sigma[batch.index] - sigma[batch.index + 1])
        weight = batch.comparison.weight.to(log_prob.device)
        loss = ((per_sample / length + self.kl_coef * kl) * weight).mean()
        distance = {"kl": kl} if self.kl_coef else {}
        return loss, loss_metrics(loss, weight, **distance) | ratio_metrics(log_ratio, weight, self.clip_range)
