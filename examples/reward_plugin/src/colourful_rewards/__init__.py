"""Two rewards for flowsteer: how colourful an image is, and how distinct from the others of its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Colourfulness:
    """How colourful an image is: the metric M3 of Hasler and Suesstrunk (2003). 0 for gray, about 100 for a garish one.

    Pointwise: each score depends on its own image only. The prompt plays no part, which `uses_prompt` says, so that the
    certificate does not ask for it.

    Args:
        weight_of_mean: what the mean distance from gray counts beside the deviation; 0.3 in the paper.
    """

    uses_prompt = False

    def __init__(self, weight_of_mean: float = 0.3) -> None:
        self.weight_of_mean = weight_of_mean
        # Kept beside a run: with another value, scores would not be comparable.
        self.fingerprint = {"reward": "colourfulness 1", "weight_of_mean": weight_of_mean}

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """uint8 [B, H, W, 3] in RGB to B scores."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
            raise ValueError(f"colourfulness is of images, uint8 [B, H, W, 3], got {images.dtype} {images.shape}")
        return [self._score(image) for image in images]

    def _score(self, image: np.ndarray) -> float:
        red, green, blue = image.astype(np.float64).reshape(-1, 3).T
        opponents = np.stack([red - green, (red + green) / 2 - blue])  # [2, pixels]
        deviation, mean = np.linalg.norm(opponents.std(1)), np.linalg.norm(opponents.mean(1))
        return float(deviation + self.weight_of_mean * mean)


class Distinctness:
    """How far the mean colour of an image is from that of the others of its group: 0 to 1.

    Groupwise: each call gets the images of one group, which all have the same prompt. One image alone cannot be compared;
    its score is missing (None), which is not 0.
    """

    groupwise = True
    uses_prompt = False

    def __init__(self) -> None:
        self.fingerprint = {"reward": "distinctness 1"}

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [G, H, W, 3] in RGB to G scores."""
        if len(images) < 2:
            return [None] * len(images)
        means = images.reshape(len(images), -1, 3).mean(1) / 255  # [G, 3]
        distances = np.linalg.norm(means[:, None] - means[None], axis=-1) / np.sqrt(3)  # [G, G]
        return (distances.sum(1) / (len(images) - 1)).tolist()
