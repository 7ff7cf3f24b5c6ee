"""What losses of either family have in common: the terms per sample, their weighted mean, and the clipped ratio.

Letters: R samples (or pairs) that take part in a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowsteer.rl.types import Mean, Metrics

DISTANCES = {"reference": "kl", "old": "old_distance"}
"""What the distance to another policy is reported as."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What an algorithm makes of a batch: a loss per sample, and what to report, per sample too.

    Example: ``Terms(loss=torch.tensor([0.5, -1.0]), metrics={"ratio": torch.tensor([1.0, 1.2])})``.
    """

    loss: Tensor  # [R]
    metrics: dict[str, Tensor] = field(default_factory=dict)  # [R] each, averaged with the samples' weights


def weighted(
    terms: Terms,
    weight: Tensor,
    distances: Mapping[str, Tensor],
    anchors: Mapping[str, float],
    *,
    over: int | None = None,
) -> tuple[Tensor, Metrics]:
    """The mean of (loss + weighted distances to the anchors) [R] times weight [R]; and the metrics as means over the samples.

    ``distances`` [R] and their weights ``anchors`` go by the name of the other policy; those of weight 0 do not count.
    ``over`` is how many samples the mean is over where some that count nothing are left out; None: R.
    Raises ValueError if ``terms``, which may be a plug-in's, are not `Terms` with one number per sample, or if a metric has
    the name of one that is reported anyway.
    """
    if not isinstance(terms, Terms):
        raise ValueError(
            f"per_sample must return Terms(loss=..., metrics={{...}}) of flowsteer.rl.algorithms.losses, got a "
            f"{type(terms).__name__}"
        )
    held = {name: distances[name] for name, coefficient in anchors.items() if coefficient}
    taken = {"loss", *(DISTANCES[name] for name in held)} & terms.metrics.keys()
    if taken:
        raise ValueError(
            f"per_sample reports {', '.join(sorted(taken))} itself, which is reported anyway; choose another name"
        )
    for name, value in {"loss": terms.loss, **terms.metrics}.items():
        if value.shape != weight.shape:
            raise ValueError(
                f"per_sample must give one number per sample: {name} has the shape {tuple(value.shape)}, expected "
                f"{tuple(weight.shape)}"
            )
    pull = sum(anchors[name] * distance for name, distance in held.items())
    each = (terms.loss + pull) * weight  # [R]
    over = over or len(each)
    loss = each.mean() if over == len(each) else each.sum() / over
    count = float(weight.sum())
    reported = terms.metrics | {DISTANCES[name]: distance for name, distance in held.items()}
    return loss, {
        "loss": Mean(loss.detach() * over, float(over)),
        **{name: Mean((value.detach() * weight).sum(), count) for name, value in reported.items()},
    }


def clipped_objective(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic clipped loss per sample, and the ratio (arXiv 1707.06347, equation 7; all [R])."""
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio


def ratio_metrics(log_ratio: Tensor, clip_range: float) -> dict[str, Tensor]:
    """What to report of [R] log ratios: the ratio, its absolute logarithm, and whether it is beyond the clip range."""
    ratio = torch.exp(log_ratio)
    return {
        "ratio": ratio,
        "ratio_deviation": log_ratio.abs(),
        "clip_fraction": ((ratio - 1).abs() > clip_range).float(),
    }
