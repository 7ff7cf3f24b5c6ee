"""From the samples of a group to a pair: the best and the worst, where there is a difference.

Letters: B samples, P groups of a rollout batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flowsteer.rl.algorithms.losses import Terms, weighted
from flowsteer.rl.types import Comparison, Mean, Metrics


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """One pair for each group; those of groups that make none have the weight 0, so that every batch has as many."""

    win: Tensor  # [P] int64, row of the preferred sample
    lose: Tensor  # [P] int64
    weight: Tensor  # [P] float32

    def sides(self) -> Tensor:
        """[2 P] rows, the winners first."""
        return torch.cat([self.win, self.lose])

    def counting(self) -> Pairs:
        """Those with a weight; where there are none, the first: a batch passes the network in any case."""
        rows = rows_that_count(self.weight > 0)
        if rows is None:
            return self
        return Pairs(win=self.win[rows], lose=self.lose[rows], weight=self.weight[rows])


def rows_that_count(counts: Tensor) -> Tensor | None:
    """The rows [R] int64 of [B] bool, or the first one where none counts; None where all do."""
    if bool(counts.all()):
        return None
    return torch.nonzero(counts).flatten() if bool(counts.any()) else torch.zeros(1, dtype=torch.int64)


def best_and_worst(group: Tensor, comparison: Comparison, *, threshold: float = 0.0) -> Pairs:
    """The best and the worst sample of every group, whole in this batch.

    ``group`` [B] int64. Only samples that carry a comparison (weight above 0) are candidates. A pair counts if its scores
    differ and the probability that the one is preferred (a softmax of the two scores) exceeds that of the
    other by more than ``threshold``: a tied group is no pair, whatever the threshold. The first sample wins among equals.
    """
    score = comparison.score.double()
    win, lose, weight = [], [], []
    for number in dict.fromkeys(group.tolist()):
        rows = torch.nonzero(group == number).flatten()
        own = score[rows]
        known = torch.isfinite(own) & (comparison.weight[rows] > 0)
        best, worst = (
            int(rows[own.where(known, fill).argmax()]) for own, fill in ((own, -torch.inf), (-own, -torch.inf))
        )
        gap = float(torch.tanh((score[best] - score[worst]) / 2))  # of the two probabilities
        counts = bool(known.any()) and gap > threshold and float(score[best]) > float(score[worst])
        win.append(best)
        lose.append(worst)
        weight.append(float(comparison.weight[best]) if counts else 0.0)
    return Pairs(win=torch.tensor(win), lose=torch.tensor(lose), weight=torch.tensor(weight))


def preference(logits: Tensor) -> Terms:
    """-log sigmoid of the logits [P], one for each pair.

    ``margin``: the logit. ``accuracy``: whether the policy prefers as the judge does; no preference counts half.
    """
    detached = logits.detach()
    right = (detached > 0).float() + 0.5 * (detached == 0)
    return Terms(loss=-logsigmoid(logits), metrics={"margin": detached, "accuracy": right})


def preference_loss(logits: Tensor, pairs: Pairs, *, over: int | None = None) -> tuple[Tensor, Metrics]:
    """The weighted mean of `preference` over the batch's groups; ``pairs`` is how many of them make a pair.

    ``over`` is how many groups there are where those that make none are left out.
    """
    over = over or len(pairs.weight)
    weight = pairs.weight.to(logits.device)
    loss, metrics = weighted(preference(logits), weight, {}, {}, over=over)
    return loss, {**metrics, "pairs": Mean(float((weight > 0).sum()), float(over))}
