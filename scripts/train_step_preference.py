"""Train the step-aware preference model of SPO (Liang et al. 2024, arXiv 2406.04314) for any diffusers pipeline.

    python scripts/train_step_preference.py runs/preference --prompts shapes_train.txt --held-out shapes_reserved.txt

It scores what a pipeline's *prediction of the clean image* at a noise level shows, against the prompt: the reward
`step_preference`, whose option `path` is the folder written here. Where pairs of a better and a worse image come from:

* by default the pipeline draws several images of each prompt, and any reward says which is better;
* with --pairs from people: a .jsonl file (or a folder with a pairs.jsonl) in the format of Pick-a-Pic, a line per pair
  with caption, image_0 and image_1 (paths, relative to the file) and label_0: 1 if the first is better, 0 if the second,
  .5 for a tie.

A step of training, as published: the images of a prompt get the same noise at a level of the sampler's own schedule, one
pass of the frozen pipeline predicts the clean images, these are decoded, and the model's scores are fitted to the labels by
binary cross-entropy of softmax(score_0, score_1). What differs: all pairs among the images of a prompt are used, not
one; some images are shown clean, for the last step; and a model that begins without --init also learns to tell the
prompts of a step apart (CLIP's loss, less and less of it), which a published CLIP has learnt before.

The defaults are for the embedded pipeline: 12 minutes of one CPU thread, after which pairs of reserved captions are in the
right order in 57 % of the cases at sigma .8 (where the reward itself, shown the predictions, gets 59 %), 70 % at .6 and 73 %
from .4 down to finished images. At sigma 1 all predictions of a prompt are one, and there is nothing to compare.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from preference_fit import (
    accuracy_by_level,
    expected_minutes,
    model_scorer,
    new_model,
    pretrained_model,
    reward_scorer,
    show_table,
    step_loss,
    train,
)
from preference_pairs import STEP, Base, console, describe, draw_pairs, read_pairs, split_pairs, split_prompts
from torch import Tensor

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.registry import load_reward
from flowsteer.rl.build import DTYPES
from flowsteer.rl.command.options import (
    CallOption,
    Chosen,
    DeviceOption,
    DTypeOption,
    HeightOption,
    ModelOption,
    NegativeOption,
    WidthOption,
    choose,
)
from flowsteer.rl.config import parse_overrides
from flowsteer.rollout.data.prompts import read_prompts
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.steps.noise import mix

CACHED_PROMPTS = 4096  # whose embeddings are kept in memory


def load_base(chosen: Chosen, num_inference_steps: int, guidance_scale: float, negative_prompt: str | None) -> Base:
    """The frozen pipeline that the options ask for."""
    dtype = DTYPES[chosen.dtype]
    arguments: dict[str, Any] = {"call_kwargs": chosen.call, "cache_size": CACHED_PROMPTS, **chosen.size}
    return Base(
        FlowPipeline.load(chosen.model, dtype=dtype, device=chosen.device, **arguments),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        dtype=dtype,
    )


def default(value: float | None, otherwise: float) -> float:
    """What was given, or else the other."""
    return otherwise if value is None else value


_PAIRS, _MODEL, _TRAINING = "Pairs", "New model (without --init)", "Training"


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write: the model and accuracy.json.")],
    model: ModelOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    call: CallOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = "auto",
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Of the rollouts that it shall judge.")] = 6,
    guidance_scale: Annotated[float, typer.Option(help="Of those rollouts; 1 is without guidance.")] = 1.0,
    negative_prompt: NegativeOption = None,
    prompts: Annotated[str | None, typer.Option(help="Prompt file to draw images of.", rich_help_panel=_PAIRS)] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="Prompt file for the accuracy; default a tenth of the prompts.", rich_help_panel=_PAIRS),
    ] = None,
    reward: Annotated[
        str, typer.Option(help="What says which image is better.", rich_help_panel=_PAIRS)
    ] = "composition",
    reward_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Option of the reward; may be repeated.", rich_help_panel=_PAIRS),
    ] = None,
    min_difference: Annotated[
        float, typer.Option(min=0, help="Of the rewards of a pair; what differs less is a tie.", rich_help_panel=_PAIRS)
    ] = 0.05,
    num_prompts: Annotated[int, typer.Option(min=1, help="How many to train on.", rich_help_panel=_PAIRS)] = 3000,
    num_held_out: Annotated[int, typer.Option(min=1, help="How many for the accuracy.", rich_help_panel=_PAIRS)] = 264,
    images_per_prompt: Annotated[int, typer.Option(min=2, help="Of each prompt.", rich_help_panel=_PAIRS)] = 6,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Pairs from people instead: Pick-a-Pic's columns in JSON lines.", rich_help_panel=_PAIRS),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="CLIP checkpoint to begin with, such as PickScore_v1; for real use.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels; default the pipeline's, at most 64.", rich_help_panel=_MODEL)
    ] = None,
    patch_size: Annotated[int, typer.Option(min=1, help="Pixels of a token.", rich_help_panel=_MODEL)] = 8,
    tower_width: Annotated[int, typer.Option(min=32, help="Of the vision tower.", rich_help_panel=_MODEL)] = 128,
    num_blocks: Annotated[int, typer.Option(min=1, help="Of the vision tower.", rich_help_panel=_MODEL)] = 4,
    projection: Annotated[int, typer.Option(min=1, help="Width of the joint space.", rich_help_panel=_MODEL)] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser updates.", rich_help_panel=_TRAINING)] = 700,
    prompts_per_step: Annotated[int, typer.Option(min=1, help="Groups (pairs).", rich_help_panel=_TRAINING)] = 32,
    learning_rate: Annotated[
        float | None, typer.Option(help="Default 1.5e-3, with --init 3e-6.", rich_help_panel=_TRAINING)
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(min=0, help="Default .05, with --init .3.", rich_help_panel=_TRAINING)
    ] = None,
    contrastive: Annotated[
        float | None,
        typer.Option(
            min=0, help="First weight of CLIP's loss, falls to 0; default 3, with --init 0.", rich_help_panel=_TRAINING
        ),
    ] = None,
    clean_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of the groups, shown without noise.", rich_help_panel=_TRAINING)
    ] = 0.15,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a pass without gradient.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
) -> None:
    """Train a step-aware preference model and print its accuracy by noise level."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    began = time.perf_counter()
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder")
    if (prompts is None) == (pairs is None):
        raise ValueError("give a prompt file with --prompts, or pairs from people with --pairs")
    torch.manual_seed(seed)
    chosen = choose(model=model, height=height, width=width, call=call, dtype=dtype, device=device)
    base = load_base(chosen, num_inference_steps, guidance_scale, negative_prompt)
    new = {"image_size": image_size, "patch_size": patch_size, "width": tower_width, "num_blocks": num_blocks}
    scorer = pretrained_model(init) if init else new_model(base, **new, projection=projection)
    scorer.to(chosen.device)
    if pairs is not None:
        rewards = None
        trained, tested = split_pairs(read_pairs(pairs, base), seed)
    else:
        rewards = RewardSet([(reward, load_reward(reward, **parse_overrides(reward_option or [])), 1.0)])
        trained, tested = draw_pairs(
            base,
            split_prompts(
                read_prompts(prompts or ""),
                read_prompts(held_out) if held_out else None,
                num_train=num_prompts,
                num_held_out=num_held_out,
                seed=seed,
            ),
            rewards,
            group_size=images_per_prompt,
            batch_size=batch_size,
            min_difference=min_difference,
            seed=seed,
        )
    console.print(f"{describe(trained)} for training, {describe(tested)} for the accuracy")

    def loss(step: int) -> tuple[Tensor, float]:
        generator = torch.Generator().manual_seed(mix(seed, STEP, step))
        rows = torch.randint(len(trained), (prompts_per_step,), generator=generator).tolist()
        share = default(contrastive, 0.0 if init else 3.0) * (1 - step / steps)
        groups = [trained[row] for row in rows]
        return step_loss(scorer, base, groups, clean_share=clean_share, contrastive=share, generator=generator)

    scorers = {"before": model_scorer(scorer)}
    console.print(f"training takes about {expected_minutes(scorer, loss, steps):.1f} minutes")
    train(
        scorer,
        loss,
        steps=steps,
        learning_rate=default(learning_rate, 3e-6 if init else 1.5e-3),
        weight_decay=default(weight_decay, 0.3 if init else 0.05),
        warmup_steps=steps // 10,
    )
    scorers["after"] = model_scorer(scorer)
    if rewards is not None:
        scorers["the reward"] = reward_scorer(rewards)
    table = accuracy_by_level(base, tested, scorers, seed=seed, batch_size=batch_size)
    scorer.save(out)
    report = {"minutes": (time.perf_counter() - began) / 60, "accuracy": table, "settings": settings}
    (out / "accuracy.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    show_table(table, f"pairs of held-out prompts in the right order; {report['minutes']:.1f} minutes in all")


if __name__ == "__main__":
    run = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    run.command(help=__doc__)(main)
    try:
        run()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
