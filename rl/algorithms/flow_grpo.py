"""Flow-GRPO: a clipped policy gradient over stochastic denoising steps (arXiv 2505.05470, equations 4 and 5).

Every stored transition is an action whose Gaussian log density the policy can evaluate again; the ratio to the density under
the policy that drew it is weighted with the group's advantage and clipped as in PPO. The rollout's settings make this

- MixGRPO and its Flash (arXiv 2507.21802) with a window of stochastic steps, a ``tail_fraction`` and dpmpp_2m behind it;
- Flow-GRPO-Fast with a window and ``shared_noise``; FlowCPS (arXiv 2509.05952) with the cps kernel;
- DanceGRPO (arXiv 2505.07818) with the dance_sde kernel, ``shared_noise`` and ``transitions_per_sample``;
- DDPO (arXiv 2305.13301, its importance-sampled estimator) with the ddim kernel and an epsilon model;
- G2RPO (arXiv 2510.01982) with ``branching``: every step has rewards of its own, summed over granularities, and one network
  pass serves the whole group.

Differences from the published code: the KL is the true one of the two Gaussians, per dimension (the published one lacks the
step's length in its variance: its coefficient 0.04 is about 0.004 here at ten steps); samples without a comparison are masked
under a global normaliser, not dropped per process; both branches of guidance carry gradients; the last step is not
stochastic unless asked, which decodes the model's last prediction as DanceGRPO does; a batch shares its denoising steps
(DanceGRPO and DDPO shuffle them per sample); G2RPO clips each granularity's advantage before they are summed, not after.
Left out: KL in the reward.

Letters: B samples, K stored transitions, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.losses import clipped_objective, loss_metrics, ratio_metrics
from flowsteer.rl.transitions import TransitionBatch, gaussian, kl_to_reference, transition_batches
from flowsteer.rl.types import AlgorithmSettings, Comparison, Metrics, PolicyView, Requirements
from flowsteer.rollout import kernels
from flowsteer.rollout.types import Rollout


class FlowGRPOConfig(AlgorithmSettings):
    """Flow-GRPO's hyper-parameters; the defaults are the paper's for Stable Diffusion 3.5."""

    needs: ClassVar[Requirements] = Requirements(transitions=True)

    name: Literal["flow_grpo"] = "flow_grpo"
    clip_range: PositiveFloat = 1e-4
    """Of the ratio of mean log densities; times the latent's dimensions it is in nats of the joint ratio."""
    kl_coef: NonNegativeFloat = 0.0
    transitions_per_sample: PositiveInt | None = None
    """Train so many of each batch's transitions, drawn at random; null trains all of them."""
    updates_per_rollout: PositiveInt = 2


class FlowGRPO:
    """See the module's docstring.

    Args:
        kernel: name of the kernel that drew the rollouts.
        log_prob_weight: its log-density convention, see `kernels.log_prob`.
        num_transitions: K, stored transitions per sample.
        seed: of the choice of transitions.
        common_indices: all batches of a step train the same ones.
        The others as in `FlowGRPOConfig`.
    """

    acting = "current"

    def __init__(
        self,
        *,
        kernel: str,
        log_prob_weight: kernels.LogProbWeight,
        num_transitions: int,
        seed: int,
        common_indices: bool = False,
        clip_range: float,
        kl_coef: float,
        transitions_per_sample: int | None = None,
    ) -> None:
        if transitions_per_sample is not None and transitions_per_sample > num_transitions:
            raise ValueError(
                f"algorithm.transitions_per_sample={transitions_per_sample}, but the plan stores {num_transitions} transitions "
                "of each sample; take at most as many"
            )
        self.kernel = kernel
        self.log_prob_weight: kernels.LogProbWeight = log_prob_weight
        self.transitions_per_sample = transitions_per_sample
        self.passes_per_batch = transitions_per_sample or num_transitions
        self.seed = seed
        self.common_indices = common_indices
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
        """Every transition that is trained of every rollout batch."""
        chosen = {"seed": self.seed, "each": self.transitions_per_sample, "common": self.common_indices}
        yield from transition_batches(rollouts, comparisons, step=step, **chosen)

    def loss(self, policy: PolicyView, batch: TransitionBatch) -> tuple[Tensor, Metrics]:
        """The clipped objective of one transition, and the KL to the reference."""
        current = gaussian(policy, batch, self.kernel)
        log_prob = kernels.log_prob(current, batch.next_latents, weight=self.log_prob_weight)  # [B]
        log_ratio = log_prob - batch.old_log_prob
        per_sample, _ = clipped_objective(log_ratio, batch.comparison.advantage.to(log_prob.device), self.clip_range)
        kl = torch.zeros_like(per_sample)
        if self.kl_coef:
            kl = kl_to_reference(policy, batch, self.kernel, current)
        weight = batch.comparison.weight.to(log_prob.device)
        loss = ((per_sample + self.kl_coef * kl) * weight).mean()
        distance = {"kl": kl} if self.kl_coef else {}
        return loss, loss_metrics(loss, weight, **distance) | ratio_metrics(log_ratio, weight, self.clip_range)
