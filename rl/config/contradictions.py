"""What no run can be made of: settings that contradict one another, do nothing, or ask for what the algorithm cannot have."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

from flowsteer.rewards.doors import blaming
from flowsteer.rl.config.schema import Config, KernelConfig, WindowPlan
from flowsteer.rl.config.teams import among, context_faults, sharers
from flowsteer.rl.types import Setting, changed, not_whole
from flowsteer.rollout.data.batches import batch_sizes

logger = logging.getLogger(__name__)

USED_BY_DECAY = {
    "constant": set[str](),
    "linear": {"keep_budget"},
    "cosine": {"keep_budget"},
    "power": {"decay_rate", "keep_budget"},
    "exponential": {"decay_rate", "keep_budget"},
}
USED_BY_STRATEGY = {
    "fixed": set[str](),  # stays at low
    "random": set[str](),
    "progressive": {"stride", "iterations", "roll_back"},
    "linear_decay": {"stride", "iterations", "roll_back", "min_iterations"},
    "exponential_decay": {"stride", "iterations", "roll_back", "decay_start", "decay_rate"},
}


def check_config(config: Config, num_processes: int) -> None:
    """Refuse what no run can be made of. Raises ValueError that says what would work, with every fault."""
    most = config.rollout.batch_size
    if sharing := list(_sharing(config, num_processes)):  # one sentence is enough: the others see whole groups
        config = _with_rollout(config, batch_size=config.rollout.prompts_per_step * config.rollout.group_size)
    else:
        config = fitted(config, num_processes)
    setting = setting_of(config, num_processes)
    with blaming(f"the check of algorithm {config.algorithm.label!r} cannot be made"):
        own = [*config.algorithm.check(setting), *config.algorithm.idle()]
    faults = [
        *sharing,
        *own,
        *_drawing(config, most),
        *_passes(config),
        *context_faults(config, num_processes),
        *_training_in_parts(config, most),
        *_pictures(config),
        *_grouping(config),
        *_branching(config),
        *_whole_branches(config, setting),
        *_comparing(config, setting),
        *_steps(config),
        *_precision(config),
        *_optimizing(config),
        *_quantizing(config),
    ]
    if faults:
        raise ValueError("\n".join(faults))
    if config.rollout.plan.name == "none" and config.rollout.kernel != KernelConfig():
        logger.warning("rollout.kernel has no effect: with rollout.plan.name=none no step is stochastic")
    if config.training_asks_no_reward and config.evaluation is None:
        logger.warning("rewards have no effect: training asks none of these pictures, and there is no evaluation")
    if config.rollout.merge_lora and config.model.dtype == "bfloat16":
        logger.warning(
            "rollout.merge_lora rounds base and LoRA to bfloat16 together: what the LoRA adds is lost where it is less than "
            "1/256 of a weight, so samples are drawn by another policy than is trained"
        )
    optimizer = config.optimizer
    if optimizer.warmup_updates > config.num_updates:
        logger.warning(
            "optimizer.warmup_updates=%d, but the run ends after %d updates: the learning rate only comes to %.2g",
            optimizer.warmup_updates,
            config.num_updates,
            optimizer.learning_rate * config.num_updates / optimizer.warmup_updates,
        )


def fitted(config: Config, num_processes: int) -> Config:
    """The configuration with the batch size that is used: ``rollout.batch_size`` is the most that it may be.

    It is the largest with which a training step divides evenly over processes and updates and that gives the algorithm whole
    groups where it needs them; failing that, the largest that divides. Where none does, the configuration stays as it is.
    """
    sizes = _dividing(config, num_processes)
    candidates = [_with_rollout(config, batch_size=size) for size in sizes]
    whole = (one for one in candidates if not _cut(one, num_processes))
    return next(whole, candidates[0] if candidates else config)


def _dividing(config: Config, num_processes: int) -> list[int]:
    """Batch sizes with which a training step divides evenly, the largest first."""
    rollout = config.rollout
    return batch_sizes(
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        batch_size=rollout.batch_size,
        num_processes=sharers(config, num_processes),
        updates_per_rollout=config.algorithm.updates_per_rollout,
    )


def _with_rollout(config: Config, **changes: int) -> Config:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=changes)})


def _cut(config: Config, num_processes: int) -> bool:
    """Whether batches cut groups apart that have to be whole."""
    setting = setting_of(config, num_processes)
    with blaming(f"the check of algorithm {config.algorithm.label!r} cannot be made"):
        # what it says of this batch size and not of one that holds a step's samples together
        at_once = replace(setting, batch_size=config.rollout.prompts_per_step * config.rollout.group_size)
        own = set(config.algorithm.check(setting)) - set(config.algorithm.check(at_once))
    return bool(own) or any(_whole_branches(config, setting))


def setting_of(config: Config, num_processes: int) -> Setting:
    """What the algorithm may have demands on."""
    rollout = config.rollout
    return Setting(
        stochastic=rollout.plan.name != "none",
        branching=rollout.branching is not None,
        kernel=rollout.kernel.name,
        log_prob_weight=rollout.kernel.log_prob_weight,
        group_size=rollout.group_size,
        batch_size=rollout.batch_size,
        num_processes=sharers(config, num_processes),
        advantage_clip=config.advantage.clip,
        best_and_worst=config.advantage.best_and_worst,
        advantage_changed=frozenset(changed(config.advantage)),
        train_guidance=rollout.train_guidance_scale is not None,
        pictures=config.prompts.pictures is not None,
    )


def _sharing(config: Config, num_processes: int) -> Iterator[str]:
    """Samples that cannot be shared evenly, or only in batches that cut groups apart."""
    rollout, updates = config.rollout, config.algorithm.updates_per_rollout
    sizes = _dividing(config, num_processes)
    if sizes and not _cut(fitted(config, num_processes), num_processes):
        return
    if sizes and not _whole_in_one(config, num_processes):
        return  # too small a batch size, whatever the number of processes: the algorithm's own sentence says it all
    needed = "whole groups" if sizes else "samples"
    proposals = [
        f"rollout.{key}={' or '.join(map(str, near))}"
        for key in ("prompts_per_step", "group_size")
        if (near := _near(config, num_processes, key))
    ]
    advice = f"With the others as they are, one of these works: {'; '.join(proposals)}" if proposals else ""
    yield (
        f"rollout.prompts_per_step={rollout.prompts_per_step} groups of rollout.group_size={rollout.group_size} cannot be "
        f"shared evenly, in {needed}, among {among(config, num_processes)} x {updates} updates, with no "
        f"rollout.batch_size up to {rollout.batch_size}. {advice or 'Change more than one of them'}"
    )


def _whole_in_one(config: Config, num_processes: int) -> bool:
    """Whether the largest batches that may be hold whole groups, were there prompts enough."""
    most = max(config.rollout.batch_size // config.rollout.group_size * config.rollout.group_size, 1)
    return not _cut(_with_rollout(config, batch_size=most), num_processes)


def _near(config: Config, num_processes: int, key: str) -> list[int]:
    """The nearest smaller and the nearest larger value of a key of ``rollout`` that can be shared evenly."""
    value = getattr(config.rollout, key)
    limit = value + config.rollout.batch_size * num_processes * config.algorithm.updates_per_rollout

    def works(other: int) -> bool:
        changed = _with_rollout(config, **{key: other})
        return bool(_dividing(changed, num_processes)) and not _cut(fitted(changed, num_processes), num_processes)

    least = 1 if key == "prompts_per_step" or not config.algorithm.compares else 2
    smaller = next((other for other in range(value - 1, least - 1, -1) if works(other)), None)
    larger = next((other for other in range(value + 1, limit + 1) if works(other)), None)
    return [found for found in (smaller, larger) if found is not None]


def train_parts(config: Config) -> int:
    """In how many equal parts a rollout batch is trained on; 0 where none of them is small enough and of whole groups."""
    rollout = config.rollout
    most = rollout.train_batch_size or rollout.batch_size
    unit = rollout.group_size if within_pass(config) and rollout.batch_size > most else 1
    fits = (size for size in range(min(most, rollout.batch_size), 0, -1) if rollout.batch_size % size == 0)
    return next((rollout.batch_size // size for size in fits if size % unit == 0), 0)


def within_pass(config: Config) -> bool:
    """Whether the algorithm compares the samples of a group that pass the network together."""
    return config.algorithm.on_pairs or config.algorithm.over_groups


def _training_in_parts(config: Config, given: int) -> Iterator[str]:
    """Training batches apart from those of sampling, for which a size is ``given``."""
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.train_batch_size is None:
        return
    if algorithm.learns_from == "transitions":
        yield (
            f"rollout.train_batch_size: algorithm.name={algorithm.label} trains the ratio of the steps that were drawn, which "
            "is 1 only in the batches of sampling; leave it out, or lower rollout.batch_size"
        )
    elif rollout.train_batch_size >= given:
        yield f"rollout.train_batch_size={rollout.train_batch_size} cuts no batch of rollout.batch_size={given}; leave it out"
    elif not train_parts(config):
        yield (
            f"rollout.train_batch_size={rollout.train_batch_size} cuts groups of rollout.group_size={rollout.group_size} "
            f"apart, and algorithm.name={algorithm.label} compares them within a pass; set it to {rollout.group_size} or more"
        )


def _drawing(config: Config, batch_size: int) -> Iterator[str]:
    """Ways of drawing that teach nothing or do nothing; ``batch_size`` is the one given."""
    rollout = config.rollout
    if rollout.updates == "mixed" and config.algorithm.updates_per_rollout == 1:
        yield "rollout.updates=mixed does nothing with algorithm.updates_per_rollout=1; leave it out, or set that above 1"
    elif rollout.updates == "mixed" and batch_size >= rollout.group_size:
        yield (
            f"rollout.updates=mixed parts groups among updates, but batches of {batch_size} hold whole groups of "
            f"rollout.group_size={rollout.group_size}; set rollout.batch_size below that, or leave it out"
        )
    elif rollout.updates == "mixed" and config.algorithm.over_groups:
        yield f"rollout.updates=mixed parts groups, which algorithm.name={config.algorithm.label} needs whole; leave it out"
    if rollout.shared_noise and rollout.plan.name == "none":
        yield (
            "rollout.shared_noise=true with rollout.plan.name=none draws one picture for a whole group: nothing can be "
            "compared; leave shared_noise out"
        )
    if rollout.solver == "dpmpp_2m" and rollout.plan.name == "all":
        yield (
            "rollout.plan.name=all leaves at most the last step to rollout.solver=dpmpp_2m, which takes it as euler does; "
            "leave rollout.solver out"
        )
    drawn = {"rollout": (rollout.negative_prompt, {rollout.guidance_scale, rollout.train_guidance_scale})}
    if config.evaluation:
        drawn["evaluation"] = (config.evaluation.negative_prompt, {config.evaluation.guidance_scale})
    guided_by_call = {"guidance_scale", "true_cfg_scale"} & config.model.call.keys()
    for section, (negative_prompt, scales) in drawn.items():
        if negative_prompt is not None and scales <= {0, 1, None} and not guided_by_call:
            yield (
                f"{section}.negative_prompt does nothing with {section}.guidance_scale={max(scales - {None}):g}; set that "
                "above 1, or leave negative_prompt out"
            )


def _passes(config: Config) -> Iterator[str]:
    """Ways to make passes cheaper that do not fit the run."""
    model, engine, algorithm = config.model, config.engine, config.algorithm
    shares_weights = engine.strategy in ("zero3", "fsdp2")
    if config.rollout.merge_lora:
        if model.lora is None:
            yield "rollout.merge_lora=true has no LoRA to merge: model.lora=null trains all weights; leave merge_lora out"
        if algorithm.learns_from == "transitions":
            yield (
                f"algorithm.name={algorithm.label} compares the density of each step with the one that drew it, and "
                "rollout.merge_lora=true rounds the drawing otherwise; leave it out"
            )
        if model.quantize is not None:
            yield f"rollout.merge_lora=true cannot add to weights of model.quantize={model.quantize}; leave one of them out"
        if shares_weights:
            yield "rollout.merge_lora=true needs whole weights on every process; leave it out, or choose another engine"
    if model.compile and shares_weights:
        yield "model.compile=true needs whole weights on every process; leave it out, or choose another engine"
    if model.compile and model.quantize is not None:
        yield f"model.compile=true is not tried with model.quantize={model.quantize}; leave one of them out"


def _pictures(config: Config) -> Iterator[str]:
    """Pictures of a file: what is for drawing does nothing, and what learns from drawing cannot learn."""
    pictures, rollout, algorithm = config.prompts.pictures, config.rollout, config.algorithm
    if pictures is None:
        return
    if algorithm.learns_from != "final latents":
        yield (
            f"algorithm.name={algorithm.label} learns from the steps that drew a sample, which prompts.pictures has none of; "
            "use weighted_sft, diffusion_dpo, diffusion_nft, dgpo or awm"
        )
    idle = {
        "rollout.solver": rollout.solver != "euler",
        "rollout.shared_noise": rollout.shared_noise,
        "rollout.merge_lora": rollout.merge_lora,
        "rollout.branching": rollout.branching is not None,
        "inputs.seed": "seed" in config.inputs,
        "rollout.train_guidance_scale": rollout.train_guidance_scale is not None,
    }
    if found := [key for key, given in idle.items() if given]:
        advice = " (rollout.guidance_scale is that of training)" if "rollout.train_guidance_scale" in found else ""
        yield f"prompts.pictures draws nothing, so {' and '.join(found)} do nothing; leave them out{advice}"
    if config.model.adapter is not None:
        yield f"prompts.pictures needs a pipeline of diffusers; model.adapter={config.model.adapter} cannot encode pictures"
    if pictures.chosen is not None and rollout.group_size != 2:
        yield f"chosen and rejected pictures are groups of two, and rollout.group_size={rollout.group_size}; set it to 2"
    if pictures.has_scores and config.advantage.combine != "rewards":
        yield (
            f"advantage.combine={config.advantage.combine} is for several rewards, and prompts.pictures has one score for each "
            "picture; leave it out"
        )
    if pictures.has_scores and not algorithm.compares:
        yield (
            "algorithm.weights=all learns from every picture alike, so their scores do nothing; leave prompts.pictures.score "
            "out, or give prompts.pictures.image in the place of chosen and rejected"
        )


def _grouping(config: Config) -> Iterator[str]:
    """Groups of one, and settings of comparisons that are not made."""
    if config.algorithm.compares and config.rollout.group_size < 2:
        yield "rollout.group_size=1 leaves nothing to compare a sample with; set it to 2 or more"
    if not config.algorithm.compares and (idle := sorted(changed(config.advantage))):
        keys = " and ".join(f"advantage.{key}" for key in idle)
        yield f"algorithm.name={config.algorithm.label} compares no samples with these settings; leave {keys} out"


def _whole_branches(config: Config, setting: Setting) -> Iterator[str]:
    """Groups that part must be whole."""
    if config.rollout.branching is not None and not setting.groups_are_whole():
        yield not_whole("rollout.branching", setting)


def _branching(config: Config) -> Iterator[str]:
    """Branches from a common state, and shortened tails."""
    rollout = config.rollout
    if rollout.branching is not None:
        if rollout.plan.name == "none":
            yield "rollout.branching parts groups at stochastic steps, but rollout.plan.name=none has none; set a plan"
        if rollout.shared_noise:
            yield "rollout.branching shares the noise of a group anyway; leave rollout.shared_noise out"
        if rollout.branching.first and rollout.plan.name == "window":
            yield "rollout.branching.first needs a plan whose steps stay the same; set rollout.plan.name to all or steps"
    if rollout.tail_fraction < 1 and (rollout.plan.name in ("none", "all") or rollout.branching is not None):
        yield (
            "rollout.tail_fraction shortens what comes after the last stochastic step of a trajectory; it needs a window "
            "or single steps as a plan, and no rollout.branching (which has granularities)"
        )


def _comparing(config: Config, setting: Setting) -> Iterator[str]:
    """Settings of the advantage that do nothing."""
    advantage, group_size = config.advantage, config.rollout.group_size
    if (kept := advantage.best_and_worst) is not None and kept >= group_size:
        yield f"advantage.best_and_worst={kept} leaves nothing out of groups of {group_size}; leave it out"
    if advantage.deviation == "none" and (idle := sorted(setting.advantage_changed & {"ddof", "epsilon"})):
        yield f"advantage.deviation=none divides by nothing; leave {' and '.join(f'advantage.{key}' for key in idle)} out"


def _steps(config: Config) -> Iterator[str]:
    """Settings of the kernel's decay and of windows that their kind does not have."""
    kernel, plan = config.rollout.kernel, config.rollout.plan
    if idle := sorted(changed(kernel) & {"decay_rate", "keep_budget"} - USED_BY_DECAY[kernel.decay]):
        yield f"rollout.kernel.decay={kernel.decay} has no {' and no '.join(idle)}; leave them out"
    if isinstance(plan, WindowPlan):
        common = {"name", "strategy", "size", "low", "high"}
        if idle := sorted(changed(plan) - USED_BY_STRATEGY[plan.strategy] - common):
            yield f"rollout.plan.strategy={plan.strategy} has no {' and no '.join(idle)}; leave them out"


def _precision(config: Config) -> Iterator[str]:
    """Weights that would be trained without float32 master copies."""
    model = config.model
    if model.lora is None and model.dtype != "float32" and config.engine.strategy == "plain":
        yield (
            f"training all weights in {model.dtype} needs float32 master copies, which engine.strategy=plain does not keep; "
            "set engine.strategy to zero1, zero2, zero3 or fsdp2, or model.dtype=float32, or train a LoRA"
        )


def _optimizing(config: Config) -> Iterator[str]:
    """Optimisers that do not use a setting, or cannot do what they are for; averages that are not made."""
    if not config.ema_decay and (idle := sorted(changed(config) & {"ema_ramp", "ema_every"})):
        yield f"ema_decay=0 averages nothing; leave {' and '.join(idle)} out, or set ema_decay"
    name, strategy = config.optimizer.name, config.engine.strategy
    if strategy == "fsdp2" and name != "adamw":
        yield f"optimizer.name={name} is not tried with engine.strategy=fsdp2; use adamw, or zero1, zero2 or zero3"
    if name != "adafactor":
        return
    if idle := sorted(changed(config.optimizer) & {"betas", "epsilon"}):
        keys = " and ".join(f"optimizer.{key}" for key in idle)
        yield f"optimizer.name=adafactor has no {' and no '.join(idle)}; leave {keys} out"
    if strategy.startswith("zero"):
        yield (
            f"optimizer.name=adafactor needs the rows and columns of each weight, and engine.strategy={strategy} puts all "
            "weights into one row; use optimizer.name=adamw8bit, or engine.strategy=plain"
        )


def _quantizing(config: Config) -> Iterator[str]:
    """Quantised weights that would be trained, or that an engine cannot hold."""
    kind, strategy = config.model.quantize, config.engine.strategy
    if kind is None:
        return
    if config.model.lora is None:
        yield f"model.quantize={kind} freezes the weights, and model.lora=null trains them; give model.lora, or leave one out"
    if strategy == "fsdp2" or (kind != "nf4" and strategy != "plain"):
        yield (
            f"model.quantize={kind} makes weights that engine.strategy={strategy} cannot hold; use engine.strategy=plain (the "
            "optimiser of a LoRA is small), or model.quantize=nf4 with zero1, zero2 or zero3"
        )
