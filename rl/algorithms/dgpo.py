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

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.algorithms.forward import ForwardAlgorithm, ForwardBatch, ForwardTerms, NoiseLevels, ramp
from flowsteer.rl.algorithms.losses import Terms
from flowsteer.rl.types import Facts, Setting, changed, not_whole
from flowsteer.rollout.steps.noise import mix
from flowsteer.rollout.types import Rollout


class DGPO(ForwardAlgorithm):
    """DGPO's hyper-parameters; the defaults are the published ones for Stable Diffusion 3.5 with guided rollouts."""

    over_groups: ClassVar[bool] = True

    name: Literal["dgpo"] = "dgpo"
    beta: PositiveFloat = 100.0
    """How sharply a group's comparison weights its gradient."""
    reference: Literal["reference", "old"] = "reference"
    """What errors are compared with: the start of training, or the old policy."""
    clip_range: PositiveFloat | None = 1e-2
    """exp(e_old - e), of the errors of the old and the current policy, is clipped to 1 plus or minus this; null does not
    clip."""
    kl_coef: NonNegativeFloat = 0.02
    """Weight of the squared distance of the prediction to the reference's."""
    old_decay_slope: NonNegativeFloat = 1e-3
    """See ``old_decay_max``."""
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

    @property
    def compares_with(self) -> frozenset[str]:
        """What errors are compared with, and the old policy where the ratio to it is clipped."""
        return frozenset({self.reference} | ({"old"} if self.clip_range is not None else set()))

    @property
    def anchors(self) -> Mapping[str, float]:
        """The reference, when the KL asks for it."""
        return {"reference": self.kl_coef}

    def check(self, setting: Setting) -> Iterator[str]:
        """Whole groups in a pass, whose advantages sum to 0."""
        yield from super().check(setting)
        name = f"algorithm.name={self.label}"
        if setting.best_and_worst is not None:
            yield f"{name} needs advantages that sum to 0 in a group; leave advantage.best_and_worst out"
        if not setting.branching and not setting.groups_are_whole(across_processes=True):
            yield not_whole(name, setting, across_processes=True)

    def old_decay(self, num_updates: int) -> float:
        """The published schedule: the old policy is almost the one of the update before."""
        return ramp(num_updates, self.old_decay_slope, self.old_decay_max)

    def counting(self, batch: ForwardBatch) -> ForwardBatch:
        """All samples pass: groups may lie over processes, which add up equally many numbers."""
        return batch

    def indices(self, levels: NoiseLevels, step: int, rollout: Rollout) -> list[int]:
        """Those of the training step, which all processes share."""
        return levels.spread(step)

    def noise_seeds(self, rollout: Rollout, step: int) -> Tensor:
        """All samples of a group share their noise."""
        return torch.tensor([mix(self.facts.seed, step, group) for group in rollout.group.tolist()])

    def per_sample(self, terms: ForwardTerms) -> Terms:
        """The surrogate w A_j d_j."""
        error = terms.error()  # [R]
        advantage = terms.advantage * (terms.comparison.weight > 0)
        margin = over_groups(terms.facts, terms.group, advantage * (error.detach() - terms.error(self.reference)))
        share = torch.sigmoid(self.beta / terms.facts.group_size * margin)  # [R], the same in all samples of a group
        pushed, clipped = error, torch.zeros_like(error, dtype=torch.bool)
        if self.clip_range is not None:
            ratio = torch.exp(terms.error("old") - error.detach())
            clipped = torch.where(advantage > 0, ratio > 1 + self.clip_range, ratio < 1 - self.clip_range)
            pushed = torch.where(clipped, error.detach(), error)
        metrics = {"group_weight": share, "clip_fraction": clipped.float()}
        return Terms(loss=share * advantage * pushed, metrics=metrics)


def over_groups(facts: Facts, group: Tensor, values: Tensor) -> Tensor:
    """Each sample's sum over its group, on all processes: [R] -> [R]."""
    everywhere = facts.gather(group.to(values.device))  # [N]
    same = group.to(values.device)[:, None] == everywhere[None]  # [R, N]
    return (same * facts.gather(values)[None]).sum(1)
