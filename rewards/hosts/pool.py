"""Several workers of one reward: the images of a batch are dealt among them, and their scores come back in order.

A worker is the reward made once more, in this process or in one of its own. Which worker scores an image is a matter of who
is free; a score may not depend on that, nor on the images beside it (`flowsteer rewards certify` checks both).

Letters: B samples, N workers.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import queue
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from flowsteer.rewards.contract import SCORE, is_groupwise
from flowsteer.rewards.functions import FunctionReward
from flowsteer.rewards.hosts.threads import Threads
from flowsteer.rewards.types import Reward, Values

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Pool:
    """A reward that is several workers. It is asked from as many threads at a time, so that none of them is idle.

    Everything else that a reward can say of itself (``fingerprint``, ``pictures``, ``unscorable`` ...) the first one says.

    Args:
        name: in messages.
        workers: the same reward, N times; each is asked by one thread at a time.
        threads: of the CPU that torch uses for one call of one worker in this process; None leaves that as it is.

    Raises:
        ValueError: the workers' scores do not depend on the same things.
    """

    def __init__(self, name: str, workers: Sequence[Reward], *, threads: int | None = None) -> None:
        self.name = name
        self._workers = list(workers)
        texts = {json.dumps(dict(getattr(worker, "fingerprint", None) or {}), sort_keys=True) for worker in workers}
        if len(texts) > 1:
            raise ValueError(
                f"the {len(workers)} workers of reward {name!r} are not alike: {' and '.join(sorted(texts))}"
            )
        first = workers[0]
        self.__signature__ = inspect.signature(first.function if isinstance(first, FunctionReward) else first)
        self._free: queue.SimpleQueue[Reward] = queue.SimpleQueue()
        for worker in workers:
            self._free.put(worker)
        device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self._threads = Threads(f"worker-of-{name}", device, len(self._workers))
        if threads is not None:
            self._limit(threads)

    def __len__(self) -> int:
        """How many workers."""
        return len(self._workers)

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name == "_workers":  # not made yet
            raise AttributeError(name)
        return getattr(self._workers[0], name)

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]
    ) -> Values | Mapping[str, Values]:
        """Score B images in up to N parts; a group, which is compared, is one part.

        Raises the error of the first part that has one, when all parts have ended.
        """
        size = len(images)
        bounds = [0, size] if is_groupwise(self) or size < 2 else share(size, len(self))
        parts = [
            self._threads.submit(
                self._ask_one,
                images[low:high],
                prompts[low:high],
                {name: values[low:high] for name, values in columns.items()},
            )
            for low, high in pairwise(bounds)
        ]
        errors = [error for part in parts if (error := _error_of(part)) is not None]
        if errors:
            raise errors[0]
        return joined([part.result() for part in parts], [high - low for low, high in pairwise(bounds)])

    def close(self) -> None:
        """End the workers that want to be ended, all of them, and the threads."""
        self._threads.close()
        with contextlib.ExitStack() as closing:
            for worker in self._workers:
                close = getattr(worker, "close", None)
                if callable(close):
                    closing.callback(close)

    def _ask_one(self, images: np.ndarray, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Any:
        worker = self._free.get()  # there are as many threads as workers, so one is free
        try:
            with torch.no_grad():
                return worker(images, prompts, **columns)
        finally:
            self._free.put(worker)

    def _limit(self, threads: int) -> None:
        """Let torch use so many threads in each call of ours, and in this thread as many as before.

        The number is each thread's own, but new threads begin with the last that anybody set: hence the last line.
        """
        before, waiting = torch.get_num_threads(), [Future[None]() for _ in self._workers]

        def here(number: int) -> None:
            torch.get_num_threads()  # a thread's first use of torch sets its number, which must not come later
            torch.set_num_threads(threads)
            waiting[number].set_result(None)
            for other in waiting:  # or a quick thread would take two of these calls, and another one none
                other.result()

        for done in [self._threads.submit(here, number) for number in range(len(self))]:
            done.result()
        torch.set_num_threads(before)


def _error_of(part: Future[Any]) -> BaseException | None:
    try:
        return part.exception()
    except BaseException as error:  # it was cancelled, since the run ends
        return error


def share(size: int, count: int) -> list[int]:
    """The bounds of at most ``count`` parts of nearly equal size, none of them empty: ``share(8, 3) == [0, 2, 5, 8]``."""
    count = min(count, size)
    return [number * size // count for number in range(count + 1)]


def joined(answers: Sequence[Values | Mapping[str, Values]], sizes: Sequence[int]) -> Values | Mapping[str, Values]:
    """The answers for consecutive parts of a batch as one. A part of a score that not all answers have is missing there.

    An answer that is no list is given back alone, for `flowsteer.rewards.contract` to refuse. Raises ValueError for a list of
    another length than its part's: alone, it could have the length of the whole batch.
    """
    if len(answers) == 1:
        return answers[0]
    named = [
        {name: _listed(values) for name, values in (own if isinstance(own, Mapping) else {SCORE: own}).items()}
        for own in answers
    ]
    for answer, given, size in zip(answers, named, sizes):
        if not all(isinstance(values, list) for values in given.values()):
            return answer
        if wrong := next((len(values) for values in given.values() if len(values) != size), None):
            raise ValueError(f"{wrong} scores for {size} images, of one worker's part of the batch")
    whole: dict[str, Values] = {
        name: [value for given, size in zip(named, sizes) for value in given.get(name, [None] * size)]
        for name in dict.fromkeys(name for given in named for name in given)
    }
    return whole if any(isinstance(answer, Mapping) for answer in answers) else whole[SCORE]


def _listed(values: Any) -> Any:
    """A list of what may be an array, a tensor or an iterator; what is none of these as it is."""
    if isinstance(values, np.ndarray | torch.Tensor):
        return values.tolist()
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str | Mapping) else values


def make_all(make: Callable[[int], Reward], count: int) -> list[Reward]:
    """``make(number)`` for so many, at the same time. Closes those that were made where another one fails, and raises that."""
    with ThreadPoolExecutor(count) as executor:
        pending = [executor.submit(make, number) for number in range(count)]
    if errors := [error for future in pending if (error := future.exception()) is not None]:
        for future in pending:
            if future.exception() is None and callable(close := getattr(future.result(), "close", None)):
                close()
        raise errors[0]
    return [future.result() for future in pending]


def threads_each(workers: int, environment: Mapping[str, str] = os.environ) -> int:
    """Threads of the CPU for one of so many workers: its part of the cores, of which each process of a node has an equal part.

    Not more than OMP_NUM_THREADS, where that is set.
    """
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    part = max(cores // (processes * workers), 1)
    given = environment.get("OMP_NUM_THREADS", "")
    return min(part, int(given)) if given.isdecimal() and int(given) else part


__all__ = ["Pool", "make_all", "share", "threads_each"]
