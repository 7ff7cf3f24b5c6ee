"""Fine-tuning on the better samples, or on given pictures: RAFT, SFT, reward-weighted regression.

The loss is the ordinary matching error of each sample, weighted by how good it is in its group:

- ``best``: the best sample of each group counts (by its score, where the clip of the advantage makes equals), the others do
  not (RAFT, arXiv 2304.06767; Flow-GRPO's online SFT);
- ``positive``: samples above their group's mean count by their advantage;
- ``exponential``: a softmax of advantage / temperature over the group (reward-weighted regression, Peters and Schaal 2007);
- ``all``: every sample counts the same, scored or not. This is plain fine-tuning, for pictures of a file.

Nothing is pushed away from: the yardstick of all the others. But then the sampler's own error does not cancel either. Samples
of few steps vary less than the data, guided ones overshoot, and a policy that is trained on its own samples again and again
inherits that each time, until it collapses. ``refresh_every`` lets the policy that draws stay for a while, or for good.

Differences from Flow-GRPO's script: several best samples of a group share its weight, and a group of equal scores teaches
nothing. Left out: its weighting by the raw reward, which depends on the reward's zero.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.algorithms.forward import ForwardAlgorithm, ForwardTerms, renewed
from flowsteer.rl.algorithms.losses import Terms
from flowsteer.rl.types import Comparison, Setting, changed, not_whole

SampleWeights = Literal["best", "positive", "exponential", "all"]


class WeightedSFT(ForwardAlgorithm):
    """Which samples count, and how far the prediction may go."""

    name: Literal["weighted_sft"] = "weighted_sft"
    weights: SampleWeights = "best"
    """Train on the best of each group, on all above its mean by their advantage, on all by exp(advantage / temperature), or on
    all alike (``all``, for pictures)."""
    temperature: PositiveFloat = 1.0
    """Temperature of the exponential weights, in units of the advantage."""
    refresh_every: PositiveInt | None = 1
    """Training steps after which the policy that draws is the current one again; null: the start of training draws always."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the squared distance of the prediction to the reference's."""

    def idle(self) -> Iterator[str]:
        """The temperature, where no weight is exponential."""
        if self.weights != "exponential" and "temperature" in changed(self):
            yield f"weighted_sft with weights={self.weights} has no temperature; leave it out"

    @property
    def compares(self) -> bool:
        """Not where all count alike."""
        return self.weights != "all"

    @property
    def acting(self) -> str:
        """The current policy, if it would be renewed after every step anyway."""
        return "current" if self.refresh_every == 1 else "old"

    @property
    def anchors(self) -> Mapping[str, float]:
        """The reference, when the KL asks for it."""
        return {"reference": self.kl_coef}

    def check(self, setting: Setting) -> Iterator[str]:
        """The best of a group is looked for in its batch."""
        yield from super().check(setting)
        if not self.compares and not setting.pictures:
            yield (
                "algorithm.weights=all learns from every sample alike, also from bad ones; give pictures (prompts.pictures), "
                "or set algorithm.weights to best, positive or exponential"
            )
        if setting.pictures and "refresh_every" in changed(self):
            yield "algorithm.refresh_every says which policy draws, but prompts.pictures draws nothing; leave it out"
        if self.compares and not setting.branching and not setting.groups_are_whole():
            yield not_whole(f"algorithm.name={self.label}", setting)

    def old_decay(self, num_updates: int) -> float:
        """The policy that draws stays, or is replaced when due."""
        return renewed(self.refresh_every, self.updates_per_rollout, num_updates)

    def shares(self, group: Tensor, comparison: Comparison) -> Tensor:
        """How good each sample is in its group."""
        return sample_weights(group, comparison, self.weights, self.temperature)

    def per_sample(self, terms: ForwardTerms) -> Terms:
        """The matching error, weighted by how good the sample is in its group."""
        error = terms.error()
        return Terms(loss=terms.share * error, metrics={"matching_loss": error})


def sample_weights(group: Tensor, comparison: Comparison, kind: SampleWeights, temperature: float) -> Tensor:
    """How much each sample counts, [B]; groups (whole in this batch) in which nothing differs count nothing.

    The weights of a group add up to the number of its samples that carry a comparison, for ``best`` and ``exponential``.
    """
    counts = comparison.weight > 0  # [B]
    if kind == "all":
        return counts.float()
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
