"""What it costs that a reward runs elsewhere, or is slow: three ratios, each measured in one run, round by round in turn.

    python scripts/benchmark_rewards.py
    python scripts/benchmark_rewards.py --environment originals        # the worker in a managed environment

- **worker**: training steps with two rewards, one of them in a worker process, over the same with both in this process.
- **slow reward**: sampling and scoring with a reward that takes as long as sampling, over sampling alone.
- **frame**: 64 images of 512x512 to a local worker and back, in milliseconds.

Every draw is cold, as in training: no prompt is prepared yet.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from benchmark import improve_once, rollout_once, seconds
from rich.console import Console
from rich.table import Table

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.envs.environments import find
from flowsteer.rewards.envs.pythons import python_in
from flowsteer.rewards.hosts.child import WorkerReward
from flowsteer.rewards.scorers import jpeg
from flowsteer.rewards.scorers.composition import CompositionReward
from flowsteer.rewards.types import Reward
from flowsteer.rl.config import load_config
from flowsteer.rl.run import Run
from flowsteer.rl.scoring import StepScorer
from flowsteer.rl.start import start

console = Console()
JPEG_FILE = f"{Path(jpeg.__file__).resolve()}:JPEGCompressibility"  # by its path, so that any environment can run it


class Takes:
    """A reward that keeps nobody's processor busy and answers after so many seconds for each image."""

    def __init__(self, seconds_per_image: float) -> None:
        self.seconds_per_image = seconds_per_image

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        time.sleep(self.seconds_per_image * len(images))
        return [float(image.mean()) for image in images]


def rollout_seconds(run: Run, reward: Reward, step: int) -> float:
    """Of sampling and scoring a training step."""
    run.scorer = StepScorer(RewardSet([("reward", reward, 1.0)]))
    taken = seconds(lambda: rollout_once(run, step))
    run.scorer.close()
    return taken


def slow_reward(run: Run, repeats: int) -> list[tuple[float, float]]:
    """(with a reward as slow as sampling, sampling alone) in seconds, a pair for each round after a first."""
    config = run.config.rollout
    images = config.prompts_per_step * config.group_size
    pairs = []
    for step in range(repeats + 1):
        alone = rollout_seconds(run, Takes(0.0), step)
        pairs.append((rollout_seconds(run, Takes(alone / images), step), alone))
    return pairs[1:]


def worker(run: Run, elsewhere: WorkerReward, repeats: int) -> list[tuple[float, float]]:
    """(with one reward in a worker, with both in this process) in seconds of a training step."""
    kinds: dict[str, Reward] = {"worker": elsewhere, "here": jpeg.JPEGCompressibility()}
    scorers = {
        kind: StepScorer(RewardSet([("composition", CompositionReward(), 1.0), ("jpeg", reward, 0.1)]))
        for kind, reward in kinds.items()
    }
    pairs = []
    for step in range(repeats + 1):
        taken = {}
        for kind, run.scorer in scorers.items():
            taken[kind] = seconds(lambda step=step: improve_once(run, rollout_once(run, step), step))
        pairs.append((taken["worker"], taken["here"]))
    for scorer in scorers.values():
        scorer.close()
    return pairs[1:]


def frame(repeats: int) -> list[float]:
    """Milliseconds of a round trip."""
    images = np.random.default_rng(0).integers(0, 256, (64, 512, 512, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        scorer = Path(folder) / "zeros.py"
        scorer.write_text("def zeros(images, prompts, **columns):\n    return [0.0] * len(images)\n", encoding="utf-8")
        reward = WorkerReward(f"{scorer}:zeros")
        times = [seconds(lambda: reward(images, [""] * 64)) for _ in range(repeats + 1)]
        reward.close()
    return [1000 * taken for taken in times[1:]]


def main(
    config: Annotated[
        str, typer.Argument(help="Configuration whose rollouts and updates are made.")
    ] = "embedded_nft_composition",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 5,
    environment: Annotated[
        str | None, typer.Option(help="A managed environment for the worker; default: this one.")
    ] = None,
    override: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the configuration; may be repeated.")] = None,
) -> None:
    """Print what a worker and a slow reward cost."""
    torch.set_num_threads(1)
    python = sys.executable if environment is None else str(python_in(find(environment)))
    table = Table("what", "with", "without", "ratio", "of each round")
    with tempfile.TemporaryDirectory() as folder:
        run = start(
            load_config(config, [f"output={folder}/run", "evaluation=null", "trackers=[]", *(override or [])]),
            quiet=True,
        )
        run.scorer.close()
        elsewhere = WorkerReward(JPEG_FILE, python=python, name="jpeg")
        for what, pairs in (("worker", worker(run, elsewhere, repeats)), ("slow reward", slow_reward(run, repeats))):
            ratios = [one / other for one, other in pairs]
            given, alone = (statistics.median(column) for column in zip(*pairs))
            listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            table.add_row(what, f"{given:.2f} s", f"{alone:.2f} s", f"{statistics.median(ratios):.3f}", listed)
        run.close()
    times = frame(repeats)
    table.add_row("frame", f"{statistics.median(times):.0f} ms", "", "", ", ".join(f"{taken:.0f}" for taken in times))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
