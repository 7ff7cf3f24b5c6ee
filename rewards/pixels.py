"""What a reward sees of an image, 8-bit pixels, rounded once; and what it hears of a sound.

Letters: B samples, T frames; of sound C channels and N samples in time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RANGE_TOLERANCE = 1e-2  # rounding of a half-precision decoder beyond [0, 1]; an image in [-1, 1] is far outside


def as_shown(images: Tensor) -> np.ndarray:
    """What rewards are given: pixels as `to_uint8`; sound [B, C, N] in float32, cut off at -1 and 1 as in a WAV file."""
    return images.detach().float().clamp(-1, 1).cpu().numpy() if images.dim() == 3 else to_uint8(images)


def to_uint8(images: Tensor) -> np.ndarray:
    """Float [B, 3, H, W] or [B, T, 3, H, W] in [0, 1] to uint8 [B, H, W, 3] or [B, T, H, W, 3], rounded, not cut off.

    The same pixels as diffusers' ``numpy_to_pil``, so a reward sees what a user of the pipeline sees. What is uint8 already
    only changes its axes.

    Raises:
        ValueError: another shape, another type, or values outside [0, 1].
    """
    check_images(images)
    if images.dim() == 3:
        raise ValueError("sound has no pixels")
    if images.dtype == torch.uint8:
        return images.detach().movedim(-3, -1).contiguous().cpu().numpy()
    if images.numel():
        low, high = (value.item() for value in torch.aminmax(images))
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
            raise ValueError(
                f"images must lie in [0, 1], got values from {low:.3g} to {high:.3g}; rescale what the decoder gives"
            )
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).contiguous().cpu().numpy()


def check_images(images: Tensor) -> None:
    """Raise ValueError unless the images are floats or uint8 [B, 3, H, W] or [B, T, 3, H, W], or float sound [B, C, N]."""
    pictures = images.dim() in (4, 5) and images.shape[-3] == 3
    numbers = images.is_floating_point() or (pictures and images.dtype == torch.uint8)
    if not (pictures or images.dim() == 3) or not numbers:
        raise ValueError(
            "images must be floats or uint8 [B, 3, H, W] or [B, T, 3, H, W], or float sound [B, C, N], got "
            f"{images.dtype} of the shape {tuple(images.shape)}"
        )
