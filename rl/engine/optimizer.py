"""The optimiser's settings, its learning rate at every update, and what an update reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from flowsteer.rl.types import Last, Mean, Metrics


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate as a pure function of the number of updates made."""

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_updates: int
    total_updates: int
    betas: tuple[float, float]
    weight_decay: float
    epsilon: float
    max_grad_norm: float

    def rate(self, update: int) -> float:
        """The learning rate of update number ``update`` (0 is the first)."""
        if update < self.warmup_updates:
            return self.learning_rate * (update + 1) / self.warmup_updates
        left = 1 - (update - self.warmup_updates) / max(self.total_updates - self.warmup_updates, 1)
        factor = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[self.schedule]
        return self.learning_rate * max(factor, 0.0)

    def adamw(self, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
        """The optimiser of these parameters, at the first update's learning rate."""
        return torch.optim.AdamW(
            parameters, lr=self.rate(0), betas=self.betas, weight_decay=self.weight_decay, eps=self.epsilon
        )


@dataclass(frozen=True, kw_only=True)
class UpdateInfo:
    """What one optimiser update was like.

    Example: ``UpdateInfo(grad_norm=0.8, learning_rate=3e-4, gradient_agreement=0.02)``.
    """

    grad_norm: float  # before clipping, over all processes
    learning_rate: float
    gradient_agreement: float  # see rl/engine/agreement.py; NaN where an update is a single batch

    def metrics(self) -> Metrics:
        """As a run reports it: means over the step's updates, and the last learning rate."""
        known = not math.isnan(self.gradient_agreement)
        return {
            "grad_norm": Mean(self.grad_norm, 1),
            "learning_rate": Last(self.learning_rate),
            "gradient_agreement": Mean(self.gradient_agreement if known else 0.0, float(known)),
        }


class NotFinite(ValueError):
    """A gradient holds NaN or infinity: the update would destroy the weights."""
