"""SIGTERM and Ctrl-C (SIGINT): the training step that is under way is finished, and its state is saved."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

ONE_PRESS_S = 1.0  # Ctrl-C reaches every process of a terminal, and launchers send it to their processes once more


class Interrupts:
    """Listens from its construction to `close`. Only the main thread may make one.

    The first SIGTERM or SIGINT asks for a stop. A second SIGINT, at least ``ONE_PRESS_S`` after the first, raises
    KeyboardInterrupt.

    Args:
        say: called with a line for the user, from the signal handler; default: write it to stderr.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.received = 0  # the signal's number; 0: none
        self._say = say or _to_stderr
        self._interrupted_at: float | None = None  # in seconds of `time.monotonic`
        self._before = {
            number: signal.signal(number, listener)
            for number, listener in ((signal.SIGTERM, self._terminate), (signal.SIGINT, self._interrupt))
        }

    def close(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _terminate(self, *_: Any) -> None:
        self.received = self.received or signal.SIGTERM

    def _interrupt(self, *_: Any) -> None:
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            self.received = self.received or signal.SIGINT
            self._say("Ctrl-C: the run finishes this step, saves it and stops; press Ctrl-C again to end it now")
        elif now - self._interrupted_at >= ONE_PRESS_S:
            raise KeyboardInterrupt


def _to_stderr(line: str) -> None:
    """Past Python's buffers: a handler may run in the middle of a write to them."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{line}\n".encode())
