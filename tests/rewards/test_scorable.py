"""Prompts that a reward cannot score are named with the reason before the run, and where a score is missing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.scorers.composition import CompositionReward
from flowsteer.rewards.scorers.world import BACKGROUNDS, COLORS, SHAPES
from flowsteer.rl.command.main import app
from flowsteer.rl.config import parse_config
from flowsteer.rl.scoring import check_scorable
from flowsteer.rl.start import start
from flowsteer.rollout.data.batches import step_batches
from flowsteer.rollout.data.prompts import read_prompts

Make = Callable[..., dict[str, Any]]


class Picky:
    """Scores prompts of at most three letters."""

    def unscorable(self, prompts):
        assert len(prompts) == len(set(prompts)), "each prompt is asked for once"
        return {prompt: f"it has {len(prompt)} letters" for prompt in prompts if len(prompt) > 3}

    def __call__(self, images, prompts, **columns):
        return [None if len(prompt) > 3 else 1.0 for prompt in prompts]


def test_a_missing_score_says_why():
    scores = RewardSet([("picky", Picky(), 1.0)]).score(torch.zeros(3, 3, 4, 4), ["cat", "horse", "cat"])
    assert scores.failures == {1: "reward 'picky' gave no score (None): it has 5 letters"}


def test_rewards_with_a_weight_are_asked():
    rewards = RewardSet([("picky", Picky(), 1.0), ("shapes", CompositionReward(), -1.0), ("idle", Picky(), 0.0)])
    assert rewards.unscorable(["cat", "a circle", "cat"]) == {
        "cat": "reward 'shapes': it does not know 'cat'",
        "a circle": "reward 'picky': it has 8 letters",
    }
    assert RewardSet([("plain", lambda images, prompts, **columns: [], 1.0)]).unscorable(["horse"]) == {}


@pytest.mark.parametrize("answer", [["horse"], {"zebra": "another prompt"}, {"horse": 3}])
def test_an_answer_of_another_kind_is_refused(answer: Any):
    class Wrong(Picky):
        def unscorable(self, prompts):
            return answer

    with pytest.raises(ValueError, match=r"reward 'wrong': unscorable\(prompts\) gave .*must map"):
        RewardSet([("wrong", Wrong(), 1.0)]).unscorable(["horse"])


def test_ocr_names_prompts_without_a_target():
    from flowsteer.rewards.scorers.ocr import OCRReward

    said = OCRReward.unscorable(object.__new__(OCRReward), ['a sign "OPEN"', "a sign", 'a sign " "'])
    assert list(said) == ["a sign", 'a sign " "']
    assert "double quotes" in said["a sign"]


def check(prompts: list[str], least: float, *steps: list[int]) -> None:
    rewards = RewardSet([("picky", Picky(), 1.0)])
    check_scorable(rewards, prompts, key="prompts.train=own.txt", steps=steps, min_scored=least)


def test_as_many_as_are_allowed_only_warn(caplog: pytest.LogCaptureFixture):
    """Rows count, not different prompts: 2 of 8. What a step draws decides, as it does in the run: 1 of 4 in each."""
    rows = ["cat"] * 6 + ["horse"] * 2
    with caplog.at_level(logging.WARNING):
        check(rows, 0.75, [0, 1, 2, 6], [3, 4, 5, 7])
    assert "prompts.train=own.txt: 2 of 8 prompts cannot be scored: 'horse' (reward 'picky': it has 5" in caplog.text
    with pytest.raises(ValueError, match=r"2 of 8 prompts .*Training step 0 draws 1 of them among its 4 .*=0\.76 asks"):
        check(rows, 0.76, [0, 1, 2, 6], [3, 4, 5, 7])
    with pytest.raises(ValueError, match=r"Training step 1 draws 2 of them .* 75\.0% of a step.* Change or remove"):
        check(rows, 0.75, [0, 1, 2, 3], [4, 5, 6, 7])
    caplog.clear()
    check(["cat"], 1.0, [0])
    assert not caplog.text


def test_only_the_first_are_named():
    with pytest.raises(ValueError, match=r"7 of 7 prompts cannot.*'horse4'.*, and 2 more\. Training") as error:
        check([f"horse{place}" for place in range(7)], 0.9, [0])
    assert "horse5" not in str(error.value)


def test_the_step_is_the_one_that_would_fail(tmp_path: Path, make_config: Make):
    """One of 40 prompts is more than a tenth of a step of 4. It comes in one of the ten steps of a pass."""
    file = tmp_path / "own.txt"
    prompts = [f"a {color} {shape} on {ground}" for color in COLORS for shape in SHAPES for ground in BACKGROUNDS][:39]
    file.write_text("\n".join([*prompts, "a cat"]))
    make = {"rewards": {"composition": {}}, "prompts": {"train": str(file)}, "num_steps": 10}
    config = parse_config(make_config(tmp_path / "run", **make), source="here")
    with pytest.raises(ValueError, match=r"1 of 40 prompts .* Training step \d draws 1 of them") as error:
        start(config, quiet=True)
    step = int(str(error.value).partition("Training step ")[2][0])
    sizes = {"seed": config.seed, "prompts_per_step": 4, "group_size": 4, "batch_size": 4, "num_processes": 1}
    batches = step_batches(read_prompts(file), step=step, process_index=0, **sizes)
    assert 39 in {row for batch in batches for row in batch.rows}


def test_a_run_is_refused_before_it_draws(tmp_path: Path, make_config: Make):
    file = tmp_path / "own.txt"
    file.write_text("A red circle.\na photo of a cat\n")
    config = make_config(tmp_path / "run", rewards={"composition": {}}, prompts={"train": str(file)})
    with pytest.raises(ValueError, match=r"own\.txt: 1 of 2 prompts cannot be scored: 'a photo of a cat' \(reward"):
        start(parse_config(config, source="here"), quiet=True)
    assert not (tmp_path / "run").exists()


def test_score_says_why_there_is_none(tmp_path: Path):
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")

    def score(prompt: str) -> str:
        done = CliRunner().invoke(app, ["score", str(tmp_path / "x.png"), "-p", prompt], env={"COLUMNS": "300"})
        return " ".join(done.output.split())

    assert re.search(r"x\.png . composition . 0\.\d{4}", score("A red circle left of a blue square."))
    assert "it does not know 'cat'" in score("a cat").replace(" . ", " ")
