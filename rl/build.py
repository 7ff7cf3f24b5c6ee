"""From a configuration's fields to the parts of a run, each with plain arguments. `rl/start.py` puts them together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.doors import blaming
from flowsteer.rewards.hosts.worker import source_hash
from flowsteer.rl.adapters import DOOR as ADAPTERS
from flowsteer.rl.adapters import load_pipeline
from flowsteer.rl.checkpoint import Checkpoints
from flowsteer.rl.compare import compare, uncompared
from flowsteer.rl.config import Config
from flowsteer.rl.config.contradictions import train_parts
from flowsteer.rl.config.schema import EvaluationConfig, PlanConfig
from flowsteer.rl.engine.base import Engine, prepare
from flowsteer.rl.engine.optimizer import OptimizerSettings
from flowsteer.rl.engine.processes import Processes
from flowsteer.rl.evaluate import Evaluation, evaluate
from flowsteer.rl.export import export_lora, export_weights
from flowsteer.rl.interrupts import Interrupts
from flowsteer.rl.passes import set_passes
from flowsteer.rl.plugins import find_algorithm, is_foreign
from flowsteer.rl.policy import Policy
from flowsteer.rl.saving import Saving
from flowsteer.rl.scoring import StepScorer
from flowsteer.rl.types import Algorithm, Comparison, Facts
from flowsteer.rollout.branches import Branching
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.encode import Encoder
from flowsteer.rollout.lifting.kept import Kept
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.offline import PictureWorker
from flowsteer.rollout.share import Share
from flowsteer.rollout.steps.plan import Plan, all_steps, decay, fixed_steps, no_steps, window
from flowsteer.rollout.worker import RolloutWorker

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_plan(section: PlanConfig, config: Config, *, num_steps: int | None = None) -> Plan:
    """Which steps are stochastic when.

    ``num_steps`` is how many denoising steps are taken, where a pipeline takes fewer than it is asked for.
    """
    rollout = config.rollout
    count, level = num_steps or rollout.num_inference_steps, rollout.kernel.noise_level
    if section.name == "none":
        return no_steps(count)
    if level == 0:
        raise ValueError(
            "rollout.kernel.noise_level=0 makes no step stochastic; set it above 0, or rollout.plan.name=none"
        )
    levels = decay(level, count, shape=rollout.kernel.decay, rate=rollout.kernel.decay_rate)
    if section.name == "all":
        return all_steps(count, levels, include_last=section.include_last)
    if section.name == "steps":
        return fixed_steps(count, levels, section.indices)
    return window(count, levels, seed=config.seed, **section.model_dump(exclude={"name"}))


def build_branching(config: Config) -> Branching | None:
    """How groups part, if they do."""
    section = config.rollout.branching
    return Branching(**section.model_dump()) if section else None


def build_algorithm(config: Config, plan: Plan, processes: Processes, *, common_indices: bool = False) -> Algorithm:
    """The algorithm, told what it has to know of the run.

    ``common_indices``: all batches of a training step are trained at the same denoising indices.
    """
    kernel, rollout, branching = config.rollout.kernel, config.rollout, config.rollout.branching
    pools = len([index for index in plan.indices(0) if branching is None or index >= branching.first])
    if branching is not None and not pools:
        raise ValueError(
            f"rollout.branching.first={branching.first} leaves no pool: the plan's stochastic steps are "
            f"{list(plan.indices(0))}; set it to at most the last of them"
        )
    facts = Facts(
        kernel=kernel.name,
        log_prob_weight=kernel.log_prob_weight,
        num_inference_steps=plan.num_steps,
        num_transitions=pools if branching else plan.num_transitions,
        group_size=rollout.group_size,
        advantage_clip=config.advantage.clip,
        seed=config.seed,
        common_indices=common_indices,
        gather=processes.gather,
        train_parts=train_parts(config),
    )
    with blaming(f"algorithm {config.algorithm.label!r} cannot be bound to the run"):
        return config.algorithm.bind(facts)


def build_processes(config: Config) -> Processes:
    """The process group."""
    engine = config.engine
    return Processes(cpu=engine.device == "cpu", timeout_s=engine.timeout_s, team_size=engine.context_parallel)


def build_engine(config: Config, processes: Processes, policy: Policy, algorithm: Algorithm) -> Engine:
    """The policy under its optimiser."""
    return prepare(
        processes,
        policy,
        build_optimizer_settings(config),
        strategy=config.engine.strategy,
        dtype=DTYPES[config.model.dtype],
        batch_size=config.rollout.batch_size // train_parts(config),
        batches=batches_per_update(config, processes.num_teams),
        passes_per_batch=algorithm.passes_per_batch,
    )


def batches_per_update(config: Config, num_teams: int) -> int:
    """Rollout batches of one optimiser update on one process, or on all that share them."""
    rollout = config.rollout
    batches = rollout.prompts_per_step * rollout.group_size // rollout.batch_size // num_teams
    return batches // config.algorithm.updates_per_rollout


def build_pipeline(config: Config, device: torch.device) -> Pipeline:
    """The pipeline, lifted, or the adapter in its place."""
    model = config.model
    pipeline = load_pipeline(
        model.path,
        adapter=model.adapter,
        dtype=DTYPES[model.dtype],
        device=device,
        height=model.height,
        width=model.width,
        call=model.call,
        scheduler=model.scheduler,
        quantize=model.quantize,
        offload=model.offload.kinds,
        vae_dtype=None if model.vae.dtype is None else DTYPES[model.vae.dtype],
        vae_modes=model.vae.modes,
    )
    set_passes(
        pipeline.denoisers,
        checkpoint_every=model.checkpoint_every,
        attention=model.attention or ("native" if config.engine.context_parallel > 1 else None),
        compiled=model.compile,
    )
    return pipeline


def plugins_of(config: Config) -> dict[str, str | None]:
    """The hash of the source file of an algorithm and of an adapter from outside; a run goes on with the same code only."""
    found = {}
    if is_foreign(config.algorithm.label):
        found[f"the code of algorithm {config.algorithm.label!r}"] = source_hash(find_algorithm(config.algorithm.label))
    if config.model.adapter is not None:
        found[f"the code of adapter {config.model.adapter!r}"] = source_hash(ADAPTERS.load(config.model.adapter))
    return found


def build_policy(config: Config, pipeline: Pipeline, algorithm: Algorithm, targets: tuple[str, ...]) -> Policy:
    """The policies that the algorithm and the evaluation need; ``targets`` are the layers of a LoRA."""
    lora = config.model.lora
    return Policy(
        pipeline,
        lora=None if lora is None else (lora.rank, lora.alpha, targets),
        variants=algorithm.variants | ({"ema"} if config.ema_decay else frozenset()),
        seed=config.seed,
        ema_decay=config.ema_decay,
        compiled=config.model.compile,
        ema_ramp=config.ema_ramp,
        ema_every=config.ema_every,
    )


def build_optimizer_settings(config: Config) -> OptimizerSettings:
    """The optimiser's settings."""
    section = config.optimizer
    return OptimizerSettings(
        name=section.name,
        learning_rate=section.learning_rate,
        schedule=section.schedule,
        warmup_updates=section.warmup_updates,
        total_updates=config.num_updates,
        betas=section.betas,
        weight_decay=section.weight_decay,
        epsilon=section.epsilon,
        max_grad_norm=section.max_grad_norm,
    )


def build_encoder(config: Config, pipeline: Pipeline) -> Encoder:
    """What makes latents of pictures. Raises ValueError for a pipeline that has no image processor."""
    assert config.prompts.pictures is not None, "asked for where there are pictures"
    assert isinstance(pipeline, FlowPipeline), "the configuration is held to it"
    folder = config.prompts.pictures.cache
    kept = Kept(folder=None if folder is None else Path(folder).absolute())
    return Encoder(pipeline, dtype=DTYPES[config.model.dtype], kept=kept)


def build_worker(
    config: Config,
    pipeline: Pipeline,
    prompts: Prompts,
    plan: Plan,
    processes: Processes,
    policy: Policy | None = None,
) -> RolloutWorker | PictureWorker:
    """What draws the samples of this process, or takes its pictures; the policy is asked where its LoRA is to be merged."""
    rollout = config.rollout
    share = Share(
        num_inference_steps=rollout.num_inference_steps,
        guidance_scale=rollout.guidance_scale,
        negative_prompt=rollout.negative_prompt,
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        batch_size=rollout.batch_size,
        updates_per_rollout=config.algorithm.updates_per_rollout,
        mixed=rollout.updates == "mixed",
        seed=config.seed,
        num_processes=processes.num_teams,
        process_index=processes.team_index,
    )
    if config.prompts.pictures is not None:
        return PictureWorker(build_encoder(config, pipeline), prompts, **share)
    worker = RolloutWorker(
        pipeline,
        prompts,
        **share,
        plan=plan,
        kernel=rollout.kernel.name,
        log_prob_weight=rollout.kernel.log_prob_weight,
        solver=rollout.solver,
        shared_noise=rollout.shared_noise,
        dtype=DTYPES[config.model.dtype],
        device=processes.device,
        branching=build_branching(config),
        tail_fraction=rollout.tail_fraction,
        train_guidance_scale=rollout.train_guidance_scale,
        keep_means=config.algorithm.keeps_means,
        training_graph=config.model.compile and config.algorithm.learns_from == "transitions",
    )
    if rollout.merge_lora:
        assert policy is not None, "its LoRA is merged while samples are drawn"
        worker.drawing = policy.merged
    return worker


def build_evaluation(
    config: EvaluationConfig,
    run: Config,
    pipeline: Pipeline,
    prompts: Prompts,
    scorer: StepScorer,
    processes: Processes,
) -> Callable[..., Evaluation]:
    """`evaluate` with all its settings."""
    return partial(
        evaluate,
        pipeline,
        prompts,
        scorer.rewards,
        num_prompts=config.num_prompts,
        num_seeds=config.num_seeds,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        negative_prompt=config.negative_prompt,
        batch_size=run.rollout.batch_size,
        dtype=DTYPES[run.model.dtype],
        device=processes.device,
        process_index=processes.team_index,
        num_processes=processes.num_teams,
        timeout_s=scorer.timeout_s,
        gather=processes.gather,
        to_main=processes.to_main,
    )


def build_saving(config: Config, checkpoints: Checkpoints, engine: Engine, *, start: int) -> Saving:
    """When the run saves itself; listens to SIGTERM and Ctrl-C from here on."""
    return Saving(
        checkpoints,
        engine,
        Interrupts(None if engine.is_main else lambda line: None),
        num_steps=config.num_steps,
        start=start,
        every=config.save_every,
        every_s=config.save_every_s,
    )


def build_compare(config: Config, rewards: RewardSet) -> Callable[..., tuple[list[Comparison], dict[str, float]]]:
    """`compare` with its settings; `uncompared` for an algorithm that compares nothing."""
    if not config.algorithm.compares:
        return uncompared
    return partial(compare, weights=rewards.weights, **config.advantage.model_dump())


def build_export(config: Config, policy: Policy, engine: Engine, folder: Path) -> Callable[[], Path]:
    """What writes the result."""
    write = export_weights if config.model.lora is None else export_lora
    return partial(write, policy, engine, folder / "export")
