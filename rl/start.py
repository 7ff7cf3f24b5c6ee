"""Starting a run in three acts: check, load, open.

Everything that can be checked is checked before anything is written: a run that cannot work ends here, with one message.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowsteer.rewards.combine import RewardSet
from flowsteer.rl import build
from flowsteer.rl.build_rewards import build_rewards, check_alike, without
from flowsteer.rl.checkpoint import Checkpoints, fingerprint, open_run, write_whole
from flowsteer.rl.config import Config, check_config, fitted, save_config
from flowsteer.rl.config.data import inputs_of, pictures_of, sources_of
from flowsteer.rl.engine.base import Engine
from flowsteer.rl.engine.context import split_sequences
from flowsteer.rl.engine.processes import Processes
from flowsteer.rl.evaluations import Evaluations
from flowsteer.rl.export import how_to_load
from flowsteer.rl.fit import check_groupwise, check_prompts, check_tokens, checked_plan, lora_targets
from flowsteer.rl.metrics import Log, Meter
from flowsteer.rl.passes import uncompiled
from flowsteer.rl.policy import Policy
from flowsteer.rl.prompt_files import add_pictures, check_columns_of_prompts, frame_rate_of, warn_of_long_prompts
from flowsteer.rl.report.screen import Screen
from flowsteer.rl.run import Run
from flowsteer.rl.scoring import LedScorer, StepScorer, StoredScorer
from flowsteer.rl.types import Algorithm
from flowsteer.rollout.data.prompts import Prompts, read_prompts
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.quantize import HOW_IN_DIFFUSERS
from flowsteer.rollout.steps.plan import Plan

logger = logging.getLogger(__name__)


def start(config: Config, *, resume: bool = False, quiet: bool = False) -> Run:
    """Make a run's parts, restore its newest checkpoint when resuming, and only then write into its folder.

    Raises ValueError for everything that makes the run impossible, before anything on disk has changed.
    """
    folder = Path(config.output).absolute()  # once: a reward may change the current folder later
    open_run(folder, config, resume=resume)
    checked = check(config)
    used = checked.config
    with ExitStack() as undo:  # a reward may be a process, which must not stay behind when anything below fails
        rewards = build_rewards(used, checked.processes.device)
        undo.callback(rewards.close)
        prompts, evaluation = add_pictures(used, rewards, checked.prompts, checked.evaluation_prompts)
        checked = replace(checked, prompts=prompts, evaluation_prompts=evaluation)
        loaded = load(used, checked, rewards)
        run = open_folder(used, folder, checked, loaded, given=config, resume=resume, quiet=quiet)
        undo.pop_all()
    return run


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What stands before anything heavy is loaded."""

    config: Config  # with the batch size that this number of processes uses
    plan: Plan
    processes: Processes
    prompts: Prompts
    evaluation_prompts: Prompts | None


def check(config: Config) -> Checked:
    """The configuration's contradictions, the plan, the algorithm's demands and the prompt files."""
    plan = build.build_plan(config.rollout.plan, config)
    build.build_branching(config)  # its faults, like all others, before anything is loaded or written
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_config(config, num_processes)
    config = fitted(config, num_processes)
    # before the rewards: a model of theirs then lands on this process's device
    processes = build.build_processes(config)
    build.build_algorithm(config, plan, processes)  # likewise; made again when the pipeline's denoisers are known
    inputs = inputs_of(config.inputs)
    pictures = pictures_of(config.prompts, config.rollout.group_size)
    prompts = read_prompts(sources_of(config.prompts.train), inputs=inputs, pictures=pictures)
    evaluation_prompts = (
        read_prompts(sources_of(config.evaluation.prompts), inputs=inputs) if config.evaluation else None
    )
    check_columns_of_prompts(config, prompts, evaluation_prompts)  # a reward may require some
    return Checked(
        config=config, plan=plan, processes=processes, prompts=prompts, evaluation_prompts=evaluation_prompts
    )


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The networks, the rewards, and the algorithm under its optimiser."""

    rewards: RewardSet
    depends_on: dict[str, dict[str, Any]]  # what scores depend on, for a restart to compare
    pipeline: Pipeline
    model: str  # a fingerprint of the weights at the start
    plan: Plan
    algorithm: Algorithm
    policy: Policy
    engine: Engine


def load(config: Config, checked: Checked, rewards: RewardSet) -> Loaded:
    """Load the pipeline, check that it can be trained so, and prepare the engine."""
    check_groupwise(rewards, config)
    check_prompts(rewards, config, checked.prompts, checked.evaluation_prompts)
    processes = checked.processes
    depends_on = without(rewards.fingerprints, "platform")
    check_alike(depends_on, processes.gather_all)
    pipeline = build.build_pipeline(config, processes.device)
    rewards.frame_rate = frame_rate_of(pipeline)
    warn_of_long_prompts(config, pipeline, checked.prompts, checked.evaluation_prompts)
    model = fingerprint(dict(pipeline.denoisers))
    with uncompiled(config.model.compile):
        plan = checked_plan(config, pipeline, checked.plan, checked.prompts, weights=model)
        targets = lora_targets(config, pipeline, checked.prompts.row(0))
    # processes meet in every pass under ZeRO, so they must ask the same one of several denoisers at the same time
    algorithm = build.build_algorithm(config, plan, processes, common_indices=len(pipeline.denoisers) > 1)
    policy = build.build_policy(config, pipeline, algorithm, targets)
    split_sequences(pipeline.denoisers, processes)
    if config.engine.context_parallel > 1:
        check_tokens(config, pipeline, checked.prompts.row(0))
    return Loaded(
        rewards=rewards,
        depends_on=depends_on,
        pipeline=pipeline,
        model=model,
        plan=plan,
        algorithm=algorithm,
        policy=policy,
        engine=build.build_engine(config, processes, policy, algorithm),
    )


def open_folder(
    config: Config, folder: Path, checked: Checked, loaded: Loaded, *, given: Config, resume: bool, quiet: bool
) -> Run:
    """Restore the newest checkpoint when resuming, then write into the run's folder; ``given`` is what the user wrote."""
    engine, policy, rewards, prompts = loaded.engine, loaded.policy, loaded.rewards, checked.prompts
    checkpoints = Checkpoints(
        folder,
        engine,
        model=loaded.model,
        prompts=prompts.fingerprint(),
        rewards=loaded.depends_on,
        keep=config.keep,
        plugins=build.plugins_of(config),
    )
    first = checkpoints.restore() if resume else 0
    if first > config.num_steps:
        raise ValueError(
            f"the run in {folder} has done {first} training steps already, more than num_steps={config.num_steps}; set it to "
            f"{first} or more, or start a new run with output=FOLDER"
        )
    origin = origin_of(first, checkpoints, config, resume=resume)
    screen = Screen(quiet=quiet or not engine.is_main, start=first, num_steps=config.num_steps)
    scorer = StepScorer(rewards, timeout_s=config.engine.timeout_s / 2)
    evaluations = None
    if config.evaluation is not None and checked.evaluation_prompts is not None:
        draw = build.build_evaluation(
            config.evaluation, config, loaded.pipeline, checked.evaluation_prompts, scorer, checked.processes
        )
        evaluations = Evaluations(
            folder, draw, policy, engine, screen, num_steps=config.num_steps, every=config.evaluation.every
        )
    if engine.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "config.json", given.model_dump_json(indent=1))
        write_whole(folder / "rewards.json", json.dumps(rewards.fingerprints, indent=1))
        save_config(given, folder / "config.yaml")
        if evaluations is not None:
            evaluations.drop_after(first)
    engine.wait()
    log = Log(
        folder,
        trackers=config.trackers,
        start=first,
        is_main=engine.is_main,
        config=json.loads(config.model_dump_json()),
    )
    screen.opening(
        derived(config, policy, engine, prompts, loaded.pipeline, most=given.rollout.batch_size),
        origin=origin,
        missing_trackers=log.missing_trackers,
    )
    return Run(
        config=config,
        folder=folder,
        start=first,
        num_steps=config.num_steps,
        policy=policy,
        engine=engine,
        worker=build.build_worker(config, loaded.pipeline, prompts, loaded.plan, checked.processes, policy),
        scorer=StoredScorer(scorer) if config.training_asks_no_reward else LedScorer.of(scorer, checked.processes),
        compare=build.build_compare(config, rewards),
        algorithm=loaded.algorithm,
        meter=Meter(),
        log=log,
        screen=screen,
        saving=build.build_saving(config, checkpoints, engine, start=first),
        evaluations=evaluations,
        export=build.build_export(config, policy, engine, folder),
    )


def origin_of(first: int, checkpoints: Checkpoints, config: Config, *, resume: bool) -> str:
    """From where a run starts, as a sentence for the screen; ``first`` is the training step that it begins with."""
    if not resume:
        return "starting at step 0"
    if not checkpoints.steps():
        return f"--resume found no checkpoint in {checkpoints.root}: starting at step 0"
    return f"continuing with step {first} ({first}/{config.num_steps} done)"


def derived(
    config: Config, policy: Policy, engine: Engine, prompts: Prompts, pipeline: Pipeline, *, most: int
) -> dict[str, str]:
    """Quantities that follow from the configuration: printed at the start, never asked for; ``most``: rollout.batch_size."""
    rollout, algorithm = config.rollout, config.algorithm
    images = rollout.prompts_per_step * rollout.group_size
    trained = sum(parameter.numel() for parameter in policy.parameters().values())
    size = f"{rollout.batch_size}" + (f" (rollout.batch_size={most} at most)" if rollout.batch_size < most else "")
    team = engine.processes.team_size
    together = f"each shared by {team} of them, " if team > 1 else ""
    through = f" through {config.model.adapter}" if config.model.adapter else ""
    lines = {
        "model": f"{config.model.path}{through}, {trained:,} parameters trained",
        "algorithm": f"{algorithm.name}, {algorithm.updates_per_rollout} update(s) per step",
        "images per step": f"{images} = {rollout.prompts_per_step} prompts x {rollout.group_size}",
        "batches": f"{images // rollout.batch_size} of {size} on {engine.processes.num_processes} process(es), "
        f"{together}{engine.accumulation} backward passes per update",
        "prompts": f"{len(prompts)}, all seen after {len(prompts) / rollout.prompts_per_step:.1f} steps",
        **({"pictures": f"{sum(map(len, prompts.groups))} of them, none is drawn"} if prompts.groups else {}),
        "output": config.output,
        **({"export": loads} if (loads := how_the_export_loads(config, pipeline)) else {}),
    }
    if rollout.branching is not None:
        ways = len(rollout.branching.granularities)
        lines["pools"] = f"each step's images once for every stochastic step, finished in {ways} way(s)"
    return lines


def how_the_export_loads(config: Config, pipeline: Pipeline) -> str:
    """How diffusers loads the LoRA of this run; empty where the run has none, or an adapter in the pipeline's place."""
    if config.model.lora is None or not isinstance(pipeline, FlowPipeline):
        return ""
    loads = how_to_load(pipeline.pipe, pipeline.denoisers)
    kind = config.model.quantize
    return loads if kind is None else f"{loads}, into a base that is quantised by {HOW_IN_DIFFUSERS[kind]}"
