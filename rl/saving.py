"""When a run saves its state: as often as asked, at its end, when it is told to stop, and before rewards end it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flowsteer.rl.checkpoint import Checkpoints
from flowsteer.rl.compare import TooFewScores
from flowsteer.rl.engine.base import Engine
from flowsteer.rl.interrupts import Interrupts


class Saving:
    """Keeps checkpoints when they are due.

    Args:
        checkpoints: what writes them.
        engine: knows the processes.
        interrupts: SIGTERM and Ctrl-C.
        num_steps: training steps of the whole run; there is a checkpoint after the last.
        start: the training step that the run begins with.
        every: a checkpoint after each so many steps; 0 for none.
        every_s: a checkpoint after each so many seconds, at the end of a step; 0 for none.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        engine: Engine,
        interrupts: Interrupts,
        *,
        num_steps: int,
        start: int,
        every: int,
        every_s: float,
    ) -> None:
        self.checkpoints = checkpoints
        self.stopped_by = 0  # the signal that ended the run before its last step; 0: none
        self._engine = engine
        self._interrupts = interrupts
        self._num_steps = num_steps
        self._every, self._every_s = every, every_s
        self._saved = start or -1
        self._saved_at = time.monotonic()

    def when_due(self, step: int, *, now: bool = False) -> bool:
        """Keep a checkpoint when due; returns True when the run was asked to stop (SIGTERM, Ctrl-C) and has been saved.

        ``step`` training steps are done. Every process calls it. The main one's clock says whether a checkpoint is due by
        time, so that all save together.
        """
        late = self._engine.is_main and self._every_s and time.monotonic() - self._saved_at >= self._every_s
        asked = self._engine.processes.gather_all(
            torch.tensor([[self._interrupts.received, int(late)]])
        )  # [processes, 2]
        self.stopped_by, overdue = asked.amax(dim=0).tolist()
        regular = self._every and step % self._every == 0
        if (now or self.stopped_by or overdue or regular or step == self._num_steps) and step != self._saved:
            self.checkpoints.save(step)
            self._saved, self._saved_at = step, time.monotonic()
        return bool(self.stopped_by)

    @contextmanager
    def before_failing(self, step: int) -> Iterator[None]:
        """Save the state before ``step`` when the rewards fail on too many of its samples, then pass the error on."""
        try:
            yield
        except TooFewScores:
            self.when_due(step, now=True)
            raise

    def close(self) -> None:
        """Let go of the signals."""
        self._interrupts.close()
