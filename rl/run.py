"""A run: its parts in one bag. `rl/start.py` fills it, `rl/train.py` puts the parts to work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowsteer.rl.config import Config
from flowsteer.rl.engine.base import Engine
from flowsteer.rl.evaluations import Evaluations
from flowsteer.rl.films import show
from flowsteer.rl.metrics import Log, Meter
from flowsteer.rl.policy import Policy
from flowsteer.rl.report.screen import Screen
from flowsteer.rl.saving import Saving
from flowsteer.rl.scoring import LedScorer, StepScorer, StoredScorer
from flowsteer.rl.types import Algorithm, Comparison
from flowsteer.rollout.offline import PictureWorker
from flowsteer.rollout.worker import RolloutWorker


@dataclass(kw_only=True)
class Run:
    """The parts of a run, each with one job."""

    config: Config
    folder: Path
    start: int  # the training step that it begins with
    num_steps: int
    policy: Policy
    engine: Engine
    worker: RolloutWorker | PictureWorker
    scorer: StepScorer | StoredScorer | LedScorer
    compare: Callable[
        ..., tuple[list[Comparison], dict[str, float]]
    ]  # `flowsteer.rl.compare.compare`, with its settings
    algorithm: Algorithm
    meter: Meter
    log: Log
    screen: Screen
    saving: Saving
    evaluations: Evaluations | None
    export: Callable[[], Path]  # writes the result as weights that diffusers loads; every process calls it

    def report(self, step: int, statistics: dict[str, float]) -> None:
        """Write the step's line and move the progress bar."""
        values = statistics | self.meter.finish(self.engine) | {"num_updates": float(self.engine.num_updates)}
        self.log.write(step, values)
        self.screen.step(step, values)

    def evaluate(self, step: int) -> None:
        """Evaluate when due, and show the trackers what was drawn."""
        if self.evaluations is not None and (result := self.evaluations.when_due(step)) is not None:
            show(self.log.trackers, step, result.images, frame_rate=result.frame_rate)

    def close(self) -> None:
        """Let go of threads, files, processes and signals."""
        parts: tuple[Any, ...] = (self.engine, self.screen, self.log, self.scorer, self.saving)
        with ExitStack() as closing:  # each of them, also where another fails; the last one first
            for part in parts:
                closing.callback(part.close)
