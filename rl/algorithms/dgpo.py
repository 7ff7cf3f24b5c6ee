"""DGPO: a preference between the good and the bad half of a group, without a policy gradient (arXiv 2510.08425).

With the matching error d of the policy and d_ref of the reference, and advantages A that sum to 0 in a group of G samples, the
loss of a group is -log sigmoid(-(beta / G) sum_j A_j (d_j - d_ref_j)). As in the published code its gradient is that of a
surrogate, mean_j w A_j d_j with w = sigmoid((beta / G) sum_j A_j (d_j - d_ref_j)) held constant: 1 / beta times as large, so
that beta only shapes w. All samples of a group share their noise at every noise level.

The samples of a group may lie on several processes, as long as they are trained on at the same time: the sum over the group
is one over processes.

As in the published code: samples whose error has left exp(d_old - d) = 1 +- clip_range in the direction in which they are
pushed get no more gradient; the reference is the start of training, or the old policy (TDM-R1's dynamic reference); noise is
drawn anew for every noise level and training step. Difference: the old policy follows once in a training step, not at every
update. Left out: the KL to a guided reference, rollouts by a moving average late in training.

Letters: B samples, N samples of all processes, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.forward import (
    ForwardBatch,
    ForwardSettings,
    NoiseLevels,
    forward_batches,
    matching_loss,
    prediction_of,
)
from flowsteer.rl.losses import loss_metrics
from flowsteer.rl.types import Comparison, Metrics, PolicyView, Requirements, changed
from flowsteer.rollout.noise import mix
from flowsteer.rollout.types import Rollout


class DGPOConfig(ForwardSettings):
    """DGPO's hyper-parameters; the defaults are the published ones for Stable Diffusion 3.5 with guided rollouts."""

    needs: ClassVar[Requirements] = Requirements(transitions=False, groups_in_a_pass=True, zero_sum_advantage=True)

    name: Literal["dgpo"] = "dgpo"
    beta: PositiveFloat = 100.0
    reference: Literal["reference", "old"] = "reference"
    """What errors are compared with: the start of training, or the old policy."""
    clip_range: PositiveFloat | None = 1e-2
    """Of exp(d_old - d), the old policy's error over the current one's; null does not clip."""
    kl_coef: NonNegativeFloat = 0.02
    """Weight of the squared distance of the prediction to the reference's."""
    old_decay_slope: NonNegativeFloat = 1e-3
    old_decay_max: Annotated[float, Field(ge=0, le=1)] = 0.3
    """After n updates the old policy keeps min(slope * n, max) of itself and takes the rest from the current one."""
    noise_levels_per_sample: PositiveInt = 4

    def idle(self) -> Iterator[str]:
        """The old policy's schedule, where nothing asks for it."""
        if (
            self.clip_range is None
            and self.reference == "reference"
            and changed(self) & {"old_decay_slope", "old_decay_max"}
        ):
            yield "dgpo without clip_range and with reference=reference has no old policy; leave old_decay_* out"


class DGPO:
    """See the module's docstring.

    Args:
        levels: noise levels to train at.
        group_size: G.
        seed: of the noise.
        gather: concatenates [B] over processes to [N].
        The others as in `DGPOConfig`.
    """

    acting = "current"

    def __init__(
        self,
        *,
        levels: NoiseLevels,
        group_size: int,
        seed: int,
        gather: Callable[[Tensor], Tensor],
        beta: float,
        reference: Literal["reference", "old"],
        clip_range: float | None,
        kl_coef: float,
        old_decay_slope: float,
        old_decay_max: float,
    ) -> None:
        self.levels = levels
        self.passes_per_batch = levels.count
        self.group_size = group_size
        self.seed = seed
        self.gather = gather
        self.beta = beta
        self.reference = reference
        self.clip_range = clip_range
        self.kl_coef = kl_coef
        self.old_decay_slope = old_decay_slope
        self.old_decay_max = old_decay_max

    @property
    def variants(self) -> frozenset[str]:
        """The reference and the old policy, as far as the settings ask for them."""
        asked = {self.reference}
        asked |= {"old"} if self.clip_range is not None else set()
        asked |= {"reference"} if self.kl_coef else set()
        return frozenset(asked)

    def old_decay(self, num_updates: int) -> float:
        """The published schedule: the old policy is almost the one of the update before."""
        return min(self.old_decay_slope * num_updates, self.old_decay_max)

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[ForwardBatch]:
        """Every rollout batch at the noise levels of the training step, which all processes share."""
        indices = self.levels.spread(step)
        for batch in forward_batches(rollouts, comparisons, [indices] * len(rollouts)):
            seeds = [mix(self.seed, step, group) for group in batch.rollout.group.tolist()]
            yield replace(batch, noise_seeds=torch.tensor(seeds))

    def loss(self, policy: PolicyView, batch: ForwardBatch) -> tuple[Tensor, Metrics]:
        """The surrogate of one noise level, and the distance to the reference."""
        noised, target = batch.noised()
        prediction = policy.velocity(noised, batch.index, batch.conditioning).float()
        others = {name: prediction_of(policy, name, noised, batch) for name in sorted(self.variants)}
        error = matching_loss(prediction, target)  # [B]
        baseline = matching_loss(others[self.reference], target)
        weight = batch.comparison.weight.to(error.device)
        advantage = batch.comparison.advantage.to(error.device) * (weight > 0)

        margin = self._over_groups(batch.rollout.group, advantage * (error.detach() - baseline))
        share = torch.sigmoid(self.beta / self.group_size * margin)  # [B], the same in all samples of a group
        pushed = error
        clipped = torch.zeros_like(error, dtype=torch.bool)
        if self.clip_range is not None:
            ratio = torch.exp(matching_loss(others["old"], target) - error.detach())
            clipped = torch.where(advantage > 0, ratio > 1 + self.clip_range, ratio < 1 - self.clip_range)
            pushed = torch.where(clipped, error.detach(), error)
        distance = torch.zeros_like(error)
        if self.kl_coef:
            distance = matching_loss(prediction, others["reference"])
        loss = ((share * advantage * pushed + self.kl_coef * distance) * weight).mean()
        kl = {"kl": distance} if self.kl_coef else {}
        return loss, loss_metrics(loss, weight, group_weight=share, clip_fraction=clipped.float(), **kl)

    def _over_groups(self, group: Tensor, values: Tensor) -> Tensor:
        """Each sample's sum over its group, on all processes: [B] -> [B]."""
        everywhere = self.gather(group.to(values.device))  # [N]
        same = group.to(values.device)[:, None] == everywhere[None]  # [B, N]
        return (same * self.gather(values)[None]).sum(1)
