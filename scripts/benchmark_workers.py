"""How long OCR of a training step's pictures takes, with one worker and with more, as threads and as processes.

    python scripts/benchmark_workers.py
    python scripts/benchmark_workers.py --workers 1 --workers 8 --workers 16 --images 288

The pictures are 512 x 512 pixels with one to three words each, on grounds of soft colours. They come in batches of eight, all
at once, so no time of sampling is in the figures. The models are loaded before the clock starts.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

import flowsteer.rewards
from flowsteer.rewards.combine import RewardSet
from flowsteer.rl.build_rewards import build_reward
from flowsteer.rl.config.rewards import HostConfig, RewardConfig
from flowsteer.rl.scoring import Scorer, collect

console = Console()
SIDE, BATCH = 512, 8
WORDS = ("OPEN", "FRESH BREAD", "Flow Steer", "Good Morning", "SALE 50", "Library", "Hello World", "Station")
HERE = HostConfig(python=sys.executable, target="flowsteer.rewards.scorers.ocr:OCRReward")


def draw(number: int, generator: np.random.Generator) -> tuple[np.ndarray, str]:
    """uint8 [512, 512, 3], and the prompt that asks for its first word."""
    ground = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    picture = ground.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(48)
    for line in range(1 + number % 3):
        word = WORDS[(number + line) % len(WORDS)]
        place = (30 + 20 * line, 60 + 150 * line)
        pen.text(place, word, font=font, fill="white", stroke_width=2, stroke_fill="black")
    return np.asarray(picture), f'a sign that says "{WORDS[number % len(WORDS)]}"'


def measure(images: torch.Tensor, prompts: list[str], section: RewardConfig) -> tuple[float, list[float]]:
    """Seconds until all pictures have their scores, and the scores."""
    rewards = RewardSet([("ocr", build_reward("ocr", section, torch.device("cpu")), 1.0)])
    try:
        with Scorer(rewards) as scorer:
            for _ in range(section.workers):  # what is loaded at the first call
                collect([scorer.submit(images[:1], prompts[:1]) for _ in range(section.workers)], None)
            begin = time.perf_counter()
            starts = range(0, len(images), BATCH)
            pending = [scorer.submit(images[low : low + BATCH], prompts[low : low + BATCH]) for low in starts]
            scores = collect(pending, None)
            return time.perf_counter() - begin, torch.cat([one.total for one in scores]).tolist()
    finally:
        rewards.close()


def main(
    workers: Annotated[list[int] | None, typer.Option(help="How many; repeatable. Default: 1 and 2.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Pictures; 144 are a step of a process of sd35m_flow_grpo.")] = 144,
) -> None:
    """Print a row for each number of workers."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(flowsteer.rewards.__path__[0]).parent), *sys.path])
    drawn = [draw(number, np.random.default_rng(number)) for number in range(images)]
    pixels = torch.from_numpy(np.stack([picture for picture, _ in drawn])).movedim(-1, -3) / 255
    prompts = [prompt for _, prompt in drawn]
    table = Table("workers", "threads s", "processes s", "mean score", "all scores equal")
    first: list[float] | None = None
    for count in workers or [1, 2]:
        here, scores = measure(pixels, prompts, RewardConfig(workers=count))
        away, others = measure(pixels, prompts, RewardConfig(workers=count, host=HERE))
        first = first or scores
        table.add_row(
            str(count), f"{here:.1f}", f"{away:.1f}", f"{np.mean(scores):.3f}", str(scores == others == first)
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
