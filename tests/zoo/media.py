"""Pictures, masks, videos and sounds for the tiny pipelines: random, different for every row."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

CONTROL, SECOND = 100, 200
"""Added to a row's number for a further picture of the same row."""


def picture(row: int, size: int = 16) -> Image.Image:
    """An RGB picture of 16 patches of random colour, which are still there after an autoencoder's averages."""
    patches = np.random.default_rng(row).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((size, size), Image.Resampling.NEAREST)


def mask(row: int, size: int = 16) -> Image.Image:
    """White in the left part of the picture, which is wider in the next row."""
    area = np.zeros((size, size), dtype=np.uint8)
    area[:, : size // 4 * (1 + row % 3)] = 255
    return Image.fromarray(area)


def video(row: int, frames: int, size: int = 16) -> list[Image.Image]:
    return [picture(1000 * (row + 1) + frame, size) for frame in range(frames)]


def sound(row: int, samples: int, channels: int = 2) -> torch.Tensor:  # [channels, samples] in [-1, 1]
    """Eight levels, one after the other, which are still there after an autoencoder's averages."""
    levels = torch.rand(channels, 8, generator=torch.Generator().manual_seed(row)) * 2 - 1
    return levels.repeat_interleave(-(-samples // 8), dim=1)[:, :samples]
