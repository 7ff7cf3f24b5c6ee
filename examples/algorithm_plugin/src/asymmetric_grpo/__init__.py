"""Flow-GRPO with DAPO's asymmetric clip: likelier good samples may go further than likelier bad ones (arXiv 2503.14476).

PPO clips the ratio to [1 - range, 1 + range]. DAPO's "clip-higher" (equation 10) widens the upper end alone: a rare sample that
was good may become much more likely before its gradient stops. Left out: DAPO's dynamic sampling and its token-level loss.

Letters: R samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from flowsteer.rl.algorithms.losses import Terms
from flowsteer.rl.algorithms.transitions import TransitionAlgorithm, TransitionTerms


class AsymmetricGRPO(TransitionAlgorithm):
    """Its settings, which a configuration gives beside its name; the ratio is that of Flow-GRPO."""

    clip_low: PositiveFloat = 1e-4
    """How far the ratio of a bad sample may fall below 1."""
    clip_high: PositiveFloat = 2e-4
    """How far the ratio of a good sample may rise above 1."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL divergence of each step to the reference's."""

    @property
    def anchors(self) -> Mapping[str, float]:
        """The reference, when the KL asks for it: the family keeps that policy, and adds the distance to the loss."""
        return {"reference": self.kl_coef}

    def idle(self) -> Iterator[str]:
        """What was set and would do nothing, or the opposite of the idea."""
        if self.clip_high < self.clip_low:
            yield f"algorithm.clip_high={self.clip_high} is below clip_low={self.clip_low}; widen the upper end, not the lower"

    def per_sample(self, step: TransitionTerms) -> Terms:
        """The clipped objective of each sample, [R]: equation 10 of the paper."""
        log_ratio = step.log_prob - step.old_log_prob
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = torch.maximum(-step.advantage * ratio, -step.advantage * clipped)
        beyond = (ratio < 1 - self.clip_low) | (ratio > 1 + self.clip_high)
        metrics = {"ratio": ratio, "ratio_deviation": log_ratio.abs(), "clip_fraction": beyond.float()}
        return Terms(loss=loss, metrics=metrics)
