"""Comparing a sample with its group: how much better than the other samples of its prompt it is.

Pure functions of the scores of a whole training step, gathered from all processes beforehand. The answer depends
neither on the order of the samples nor on how they were split: sums run over sorted scores in float64.

Left out: running statistics per prompt over several training steps (DDPO's buffer), trimmed means.

Letters: N samples of a training step over all processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Deviation = Literal["group", "global", "none"]


def group_advantage(
    total: Tensor,
    group: Tensor,
    *,
    deviation: Deviation = "group",
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
    ddof: int = 0,
) -> Tensor:
    """(score - mean of its group) / (deviation + epsilon), clipped to +-clip; [N] float32.

    ``total`` [N] holds the scores, NaN where missing (an infinite score counts as missing: it compares with nothing);
    ``group`` [N] int64 says which samples belong together. Missing scores are left out of mean and deviation. Exactly 0
    for missing scores, for groups with fewer than two scores, and for groups whose scores are all equal.

    ``deviation``: ``group`` divides by the group's own; ``global`` by that of all scores of the training step, which
    does not amplify the noise of groups with nearly equal scores (Flow-GRPO's ``global_std``); ``none`` by nothing.
    Published conventions: ddof 0, epsilon 1e-4 (Flow-GRPO, DiffusionNFT, AWM, DGPO); ddof 1, epsilon 1e-8 (DanceGRPO,
    MixGRPO, G2RPO), arXiv 2402.03300 for the idea.

    Raises:
        ValueError: for shapes, types or options that do not fit.
    """
    _check(total, group)
    if deviation not in ("group", "global", "none"):
        raise ValueError(f"deviation {deviation!r} is unknown; use 'group', 'global' or 'none'")
    if ddof not in (0, 1) or not epsilon >= 0 or (clip is not None and not clip > 0):
        raise ValueError(
            f"got ddof={ddof}, epsilon={epsilon}, clip={clip}; ddof is 0 or 1, epsilon 0 or more, "
            "and clip above 0 or None"
        )
    stats = _GroupStatistics(total, group)
    if deviation == "group":
        scale = stats.deviation(ddof)[stats.row_group] + epsilon  # [N]
    elif deviation == "global":
        scale = stats.global_deviation(ddof) + epsilon  # []
    else:
        scale = torch.ones((), dtype=torch.float64, device=total.device)
    differs = stats.scored & stats.differs[stats.row_group]  # [N]
    advantage = torch.where(differs, stats.centred / scale, 0.0)
    if clip is not None:
        advantage = advantage.clamp(-clip, clip)
    return advantage.float()


def combined_advantage(
    parts: Mapping[str, Tensor],
    weights: Mapping[str, float],
    group: Tensor,
    *,
    deviation: Deviation = "group",
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
    ddof: int = 0,
    over_step: bool = False,
) -> Tensor:
    """Each reward compared on its own scale, then summed by weight and clipped (MixGRPO's ``advantage_aggr``); [N].

    ``parts`` are scores [N] by name, NaN where missing; a sample that misses one of them gets 0 from that one.
    ``over_step`` normalises the sums once more, by mean and deviation over all samples that carry a comparison (GDPO, arXiv
    2601.05242), so that the size of an update does not depend on how many rewards there are.
    """
    unknown = sorted(set(weights) - set(parts))
    if unknown or not weights:
        raise ValueError(f"weights are given for {sorted(weights)}; rewards with scores are {sorted(parts)}")
    options = {"deviation": deviation, "clip": None, "epsilon": epsilon, "ddof": ddof}
    terms = [weight * group_advantage(parts[name], group, **options) for name, weight in weights.items()]
    summed = torch.stack(terms).sum(0)
    if over_step:
        counts = torch.stack([usable(parts[name], group) for name in weights]).any(0)
        own = summed[counts].double()
        if len(own) and float(own.std(correction=0)) > 0:
            normalised = (summed.double() - own.mean()) / (own.std(correction=0) + epsilon)
            compared = torch.stack([term != 0 for term in terms]).any(0)  # tied groups stay at exactly 0
            summed = torch.where(counts & compared, normalised, 0.0).float()
    return summed if clip is None else summed.clamp(-clip, clip)


def extremes(advantage: Tensor, counts: Tensor, group: Tensor, number: int) -> Tensor:
    """[N] bool: the ``number // 2`` best and as many worst samples of each group (DanceGRPO's best-of-n selection).

    Only samples that ``counts`` [N] admits are chosen from; among equals the first. A group that has no more than
    ``number`` of them keeps all. Advantages stay those that were computed on the whole group.

    Raises:
        ValueError: for a number that is not even, or less than 2.
    """
    if number < 2 or number % 2:
        raise ValueError(
            f"advantage.best_and_worst={number} takes half from either end; give an even number, 2 or more"
        )
    chosen = torch.zeros_like(counts)
    for one in group.unique():
        rows = torch.nonzero(counts & (group == one)).flatten()
        order = rows[advantage[rows].argsort(stable=True)]
        chosen[order if len(order) <= number else torch.cat([order[: number // 2], order[-(number // 2) :]])] = True
    return chosen


def usable(total: Tensor, group: Tensor) -> Tensor:
    """[N] bool: samples that carry a comparison, that is, scored ones whose group has two scores or more."""
    _check(total, group)
    stats = _GroupStatistics(total, group)
    return stats.scored & (stats.count[stats.row_group] >= 2)


def untied(advantage: Tensor, group: Tensor) -> Tensor:
    """[N] bool: samples of groups in which some advantage [N] is not 0, so that something is to be learned."""
    _, row_group = torch.unique(group, return_inverse=True)  # [N]
    differing = torch.zeros(int(row_group.max()) + 1, dtype=torch.int64, device=group.device)  # [P]
    return differing.index_add(0, row_group, (advantage != 0).long())[row_group] > 0


def reward_statistics(total: Tensor, group: Tensor) -> dict[str, float]:
    """What to report of a training step's scores; numbers that do not exist (no score at all) are left out.

    ``reward_mean``, ``reward_std``: over the scored samples, population deviation. ``reward_group_std``: mean over
    groups with two scores or more of their own deviation. ``reward_missing``: how many samples have no score.
    ``zero_deviation_fraction``: of the groups with two scores or more, how many have equal scores and teach nothing.
    ``incomparable_groups``: how many groups have fewer than two scores.
    """
    _check(total, group)
    stats = _GroupStatistics(total, group)
    report = {"reward_missing": float((~stats.scored).sum()), "incomparable_groups": float((stats.count < 2).sum())}
    if bool(stats.scored.any()):
        scores = total.double()[stats.scored].sort().values
        report["reward_mean"] = float(scores.mean())
        report["reward_std"] = float(stats.global_deviation(0))
    comparable = stats.count >= 2
    if bool(comparable.any()):
        report["reward_group_std"] = float(stats.deviation(0)[comparable].mean())
        report["zero_deviation_fraction"] = float((~stats.differs[comparable]).double().mean())
    return report


class _GroupStatistics:
    """Sums by group over the scored samples. Letters: N samples, P groups."""

    def __init__(self, total: Tensor, group: Tensor) -> None:
        scores = total.double()
        self.scored = torch.isfinite(scores)  # [N]
        known, self.row_group = torch.unique(group, return_inverse=True)  # [P], [N]
        self._groups = len(known)
        # Adding in the order of the scores makes the sums, bit for bit, independent of the order of the samples.
        self._order = scores.argsort(stable=True)
        self._order = self._order[self.scored[self._order]]
        self.count = self._sum(torch.ones_like(scores))  # [P]
        mean = self._sum(scores) / self.count.clamp(min=1)  # [P]
        self.centred = torch.where(self.scored, scores - mean[self.row_group], 0.0)  # [N]
        low = torch.full_like(mean, math.inf).scatter_reduce(0, self._rows, scores[self._order], "amin")
        high = torch.full_like(mean, -math.inf).scatter_reduce(0, self._rows, scores[self._order], "amax")
        self.differs = high > low  # [P], false for empty groups and for single scores
        self._scores = scores[self._order]

    @property
    def _rows(self) -> Tensor:
        return self.row_group[self._order]

    def _sum(self, values: Tensor) -> Tensor:
        """[N] -> [P], over the scored samples."""
        zeros = torch.zeros(self._groups, dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self._rows, values[self._order])

    def deviation(self, ddof: int) -> Tensor:
        """[P], 0 where a group has too few scores or equal ones."""
        squares = self._sum(self.centred**2) / (self.count - ddof).clamp(min=1)
        return torch.where(self.differs, squares.sqrt(), 0.0)

    def global_deviation(self, ddof: int) -> Tensor:
        """[], of all scored samples about their common mean; 0 where there is at most one."""
        count = len(self._scores)
        if count <= ddof:
            return torch.zeros((), dtype=torch.float64, device=self._scores.device)
        return self._scores.std(correction=ddof)


def _check(total: Tensor, group: Tensor) -> None:
    if total.dim() != 1 or total.shape != group.shape:
        raise ValueError(
            f"scores and groups are one number per sample, got {tuple(total.shape)} and {tuple(group.shape)}"
        )
    if group.dtype != torch.int64:
        raise ValueError(f"groups are whole numbers of type int64 (floats would merge large ids), got {group.dtype}")
