"""What a run says on the screen."""

from __future__ import annotations

import io

from rich.console import Console

from flowsteer.rl.intervals import Estimate
from flowsteer.rl.report.screen import Screen


def screen() -> tuple[Screen, io.StringIO]:
    """A screen that writes into a file, as under a job's scheduler."""
    file = io.StringIO()
    return Screen(quiet=False, start=0, num_steps=3, console=Console(file=file, width=200)), file


def test_equal_scores_in_all_groups_are_told_once():
    own, file = screen()
    for step, fraction in enumerate((0.5, 1.0, 1.0)):
        own.step(step, {"reward_mean": 1.0, "zero_deviation_fraction": fraction})
    lines = file.getvalue().splitlines()
    assert [line for line in lines if "same" in line] == [
        "step 1: in each group all samples have the same total score, so there is nothing to compare"
    ]
    assert len(lines) == 4


def test_an_evaluation_without_a_score_says_so():
    own, file = screen()
    nan = float("nan")
    own.evaluation(0, {"total": Estimate(nan, nan, nan), "shape": Estimate(0.5, 0.4, 0.6)})
    assert file.getvalue() == "evaluation after 0 steps  total no score  shape 0.500 (0.400 to 0.600)\n"
