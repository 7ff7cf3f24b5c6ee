"""A reward for tests: smooth, dense, and of every picture by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Brightness:
    """The mean of the pixels, 0 to 100."""

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """uint8 [B, H, W, 3] to B numbers."""
        return [float(image.mean()) / 2.55 for image in images]
