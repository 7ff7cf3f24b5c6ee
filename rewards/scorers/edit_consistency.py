"""How much of a picture an edit leaves as it was: structural similarity to the source, outside of the mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
from PIL import Image

from flowsteer.rewards.scorers.batching import Fingerprint

SIGMA, RADIUS = 1.5, 5  # of the Gaussian window in pixels: 11 x 11
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # for levels 0 to 255
HALF = 128  # a mask is on from here
STRIP = 32  # pixels that are smoothed by one matrix product


class EditConsistency:
    """Structural similarity of the result to the source picture outside of the mask: 0 to 1, and 1 where nothing differs.

    The mean of the SSIM index (Wang et al. 2004, IEEE Transactions on Image Processing 13(4), equation 13) over the pixels
    outside of the mask and the three channels, no less than 0: a Gaussian window of 11 x 11 pixels with a deviation of
    1.5, K1 = 0.01, K2 = 0.03, levels 0 to 255, pictures mirrored at their edges. Of each mask pixel the source takes the
    result's colour first, so nothing that happens inside the mask has an effect, not even on windows that reach into it.

    The source and the mask are resized to the result by Lanczos' filter, as diffusers resizes them; then the mask is what is
    at least half white. A sample without a mask is compared as a whole. One without a source, or whose mask leaves no pixel,
    has no score. The prompt plays no part: an unchanged picture scores 1, so put a reward beside it that asks for the edit.

    It takes images. Of a video each frame is compared with the one source picture.
    """

    pictures = {"source": "image", "mask": "mask"}  # noqa: RUF012  (read only)
    uses_prompt = False
    score_range = (0.0, 1.0)

    def __init__(self) -> None:
        self.fingerprint: Fingerprint = {"reward": "edit_consistency", "version": "1", "pillow": PIL.__version__}

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        *,
        source: Sequence[np.ndarray | None],
        mask: Sequence[np.ndarray | None] | None = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """uint8 [B, H, W, 3], sources [h, w, 3] and masks [h, w] to B scores."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"edit_consistency scores uint8 images [B, H, W, 3], got {images.dtype} {images.shape}")
        return [self._score(*row) for row in zip(images, source, mask or [None] * len(images))]

    def _score(self, image: np.ndarray, source: np.ndarray | None, mask: np.ndarray | None) -> float | None:
        if source is None or not image.size:
            return None
        outside = np.ones(image.shape[:2], bool) if mask is None else _resized(mask, image) < HALF
        if not outside.any():
            return None
        kept = np.where(outside[..., None], _resized(source, image), image)
        return max(0.0, float(ssim_map(image, kept)[outside].mean()))


def ssim_map(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The SSIM index around each pixel, in each channel: two uint8 [H, W, C] to float64 [H, W, C] in [-1, 1]."""
    x, y = first.astype(np.float64), second.astype(np.float64)
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x * mean_x, _smooth(y * y) - mean_y * mean_y
    covariance = _smooth(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
    return luminance * (2 * covariance + C2) / (var_x + var_y + C2)


def _smooth(x: np.ndarray) -> np.ndarray:
    """The Gaussian window's mean around each pixel of [H, W, C]; beyond its edges the picture is mirrored."""
    for axis in (0, 1):
        lines = np.moveaxis(x, axis, -1)
        length = lines.shape[-1]
        padded = np.pad(lines, [(0, 0), (0, 0), (RADIUS, RADIUS + -length % STRIP)], mode="symmetric")
        strips = np.lib.stride_tricks.sliding_window_view(padded, len(BAND), axis=-1)[..., ::STRIP, :]
        means = (strips @ BAND).reshape(*lines.shape[:2], -1)[..., :length]
        x = np.moveaxis(means, -1, axis)
    return x


def _band() -> np.ndarray:
    """[STRIP + 2 RADIUS, STRIP], in each column the window's weights: a matrix product is faster than eleven sums."""
    weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    band = np.zeros((STRIP + 2 * RADIUS, STRIP))
    for place in range(STRIP):
        band[place : place + len(weights), place] = weights / weights.sum()
    return band


def _resized(picture: np.ndarray, like: np.ndarray) -> np.ndarray:
    height, width = like.shape[:2]
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


BAND = _band()

__all__ = ["EditConsistency", "ssim_map"]
