"""One training step on a pipeline of the zoo, its export, and the same picture drawn by plain diffusers with it.

What learns is the real thing: a policy with LoRA, an engine, a rollout worker, a reward, an algorithm. Only the
configuration file is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from flowsteer.rewards.combine import RewardSet
from flowsteer.rl.algorithms import DiffusionNFT, FlowGRPO
from flowsteer.rl.compare import compare
from flowsteer.rl.engine.base import Engine, prepare
from flowsteer.rl.engine.optimizer import OptimizerSettings
from flowsteer.rl.engine.processes import Processes
from flowsteer.rl.export import export_lora, load_lora
from flowsteer.rl.policy import Policy
from flowsteer.rl.scoring import StepScorer
from flowsteer.rl.targets import automatic_targets
from flowsteer.rl.types import Facts
from flowsteer.rollout.data.prompts import Prompts, Row
from flowsteer.rollout.lifting.loop import fixed_randomness
from flowsteer.rollout.lifting.pipeline import FlowPipeline, as_tensor
from flowsteer.rollout.lifting.selfcheck import _Stepper
from flowsteer.rollout.steps.kernels import check_kernel
from flowsteer.rollout.steps.plan import Plan, all_steps, no_steps
from flowsteer.rollout.steps.solvers import euler
from flowsteer.rollout.types import Schedule
from flowsteer.rollout.worker import RolloutWorker
from zoo.entries import Entry, lifted

STEPS = 4
GROUP = 2
RANK, ALPHA = 4, 8
WEIGHT = "variance"
NOISE_LEVEL = 0.7


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What one training step did.

    Example: ``Trained(algorithm="flow_grpo", changed=0.03, apart=0.0)``: what the pipeline draws has changed by up to 0.03, and
    plain diffusers with the export draws the same bit for bit.
    """

    algorithm: str
    changed: float  # largest difference of what is drawn before and after the step
    apart: float  # largest difference of what the policy and plain diffusers with its export draw


def brightness(images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """uint8 pictures [B, H, W, 3] or videos [B, T, H, W, 3] to their mean brightness in [0, 1]."""
    return [float(image.mean()) / 255 for image in images]


def loudness(images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """Sound [B, C, N] to its mean absolute value."""
    return [float(np.abs(sound).mean()) for sound in images]


brightness.video = True  # type: ignore[attr-defined]
loudness.sound = True  # type: ignore[attr-defined]


def trained(entry: Entry, folder: Path, *, batch_size: int = GROUP) -> Trained:
    """Train a pipeline of the entry for one step, export its LoRA into ``folder``, and draw with it by plain diffusers."""
    pipeline, inputs, negative = lifted(entry)
    row = inputs[0] if inputs else {}
    settings = {
        "num_inference_steps": STEPS,
        "guidance_scale": entry.guided or 1.0,
        "negative_prompt": negative,
    }
    schedule = pipeline.prepare([entry.prompts[0]], **settings, inputs=[row]).schedule
    targets = automatic_targets(pipeline, Row.of(entry.prompts[0], row), **settings)
    before = drawn(pipeline, entry.prompts[0], row, settings)
    processes = Processes(cpu=True, timeout_s=600)
    algorithm, plan = chosen(schedule, processes, common=len(pipeline.denoisers) > 1)
    policy = Policy(pipeline, lora=(RANK, ALPHA, targets), variants=algorithm.variants, seed=0)
    engine = _engine(processes, policy, algorithm, batch_size)
    prompts = Prompts(texts=entry.prompts[:1], inputs={name: (value,) for name, value in row.items()})
    settings_of_rollout = {"plan": plan, "kernel": kernel_of(schedule), "batch_size": batch_size, **settings}
    worker = _worker(pipeline, prompts, processes, algorithm, settings_of_rollout)
    _one_step(algorithm, policy, engine, worker)
    with policy.using(policy.best):
        after = drawn(pipeline, entry.prompts[0], row, settings)
    export_lora(policy, engine, folder)
    engine.close()
    apart = _difference(drawn_by_diffusers(entry, folder, schedule, settings), after)
    return Trained(algorithm=algorithm.name, changed=_difference(after, before), apart=apart)


def kernel_of(schedule: Schedule) -> str:
    return "flow_sde" if schedule.prediction == "velocity" else "ddim"


def chosen(schedule: Schedule, processes: Processes, *, common: bool) -> tuple[FlowGRPO | DiffusionNFT, Plan]:
    """Flow-GRPO, or where its stochastic steps do not fit the schedule DiffusionNFT, bound to a plan."""
    count = schedule.num_steps
    try:
        plan = all_steps(count, NOISE_LEVEL)
        check_kernel(kernel_of(schedule), schedule, plan.covered_levels)
    except ValueError:
        plan = no_steps(count)
    facts = Facts(
        kernel=kernel_of(schedule),
        log_prob_weight=WEIGHT,
        num_inference_steps=count,
        num_transitions=plan.num_transitions,
        group_size=GROUP,
        advantage_clip=5.0,
        seed=0,
        common_indices=common,
        gather=processes.gather,
    )
    if plan.num_transitions:
        return FlowGRPO(updates_per_rollout=1, clip_range=0.2).bind(facts), plan
    return DiffusionNFT(updates_per_rollout=1, noise_levels_per_sample=1).bind(facts), plan


def _engine(processes: Processes, policy: Policy, algorithm: FlowGRPO | DiffusionNFT, batch_size: int) -> Engine:
    optimizer = OptimizerSettings(
        learning_rate=1e-2,
        schedule="constant",
        warmup_updates=0,
        total_updates=1,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        epsilon=1e-12,  # networks this small have gradients this small
        max_grad_norm=1.0,
    )
    layout = {"strategy": "plain", "dtype": torch.float32, "batch_size": batch_size, "batches": GROUP // batch_size}
    return prepare(processes, policy, optimizer, **layout, passes_per_batch=algorithm.passes_per_batch)


def _worker(
    pipeline: FlowPipeline,
    prompts: Prompts,
    processes: Processes,
    algorithm: FlowGRPO | DiffusionNFT,
    settings: Mapping[str, Any],
) -> RolloutWorker:
    return RolloutWorker(
        pipeline,
        prompts,
        log_prob_weight=WEIGHT,
        solver="euler",
        **settings,
        prompts_per_step=1,
        group_size=GROUP,
        shared_noise=False,
        updates_per_rollout=algorithm.updates_per_rollout,
        seed=0,
        num_processes=1,
        process_index=0,
        dtype=torch.float32,
        device=processes.device,
    )


def _one_step(algorithm: FlowGRPO | DiffusionNFT, policy: Policy, engine: Engine, worker: RolloutWorker) -> None:
    """Sample, score, compare, improve. Raises ValueError where the samples' scores are equal, from which nothing is learned."""
    with policy.using(algorithm.acting):
        rollouts = worker.sample(0)
    reward = loudness if rollouts[0].images.dim() == 3 else brightness
    scorer = StepScorer(RewardSet([("reward", reward, 1.0)]))
    for rollout in rollouts:
        scorer.submit(rollout)
    scores = scorer.collect()
    scorer.close()
    comparisons, _ = compare(
        rollouts, scores, engine.gather, weights={"reward": 1.0}, deviation="group", clip=5.0, min_scored=1.0
    )
    if not any(comparison.advantage.any() for comparison in comparisons):
        raise ValueError("two samples of one prompt are equally bright or loud: nothing to learn from")
    for batch in algorithm.batches(rollouts, comparisons, 0):
        engine.backward(algorithm.loss(policy, batch)[0])  # type: ignore[arg-type]  (its own batches)
    policy.follow_old(algorithm.old_decay(engine.num_updates))


def drawn(pipeline: FlowPipeline, prompt: str, inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> Tensor:
    """The picture by lifted steps, from what the pipeline itself would start with."""
    latents, row = pipeline.own_start(prompt, inputs=inputs, **settings)
    with torch.no_grad():
        for index in range(row.schedule.num_steps):
            step = pipeline.begin(latents, index, row)
            latents = step.finish(euler(step.velocity, latents, row.schedule, index)[0].to(step.velocity.dtype))
        return pipeline.decode(latents, row)


def drawn_by_diffusers(entry: Entry, folder: Path, schedule: Schedule, settings: Mapping[str, Any]) -> Tensor:
    """The picture by the pipeline's own ``__call__``, newly built, with the LoRA of ``folder``.

    Only a solver is replaced: what is no Euler or DDIM scheduler takes Euler steps.
    """
    fresh, inputs, _ = lifted(entry)  # an epsilon pipeline has got its DDIM scheduler
    plain = fresh.pipe
    load_lora(plain, folder)
    for network in plain.components.values():
        if isinstance(network, nn.Module):
            network.requires_grad_(False)  # as training froze it: torch multiplies by whether a weight wants a gradient
    if schedule.rising or not isinstance(plain.scheduler, (FlowMatchEulerDiscreteScheduler, DDIMScheduler)):
        plain.scheduler = copy.deepcopy(plain.scheduler)
        plain.scheduler.step = _Stepper(schedule)
    if getattr(plain, "guider", None) is not None:
        plain.guider.guidance_scale = settings["guidance_scale"]
    for name, value in fresh.loop.unchecked.items():
        setattr(plain, name, value)
    fresh.prepare(list(entry.prompts[:1]), inputs=inputs and inputs[:1], **settings)  # whether it wants a bare text
    arguments = fresh.call_arguments(list(entry.prompts[:1]), inputs=inputs and inputs[:1], **settings)
    with fixed_randomness(torch.device("cpu")), torch.no_grad():
        return as_tensor(plain(**arguments), type(plain).__name__)


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
