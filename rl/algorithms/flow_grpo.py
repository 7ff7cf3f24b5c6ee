"""Flow-GRPO: a clipped policy gradient over stochastic denoising steps (arXiv 2505.05470, equations 4 and 5).

Every stored transition is an action whose Gaussian log density the policy can evaluate again; the ratio to the density under
the policy that drew it is weighted with the group's advantage and clipped as in PPO. With a window of stochastic steps this
is MixGRPO's loss (arXiv 2507.21802), with the cps kernel FlowCPS' (arXiv 2509.05952).

Differences from the published code: the KL is the true one of the two Gaussians, per dimension (the published one lacks the
step's length in its variance: its coefficient 0.04 is about 0.004 here at ten steps); samples without a comparison are masked
under a global normaliser, not dropped per process; both branches of guidance carry gradients; the last step is not
stochastic unless asked. Left out: KL in the reward.

Letters: B samples, K stored transitions, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.types import Comparison, Metrics, PolicyView, schedule_of
from flowsteer.rollout import kernels
from flowsteer.rollout.types import Rollout


class FlowGRPOConfig(BaseModel):
    """Flow-GRPO's hyper-parameters; the defaults are the paper's for Stable Diffusion 3.5."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    needs_trajectory: ClassVar[bool] = True

    name: Literal["flow_grpo"] = "flow_grpo"
    clip_range: PositiveFloat = 1e-4
    """Of the ratio of mean log densities; times the latent's dimensions it is in nats of the joint ratio."""
    kl_coef: NonNegativeFloat = 0.0
    updates_per_rollout: PositiveInt = 2


@dataclass(frozen=True, kw_only=True)
class TransitionBatch:
    """One denoising index of one rollout batch."""

    rollout: Rollout
    comparison: Comparison
    transition: Annotated[int, "k, the place in the trajectory"]


class FlowGRPO:
    """See the module's docstring.

    Args:
        kernel: name of the kernel that drew the rollouts.
        log_prob_weight: its log-density convention, see `kernels.log_prob`.
        num_transitions: K, stored transitions per sample.
        clip_range: epsilon of the ratio's clipping.
        kl_coef: weight of the KL divergence to the reference policy; 0 leaves the reference pass out.
    """

    acting = "current"

    def __init__(
        self,
        *,
        kernel: str,
        log_prob_weight: Literal["gaussian", "variance"],
        num_transitions: int,
        clip_range: float,
        kl_coef: float,
    ) -> None:
        self.kernel = kernel
        self.log_prob_weight: Literal["gaussian", "variance"] = log_prob_weight
        self.passes_per_batch = num_transitions
        self.clip_range = clip_range
        self.kl_coef = kl_coef

    @property
    def variants(self) -> frozenset[str]:
        """The reference policy, when the KL asks for it."""
        return frozenset({"reference"} if self.kl_coef else ())

    def old_decay(self, num_updates: int) -> float:
        """There is no old policy: the rollout keeps the log densities of the one that drew it."""
        return 0.0

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[TransitionBatch]:
        """Every transition of every rollout batch."""
        for rollout, comparison in zip(rollouts, comparisons):
            for transition in range(self.passes_per_batch):
                yield TransitionBatch(rollout=rollout, comparison=comparison, transition=transition)

    def loss(self, policy: PolicyView, batch: TransitionBatch) -> tuple[Tensor, Metrics]:
        """The clipped objective of one transition, and the KL to the reference."""
        trajectory, conditioning = batch.rollout.trajectory, batch.rollout.conditioning
        assert trajectory is not None, "the configuration guarantees stochastic steps"
        k = batch.transition
        index, noise_level = trajectory.indices[k], trajectory.noise_levels[k]
        # contiguous as when they were drawn: strided ones take other kernels in half precision, and the ratio leaves 1
        latents, next_latents = trajectory.latents[:, k].contiguous(), trajectory.next_latents[:, k]  # [B, *X]

        def step() -> kernels.Gaussian:
            velocity = policy.velocity(latents, index, conditioning)
            return kernels.KERNELS[self.kernel](velocity, latents, schedule_of(batch.rollout), index, noise_level)

        gaussian = step()
        log_prob = kernels.log_prob(gaussian, next_latents, weight=self.log_prob_weight)  # [B]
        per_sample, ratio = clipped_objective(
            log_prob, trajectory.log_prob[:, k], batch.comparison.advantage.to(log_prob.device), self.clip_range
        )
        kl = torch.zeros_like(per_sample)
        if self.kl_coef:
            with torch.no_grad(), policy.using("reference"):
                reference = step()
            kl = kernels.kl(gaussian, reference)
        weight = batch.comparison.weight.to(log_prob.device)
        loss = ((per_sample + self.kl_coef * kl) * weight).mean()

        log_ratio = (log_prob - trajectory.log_prob[:, k]).detach()
        count = float(weight.sum())
        clipped = (ratio.detach() - 1).abs() > self.clip_range
        metrics: Metrics = {
            "loss": (loss.detach() * len(weight), float(len(weight))),
            "ratio": ((ratio.detach() * weight).sum(), count),
            "ratio_deviation": ((log_ratio.abs() * weight).sum(), count),
            "clip_fraction": ((clipped * weight).sum(), count),
        }
        if self.kl_coef:
            metrics["kl"] = ((kl.detach() * weight).sum(), count)
        return loss, metrics


def clipped_objective(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic clipped loss per sample, and the ratio (arXiv 1707.06347, equation 7; all [B])."""
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio
