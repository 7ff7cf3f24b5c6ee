"""From pixels to what a vision tower wants to see, without torchvision.

How an image is made smaller changes its score, and the published rewards differ in it. So each choice is a value of
`Preprocess`, and part of the reward's fingerprint:

=================  ============================================================================================
``pil``            Pillow's bicubic on 8-bit pixels, which always antialiases and rounds: CLIP, PickScore, ImageReward
``antialias``      bicubic on floats with antialiasing, neither rounded nor clamped: torchvision >= 0.17 on tensors
``plain``          the same without antialiasing: torchvision < 0.17 on tensors, as in HPSv2's published numbers
=================  ============================================================================================

Letters: N images, S side of the square that comes out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Resize = Literal["pil", "antialias", "plain"]
Fit = Literal["crop", "crop_round", "pad", "stretch"]
RGB = tuple[float, float, float]

CLIP_MEAN: RGB = (0.48145466, 0.4578275, 0.40821073)  # Radford et al. 2021 (arXiv 2103.00020): CLIP's training images
CLIP_STD: RGB = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """uint8 [N, H, W, 3] in RGB to float32 [N, 3, S, S].

    Example: ``Preprocess(size=224)`` is what transformers' CLIPImageProcessor does without torchvision.

    Raises:
        ValueError: a resize or fit that does not exist, or a size below 1.
    """

    size: int  # S, pixels
    # crop: the shorter side becomes S and the middle is kept, the cut rounded down (transformers); crop_round: to the nearest
    # even, as torchvision; pad: the longer side becomes S, black around it; stretch: both sides become S
    fit: Fit = "crop"
    resize: Resize = "pil"
    mean: RGB = CLIP_MEAN
    std: RGB = CLIP_STD

    def __post_init__(self) -> None:
        check_resize(self.resize)
        if self.fit not in get_args(Fit):
            raise ValueError(f"fit must be {', '.join(get_args(Fit))}, got {self.fit!r}")
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")

    def __call__(self, images: np.ndarray) -> Tensor:
        """uint8 [N, H, W, 3] to float32 [N, 3, S, S], on the CPU."""
        height, width = images.shape[1:3]
        pixels = resized(images, resized_shape(height, width, self.size, self.fit), self.resize)
        if self.fit == "pad":
            pixels = padded(pixels, self.size)
        elif self.fit != "stretch":
            pixels = cropped(pixels, self.size, nearest=self.fit == "crop_round")
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def fingerprint(self) -> dict[str, str | int | float | bool]:
        """Every choice, under names of its own."""
        return {f"preprocess_{name}": value if name == "size" else str(value) for name, value in asdict(self).items()}


def check_resize(resize: str) -> None:
    """Raise ValueError for a resize that does not exist."""
    if resize not in get_args(Resize):
        raise ValueError(f"resize must be {', '.join(get_args(Resize))}, got {resize!r}")


def resized_shape(height: int, width: int, size: int, fit: Fit) -> tuple[int, int]:
    """Height and width after resizing; nothing is smaller than one pixel."""
    if fit == "stretch":
        return size, size
    if fit == "pad":  # hpsv2's open_clip: Python's round, to the nearest even
        scale = size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))
    short, long = sorted((height, width))
    longer = int(size * long / short)  # as torchvision and transformers: rounded down
    return (size, longer) if height <= width else (longer, size)


def resized(images: np.ndarray, shape: tuple[int, int], resize: Resize) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, *shape]; in [0, 1] but for what bicubic on floats overshoots."""
    if images.shape[1:3] != shape and resize == "pil":
        size = (shape[1], shape[0])
        images = np.stack(
            [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, -3).float() / 255
    if pixels.shape[-2:] != shape:
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=resize == "antialias")
    return pixels


def cropped(pixels: Tensor, size: int, *, nearest: bool) -> Tensor:
    """The middle [..., S, S] of pixels [..., H, W], neither of which is smaller.

    An odd number of rows too many leaves one more at the bottom, or, with ``nearest``, at the even place (torchvision).
    """
    rests = [side - size for side in pixels.shape[-2:]]
    top, left = [round(rest / 2) if nearest else rest // 2 for rest in rests]
    return pixels[..., top : top + size, left : left + size]


def padded(pixels: Tensor, size: int) -> Tensor:
    """Pixels [..., H, W], neither of which is larger, in the middle of black [..., S, S]; an odd row goes to the end."""
    rows, columns = (size - side for side in pixels.shape[-2:])
    return F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "Fit",
    "Preprocess",
    "Resize",
    "check_resize",
    "cropped",
    "padded",
    "resized",
    "resized_shape",
]
