"""Which optimiser, its learning rate at every update, its state in a checkpoint, and what an update reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowsteer.rewards.extras import need
from flowsteer.rl.types import Last, Mean, Metrics


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimiser, and its learning rate as a pure function of the number of updates made."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
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

    def make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of these parameters, at the first update's learning rate.

        Raises ValueError where its package is not installed, or has nothing for the parameters' device.
        """
        if self.name == "adamw8bit":
            return self._adamw8bit(parameters)
        if self.name == "adafactor":
            from transformers.optimization import Adafactor

            # an absolute learning rate: scaled by a parameter's size, a LoRA's zeros would hardly ever leave 0
            absolute = {"scale_parameter": False, "relative_step": False}
            return Adafactor(parameters, lr=self.rate(0), weight_decay=self.weight_decay, **absolute)
        # One kernel per step. PyTorch's own choice on CUDA holds several copies of all parameters for a moment (6 GB for
        # a share of FLUX's weights). On a CPU the numbers stay those of its own choice.
        fused = all(parameter.is_cuda for parameter in parameters)
        return torch.optim.AdamW(parameters, **self._of_adamw(), fused=fused or None)

    def _adamw8bit(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The one of bitsandbytes, whose two means have 8 bits, after one step of it was tried."""
        bitsandbytes = need("bitsandbytes", extra="quantization", what="optimizer.name=adamw8bit")
        trial = nn.Parameter(torch.ones(4096, device=parameters[0].device))  # the smallest that it keeps in 8 bits
        trial.grad = torch.ones_like(trial)
        try:
            bitsandbytes.optim.AdamW8bit([trial]).step()
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"optimizer.name=adamw8bit does not run on {trial.device.type} with bitsandbytes {bitsandbytes.__version__} "
                f"({reason}); use optimizer.name=adamw"
            ) from error
        return bitsandbytes.optim.AdamW8bit(parameters, **self._of_adamw())

    def _of_adamw(self) -> dict[str, Any]:
        return {"lr": self.rate(0), "betas": self.betas, "weight_decay": self.weight_decay, "eps": self.epsilon}


def saved_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What an optimiser keeps of one parameter, as tensors; a count that is a plain number becomes a scalar."""
    return {key: torch.as_tensor(value) for key, value in state.items()}


def restored_state(saved: Mapping[str, Tensor], master: Tensor, *, fused: bool) -> dict[str, Any]:
    """What `saved_state` gave, as the optimiser had it.

    Args:
        saved: by name, on the CPU.
        master: the parameter that it belongs to.
        fused: whether the optimiser counts its steps beside the parameter, as torch's fused ones do, and not on the CPU.
    """

    def one(value: Tensor) -> Any:
        if value.dim():
            return value.to(master.device)
        if not value.is_floating_point():
            return int(value)  # bitsandbytes and transformers count in plain numbers
        return value.to(master.device) if fused else value

    return {key: one(value) for key, value in saved.items()}


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
