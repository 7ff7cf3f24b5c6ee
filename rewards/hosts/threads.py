"""Threads that make calls in the order in which they were submitted."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch


class Threads:
    """Some threads that share one queue of calls. They do not keep the program alive: a reward that is stuck may not either.

    On a CUDA device each thread has a stream of its own, so what it computes runs beside the sampler and does not wait for it.
    No event is needed between the two: pictures come as arrays on the CPU, which are complete, and so do the scores that
    leave a thread. What was queued before the threads began, such as a model's weights, their streams wait for once.

    Args:
        name: of the threads.
        device: index of the accelerator that they use, which is a setting of each thread; None where there is none.
        count: how many threads.
    """

    def __init__(self, name: str, device: int | None, count: int = 1) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # no call enters the queue behind the ends
        self._threads = [
            threading.Thread(target=self._run, args=(device,), name=f"flowsteer-{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queue a call. After `close` it is cancelled."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                future.cancel()
            else:
                self._calls.put((future, lambda: function(*arguments)))
        return future

    def close(self) -> None:
        """Cancel the calls that wait, and let the threads end after those that they are making."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._calls.put(None)

    def join(self, timeout: float) -> None:
        """Wait for the end of all threads, each at most so many seconds."""
        for thread in self._threads:
            thread.join(timeout)

    def _run(self, device: int | None) -> None:
        with own_stream(device):
            while (item := self._calls.get()) is not None:
                future, call = item
                if self._closed:
                    future.cancel()
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(call())
                except BaseException as error:  # handed on to whoever waits for it
                    future.set_exception(error)


def own_stream(device: int | None) -> contextlib.AbstractContextManager[Any]:
    """Make the accelerator this thread's, and on CUDA a new stream its current one inside the context."""
    if device is not None:
        torch.accelerator.set_device_index(device)
    if device is None or not torch.cuda.is_available():
        return contextlib.nullcontext()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    return torch.cuda.stream(stream)
