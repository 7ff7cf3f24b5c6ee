"""From a configuration to the parts of a run. The only file that reads the configuration's fields.

`start` checks everything that can be checked before anything is written: a run that cannot work ends here, with one message.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowsteer.rewards.columns import check_columns
from flowsteer.rewards.combine import Normalise, RewardSet, check_names_and_weights
from flowsteer.rewards.environments import locate
from flowsteer.rewards.hosts.child import WorkerReward
from flowsteer.rewards.hosts.remote import HTTPReward
from flowsteer.rewards.registry import load_reward
from flowsteer.rewards.types import Reward
from flowsteer.rl.checkpoint import Checkpoints, fingerprint, open_run, write_whole
from flowsteer.rl.compare import TooFewScores, compare
from flowsteer.rl.config import Config, PlanConfig, RewardConfig, save_config
from flowsteer.rl.engine import Engine, OptimizerSettings
from flowsteer.rl.evaluate import Evaluation, evaluate, save_grid
from flowsteer.rl.export import export_lora, export_weights
from flowsteer.rl.metrics import Log, Meter
from flowsteer.rl.policy import Policy
from flowsteer.rl.scoring import StepScorer, check_scorable
from flowsteer.rl.show import Screen
from flowsteer.rl.types import Algorithm, Facts
from flowsteer.rollout import kernels, selfcheck
from flowsteer.rollout.branches import Branching
from flowsteer.rollout.pipeline import FlowPipeline, UnlikeConditioning
from flowsteer.rollout.plan import Plan, all_steps, decay, fixed_steps, no_steps, window
from flowsteer.rollout.prompts import Prompts, read_prompts, step_rows
from flowsteer.rollout.worker import RolloutWorker

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class Run:
    """A run's parts, and what `rl/train.py` asks for between the acts."""

    config: Config
    folder: Path
    policy: Policy
    engine: Engine
    worker: RolloutWorker
    scorer: StepScorer
    algorithm: Algorithm
    meter: Meter
    log: Log
    screen: Screen
    checkpoints: Checkpoints
    evaluation_prompts: Prompts | None
    start: int

    def __post_init__(self) -> None:
        self.num_steps = self.config.num_steps
        weights = self.scorer.rewards.weights
        self.compare = partial(compare, weights=weights, **self.config.advantage.model_dump())
        self._stop_requested = False
        self._saved = self.start or -1
        self._sigterm_before = signal.signal(signal.SIGTERM, self._request_stop)

    def _request_stop(self, *_: object) -> None:
        self._stop_requested = True

    @contextmanager
    def saving_before(self, step: int) -> Iterator[None]:
        """Save the state before ``step`` when the rewards fail on too many of its samples, then pass the error on."""
        try:
            yield
        except TooFewScores:
            self.save(step=step, now=True)
            raise

    def report(self, step: int, statistics: dict[str, float]) -> None:
        """Write the step's line and move the progress bar."""
        values = statistics | self.meter.finish(self.engine) | {"num_updates": float(self.engine.num_updates)}
        self.log.write(step, values)
        self.screen.step(step, values)

    def evaluate(self, step: int) -> None:
        """Evaluate when due (before the first step, after the last, and as often as asked) and keep table and pictures."""
        settings = self.config.evaluation
        if settings is None or self.evaluation_prompts is None:
            return
        regular = settings.every and step % settings.every == 0
        if not (step in (0, self.num_steps) or regular) or self._evaluation_file(step).exists():
            return
        with self.policy.using(self.policy.best), self.screen.evaluating(step) as progress:
            result = evaluate(
                self.policy.pipeline,
                self.evaluation_prompts,
                self.scorer.rewards,
                num_prompts=settings.num_prompts,
                num_seeds=settings.num_seeds,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                negative_prompt=settings.negative_prompt,
                batch_size=self.config.rollout.batch_size,
                dtype=DTYPES[self.config.model.dtype],
                device=self.engine.device,
                process_index=self.engine.process_index,
                num_processes=self.engine.num_processes,
                timeout_s=self.scorer.timeout_s,
                gather=self.engine.gather,
                progress=progress,
            )
        if self.engine.is_main:
            self._keep_evaluation(step, result)
        self.engine.wait()

    def _evaluation_file(self, step: int) -> Path:
        return self.folder / "evaluations" / f"step_{step:06d}.json"

    def _keep_evaluation(self, step: int, result: Evaluation) -> None:
        file = self._evaluation_file(step)
        file.parent.mkdir(exist_ok=True)
        save_grid(result.images, file.with_suffix(".png"))
        write_whole(file, json.dumps({"step": step, **result.table()}, indent=1))
        self.screen.evaluation(step, result.summary())

    def save(self, step: int, *, now: bool = False) -> bool:
        """Keep a checkpoint when due; returns True when the run was asked to stop (SIGTERM) and has been saved."""
        stopping = bool(self.engine.gather(torch.tensor([int(self._stop_requested)])).any())
        regular = self.config.save_every and step % self.config.save_every == 0
        if (now or stopping or regular or step == self.num_steps) and step != self._saved:
            self.checkpoints.save(step)
            self._saved = step
        return stopping

    def export(self) -> Path:
        """Write the result as weights that diffusers loads; every process calls it."""
        write = export_weights if self.config.model.lora is None else export_lora
        return write(self.policy, self.engine, self.folder / "export")

    def close(self) -> None:
        """Let go of threads, files, processes and SIGTERM."""
        signal.signal(signal.SIGTERM, self._sigterm_before or signal.SIG_DFL)
        with ExitStack() as closing:  # each of them, also where another fails; the last one first
            for part in (self.engine, self.screen, self.log, self.scorer):
                closing.callback(part.close)


def start(config: Config, *, resume: bool = False, quiet: bool = False) -> Run:
    """Make a run's parts, restore its newest checkpoint when resuming, and only then write into its folder.

    Raises ValueError for everything that makes the run impossible, before anything on disk has changed.
    """
    folder = Path(config.output)
    open_run(folder, config, resume=resume)
    plan = build_plan(config.rollout.plan, config)
    build_branching(config)  # its faults, like all others, before anything is loaded or written
    engine = build_engine(config)  # before the rewards: a model of theirs then lands on this process's device
    build_algorithm(config, plan, engine)  # likewise; made again when the pipeline's denoisers are known
    prompts = read_prompts(config.prompts.train)
    evaluation_prompts = read_prompts(config.evaluation.prompts) if config.evaluation else None
    check_columns_of_prompts(config, prompts, evaluation_prompts)  # a reward may require some
    with ExitStack() as undo:  # a reward may be a process, which must not stay behind when anything below fails
        rewards = build_rewards(config, engine.device)
        undo.callback(rewards.close)
        check_groupwise(rewards, config)
        check_prompts(rewards, config, prompts, evaluation_prompts)
        depends_on = without(rewards.fingerprints, "platform")
        check_alike(depends_on, engine.gather)
        pipeline = build_pipeline(config, engine.device)
        model = fingerprint(dict(pipeline.denoisers))
        plan = _checked_plan(config, pipeline, plan, prompts)
        # processes meet in every pass under ZeRO, so they must ask the same one of several denoisers at the same time
        algorithm = build_algorithm(config, plan, engine, common_indices=len(pipeline.denoisers) > 1)
        policy = build_policy(config, pipeline, algorithm)
        engine.prepare(policy, build_optimizer_settings(config), passes_per_batch=algorithm.passes_per_batch)
        checkpoints = Checkpoints(
            folder, engine, model=model, prompts=prompts.fingerprint(), rewards=depends_on, keep=config.keep
        )
        first = checkpoints.restore() if resume else 0
        if engine.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "config.json", config.model_dump_json(indent=1))
            write_whole(folder / "rewards.json", json.dumps(rewards.fingerprints, indent=1))
            save_config(config, folder / "config.yaml")
            for table in (folder / "evaluations").glob("step_*.json"):  # of weights that are not there any more
                if int(table.stem.split("_")[1]) > first:
                    table.unlink()
        engine.wait()
        log = Log(
            folder,
            trackers=config.trackers,
            start=first,
            is_main=engine.is_main,
            config=json.loads(config.model_dump_json()),
        )
        screen = Screen(quiet=quiet or not engine.is_main, start=first, num_steps=config.num_steps)
        screen.opening(derived(config, policy, engine, prompts), missing_trackers=log.missing_trackers)
        run = Run(
            config=config,
            folder=folder,
            policy=policy,
            engine=engine,
            worker=build_worker(config, pipeline, prompts, plan, engine),
            scorer=StepScorer(rewards, timeout_s=config.engine.timeout_s / 2),
            algorithm=algorithm,
            meter=Meter(),
            log=log,
            screen=screen,
            checkpoints=checkpoints,
            evaluation_prompts=evaluation_prompts,
            start=first,
        )
        undo.pop_all()
    return run


def build_plan(section: PlanConfig, config: Config) -> Plan:
    """Which steps are stochastic when."""
    rollout = config.rollout
    count, level = rollout.num_inference_steps, rollout.kernel.noise_level
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


def build_algorithm(config: Config, plan: Plan, engine: Engine, *, common_indices: bool = False) -> Algorithm:
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
    return config.algorithm.bind(
        Facts(
            kernel=kernel.name,
            log_prob_weight=kernel.log_prob_weight,
            num_inference_steps=rollout.num_inference_steps,
            num_transitions=pools if branching else plan.num_transitions,
            group_size=rollout.group_size,
            advantage_clip=config.advantage.clip,
            seed=config.seed,
            common_indices=common_indices,
            gather=engine.gather,
        )
    )


def build_rewards(config: Config, device: torch.device) -> RewardSet:
    """The rewards by their entry points, or where their hosts say. Closes what was started when one of them fails."""
    check_names_and_weights([(name, section.weight) for name, section in config.rewards.items()])
    with ExitStack() as undo:
        entries = []
        for name, section in config.rewards.items():
            reward = build_reward(name, section, device)
            undo.callback(getattr(reward, "close", lambda: None))
            entries.append((name, reward, section.weight))
        constants = {
            name: Normalise(scale=section.scale, offset=section.offset) for name, section in config.rewards.items()
        }
        rewards = RewardSet(entries, normalise=constants)
        undo.pop_all()
    return rewards


def build_reward(name: str, section: RewardConfig, device: torch.device) -> Reward:
    """A reward in this process, in one of its own, or on another machine."""
    host = section.host
    if host is None:
        return load_reward(name, **section.options)
    times = {
        "name": name,
        "start_timeout_s": host.start_timeout_s,
        "deadline_s": host.deadline_s,
        "deadline_per_image_s": host.deadline_per_image_s,
    }
    target, python = host.target or name, host.python
    if host.environment is not None:
        python, target = locate(host.environment, target)
    try:
        if host.url is not None:
            return HTTPReward(host.url, token_file=host.token_file, **times)
        return WorkerReward(
            target,
            python=str(python),
            options=section.options,
            env=visible_device(device, os.environ),
            max_restarts=host.max_restarts,
            max_body_bytes=host.max_body_bytes,
            **times,
        )
    except (ConnectionError, TimeoutError) as error:
        raise ValueError(f"the reward {name!r} does not start: {error}") from error


def visible_device(device: torch.device, environment: Mapping[str, str]) -> dict[str, str]:
    """What makes a worker's only accelerator the one of this process: each process has a worker and a device of its own."""
    if device.type != "cuda":
        return {"CUDA_VISIBLE_DEVICES": ""}
    index = device.index or 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index].strip() if visible else str(index)}


def check_alike(fingerprints: Mapping[str, Any], gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """All processes must score alike, or groups would be compared across unlike judges. Raises ValueError on each of them."""
    text = json.dumps(fingerprints, sort_keys=True)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    if len(gather(torch.tensor([number])).unique()) > 1:
        raise ValueError(
            "the processes' rewards differ in what their scores depend on (weights, packages, preprocessing); make the nodes "
            f"alike. On this process: {text}"
        )


def without(fingerprints: dict[str, dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """A run may go on on another machine, as long as what scores depend on is the same."""
    return {name: {own: value for own, value in said.items() if own != key} for name, said in fingerprints.items()}


def check_groupwise(rewards: RewardSet, config: Config) -> None:
    """Rewards that compare the images of a group must be shown whole groups. Raises ValueError."""
    rollout = config.rollout
    if rewards.groupwise and rollout.batch_size % rollout.group_size:
        raise ValueError(
            f"the reward {rewards.groupwise[0]!r} compares the images of a group, but a rollout batch of "
            f"rollout.batch_size={rollout.batch_size} cuts groups of rollout.group_size={rollout.group_size} apart; set "
            f"rollout.batch_size to a multiple of {rollout.group_size}"
        )


def check_columns_of_prompts(config: Config, train: Prompts, evaluation: Prompts | None) -> None:
    """Raise ValueError where a reward in this process requires a column that a prompt file lacks."""
    files = {
        f"prompts.train={config.prompts.train}": [*train.columns, *(["sigma"] if config.rollout.branching else [])]
    }
    if config.evaluation is not None and evaluation is not None:
        files[f"evaluation.prompts={config.evaluation.prompts}"] = list(evaluation.columns)
    own = {name: section.options for name, section in config.rewards.items() if section.host is None}
    check_columns(own, files)


def check_prompts(rewards: RewardSet, config: Config, train: Prompts, evaluation: Prompts | None) -> None:
    """Warn of prompts that the rewards cannot score. Raises ValueError where a training step would fail."""
    each = {"seed": config.seed, "prompts_per_step": config.rollout.prompts_per_step}
    steps = (step_rows(len(train), step=step, **each) for step in range(config.num_steps))
    key = f"prompts.train={config.prompts.train}"
    check_scorable(rewards, train.texts, key=key, steps=steps, min_scored=config.advantage.min_scored)
    if config.evaluation is not None and evaluation is not None:
        check_scorable(rewards, evaluation.texts, key=f"evaluation.prompts={config.evaluation.prompts}")


def build_engine(config: Config) -> Engine:
    """Processes and precision."""
    rollout = config.rollout
    return Engine(
        zero_stage=config.engine.zero_stage,
        dtype=DTYPES[config.model.dtype],
        cpu=config.engine.device == "cpu",
        batch_size=rollout.batch_size,
        max_grad_norm=config.optimizer.max_grad_norm,
        timeout_s=config.engine.timeout_s,
        batches=lambda processes: batches_per_update(config, processes),
    )


def batches_per_update(config: Config, num_processes: int) -> int:
    """Rollout batches of one optimiser update on one process."""
    config.check(num_processes)
    rollout = config.rollout
    batches = rollout.prompts_per_step * rollout.group_size // rollout.batch_size // num_processes
    return batches // config.algorithm.updates_per_rollout


def build_pipeline(config: Config, device: torch.device) -> FlowPipeline:
    """The pipeline, lifted."""
    model = config.model
    pipeline = FlowPipeline.load(
        model.path,
        dtype=DTYPES[model.dtype],
        device=device,
        height=model.height,
        width=model.width,
        call_kwargs=model.call,
    )
    if model.gradient_checkpointing:
        for denoiser in pipeline.denoisers.values():
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    return pipeline


def build_policy(config: Config, pipeline: FlowPipeline, algorithm: Algorithm) -> Policy:
    """The policies that the algorithm and the evaluation need."""
    lora = config.model.lora
    return Policy(
        pipeline,
        lora=None if lora is None else (lora.rank, lora.alpha, lora.targets),
        variants=algorithm.variants | ({"ema"} if config.ema_decay else frozenset()),
        seed=config.seed,
        ema_decay=config.ema_decay,
    )


def build_optimizer_settings(config: Config) -> OptimizerSettings:
    """AdamW's settings."""
    section = config.optimizer
    return OptimizerSettings(
        learning_rate=section.learning_rate,
        schedule=section.schedule,
        warmup_updates=section.warmup_updates,
        total_updates=config.num_updates,
        betas=section.betas,
        weight_decay=section.weight_decay,
        epsilon=section.epsilon,
        max_grad_norm=section.max_grad_norm,
    )


def build_worker(config: Config, pipeline: FlowPipeline, prompts: Prompts, plan: Plan, engine: Engine) -> RolloutWorker:
    """The rollout worker of this process."""
    rollout = config.rollout
    return RolloutWorker(
        pipeline,
        prompts,
        plan=plan,
        kernel=rollout.kernel.name,
        log_prob_weight=rollout.kernel.log_prob_weight,
        solver=rollout.solver,
        num_inference_steps=rollout.num_inference_steps,
        guidance_scale=rollout.guidance_scale,
        negative_prompt=rollout.negative_prompt,
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        batch_size=rollout.batch_size,
        shared_noise=rollout.shared_noise,
        updates_per_rollout=config.algorithm.updates_per_rollout,
        seed=config.seed,
        num_processes=engine.num_processes,
        process_index=engine.process_index,
        dtype=DTYPES[config.model.dtype],
        device=engine.device,
        branching=build_branching(config),
        tail_fraction=rollout.tail_fraction,
        train_guidance_scale=rollout.train_guidance_scale,
        keep_means=config.algorithm.keeps_means,
    )


def derived(config: Config, policy: Policy, engine: Engine, prompts: Prompts) -> dict[str, str]:
    """Quantities that follow from the configuration: printed at the start, never asked for."""
    rollout, algorithm = config.rollout, config.algorithm
    images = rollout.prompts_per_step * rollout.group_size
    trained = sum(parameter.numel() for parameter in policy.parameters().values())
    lines = {
        "model": f"{config.model.path}, {trained:,} parameters trained",
        "algorithm": f"{algorithm.name}, {algorithm.updates_per_rollout} update(s) per step",
        "images per step": f"{images} = {rollout.prompts_per_step} prompts x {rollout.group_size}",
        "batches": f"{images // rollout.batch_size} of {rollout.batch_size} on {engine.num_processes} process(es), "
        f"{engine.accumulation} backward passes per update",
        "prompts": f"{len(prompts)}, all seen after {len(prompts) / rollout.prompts_per_step:.1f} steps",
        "output": config.output,
    }
    if rollout.branching is not None:
        ways = len(rollout.branching.granularities)
        lines["pools"] = f"each step's images once for every stochastic step, finished in {ways} way(s)"
    return lines


def _checked_plan(config: Config, pipeline: FlowPipeline, plan: Plan, prompts: Prompts) -> Plan:
    """Can this pipeline be trained so? A few network passes; raises ValueError that says what does not hold.

    Returns the plan with noise levels that keep their budget on the pipeline's schedule, where that is asked for.
    """
    rollout = config.rollout
    guidance = {"guidance_scale": rollout.guidance_scale, "negative_prompt": rollout.negative_prompt}
    some = list(dict.fromkeys([*prompts.texts[:64], *selfcheck.PROMPTS]))
    report = selfcheck.check(pipeline, prompts=some[:2], **guidance)
    if not report.ok:
        raise ValueError(report.text())
    settings = {"num_inference_steps": rollout.num_inference_steps, **guidance}
    conditioning = pipeline.prepare(some[:1], **settings)
    if rollout.batch_size > rollout.group_size:
        try:
            pipeline.prepare(list(dict.fromkeys(prompts.texts[:64])), **settings)
        except UnlikeConditioning as error:
            raise ValueError(
                f"rollout.batch_size={rollout.batch_size} puts several prompts into a batch, but {error}; set it to "
                f"rollout.group_size={rollout.group_size} or a divisor of it"
            ) from error
    if (rollout.tail_fraction < 1 or rollout.branching) and not pipeline.lifted.tail_is_idle:
        raise ValueError(
            f"{type(pipeline.pipe).__name__} does something to the latents after each denoising step, which neither skipped "
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
