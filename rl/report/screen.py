"""What a person sees in the terminal, or finds in a log file, while a run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from flowsteer.rl.intervals import Estimate

_SHOWN = ("reward_mean", "gradient_agreement", "kl", "clip_fraction", "grad_norm")


class Screen:
    """A progress bar above the numbers that matter, and a line for each evaluation. In a file, a line for each step.

    A step has the number that it has in ``metrics.jsonl``, from 0. The bar, evaluations and checkpoints count the steps that
    are done: ``step 3 (4/20 done)``, and then ``evaluation after 4 steps``.

    Args:
        quiet: print nothing (processes besides the main one, tests).
        start: the training step that the run goes on with.
        num_steps: where it ends.
        console: where to print; the terminal, or what the output is redirected to.
    """

    def __init__(self, *, quiet: bool, start: int, num_steps: int, console: Console | None = None) -> None:
        self._console = console or Console(quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("training", total=num_steps, completed=start)
        shown = self._console.is_terminal and not quiet
        self._live = Live(console=self._console, refresh_per_second=4) if shown else None
        self._numbers = ""
        self._told_of_equal_scores = False
        self._num_steps = num_steps

    def opening(self, facts: dict[str, str], *, origin: str, missing_trackers: list[str]) -> None:
        """Say what the run is going to do, in quantities that were derived, and from where it starts (``origin``)."""
        table = Table.grid(padding=(0, 2))
        for name, fact in facts.items():
            table.add_row(Text(name, style="bold"), Text(fact))
        self._console.print(table)
        self._line(origin)
        for name in missing_trackers:
            self._console.print(f"{name} is not installed: its log is left out (metrics.jsonl has everything)")

    def step(self, step: int, values: dict[str, float]) -> None:
        """A training step is over."""
        numbers = "  ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)
        missing = values.get("reward_missing", 0)
        if missing:
            numbers += f"  missing scores {missing:.0f}"
        if values.get("zero_deviation_fraction") == 1 and not self._told_of_equal_scores:
            self._told_of_equal_scores = True
            self._line(
                f"step {step}: in each group all samples have the same total score, so there is nothing to compare"
            )
        if self._live is None:
            self._line(f"step {step} ({step + 1}/{self._num_steps} done)  {numbers}")
            return
        self._progress.update(self._task, completed=step + 1)
        self._numbers = numbers
        self._below(numbers)

    @contextmanager
    def evaluating(self, step: int) -> Iterator[Callable[[int], None]]:
        """Show that an evaluation is under way; call what it gives with the number of images that are done."""
        self._below(f"evaluating after {_steps(step)}")
        yield lambda done: self._below(f"evaluating after {_steps(step)}: {done} images")
        self._below(self._numbers)

    def evaluation(self, step: int, summary: dict[str, Estimate]) -> None:
        """Print an evaluation's means with their 95 % intervals."""
        numbers = "  ".join(
            f"{name} {own.mean:.3f} ({own.low:.3f} to {own.high:.3f})"
            if not math.isnan(own.mean)
            else f"{name} no score"
            for name, own in summary.items()
        )
        self._line(f"evaluation after {_steps(step)}  {numbers}")

    def print(self, text: str) -> None:
        """Something of its own."""
        self._line(text)

    def close(self) -> None:
        """Stop the bar."""
        if self._live is not None and self._live.is_started:
            self._live.stop()

    def _line(self, text: str) -> None:
        """As it is: names may hold square brackets, and a line in a file is not to be broken."""
        self._console.print(Text(text), soft_wrap=True)

    def _below(self, text: str) -> None:
        """The text below the bar."""
        if self._live is not None:
            self._live.update(Group(self._progress, Text(text, style="dim")))
            self._live.start()


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"
