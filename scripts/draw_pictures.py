"""A data set of pictures for offline training: drawn by a pipeline, scored by a reward, the best and the worst of each prompt.

    python scripts/draw_pictures.py data/embedded_pairs --option score=strict --least-gap 1
    flowsteer train embedded_offline_dpo_pictures

Each line of FOLDER/rows.jsonl has a prompt, its ``pictures`` and ``scores``, and the paths ``best`` and ``worst``. So one file
serves fine-tuning (``prompts.pictures={image: best}``), Diffusion-DPO (``{chosen: best, rejected: worst}``), and
reward-weighted regression, DiffusionNFT and AWM (``{image: pictures, score: scores}``). The same arguments give the same files.

Letters: B samples, G pictures of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from flowsteer.rewards.pixels import to_uint8
from flowsteer.rl.command.options import named_rewards
from flowsteer.rollout.data.prompts import read_prompts
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.steps.plan import no_steps
from flowsteer.rollout.types import Rollout
from flowsteer.rollout.worker import RolloutWorker

console = Console()


def groups(rollout: Rollout, scores: list[float]) -> Iterator[tuple[str, list[Image.Image], list[float]]]:
    """Each group of a batch: its prompt, its G pictures and their scores."""
    pixels = to_uint8(rollout.images)
    for number in dict.fromkeys(rollout.group.tolist()):
        places = [place for place, own in enumerate(rollout.group.tolist()) if own == number]
        pictures = [Image.fromarray(pixels[place]) for place in places]
        yield rollout.prompts[places[0]], pictures, [scores[place] for place in places]


def write(folder: Path, number: int, prompt: str, pictures: list[Image.Image], scores: list[float]) -> dict[str, Any]:
    """Save the pictures of a row; returns the row."""
    names = [f"pictures/{number:05d}_{place}.png" for place in range(len(pictures))]
    for name, picture in zip(names, pictures):
        picture.save(folder / name)
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return {"prompt": prompt, "pictures": names, "scores": scores, "best": names[best], "worst": names[worst]}


def main(
    folder: Annotated[Path, typer.Argument(help="New folder for the data set.")],
    rows: Annotated[int, typer.Option(min=1, help="Prompts with pictures to write.")] = 2000,
    per_prompt: Annotated[int, typer.Option(min=2, help="Pictures drawn of each prompt.")] = 4,
    least_score: Annotated[float | None, typer.Option(help="Leave a prompt out whose best scores less.")] = None,
    least_gap: Annotated[float, typer.Option(min=0, help="Leave a prompt out whose best is ahead by less.")] = 0.0,
    model: Annotated[str, typer.Option(help="A folder or hub id in diffusers' layout.")] = "embedded",
    prompts: Annotated[str, typer.Option(help="A prompt file.")] = "shapes_train.txt",
    reward: Annotated[str, typer.Option("-r", "--reward", help="Who scores.")] = "composition",
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, an option of the reward.")] = None,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 6,
    guidance_scale: Annotated[float, typer.Option(min=0, help="1 is without guidance.")] = 1.0,
    prompts_per_batch: Annotated[int, typer.Option(min=1, help="Prompts in each network pass.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Decides all random draws.")] = 0,
) -> None:
    """Draw, score and write until there are enough rows. The file of rows appears when all pictures are there."""
    if folder.exists() and any(folder.iterdir()):
        raise typer.BadParameter(f"{folder} is not empty; give a new folder")
    judge = named_rewards([reward], option)
    worker = RolloutWorker(
        FlowPipeline.load(model),
        read_prompts(prompts),
        plan=no_steps(num_inference_steps),
        kernel="flow_sde",
        log_prob_weight="gaussian",
        solver="euler",
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        prompts_per_step=prompts_per_batch,
        group_size=per_prompt,
        batch_size=prompts_per_batch * per_prompt,
        shared_noise=False,
        updates_per_rollout=1,
        seed=seed,
        num_processes=1,
        process_index=0,
        dtype=torch.float32,
        device="cpu",
    )
    (folder / "pictures").mkdir(parents=True)
    kept: list[dict[str, Any]] = []
    drawn = 0
    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("rows", total=rows)
        while len(kept) < rows:
            (rollout,) = worker.sample(drawn // prompts_per_batch)
            scores = judge.score(
                rollout.images, rollout.prompts, rollout.columns, rollout.group.tolist()
            ).total.tolist()
            drawn += prompts_per_batch
            for prompt, pictures, own in groups(rollout, scores):
                best, worst = max(own), min(own)  # a missing score, NaN, fails every comparison below
                good = least_score is None or best >= least_score
                if len(kept) < rows and good and best - worst >= least_gap and all(score == score for score in own):
                    kept.append(write(folder, len(kept), prompt, pictures, own))
            progress.update(bar, completed=len(kept))
            if drawn >= 20 * rows:
                raise typer.BadParameter(f"of {drawn} prompts only {len(kept)} are good enough; ask for less")
    temporary = folder / ".rows.part"
    temporary.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
    temporary.rename(folder / "rows.jsonl")
    console.print(f"{len(kept)} rows of {drawn} prompts drawn, in {folder / 'rows.jsonl'}")


if __name__ == "__main__":
    typer.run(main)
