"""How different an image is from the others of its prompt: rewards of a whole group.

Such a reward is shown exactly one group per call, the images of one prompt, and says of each how far from the others it
is on the mean. Alone it pulls a policy away from its prompt; give it a small weight beside a reward that reads the prompt.

Letters: G images of the group, T frames, S side of the shrunk images, P width of CLIP's joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowsteer.rewards.scorers.batching import Fingerprint, check_batch_size, check_images
from flowsteer.rewards.scorers.clip_model import load_clip
from flowsteer.rewards.scorers.preprocess import Resize


class PixelDiversity:
    """How different the image's pixels are from those of its group's other images: 0 (all equal) to 1.

    The mean over the others of the root mean square difference, after averaging down to a small square. Of videos, over
    their corresponding frames.

    Args:
        size: side of that square in pixels: how fine a difference counts.

    Raises:
        ValueError: a size below 1.
    """

    groupwise = True
    uses_prompt = False
    video = True

    def __init__(self, size: int = 32) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        self.size = size
        self.fingerprint: Fingerprint = {"reward": "pixel_diversity", "version": "1", "size": size}

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [G, H, W, 3] or [G, T, H, W, 3] in RGB of one prompt to G scores; None of an image that is alone."""
        check_group("pixel_diversity", images, prompts)
        if images.shape[0] < 2:
            return [None] * len(images)
        frames = torch.from_numpy(np.ascontiguousarray(images)).reshape(-1, *images.shape[-3:])
        small = F.adaptive_avg_pool2d(frames.movedim(-1, 1).float() / 255, self.size)  # [G T, 3, S, S]
        flat = small.reshape(len(images), -1)
        distances = torch.stack([(flat - one).square().mean(1).sqrt() for one in flat])  # [G, G]
        return mean_of_others(distances)


class ClipDiversity:
    """How different CLIP finds the image from its group's other images: cosine distance, 0 (all alike) to 2.

    The mean over the others; images of one prompt have about 0.05 to 0.4. Of videos, over their corresponding frames.

    Args:
        weights: folder, or ``owner/repository[@revision]`` of the hub.
        sha256: what the weights' hash must be; ``fingerprint`` reports it.
        resize: to the square that is scored, the image's middle: ``pil`` as published; ``antialias`` or ``plain`` on floats.
        device: where it runs; None: an accelerator where there is one.
        batch_size: images in one pass.

    Raises:
        ValueError: weights that are not there or are something else, or an option that does not exist.
    """

    groupwise = True
    uses_prompt = False
    video = True

    def __init__(
        self,
        weights: str = "openai/clip-vit-large-patch14",
        *,
        sha256: str | None = None,
        resize: Resize = "pil",
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.batch_size = check_batch_size(batch_size)
        self.clip, of_clip = load_clip(weights, None, sha256=sha256, resize=resize, device=device)
        del of_clip["tokenizer_sha256"], of_clip["max_tokens"]  # the prompt plays no part
        self.fingerprint: Fingerprint = {"reward": "clip_diversity", "version": "1", **of_clip}

    @torch.no_grad()
    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [G, H, W, 3] or [G, T, H, W, 3] in RGB of one prompt to G scores; None of an image that is alone."""
        check_group("clip_diversity", images, prompts)
        if images.shape[0] < 2:
            return [None] * len(images)
        frames = images.reshape(-1, *images.shape[-3:])
        starts = range(0, len(frames), self.batch_size)
        vectors = torch.cat([self.clip.images(frames[start : start + self.batch_size]) for start in starts])
        vectors = vectors.unflatten(0, (len(images), -1))  # [G, T, P]
        return mean_of_others(1 - torch.einsum("itp,jtp->ijt", vectors, vectors).mean(2))


def check_group(name: str, images: np.ndarray, prompts: Sequence[str]) -> None:
    """Raise ValueError for images of another kind, or of several prompts."""
    check_images(name, images, prompts)
    if len(set(prompts)) > 1:
        raise ValueError(f"{name} compares the images of one prompt, got {len(set(prompts))} prompts in one call")


def mean_of_others(distances: Tensor) -> list[float | None]:
    """Of each row of [G, G], the mean without the diagonal."""
    size = len(distances)
    others = ~torch.eye(size, dtype=torch.bool)
    return distances.cpu()[others].view(size, size - 1).mean(1).tolist()


__all__ = ["ClipDiversity", "PixelDiversity", "check_group", "mean_of_others"]
