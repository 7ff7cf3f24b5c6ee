"""Does a configuration learn? Several training seeds, each evaluated before and after on prompts it never trains on.

    python scripts/learn.py embedded_nft_composition --seeds 3

Prints the gain of each seed and its mean with a 95 % interval over seeds (Student's t). Letters: P prompts, S noise seeds.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

console = Console()
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 97.5 % quantile with n - 1 degrees


def train(config: str, seed: int, folder: Path, overrides: list[str]) -> Path:
    """One run in a process of its own on one thread; returns its folder. Raises RuntimeError with the end of its output."""
    settings = [f"seed={seed}", f"output={folder}", "evaluation.num_prompts=264", "evaluation.num_seeds=4", *overrides]
    command = [sys.executable, "-m", "flowsteer.rl.command", "train", config, *settings, "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"seed {seed} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return folder


def outcome(folder: Path, part: str) -> tuple[float, float, float]:
    """Mean score before, mean score after, and the minutes of training of a finished run."""
    files = sorted((folder / "evaluations").glob("step_*.json"))
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in (files[0], files[-1])]
    before, after = (float(np.nanmean(np.array(table["scores"][part], dtype=float))) for table in tables)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    spent = sum(value for line in lines for key, value in line.items() if key.startswith("seconds/"))
    return before, after, spent / 60


def gain_over_seeds(gains: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval over training seeds."""
    spread = statistics.stdev(gains)
    return statistics.mean(gains), STUDENT[len(gains)] * spread / math.sqrt(len(gains))


def main(
    config: Annotated[str, typer.Argument(help="A YAML file or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")] = None,
    seeds: Annotated[int, typer.Option(min=2, max=8, help="Training seeds.")] = 3,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 1,
    part: Annotated[str, typer.Option(help="The score that is compared.")] = "composition/strict",
    root: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/learn"),
) -> None:
    """Train with several seeds and say whether it learnt. Ends with exit code 1 when the interval reaches zero."""
    name = Path(config).stem
    folders = [root / f"{name}_{seed}" for seed in range(seeds)]
    with ThreadPoolExecutor(parallel) as pool:
        jobs = [pool.submit(train, config, seed, folder, overrides or []) for seed, folder in enumerate(folders)]
        outcomes = [outcome(job.result(), part) for job in jobs]
    table = Table(
        "training seed", "before", "after", "gain", "minutes", title=f"{name}: {part} on fixed prompts and seeds"
    )
    for seed, (before, after, minutes) in enumerate(outcomes):
        table.add_row(str(seed), f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}", f"{minutes:.1f}")
    console.print(table)
    mean, half = gain_over_seeds([after - before for before, after, _ in outcomes])
    console.print(f"gain {mean:+.3f}, 95 % interval over seeds {mean - half:+.3f} to {mean + half:+.3f}")
    if not mean - half > 0:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
