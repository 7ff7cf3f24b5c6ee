"""Whole runs inside the test process. accelerate keeps a state per process, and a run listens to signals: both are put back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from flowsteer.rl.config import parse_config
from flowsteer.rl.run import Run
from flowsteer.rl.start import start
from flowsteer.rl.train import train


@contextmanager
def fresh_process() -> Iterator[None]:
    """Inside, this process is as if nothing had run in it before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    _reset()
    try:
        yield
    finally:
        _reset()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def finished(config: dict[str, Any], *, resume: bool = False) -> Run:
    """A run that has been trained to its end and exported."""
    with fresh_process():
        run = start(parse_config(config), resume=resume, quiet=True)
        try:
            train(run)
            run.export()
        finally:
            run.close()
    return run


def _reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
