"""The section ``optimizer`` of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from flowsteer.rl.config.section import Section


class OptimizerConfig(Section):
    """What makes updates of gradients; the learning rate is a pure function of the number of updates."""

    name: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """``adamw`` keeps 8 bytes for each trained weight. ``adamw8bit`` keeps 2 (bitsandbytes, ``pip install
    'flowsteer[quantization]'``; tensors below 4,096 elements keep 8). ``adafactor`` keeps a number for each row and each
    column of a weight, and no mean of the gradient (arXiv 1804.04235); under ZeRO from stage 1 on, weights lie in one row,
    so it is refused. Both are lossy for the updates: they learn along another path. They do not touch densities, so the
    first ratio stays exactly 1."""
    learning_rate: PositiveFloat = 3e-4
    """After the warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """``linear`` and ``cosine`` fall towards 0, which they would reach one update after the run's last."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    """Updates in which the learning rate rises from 0."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square. Not for ``adafactor``."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled, times the learning rate."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the mean square. Not for ``adafactor``."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of a larger norm are scaled down to it."""
