"""What the rewards that are neural networks have in common: their batches, their prompts, their device.

Letters: B samples, T frames, N images of one pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

Fingerprint = dict[str, str | int | float | bool]
Value = TypeVar("Value")


class PromptMemory(Generic[Value]):
    """What was computed of a prompt, kept for the next batch; the least recently used goes first.

    Each prompt is computed by itself, so that the answer does not depend on the others. Several threads may ask.

    Args:
        compute: of one prompt.
        size: how many prompts are kept.
    """

    def __init__(self, compute: Callable[[str], Value], size: int = 4096) -> None:
        self._compute, self._size = compute, size
        self._kept: OrderedDict[str, Value] = OrderedDict()
        self._lock = Lock()  # tokenizers are no more thread-safe than the dictionary is

    def __call__(self, prompts: Sequence[str]) -> list[Value]:
        """One value per prompt, in order."""
        with self._lock:
            for prompt in dict.fromkeys(prompts):
                if prompt not in self._kept:
                    self._kept[prompt] = self._compute(prompt)
                self._kept.move_to_end(prompt)
            values = [self._kept[prompt] for prompt in prompts]
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return values


def check_images(name: str, images: np.ndarray, prompts: Sequence[str]) -> None:
    """Raise ValueError, with the reward's name, for anything but uint8 [B, H, W, 3] or [B, T, H, W, 3] and B prompts."""
    if images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] != 3 or len(images) != len(prompts):
        raise ValueError(
            f"{name} scores uint8 images [B, H, W, 3] or [B, T, H, W, 3] with B prompts, got {images.dtype} "
            f"{images.shape} with {len(prompts)} prompts"
        )


def check_batch_size(batch_size: int) -> int:
    """The number, if it is one."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return batch_size


def check_max_tokens(max_tokens: int | None) -> None:
    """Raise ValueError where a prompt's start and end have no room; how many a model takes, its weights tell."""
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens must be at least 2, got {max_tokens}")


@torch.no_grad()
def score_frames(
    score: Callable[[np.ndarray, Sequence[str]], Tensor],
    images: np.ndarray,
    prompts: Sequence[str],
    *,
    name: str,
    batch_size: int,
) -> list[float | None]:
    """Scores of B images, or of B videos as the mean over their frames, a few frames per pass.

    Args:
        score: uint8 [N, H, W, 3] and N prompts to [N].
        images: uint8 [B, H, W, 3] or [B, T, H, W, 3].
        prompts: B texts.
        name: of the reward, for the message.
        batch_size: the largest N.

    Raises:
        ValueError: images of another kind, or another number of prompts.
    """
    check_images(name, images, prompts)
    frames = images if images.ndim == 5 else images[:, None]
    if not frames.size:
        return [None] * len(images)  # no samples, or videos without frames
    num_frames = frames.shape[1]
    flat = frames.reshape(-1, *frames.shape[2:])
    texts = [prompt for prompt in prompts for _ in range(num_frames)]
    values: list[float] = []
    for start in range(0, len(flat), batch_size):
        rows = slice(start, start + batch_size)
        values += score(flat[rows], texts[rows]).float().tolist()
    return np.reshape(values, (-1, num_frames)).mean(1).tolist()


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; of None, an accelerator where there is one. Raises ValueError where it cannot be used."""
    if device is not None:
        try:
            torch.empty(0, device=device)  # before weights are read for nothing
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
        return torch.device(device)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def libraries() -> Fingerprint:
    """The versions of what computes a score."""
    import PIL
    import transformers

    return {
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "pillow": PIL.__version__,  # it resizes
    }


__all__ = [
    "Fingerprint",
    "PromptMemory",
    "check_batch_size",
    "check_images",
    "check_max_tokens",
    "libraries",
    "pick_device",
    "score_frames",
]
