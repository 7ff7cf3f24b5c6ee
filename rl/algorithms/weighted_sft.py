"""Fine-tuning on the model's own better samples: RAFT, online SFT, reward-weighted regression.

The loss is the ordinary matching error of each sample, weighted by how good it is in its group:

- ``best``: the best sample of each group counts (by its score, where the clip of the advantage makes equals), the others do
  not (RAFT, arXiv 2304.06767; Flow-GRPO's online SFT);
- ``positive``: samples above their group's mean count by their advantage;
- ``exponential``: a softmax of advantage / temperature over the group (reward-weighted regression, Peters and Schaal 2007).

Nothing is pushed away from: the yardstick of all the others. But then the sampler's own error does not cancel either. Samples
of few steps vary less than the data, guided ones overshoot, and a policy that is trained on its own samples again and again
inherits that each time, until it collapses. ``refresh_every`` lets the policy that draws stay for a while, or for good.

Differences from Flow-GRPO's script: several best samples of a group share its weight, and a group of equal scores teaches
nothing. Left out: its weighting by the raw reward, which depends on the reward's zero.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
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
from flowsteer.rollout.types import Rollout

SampleWeights = Literal["best", "positive", "exponential"]


class WeightedSFTConfig(ForwardSettings):
    """Which samples count, and how far the prediction may go."""

    needs: ClassVar[Requirements] = Requirements(transitions=False, groups_in_a_batch=True)

    name: Literal["weighted_sft"] = "weighted_sft"
    weights: SampleWeights = "best"
    temperature: PositiveFloat = 1.0
    """Of the exponential weights, in units of the advantage."""
    refresh_every: PositiveInt | None = 1
    """Training steps after which the policy that draws is the current one again; null: the start of training draws always."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the squared distance of the prediction to the reference's."""

    def idle(self) -> Iterator[str]:
        """The temperature, where no weight is exponential."""
        if self.weights != "exponential" and "temperature" in changed(self):
            yield f"weighted_sft with weights={self.weights} has no temperature; leave it out"


class WeightedSFT:
    """See the module's docstring.

    Args:
        levels: noise levels to train at.
        The others as in `WeightedSFTConfig`.
    """

    def __init__(
        self,
        *,
        levels: NoiseLevels,
        weights: SampleWeights,
        temperature: float,
        refresh_every: int | None,
        kl_coef: float,
        updates_per_rollout: int,
    ) -> None:
        self.levels = levels
        self.passes_per_batch = levels.count
        self.weights: SampleWeights = weights
        self.temperature = temperature
        self.kl_coef = kl_coef
        self.refresh_updates = None if refresh_every is None else refresh_every * updates_per_rollout
        self.acting = "current" if refresh_every == 1 else "old"

    @property
    def variants(self) -> frozenset[str]:
        """The reference policy, when the KL asks for it, and the one that draws, where it is not the current one."""
        return frozenset(({"reference"} if self.kl_coef else set()) | ({"old"} if self.acting == "old" else set()))

    def old_decay(self, num_updates: int) -> float:
        """The policy that draws stays, or is replaced when due."""
        return 0.0 if self.refresh_updates and num_updates % self.refresh_updates == 0 else 1.0

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[ForwardBatch]:
        """Every rollout batch at the noise levels that are drawn for it."""
        indices = [self.levels.spread(step, int(rollout.sample[0])) for rollout in rollouts]
        yield from forward_batches(rollouts, comparisons, indices)

    def loss(self, policy: PolicyView, batch: ForwardBatch) -> tuple[Tensor, Metrics]:
        """The weighted matching error of one noise level, and the distance to the reference."""
        noised, target = batch.noised()
        prediction = policy.velocity(noised, batch.index, batch.conditioning).float()
        error = matching_loss(prediction, target)
        weight = batch.comparison.weight.to(error.device)
        share = sample_weights(batch.rollout.group, batch.comparison, self.weights, self.temperature)
        distance = torch.zeros_like(error)
        if self.kl_coef:
            distance = matching_loss(prediction, prediction_of(policy, "reference", noised, batch))
        loss = ((share.to(error.device) * error + self.kl_coef * distance) * weight).mean()
        kl = {"kl": distance} if self.kl_coef else {}
        return loss, loss_metrics(loss, weight, matching_loss=error, **kl)


def sample_weights(group: Tensor, comparison: Comparison, kind: SampleWeights, temperature: float) -> Tensor:
    """How much each sample counts, [B]; groups (whole in this batch) in which nothing differs count nothing.

    The weights of a group add up to the number of its samples that carry a comparison, for ``best`` and ``exponential``.
    """
    counts = comparison.weight > 0  # [B]
    advantage = comparison.advantage.where(counts, 0.0)
    if kind == "positive":
        return advantage.clamp(min=0)
    same = (group[:, None] == group[None]) & counts[None]  # [B, B], the samples that each is compared with
    if kind == "best":
        best = torch.where(same, advantage[None], -torch.inf).amax(1)
        alike = same & (advantage[None] == best[:, None])  # the best; several where the advantages are clipped
        score = comparison.score.where(counts, -torch.inf)
        winner = (advantage == best) & (score == torch.where(alike, score[None], -torch.inf).amax(1))
        raw = (winner & (advantage > 0)).float()
    else:
        highest = torch.where(same, advantage[None], -torch.inf).amax(1).nan_to_num(neginf=0.0)
        raw = torch.exp(((advantage - highest) / temperature).clamp(max=0))  # of those that count, the best has 1
    shares = counts * raw * same.sum(1) / (same * raw[None]).sum(1).clamp(min=1e-30)
    return shares * (same & (advantage[None] != 0)).any(1)
