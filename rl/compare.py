"""Scores of this process's batches become comparisons within groups across all processes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowsteer.rewards.types import Scores
from flowsteer.rl.advantage import (
    Deviation,
    combined_advantage,
    extremes,
    group_advantage,
    reward_statistics,
    untied,
    usable,
)
from flowsteer.rl.metrics import all_names
from flowsteer.rl.types import Comparison
from flowsteer.rollout.types import Rollout

Combine = Literal["rewards", "advantages", "gdpo"]

logger = logging.getLogger(__name__)


BIAS_WORTH_A_WARNING = 1.0  # deviations
FEW = 4  # samples that say nothing about a mean


class TooFewScores(ValueError):
    """Less than the required part of a training step's samples has a score."""


def compare(
    rollouts: Sequence[Rollout],
    scores: Sequence[Scores],
    gather: Callable[[Tensor], Tensor],
    *,
    weights: Mapping[str, float],
    combine: Combine = "rewards",
    deviation: Deviation,
    ddof: int = 0,
    epsilon: float = 1e-4,
    clip: float | None,
    best_and_worst: int | None = None,
    tied: Literal["keep", "drop"] = "keep",
    min_scored: float,
) -> tuple[list[Comparison], dict[str, float]]:
    """Compare each sample with its group.

    Args:
        rollouts: this process's batches.
        scores: theirs, in the same order.
        gather: concatenates over processes.
        weights: of the rewards, by name.
        combine: several rewards by summing ``rewards``, or ``advantages`` (each compared on its own scale), or ``gdpo`` (these,
            normalised once more over the whole step).
        deviation: what a difference is divided by, see `group_advantage`.
        ddof: of the deviation.
        epsilon: added to it.
        clip: of the advantage.
        best_and_worst: of each group only so many count, half of them its best and half its worst; None: all.
        tied: whether samples of groups with equal scores count.
        min_scored: the part of all samples that must have a score.

    Returns:
        One comparison per batch, and the step's reward statistics, equal on every process.

    Raises:
        TooFewScores: names how many are missing and the most frequent reason on this process.
    """
    table = gathered(rollouts, scores, gather)
    total, group = table.total, table.group
    _require_scores(total, scores, min_scored)
    divided = {"deviation": deviation, "ddof": ddof, "epsilon": epsilon, "clip": clip}
    if combine == "rewards":
        advantage = group_advantage(total, group, **divided)
    else:
        known = {name: table.parts[name] for name, weight in weights.items() if weight and name in table.parts}
        advantage = combined_advantage(
            {name: values.where(~total.isnan(), torch.nan) for name, values in known.items()},
            {name: weights[name] for name in known},
            group,
            **divided,
            over_step=combine == "gdpo",
        )
    counts = usable(total, group)
    if tied == "drop":
        counts = counts & untied(advantage, group)
    if best_and_worst is not None:
        counts = counts & extremes(advantage, counts, group, best_and_worst)
    weight = counts.float() * (len(total) / counts.sum().clamp(min=1))
    comparisons = [
        Comparison(score=total[rows], advantage=advantage[rows], weight=weight[rows])
        for rows in (table.place[rollout.sample] for rollout in rollouts)
    ]
    return comparisons, reward_statistics(total, group) | _of_parts(table)


def uncompared(
    rollouts: Sequence[Rollout], scores: Sequence[Scores], gather: Callable[[Tensor], Tensor]
) -> tuple[list[Comparison], dict[str, float]]:
    """For algorithms that learn from all samples alike: each has the weight 1 and no advantage, scored or not.

    The arguments are those of `compare`. Statistics are those of the scores that there are.
    """
    comparisons = [
        Comparison(score=own.total, advantage=torch.zeros_like(own.total), weight=torch.ones_like(own.total))
        for own in scores
    ]
    table = gathered(rollouts, scores, gather)
    statistics = reward_statistics(table.total, table.group)
    return comparisons, {name: statistics[name] for name in ("reward_mean", "reward_std") if name in statistics}


@dataclass(frozen=True, kw_only=True)
class Table:
    """The scores of a training step's N samples over all processes, in the order in which they were gathered."""

    total: Tensor  # [N], NaN where missing
    parts: dict[str, Tensor]  # name -> [N]
    group: Tensor  # [N] int64
    place: Tensor  # int64, from a sample's number to its row


def gathered(rollouts: Sequence[Rollout], scores: Sequence[Scores], gather: Callable[[Tensor], Tensor]) -> Table:
    """The arguments are those of `compare`; every process gets the same table."""
    names = all_names({name for s in scores for name in s.parts}, gather)  # a batch that failed as a whole has none
    columns = [torch.cat([s.parts.get(name, torch.full_like(s.total, torch.nan)) for s in scores]) for name in names]
    table = gather(torch.stack([torch.cat([s.total for s in scores]), *columns], dim=1))  # [N, 1 + parts]
    sample = gather(torch.cat([rollout.sample for rollout in rollouts]))  # [N]
    place = torch.empty(int(sample.max()) + 1, dtype=torch.int64)
    place[sample] = torch.arange(len(sample))
    return Table(
        total=table[:, 0],
        parts={name: table[:, column] for column, name in enumerate(names, start=1)},
        group=gather(torch.cat([rollout.group for rollout in rollouts])),
        place=place,
    )


def _require_scores(total: Tensor, scores: Sequence[Scores], min_scored: float) -> None:
    """Say which scores are missing here, and raise TooFewScores where too many are missing everywhere."""
    scored = float((~total.isnan()).double().mean())  # in float32, 18 of 20 would be less than 0.9
    reasons = [reason for s in scores for reason in s.failures.values()]
    kinds = Counter(reasons).most_common(3)
    common = kinds[0][0] if kinds else "no failure on this process"
    if kinds:
        listed = "; ".join(f"{count} times: {reason}" for reason, count in kinds)
        logger.warning("%d samples of this process have no score; %s", len(reasons), listed)
    if scored < min_scored:
        raise TooFewScores(
            f"only {scored:.1%} of the samples have a score, advantage.min_scored asks for {min_scored:.1%}; "
            f"the most frequent reason: {common}"
        )


def _of_parts(table: Table) -> dict[str, float]:
    """``reward/NAME``, the mean of each part, and ``missing_bias`` where it can be told; warns of a large one."""
    statistics: dict[str, float] = {}
    measured = ((name, missing_bias(table.total, values)) for name, values in table.parts.items())
    biases = {name: bias for name, bias in measured if bias is not None}
    if biases:
        name = max(biases, key=lambda name: abs(biases[name]))
        statistics["missing_bias"] = biases[name]
        if abs(biases[name]) > BIAS_WORTH_A_WARNING:
            logger.warning(
                "samples without a score are not like the others: their %s is %+.1f deviations from the rest; what cannot "
                "be scored is then selected for or against",
                name, biases[name],
            )  # fmt: skip
    for name, values in table.parts.items():
        known = values[~values.isnan()]
        if len(known):
            statistics[f"reward/{name}"] = float(known.mean())
    return statistics


def missing_bias(total: Tensor, part: Tensor) -> float | None:
    """Does failure go together with quality? How far the mean of a part [N] over the samples without a total [N] is from that
    over the others, in deviations of the part; None where either are fewer than `FEW` or all are equal.
    """
    known = ~part.isnan()
    lost, kept = part[known & total.isnan()].double(), part[known & ~total.isnan()].double()
    if min(len(lost), len(kept)) < FEW:
        return None
    deviation = float(torch.cat([lost, kept]).std(correction=0))
    return float(lost.mean() - kept.mean()) / deviation if deviation > 0 else None
