"""What a person sees in the terminal while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_SHOWN = ("reward_mean", "gradient_agreement", "kl", "clip_fraction", "grad_norm")


class Screen:
    """A progress bar with the numbers that matter, and tables of evaluations.

    Args:
        quiet: print nothing (processes besides the main one, tests).
        start: the training step that the run goes on with.
        num_steps: where it ends.
    """

    def __init__(self, *, quiet: bool, start: int, num_steps: int) -> None:
        self._console = Console(quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=quiet,
        )
        self._task = self._progress.add_task("training", total=num_steps, completed=start, numbers="")
        self._first = start
        self._started = False

    def opening(self, facts: dict[str, str], *, missing_trackers: list[str]) -> None:
        """Say what the run is going to do, in quantities that were derived."""
        table = Table.grid(padding=(0, 2))
        for name, fact in facts.items():
            table.add_row(f"[bold]{name}", fact)
        self._console.print(table)
        if self._first:
            self._console.print(f"continuing after step {self._first}")
        for name in missing_trackers:
            self._console.print(f"{name} is not installed: its log is left out (metrics.jsonl has everything)")

    def step(self, step: int, values: dict[str, float]) -> None:
        """A training step is over."""
        if not self._started:
            self._progress.start()
            self._started = True
        numbers = "  ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)
        missing = values.get("reward_missing", 0)
        if missing:
            numbers += f"  missing scores {missing:.0f}"
        self._progress.update(self._task, completed=step + 1, numbers=numbers)

    @contextmanager
    def evaluating(self, step: int) -> Iterator[Callable[[int], None]]:
        """Show that an evaluation is under way."""
        status = self._console.status(f"evaluating at step {step}") if not self._started else None
        if status:
            status.start()
        try:
            yield lambda done: status.update(f"evaluating at step {step}: {done} images") if status else None
        finally:
            if status:
                status.stop()

    def evaluation(self, step: int, summary: dict[str, tuple[float, float]]) -> None:
        """Print an evaluation's means with their 95 % intervals."""
        numbers = "  ".join(f"{name} {mean:.3f} ± {half:.3f}" for name, (mean, half) in summary.items())
        self._console.print(f"[bold]evaluation at step {step}[/bold]  {numbers}")

    def print(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text)

    def close(self) -> None:
        """Stop the bar."""
        if self._started:
            self._progress.stop()
