"""The example of a pipeline in a package of its own: installed, checked, trained, sampled from and resumed."""

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

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pipeline_adapter"
COMMAND = ("-m", "flowsteer.rl.command")
ADAPTER = ("model.adapter=interval_guided_sd3", "model.call={low: 0.2, high: 0.8}", "rollout.guidance_scale=4")
SETTINGS = ("evaluation=null", "trackers=[]", "save_every_s=0", "rollout.prompts_per_step=2", "rollout.group_size=6")
SETTINGS += (
    "rollout.batch_size=6",
    "algorithm.updates_per_rollout=1",
    "rollout.num_inference_steps=4",
    "rewards=jpeg_compressibility",
    "--quiet",
)


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``with_plugin(*arguments)``: what python prints where the example is installed beside everything else.

    A process that is forked from the tests' server; with ``fresh=True`` an interpreter that begins with nothing.
    """
    folder = tmp_path_factory.mktemp("adapter")
    source, site = folder / "source", folder / "site"
    shutil.copytree(EXAMPLE, source)  # building leaves files behind
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)]
    subprocess.run(install, check=True, capture_output=True, text=True, timeout=300)
    places = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "COLUMNS": "200"}

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


def test_it_is_checked(with_plugin: Callable[..., str]) -> None:
    given = ("--adapter", "interval_guided_sd3", "--guidance-scale", "4", "--call", "low=0.2")
    text = with_plugin(*COMMAND, "check-model", "embedded", *given, fresh=True)
    assert "IntervalGuidedSD3: can be trained" in text
    assert "not lifted: a hand-written adapter" in text
    assert "ok    gradient" in text


@pytest.mark.parametrize("lora", ["{rank: 4, alpha: 8}", "null"])
def test_it_trains_is_resumed_and_sampled_from(with_plugin: Callable[..., str], tmp_path: Path, lora: str) -> None:
    run = tmp_path / "run"
    given = ("train", "embedded_flow_grpo_sde_composition", f"output={run}", f"model.lora={lora}", *ADAPTER, *SETTINGS)
    with_plugin(*COMMAND, *given, "num_steps=2")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["ratio"] == 1
    assert lines[0]["grad_norm"] > 0
    with_plugin(*COMMAND, "train", run / "config.yaml", "num_steps=3", "--resume", "--quiet")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    with_plugin(*COMMAND, "sample", "a red circle", "--run", run, "--num-seeds", "1", "-o", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0
    text = with_plugin(*COMMAND, "export", run, tmp_path / "exported", code=2)
    assert "the run's pipeline is the adapter interval_guided_sd3, which diffusers cannot load as a whole" in text
    if lora == "null":
        text = with_plugin(*COMMAND, "export", run, tmp_path / "exported", "--format", "peft", code=2)
        assert "trained all weights, so it has no LoRA" in text
    else:
        with_plugin(*COMMAND, "export", run, tmp_path / "exported", "--format", "peft")


def test_its_own_tests_pass(with_plugin: Callable[..., str]) -> None:
    text = with_plugin("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE / "tests", "--rootdir", EXAMPLE)
    assert " passed" in text
