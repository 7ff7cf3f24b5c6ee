"""Small pictures in 8 bits: what a report, a sheet and a tracker show of an evaluation's pictures.

Letters: P pictures, T frames; of sound C channels and N samples in time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowsteer.rl.sounds import envelopes

RATE = 16.0  # frames a second of a video where a pipeline names none
SIDE = 512  # pixels of a picture's width; the report shows a whole line of twelve in 1800
PREVIEW_FRAMES, PREVIEW_WIDTH = 32, 256  # of videos: longer ones skip frames, wider ones are reduced


def thumbnails(images: Tensor) -> tuple[Tensor, int]:
    """Pictures [P, 3, H, W] or videos [P, T, 3, H, W] in [0, 1], or sound [P, C, N], as uint8 pictures or videos.

    Wider pictures are reduced to 512 pixels; videos are previews; of sound there is its loudness over time. Also says which
    part of a video's frames is there, 1 in how many.
    """
    step = 1
    if images.dim() == 3:
        images = envelopes(images)
    elif images.dim() == 5:
        images, step = preview(images)
    elif images.shape[-1] > SIDE:
        images = _reduced(images, SIDE)
    return (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8), step


def preview(videos: Tensor) -> tuple[Tensor, int]:
    """The videos with so many frames and pixels that a preview needs, and which part of the frames it has, 1 in how many."""
    step = -(-videos.shape[1] // PREVIEW_FRAMES)  # rounded up
    shown = videos[:, ::step]
    if videos.shape[-1] > PREVIEW_WIDTH:
        shown = _reduced(shown.flatten(0, 1), PREVIEW_WIDTH).unflatten(0, shown.shape[:2])
    return shown, step


def _reduced(pictures: Tensor, width: int) -> Tensor:
    size = (max(1, round(pictures.shape[-2] * width / pictures.shape[-1])), width)
    return F.interpolate(pictures, size=size, mode="bilinear", antialias=True)
