"""Do the rewards, the prompt files and the pipeline fit the configuration? Asked at the start of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from flowsteer.rewards.combine import RewardSet
from flowsteer.rl import adapters, build
from flowsteer.rl.adapters import tail_is_idle
from flowsteer.rl.config import Config
from flowsteer.rl.config.data import name_of
from flowsteer.rl.scoring import check_scorable, warn_of_single_images
from flowsteer.rl.targets import automatic_targets
from flowsteer.rl.verdicts import checked, verdict_file
from flowsteer.rollout.data.batches import step_rows
from flowsteer.rollout.data.inputs import PICTURES
from flowsteer.rollout.data.prompts import Prompts, Row
from flowsteer.rollout.lifting import selfcheck
from flowsteer.rollout.lifting.pipeline import FlowPipeline, UnlikeConditioning
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.several import Several
from flowsteer.rollout.sample import prepare_rows
from flowsteer.rollout.steps import kernels
from flowsteer.rollout.steps.plan import Plan

logger = logging.getLogger(__name__)


def check_groupwise(rewards: RewardSet, config: Config) -> None:
    """Rewards that compare the images of a group must be shown whole groups. Raises ValueError; warns for evaluations."""
    rollout = config.rollout
    if config.evaluation is not None:
        warn_of_single_images(rewards, num_seeds=config.evaluation.num_seeds, key="evaluation.num_seeds")
    if rewards.groupwise and not config.training_asks_no_reward and rollout.batch_size % rollout.group_size:
        raise ValueError(
            f"the reward {rewards.groupwise[0]!r} compares the images of a group, but a rollout batch of "
            f"rollout.batch_size={rollout.batch_size} cuts groups of rollout.group_size={rollout.group_size} apart; set "
            f"rollout.batch_size to a multiple of {rollout.group_size}"
        )


def check_prompts(rewards: RewardSet, config: Config, train: Prompts, evaluation: Prompts | None) -> None:
    """Warn of prompts that the rewards cannot score. Raises ValueError where a training step would fail."""
    if not config.training_asks_no_reward:
        each = {"seed": config.seed, "prompts_per_step": config.rollout.prompts_per_step}
        steps = (step_rows(train, step=step, **each) for step in range(config.num_steps))
        key = f"prompts.train={name_of(config.prompts.train)}"
        check_scorable(rewards, train.texts, key=key, steps=steps, min_scored=config.advantage.min_scored)
    if config.evaluation is not None and evaluation is not None:
        check_scorable(rewards, evaluation.texts, key=f"evaluation.prompts={name_of(config.evaluation.prompts)}")


def warn_of_idle_columns(config: Config, pipeline: Pipeline, prompts: Prompts) -> None:
    """Warn of columns that look like inputs of the pipeline and are mapped nowhere."""
    if not isinstance(pipeline, FlowPipeline) or not (media := pipeline.preparer.arguments.media):
        return
    mapped = {*(own.column for own in config.inputs.values()), *prompts.pictures}
    for name, values in prompts.columns.items():
        paths = any(isinstance(value, str) and value.lower().endswith(PICTURES) for value in values[:64])
        named = name in media or (
            paths and config.prompts.pictures is None
        )  # of pictures, a file may hold some to spare
        if named and name not in mapped:
            logger.warning(
                "the column %r looks like an input, but %s is not given it; map it, as in inputs={%s: %s}, unless only rewards "
                "want it",
                name,
                adapters.name_of(pipeline),
                name if name in media else media[0],
                name,
            )


def lora_targets(config: Config, pipeline: Pipeline, row: Row) -> tuple[str, ...]:
    """The layers that the run's LoRA trains, by the ends of their paths; none where it has no LoRA."""
    lora, rollout = config.model.lora, config.rollout
    if lora is None:
        return ()
    if lora.targets != "auto":
        return lora.targets
    return automatic_targets(
        pipeline,
        row,
        num_inference_steps=rollout.num_inference_steps,
        guidance_scale=rollout.guidance_scale,
        negative_prompt=rollout.negative_prompt,
    )


@torch.no_grad()
def check_tokens(config: Config, pipeline: Pipeline, row: Row) -> None:
    """One pass of a network that is split over processes, which raises ValueError where its tokens cannot be shared evenly."""
    rollout = config.rollout
    conditioning = prepare_rows(
        pipeline,
        [row],
        num_inference_steps=rollout.num_inference_steps,
        guidance_scale=rollout.guidance_scale,
        negative_prompt=rollout.negative_prompt,
    )
    device = next(next(iter(pipeline.denoisers.values())).parameters()).device
    noise = torch.zeros((1, *conditioning.latent_shape), device=device, dtype=conditioning.latent_dtype)
    latents, started = conditioning.start(noise)
    pipeline.begin(latents, 0, started)


def check_rows(
    config: Config, pipeline: Pipeline, rows: Sequence[Row], settings: dict[str, Any], *, weights: str
) -> None:
    """Raise ValueError with the whole report where a pipeline cannot be trained on such rows.

    A good verdict of an earlier run is taken, if ``model.selfcheck`` says so; ``weights`` is their fingerprint. The code of an
    adapter may be in many files, so it is checked every time.
    """
    inputs = {"inputs": [dict(row.inputs) for row in rows]} if any(row.inputs for row in rows) else {}
    asked = config.model.selfcheck
    if asked == "cached" and not isinstance(pipeline, FlowPipeline):
        asked = "always"
    about = {
        "class": adapters.name_of(pipeline),
        "weights": weights,
        "scheduler": dict(pipeline.pipe.scheduler.config) if isinstance(pipeline, FlowPipeline) else None,
        "model": config.model.model_dump(mode="json", exclude={"path", "lora", "selfcheck"}),
        "rows": rows,
        "settings": settings,
    }
    device = next(value.device for network in pipeline.denoisers.values() for value in network.parameters())
    checked(
        asked,
        verdict_file(about, device),
        lambda: selfcheck.check(pipeline, prompts=[row.text for row in rows], **inputs, **settings),
    )


def check_pictures(config: Config, pipeline: Pipeline, prompts: Prompts, settings: dict[str, Any]) -> None:
    """Encode a picture of each kind of row. Raises ValueError where the pipeline cannot learn from pictures."""
    if not prompts.groups:
        return
    encoder = build.build_encoder(config, pipeline)
    kinds = {prompts.row(place).signature: place for place in range(len(prompts))}
    for place in kinds.values():
        row = prepare_rows(pipeline, [prompts.row(place)], **settings)
        encoder.encode(prompts.groups[place][0].media, row.parts[0] if isinstance(row, Several) else row)


def of_all_lengths(prompts: Prompts, count: int = 8) -> list[Row]:
    """So many rows of a file: the shortest prompt, the longest, and some in between.

    A pipeline that does not pad has rows of unlike shape for prompts of unlike length.
    """
    rows = sorted(map(prompts.row, range(len(prompts))), key=lambda row: len(row.text))
    last = len(rows) - 1
    return [rows[place] for place in sorted({number * last // (count - 1) for number in range(count)})]


def checked_plan(config: Config, pipeline: Pipeline, plan: Plan, prompts: Prompts, *, weights: str) -> Plan:
    """Can this pipeline be trained so? A few network passes; raises ValueError that says what does not hold.

    ``weights`` is a fingerprint of the denoisers' weights. Returns the plan with noise levels that keep their budget on the
    pipeline's schedule, where that is asked for.
    """
    rollout = config.rollout
    guidance = {"guidance_scale": rollout.guidance_scale, "negative_prompt": rollout.negative_prompt}
    first = [prompts.row(place) for place in range(min(len(prompts), 64))]
    some = [*{row.text: row for row in first}.values(), *(first[0]._replace(text=text) for text in selfcheck.PROMPTS)]
    two = {row.text: row for row in some}
    warn_of_idle_columns(config, pipeline, prompts)
    # one that starts from a picture takes a part of the steps: fewer than the run's might leave the picture out
    asked = {"num_inference_steps": rollout.num_inference_steps} if config.inputs else {}
    check_rows(config, pipeline, list(two.values())[:2], guidance | asked, weights=weights)
    settings = {"num_inference_steps": rollout.num_inference_steps, **guidance}
    conditioning = prepare_rows(pipeline, some[:1], **settings)
    if (taken := conditioning.schedule.num_steps) != plan.num_steps:
        logger.warning(
            "%s takes %d of the %d denoising steps of rollout.num_inference_steps; the plan is for those",
            adapters.name_of(pipeline),
            taken,
            rollout.num_inference_steps,
        )
        plan = build.build_plan(rollout.plan, config, num_steps=taken)
    for row in {row.signature: row for row in map(prompts.row, range(len(prompts)))}.values():
        # now, on all processes at once: what a pipeline is asked first about such rows may take network passes
        prepare_rows(pipeline, [row], **settings)
    check_pictures(config, pipeline, prompts, settings)
    if rollout.batch_size > rollout.group_size:
        try:
            together = prepare_rows(pipeline, of_all_lengths(prompts), **settings)
            if isinstance(together, Several) and not isinstance(conditioning, Several):
                raise UnlikeConditioning("rows of the prompt file need network passes of their own")
        except UnlikeConditioning as error:
            raise ValueError(
                f"rollout.batch_size={rollout.batch_size} puts several prompts into a batch, but {error}; set it to "
                f"rollout.group_size={rollout.group_size} or a divisor of it"
            ) from error
    if (rollout.tail_fraction < 1 or rollout.branching) and not tail_is_idle(pipeline, conditioning):
        raise ValueError(
            f"{adapters.name_of(pipeline)} does something to the latents after each denoising step, which neither skipped "
            "steps nor candidates would get; leave rollout.tail_fraction and rollout.branching out"
        )
    if rollout.branching and "sigma" in prompts.columns:
        raise ValueError(
            "rollout.branching gives rewards a column called sigma, and so does the prompt file; rename that one"
        )
    if not plan.num_transitions:
        return plan
    reached = {index for step in range(config.num_steps) for index in plan.indices(step)}
    if missed := sorted(set(plan.covered) - reached):
        logger.warning(
            "in %d training steps the window never comes to the denoising steps %s", config.num_steps, missed
        )
    kernels.check_kernel(rollout.kernel.name, conditioning.schedule, plan.covered_levels)
    if rollout.kernel.keep_budget:
        kernel, schedule = rollout.kernel, conditioning.schedule
        factor = kernels.budget_factor(kernel.name, schedule, plan.covered_levels, kernel.noise_level)
        plan = replace(plan, levels=tuple(factor * level for level in plan.levels))
    return plan
