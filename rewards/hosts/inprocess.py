"""Scoring in this process, on a thread of its own: one batch is scored while the next one is sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.types import Scores


class PendingScores:
    """Scores that are being made."""

    def __init__(self, future: Future[Scores]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Scores:
        """Wait for the scores. Raises what scoring raised, or TimeoutError after ``timeout`` seconds."""
        return self._future.result(timeout)


class Scorer:
    """Scores batches one after another on one thread, in the order in which they were submitted.

    One thread, so that a reward need not be safe for several and sees its batches in the same order in every run.
    Use it as a context manager, or call `close`.
    """

    def __init__(self, rewards: RewardSet) -> None:
        self.rewards = rewards
        # Which accelerator is the current one is a setting of each thread; a new thread would use the first.
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self._pool = ThreadPoolExecutor(1, "flowsteer-rewards", initializer=_use_device, initargs=(device,))

    def submit(
        self, images: Tensor, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> PendingScores:
        """Begin to score a batch; the arguments are `RewardSet.score`'s, copied: the caller may go on to use them."""
        kept = images.detach().to("cpu", copy=True)
        kept_columns = {name: tuple(values) for name, values in (columns or {}).items()}
        return PendingScores(self._pool.submit(self.rewards.score, kept, tuple(prompts), kept_columns))

    def close(self) -> None:
        """Finish the batch that is being scored, drop those that wait, end the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _use_device(index: int | None) -> None:
    if index is not None:
        torch.accelerator.set_device_index(index)
