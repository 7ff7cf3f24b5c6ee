"""The example of a package with rewards of its own: installed, listed, certified, and trained with, without any change here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import launch
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "reward_plugin"


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``with_plugin(*arguments)``: what python prints where the example is installed beside everything else.

    A process that is forked from the tests' server; with ``fresh=True`` an interpreter that begins with nothing.
    """
    folder = tmp_path_factory.mktemp("plugin")
    source, site = folder / "source", folder / "site"
    shutil.copytree(EXAMPLE, source)  # building leaves files behind
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=300)
    places = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "COLUMNS": "200"}

    def run(*arguments: str | Path, fresh: bool = False) -> str:
        if fresh:
            command = [sys.executable, *map(str, arguments)]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
        else:
            done = launch.python(*arguments, cwd=folder, environment=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


def test_it_is_listed(with_plugin: Callable[..., str]) -> None:
    text = with_plugin("-m", "flowsteer.rl.command", "rewards", "list", fresh=True)
    for name in ("colourfulness", "distinctness"):
        (line,) = [line for line in text.splitlines() if f" {name} " in line]
        assert "colourful-rewards" in line


@pytest.mark.parametrize("name", ["colourfulness", "distinctness"])
def test_it_is_certified(with_plugin: Callable[..., str], name: str) -> None:
    assert f"reward '{name}': certified" in with_plugin("-m", "flowsteer.rl.command", "rewards", "certify", name)


def test_it_trains(with_plugin: Callable[..., str], tmp_path: Path) -> None:
    settings = [f"output={tmp_path / 'run'}", "num_steps=1", "evaluation=null", "trackers=[]"]
    settings += ["rollout.prompts_per_step=4", "rollout.group_size=6", "rollout.batch_size=12"]
    settings += ["algorithm.updates_per_rollout=1", "optimizer.warmup_updates=0"]
    rewards = "rewards={colourfulness: {options: {weight_of_mean: 0.2}}, distinctness: {weight: 0.5}}"
    with_plugin("-m", "flowsteer.rl.command", "train", "embedded_nft_composition", rewards, *settings, "--quiet")
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["reward/colourfulness"] > 1
    assert 0 < line["reward/distinctness"] < 1
    assert line["reward_missing"] == 0
    kept = json.loads((tmp_path / "run" / "rewards.json").read_text())
    assert kept["colourfulness"] == {"reward": "colourfulness 1", "weight_of_mean": 0.2}


def test_its_own_tests_pass(with_plugin: Callable[..., str]) -> None:
    text = with_plugin("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE / "tests", "--rootdir", EXAMPLE)
    assert " passed" in text
