"""What a run reports: JSON lines always, TensorBoard and Weights & Biases where installed.

Each number carries its own reduction (`Mean`, `Max`, `Last`), so a mean is over samples and never an average of averages.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate.tracking import TensorBoardTracker, WandBTracker
from torch import Tensor

from flowsteer.rl.engine.base import Engine
from flowsteer.rl.engine.optimizer import UpdateInfo
from flowsteer.rl.types import Last, Max, Mean, Metrics


class Meter:
    """Collects one training step's numbers on this process."""

    def __init__(self) -> None:
        self._metrics: dict[str, Mean | Max | Last] = {}
        self._seconds: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        """Add what a loss term or an update reports."""
        for name, value in metrics.items():
            known = self._metrics.get(name)
            self._metrics[name] = value if known is None else known.plus(value)  # pyright: ignore[reportArgumentType]

    def add_update(self, update: UpdateInfo | None) -> None:
        """Note an optimiser update; None is a pass in between."""
        if update is not None:
            self.add(update.metrics())

    @contextmanager
    def timing(self, act: str) -> Iterator[None]:
        """Add the wall time of the block to the act's seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[act] = self._seconds.get(act, 0.0) + time.perf_counter() - start

    def finish(self, engine: Engine) -> dict[str, float]:
        """The step's numbers, each reduced over all batches and processes; the meter is empty afterwards."""
        means = {name: value for name, value in sorted(self._metrics.items()) if isinstance(value, Mean)}
        largest = {name: value for name, value in sorted(self._metrics.items()) if isinstance(value, Max)}
        names = all_names(means, engine.gather)  # a process may lack one that another has
        pairs = [means.get(name, Mean(0.0, 0.0)) for name in names]
        local = torch.tensor([[float(total), count] for total, count in pairs], dtype=torch.float64).reshape(-1, 2)
        sums = engine.gather(local[None]).sum(0)  # [names, 2]
        values = {name: float(total / count) for name, (total, count) in zip(names, sums) if count > 0}
        if names := all_names(largest, engine.gather):
            own = [float(largest[name].value) if name in largest else -math.inf for name in names]
            values |= dict(zip(names, engine.gather(torch.tensor([own], dtype=torch.float64)).amax(0).tolist()))
        values |= {name: value.value for name, value in self._metrics.items() if isinstance(value, Last)}
        values |= {f"seconds/{act}": seconds for act, seconds in self._seconds.items()}
        self._metrics, self._seconds = {}, {}
        return values


class Log:
    """The run's ``metrics.jsonl`` and its trackers; only the main process writes.

    Args:
        folder: of the run.
        trackers: ``tensorboard`` and ``wandb``; one that is not installed is named once and left out.
        start: the training step that the run goes on with; lines from there on are dropped, for they will be made again.
        is_main: whether this process writes.
        config: the resolved configuration, for the trackers.
    """

    def __init__(
        self, folder: Path, *, trackers: Sequence[str], start: int, is_main: bool, config: dict[str, Any]
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._file: TextIO | None = None
        self.trackers: list[TensorBoardTracker | WandBTracker] = []
        self.missing_trackers: list[str] = []
        if not is_main:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] < start]
        temporary = self.path.with_suffix(".part")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        for name in trackers:
            if importlib.util.find_spec(name) is None:
                self.missing_trackers.append(name)
                continue
            tracker = (
                TensorBoardTracker("tensorboard", folder, purge_step=start)
                if name == "tensorboard"
                else WandBTracker("flowsteer", dir=str(folder), name=folder.name, id=_run_id(folder), resume="allow")
            )
            tracker.start()
            if name == "wandb":
                tracker.store_init_configuration(config)
            self.trackers.append(tracker)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line; numbers that are not finite are written as null."""
        if self._file is None:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for tracker in self.trackers:
            tracker.log({key: value for key, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        """Flush everything."""
        if self._file is not None:
            self._file.close()
        for tracker in self.trackers:
            tracker.finish()


def _run_id(folder: Path) -> str:
    """Weights & Biases' id of the run: the same for a resumed run, kept in its folder."""
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def all_names(names: Iterable[str], gather: Callable[[Tensor], Tensor]) -> list[str]:
    """The names that any process has, sorted: every process calls it and gets the same.

    A reward that fails on a whole batch gives none of its parts there, so processes may know different ones.
    """
    text = "\n".join(sorted(set(names))).encode()
    width = int(gather(torch.tensor([len(text)])).max())
    row = torch.zeros((1, width), dtype=torch.uint8)
    row[0, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    rows = [bytes(row.tolist()).rstrip(b"\0").decode() for row in gather(row)]
    return sorted({name for row in rows for name in row.split("\n") if name})
