"""The evaluations of a run: when they are due, and the files that keep them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flowsteer.rl.checkpoint import write_whole
from flowsteer.rl.engine.base import Engine
from flowsteer.rl.evaluate import Evaluation, save_grid
from flowsteer.rl.films import save_film_grid
from flowsteer.rl.policy import Policy
from flowsteer.rl.report.screen import Screen


class Evaluations:
    """Draws fixed prompts with the best policy when due, and keeps a table and a sheet of pictures of each evaluation.

    Of videos there are two sheets: their first frames, and one that plays.

    Args:
        folder: of the run; files go to ``evaluations/``.
        draw: `flowsteer.rl.evaluate.evaluate` with all its settings, but for ``progress``.
        policy: whose best variant is evaluated.
        engine: knows the processes.
        screen: shows the result.
        num_steps: training steps of the whole run; before the first and after the last there is an evaluation.
        every: one after each so many steps; 0 for none in between.
    """

    def __init__(
        self,
        folder: Path,
        draw: Callable[..., Evaluation],
        policy: Policy,
        engine: Engine,
        screen: Screen,
        *,
        num_steps: int,
        every: int,
    ) -> None:
        self._folder = folder / "evaluations"
        self._draw, self._policy, self._engine, self._screen = draw, policy, engine, screen
        self._num_steps, self._every = num_steps, every

    def when_due(self, step: int) -> Evaluation | None:
        """Evaluate after ``step`` training steps, unless that has been kept already. Every process calls it."""
        regular = self._every and step % self._every == 0
        if not (step in (0, self._num_steps) or regular) or self._file(step).exists():
            return None
        with self._policy.using(self._policy.best), self._screen.evaluating(step) as progress:
            result = self._draw(progress=progress)
        if self._engine.is_main:
            self._keep(step, result)
        self._engine.wait()
        return result

    def drop_after(self, step: int) -> None:
        """Remove evaluations of weights that are not there any more: a resumed run makes them again."""
        for table in self._folder.glob("step_*.json"):
            if int(table.stem.split("_")[1]) > step:
                table.unlink()

    def _file(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}.json"

    def _keep(self, step: int, result: Evaluation) -> None:
        file = self._file(step)
        file.parent.mkdir(exist_ok=True)
        save_grid(result.images, file.with_suffix(".png"))
        if result.images.dim() == 5:
            save_film_grid(result.images, file.with_suffix(".webp"), frame_rate=result.frame_rate)
        write_whole(file, json.dumps({"step": step, **result.table()}, indent=1))
        self._screen.evaluation(step, result.summary())
