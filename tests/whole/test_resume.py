"""A run that was killed and resumed ends as the unbroken one, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals, getsignal
from typing import Any

import launch
import numpy as np
import pytest
import torch
from conftest import Make
from launch import Strike
from safetensors.torch import load_file

from flowsteer.rewards.combine import RewardSet
from flowsteer.rl.compare import TooFewScores
from flowsteer.rl.config import parse_config
from flowsteer.rl.metrics import read_metrics
from flowsteer.rl.scoring import StepScorer
from flowsteer.rl.start import start
from flowsteer.rl.train import train

STEPS = 5
CASES: dict[str, tuple[dict[str, Any], int]] = {  # overrides, processes
    "flow_grpo": ({}, 1),
    "diffusion_nft": (
        launch.nft(updates_per_rollout=2, old_decay_slope=0.1),
        1,
    ),  # an old policy unlike the current one
    "flow_grpo under ZeRO-2": ({"engine.strategy": "zero2"}, 2),
}


def lines(folder: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if not key.startswith("seconds/")}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "pytorch_lora_weights.safetensors")


def assert_same_end(resumed: Path, unbroken: Path) -> None:
    assert lines(resumed) == lines(unbroken)
    mine, other = exported(resumed), exported(unbroken)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("_")[1]) for path in (folder / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_unbroken(make_config: Make, tmp_path: Path, case: str) -> None:
    overrides, processes = CASES[case]
    settings: dict[str, Any] = {"num_steps": STEPS, "ema_decay": 0.9, **overrides}
    unbroken = launch.run(make_config(tmp_path / "unbroken", **settings), processes=processes)

    config = make_config(tmp_path / "killed", save_every=1, **settings)
    last = processes - 1
    codes = launch.wait(launch.begin(config, processes=processes, strike=Strike(step=2, signal=SIGKILL, rank=last)))
    assert codes[last] == -SIGKILL
    assert all(code not in (0, None) for code in codes)  # the others notice that one is gone, and end
    assert len(lines(tmp_path / "killed")) < STEPS
    newest = saved_steps(tmp_path / "killed")[-1]
    assert 2 <= newest < STEPS

    # what a kill in the middle of saving leaves: a folder that was never renamed, and a line without an end
    left = tmp_path / "killed" / "checkpoints" / f".step_{newest + 1:06d}.part"
    left.mkdir(exist_ok=True)
    (left / "process_00000.safetensors").write_bytes(b"half")
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward_me')

    resumed = launch.run(config, processes=processes, resume=True)
    assert_same_end(resumed, unbroken)
    assert not left.exists()
    assert saved_steps(resumed) == [STEPS - 1, STEPS]  # keep: 2


@pytest.mark.parametrize("number", [SIGTERM, SIGINT], ids=lambda number: number.name)
def test_terminated_run_saves_and_resumes(make_config: Make, tmp_path: Path, number: Signals) -> None:
    """SIGTERM, as a cluster sends before it takes a machine away, or Ctrl-C; one process hears it, both stop at one step."""
    unbroken = launch.run(make_config(tmp_path / "unbroken", num_steps=STEPS), processes=2)
    config = make_config(tmp_path / "stopped", num_steps=STEPS)
    launch.run(config, processes=2, strike=Strike(step=1, signal=number, rank=1))  # it ends without an error
    (step,) = saved_steps(tmp_path / "stopped")  # there are no regular checkpoints
    assert 1 < step < STEPS
    assert len(lines(tmp_path / "stopped")) == step  # the step under way was finished, and no other begun
    assert_same_end(launch.run(config, processes=2, resume=True), unbroken)


def test_checkpoints_by_time(make_config: Make, tmp_path: Path) -> None:
    """The main process's clock decides for both; another interval is no reason to refuse a resumption."""
    settings = {"num_steps": 3, "keep": 5}
    unbroken = launch.run(make_config(tmp_path / "unbroken", **settings), processes=2)
    assert saved_steps(unbroken) == [3]  # a step takes less than 600 s
    config = make_config(tmp_path / "killed", save_every_s=1e-6, **settings)
    launch.wait(launch.begin(config, processes=2, strike=Strike(step=2, signal=SIGKILL, rank=1)))
    assert saved_steps(tmp_path / "killed")[:2] == [1, 2]
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step_000003", ignore_errors=True)
    resumed = launch.run(config | {"save_every_s": 0}, processes=2, resume=True)
    assert_same_end(resumed, unbroken)
    assert saved_steps(resumed) == [1, 2, 3]


@pytest.mark.parametrize("strategy", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_shares_of_the_weights_resume(make_config: Make, tmp_path: Path, strategy: str) -> None:
    stage = {"engine.strategy": strategy, "ema_decay": 0.5}
    unbroken = launch.run(make_config(tmp_path / "unbroken", num_steps=2, **stage))
    config = make_config(tmp_path / "run", num_steps=1, **stage)
    launch.run(config)
    assert saved_steps(tmp_path / "run") == [1]
    assert_same_end(launch.run(config | {"num_steps": 2}, resume=True), unbroken)


def test_resuming_a_finished_run_changes_nothing(make_config: Make, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", num_steps=1)
    launch.run(config)
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    file = tmp_path / "run" / "config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    del saved["advantage"]["ddof"]  # as of a run from before that key came into being: it had the default
    file.write_text(json.dumps(saved), encoding="utf-8")
    assert_same_end(launch.run(config, resume=True), tmp_path / "kept")


def test_what_does_not_belong_to_the_run_is_refused(make_config: Make, tmp_path: Path) -> None:
    """Everything is refused before anything is written."""
    config = make_config(tmp_path / "run", num_steps=1)
    launch.run(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes(), (tmp_path / "run" / "config.json").read_bytes()

    def refusal(config: dict[str, Any], *, resume: bool, processes: int = 1) -> str:
        with pytest.raises(AssertionError, match="the run ended with") as error:
            launch.run(config, resume=resume, processes=processes)
        return str(error.value)

    assert "holds a run already; continue it with --resume" in refusal(config, resume=False)
    assert "seed: 0 then, 7 now" in refusal(config | {"seed": 7}, resume=True)
    assert "the number of processes has changed since" in refusal(config | {"num_steps": 2}, resume=True, processes=2)
    about = tmp_path / "run" / "checkpoints" / "step_000001" / "checkpoint.json"
    right = about.read_text()
    about.write_text(json.dumps(json.loads(right) | {"model": "another"}))
    assert "(another then, " in refusal(config, resume=True)
    theirs = json.loads(right)["rewards"] | {"theirs": {"weights": "0a1b"}}
    about.write_text(json.dumps(json.loads(right) | {"rewards": theirs}))
    found = refusal(config, resume=True)
    assert "rewards.theirs.weights has changed since" in found
    assert "(0a1b then, None now)" in found
    about.write_text(right)
    other = tmp_path / "other.txt"  # another place may hold the same prompts, but not others
    other.write_text("a red circle\na house")
    moved = config | {"prompts": {"train": str(other)}}
    assert "the content of prompts.train has changed since" in refusal(moved, resume=True)
    after = (tmp_path / "run" / "metrics.jsonl").read_bytes(), (tmp_path / "run" / "config.json").read_bytes()
    assert before == after


def test_rewards_that_fail_stop_the_run_with_the_step_before_saved(make_config: Make, tmp_path: Path) -> None:
    def fails_at_the_second_step(images: np.ndarray, prompts: list[str]) -> list[float | None]:
        calls.append(len(images))
        return [0.0] * len(images) if len(calls) <= 4 else [None] * len(images)  # a step has four batches

    calls: list[int] = []
    handlers = getsignal(SIGTERM), getsignal(SIGINT)
    run = start(parse_config(make_config(tmp_path / "run")), quiet=True)
    try:
        run.scorer = StepScorer(RewardSet([("theirs", fails_at_the_second_step, 1.0)]))
        with pytest.raises(TooFewScores, match=r"only 0.0% of the samples have a score.*gave no score \(None\)"):
            train(run)
        assert run.engine.num_updates == 2
    finally:
        run.close()
    assert (
        getsignal(SIGTERM),
        getsignal(SIGINT),
    ) == handlers  # a finished run does not swallow what is meant for its process
    assert saved_steps(tmp_path / "run") == [1]
    assert len(lines(tmp_path / "run")) == 1
