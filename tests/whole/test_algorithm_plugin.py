"""The example of a package with an algorithm of its own: installed, listed, checked and trained with."""

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

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "algorithm_plugin"
COMMAND = ("-m", "flowsteer.rl.command")
SETTINGS = ("evaluation=null", "trackers=[]", "save_every_s=0", "rollout.prompts_per_step=2", "rollout.group_size=6")
SETTINGS += ("rollout.batch_size=12", "rollout.num_inference_steps=4", "rewards=jpeg_compressibility", "--quiet")


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
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "COLUMNS": "220"}

    def run(*arguments: str | Path, code: int = 0, fresh: bool = False) -> str:
        if fresh:
            command = [sys.executable, *map(str, arguments)]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
        else:
            done = launch.python(*arguments, cwd=folder, environment=environment)
        assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def test_it_is_listed(with_plugin: Callable[..., str]) -> None:
    text = with_plugin(*COMMAND, "algorithms", "list", fresh=True)
    (line,) = [line for line in text.splitlines() if " asymmetric_grpo " in line]
    assert "arXiv 2503.14476" in line
    assert "asymmetric-grpo" in line
    assert "asymmetric_grpo:AsymmetricGRPO" in line


def test_it_is_checked(with_plugin: Callable[..., str]) -> None:
    text = with_plugin(*COMMAND, "algorithms", "check", "asymmetric_grpo", "algorithm.kl_coef=0.1")
    assert "algorithm 'asymmetric_grpo': passes all checks" in text
    assert "ok    start         ratio 1, ratio_deviation 0, clip_fraction 0, kl 0" in text
    assert "ok    distances     kl_coef pulls towards the reference policy" in text


def test_it_trains_and_resumes(with_plugin: Callable[..., str], tmp_path: Path) -> None:
    given = ("train", "embedded_flow_grpo_sde_composition", f"output={tmp_path / 'run'}", *SETTINGS)
    algorithm = "algorithm={name: asymmetric_grpo, clip_high: 3e-4, kl_coef: 0.01}"
    with_plugin(*COMMAND, *given, algorithm, "num_steps=2")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["ratio"] == 1
    assert lines[1]["kl"] > 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["algorithm"]
    assert saved["name"] == "asymmetric_grpo"
    assert saved["clip_high"] == 3e-4
    with_plugin(*COMMAND, "train", tmp_path / "run" / "config.yaml", "num_steps=3", "--resume", "--quiet")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_its_faults_are_told_as_those_of_built_in_ones(with_plugin: Callable[..., str], tmp_path: Path) -> None:
    given = ("train", "embedded_flow_grpo_sde_composition", f"output={tmp_path / 'run'}", *SETTINGS, "num_steps=1")
    text = with_plugin(*COMMAND, *given, "algorithm={name: asymmetric_grpo, clip_hihg: 1, clip_low: -1}", code=2)
    assert "algorithm.clip_hihg: unknown key for name=asymmetric_grpo; did you mean 'clip_high'?" in text
    assert "algorithm.clip_low: Input should be greater than 0, got -1" in text
    text = with_plugin(*COMMAND, *given, "algorithm={name: asymetric_grpo}", code=2)
    assert "allowed: flow_grpo, " in text
    assert "weighted_sft, asymmetric_grpo. A new entry point is visible only after" in text


def test_its_own_tests_pass(with_plugin: Callable[..., str]) -> None:
    text = with_plugin("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE / "tests", "--rootdir", EXAMPLE)
    assert " passed" in text
