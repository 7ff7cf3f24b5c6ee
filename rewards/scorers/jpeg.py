"""How large an image is as a JPEG: the two rewards of DDPO (Black et al., 2023, section 5.1) that need no model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL
from PIL import Image, features


class JPEGIncompressibility:
    """Size of the image as a JPEG, in kilobytes (1000 bytes): more detail, higher reward.

    Quality 95 with Pillow's defaults, as DDPO measures it. Always positive: the header alone is 0.6, a photograph of
    512 x 512 has 50 to 250. Of a video, the mean over its frames. The prompt plays no part.

    Args:
        quality: of the JPEG, 1 to 95.
    """

    uses_prompt = False
    video = True

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"quality must be from 1 to 95, got {quality}; above 95 a JPEG grows without gain")
        self.quality = quality
        self.fingerprint = {
            "reward": "jpeg_incompressibility",
            "version": "1",
            "quality": quality,
            "pillow": PIL.__version__,
            "libjpeg": features.version("jpg") or "unknown",
        }

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB to B sizes in kB."""
        return [self._size_kb(image) for image in images]

    def _size_kb(self, image: np.ndarray) -> float:
        if image.ndim == 4:
            return float(np.mean([self._size_kb(frame) for frame in image]))
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000


class JPEGCompressibility:
    """Minus the size of the image as a JPEG, in kilobytes (1000 bytes): less detail, higher reward.

    Always negative; see `JPEGIncompressibility` for the measure and its range.

    Args:
        quality: of the JPEG, 1 to 95.
    """

    uses_prompt = False
    video = True

    def __init__(self, quality: int = 95) -> None:
        self._incompressibility = JPEGIncompressibility(quality)
        self.fingerprint = {**self._incompressibility.fingerprint, "reward": "jpeg_compressibility"}

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB to B negative sizes in kB."""
        return [None if size is None else -size for size in self._incompressibility(images, prompts, **columns)]
