"""What losses of either family have in common: the clipped ratio, and what is reported.

Letters: B samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowsteer.rl.types import Metrics


def clipped_objective(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic clipped loss per sample, and the ratio (arXiv 1707.06347, equation 7; all [B])."""
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio


def ratio_metrics(log_ratio: Tensor, weight: Tensor, clip_range: float) -> Metrics:
    """What to report of [B] log ratios.

    ``ratio``: mean. ``ratio_deviation``: mean absolute log ratio. ``clip_fraction``: of samples beyond the clip range.
    """
    log_ratio, count = log_ratio.detach(), float(weight.sum())
    ratio = torch.exp(log_ratio)
    return {
        "ratio": ((ratio * weight).sum(), count),
        "ratio_deviation": ((log_ratio.abs() * weight).sum(), count),
        "clip_fraction": ((((ratio - 1).abs() > clip_range) * weight).sum(), count),
    }


def loss_metrics(loss: Tensor, weight: Tensor, **per_sample: Tensor) -> Metrics:
    """The batch's loss, and means over the samples that carry a comparison, of values [B]."""
    count = float(weight.sum())
    return {
        "loss": (loss.detach() * len(weight), float(len(weight))),
        **{name: ((value.detach() * weight).sum(), count) for name, value in per_sample.items()},
    }
