"""Pictures, masks, videos and sounds for the tiny pipelines: random, different for every row."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

CONTROL, SECOND = 100, 200
"""Added to a row's number for a further picture of the same row."""


def picture(row: int, height: int = 16, width: int | None = None) -> Image.Image:
    """Four by four fields of random colours, others for each row, which outlast any enlargement and an autoencoder's averages.

    Square unless a width is given.
    """
    colours = np.random.default_rng(row).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width or height, height), Image.Resampling.NEAREST)


def mask(row: int, height: int = 16, width: int | None = None) -> Image.Image:
    """Four by four fields, half of them white, others for each row."""
    fields = np.random.default_rng(row).permutation(16).reshape(4, 4) < 8
    white = Image.fromarray(255 * fields.astype(np.uint8))
    return white.resize((width or height, height), Image.Resampling.NEAREST)


def video(row: int, frames: int, size: int = 16) -> list[Image.Image]:
    return [picture(1000 * (row + 1) + frame, size) for frame in range(frames)]


def sound(row: int, samples: int, channels: int = 2) -> torch.Tensor:  # [channels, samples] in [-1, 1]
    """Eight levels, one after the other, which are still there after an autoencoder's averages."""
    levels = torch.rand(channels, 8, generator=torch.Generator().manual_seed(row)) * 2 - 1
    return levels.repeat_interleave(-(-samples // 8), dim=1)[:, :samples]
