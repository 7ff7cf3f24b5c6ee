"""Scoring beside sampling: every reward has a thread of its own, so one batch is scored while the next one is sampled."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch
from torch import Tensor

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.contract import Answer, Shown, failed
from flowsteer.rewards.hosts.pool import Pool
from flowsteer.rewards.hosts.threads import Threads
from flowsteer.rewards.pictures import Picture
from flowsteer.rewards.types import Scores

logger = logging.getLogger(__name__)

STUCK_AFTER_S = 10.0  # how long the end of a run waits for a batch that is being scored


class RewardTimeout(TimeoutError):
    """A reward did not answer in time; it may be stuck for good."""


class PendingScores:
    """Scores that are being made."""

    def __init__(self, rewards: RewardSet, batch: Future[Shown], answers: Mapping[str, Future[Answer]]) -> None:
        self._rewards = rewards
        self._batch = batch
        self._answers = answers

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return all(future.done() for future in self._answers.values())

    def result(self, timeout: float | None = None) -> Scores:
        """Wait for the scores, at most ``timeout`` seconds: those of a reward that is not ready by then are missing.

        Raises what scoring raised.
        """
        end = None if timeout is None else time.monotonic() + timeout
        batch, answers = self._batch.result(), {}
        for name, future in self._answers.items():
            wait([future], timeout=None if end is None else max(end - time.monotonic(), 0.0))
            try:
                if not future.done():
                    future.cancel()  # where it has not begun, it never will
                    raise RewardTimeout(f"no answer in the time that the run gives its rewards; {name!r} may be stuck")
                answers[name] = future.result()
            except RewardTimeout as late:
                logger.warning("reward %r: %s", name, late)
                answers[name] = failed(late, len(batch))
        return self._rewards.combine(batch, answers)


def collect(pending: Sequence[PendingScores], timeout: float | None) -> list[Scores]:
    """The scores of several batches, in order. All of them together are waited for at most ``timeout`` seconds."""
    end = None if timeout is None else time.monotonic() + timeout
    return [scores.result(None if end is None else max(end - time.monotonic(), 0.0)) for scores in pending]


class Scorer:
    """Scores batches in the order in which they were submitted, each reward on one thread of its own.

    One thread, so that a reward need not be safe for several and sees its batches in the same order in every run; of its own,
    so that a slow reward in another process does not keep the others waiting. One with several workers (`pool.py`) has as many
    threads, and so several batches at a time. Use it as a context manager, or call `close`.
    """

    def __init__(self, rewards: RewardSet) -> None:
        self.rewards = rewards
        # Which accelerator is the current one is a setting of each thread; a new thread would use the first.
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        counts = {name: len(reward) if isinstance(reward, Pool) else 1 for name, reward in rewards.rewards.items()}
        self._threads = {
            name: Threads(f"rewards-{name}", device, count) for name, count in {"to-pixels": 1, **counts}.items()
        }

    def submit(
        self,
        images: Tensor,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
        group: Sequence[int] | None = None,
        pictures: Mapping[str, Sequence[Picture | None]] | None = None,
    ) -> PendingScores:
        """Begin to score a batch; the arguments are `RewardSet.score`'s, copied: the caller may go on to use them."""
        kept = images.detach().to("cpu", copy=True)
        kept_columns = {name: tuple(values) for name, values in (columns or {}).items()}
        kept_group = None if group is None else tuple(group)
        rest = (kept_columns, kept_group, dict(pictures or {}))
        batch = self._threads["to-pixels"].submit(Shown.of, kept, tuple(prompts), *rest)
        answers = {name: self._threads[name].submit(self._ask, name, batch) for name in self.rewards.rewards}
        return PendingScores(self.rewards, batch, answers)

    def _ask(self, name: str, batch: Future[Shown]) -> Answer:
        return self.rewards.ask(name, batch.result())

    def close(self) -> None:
        """Finish the batches that are being scored, drop those that wait, end the threads; one that is stuck is left behind."""
        for thread in self._threads.values():
            thread.close()
        for thread in self._threads.values():
            thread.join(STUCK_AFTER_S)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
