"""What of a run's configuration decides about its memory. Every key that a plan reads is read here, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowsteer.rl.build import build_plan
from flowsteer.rl.config import Config, check_config, fitted, parse_config, parse_overrides
from flowsteer.rl.config.contradictions import train_parts

BYTES = {"float32": 4, "bfloat16": 2}
# Of a weight of a linear layer; nf4: half a byte, and a float32 for 64.
QUANTISED = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5625}
OPTIMISER = {"adamw": 8.0, "adamw8bit": 2.06, "adafactor": 0.02}  # the state of a weight, without its float32 master
PROMPT_CACHE = 256  # prepared prompts that a pipeline remembers
PROCESSES_PER_NODE = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run, as far as memory goes.

    Example: ``Settings.of(load_config("sd35m_flow_grpo_ocr"), 8)`` has ``batch_size=8``, ``moving=("ema",)``,
    ``strategy="plain"`` and ``transitions=9``.
    """

    path: str
    dtype: str
    height: int | None
    width: int | None
    call: str  # arguments of the pipeline, as JSON
    rank: int | None  # of the LoRA; None trains all weights
    targets: tuple[str, ...] | str
    quantize: str | None
    checkpointing: int  # 0: none; N: every N-th block
    offload_text_encoders: bool
    offload_vae: bool
    vae_dtype: str
    vae_slicing: bool
    vae_tiling: bool
    strategy: str  # plain, zero1, zero2, zero3, fsdp2
    optimizer: str
    moving: tuple[str, ...]  # old and ema, where the run has them
    reference: bool
    num_processes: int
    num_prompts: int  # of a training step
    group_size: int
    batch_size: int
    train_parts: int  # in which a batch is trained
    updates: int
    guided: bool  # in sampling or evaluation
    train_guided: bool
    two_conditionings: bool  # training has another guidance than sampling
    pairs: bool  # only the best and the worst sample of each group are trained
    pools: int  # of branches; 0: there are none
    ways: int  # in which each pool is finished
    transitions: int  # stored of each sample
    means: bool  # the means of the transitions are stored, too

    @staticmethod
    def of(config: Config, num_processes: int) -> Settings:
        """Those of a configuration on so many processes, with the batch size that it has there."""
        config = fitted(config, num_processes)
        model, rollout, algorithm = config.model, config.rollout, config.algorithm
        plan = build_plan(rollout.plan, config)
        branching = rollout.branching
        pools = len([index for index in plan.indices(0) if index >= branching.first]) if branching else 0
        train_scale = rollout.train_guidance_scale
        scales = [rollout.guidance_scale, *([config.evaluation.guidance_scale] if config.evaluation else [])]
        variants = algorithm.variants | ({"ema"} if config.ema_decay else set())
        return Settings(
            path=model.path,
            dtype=model.dtype,
            height=model.height,
            width=model.width,
            call=json.dumps(model.call, sort_keys=True),
            rank=None if model.lora is None else model.lora.rank,
            targets="auto" if model.lora is None else model.lora.targets,
            quantize=model.quantize,
            checkpointing=model.checkpoint_every or 0,
            offload_text_encoders=model.offload.text_encoders,
            offload_vae=model.offload.vae,
            vae_dtype=model.vae.dtype or model.dtype,
            vae_slicing=model.vae.slicing,
            vae_tiling=model.vae.tiling,
            strategy=config.engine.strategy,
            optimizer=config.optimizer.name,
            moving=tuple(sorted(variants - {"reference"})),
            reference="reference" in variants,
            num_processes=num_processes,
            num_prompts=rollout.prompts_per_step,
            group_size=rollout.group_size,
            batch_size=rollout.batch_size,
            train_parts=max(train_parts(config), 1),
            updates=algorithm.updates_per_rollout,
            guided=max(scales) > 1,
            train_guided=(rollout.guidance_scale if train_scale is None else train_scale) > 1,
            two_conditionings=train_scale is not None and train_scale != rollout.guidance_scale,
            pairs=algorithm.on_pairs,
            pools=pools,
            ways=len(branching.granularities) if branching else 1,
            transitions=1 if branching else plan.num_transitions,
            means=algorithm.keeps_means,
        )

    @property
    def trained_rows(self) -> int:
        """Rows of a network pass of the update, before guidance."""
        groups = max(self.batch_size // self.group_size, 1)
        if self.pools:  # all candidates of a pool left one state
            return groups
        rows = min(2 * groups, self.batch_size) if self.pairs else self.batch_size
        return max(rows // self.train_parts, 1)

    @property
    def samples(self) -> int:
        """Of a training step, on one process."""
        return max(self.num_prompts * self.group_size // self.num_processes, self.batch_size)

    @property
    def arguments(self) -> tuple[tuple[str, Any], ...]:
        """Those of the pipeline's call that plain values are given for."""
        given: Mapping[str, Any] = json.loads(self.call)
        return tuple((key, value) for key, value in given.items() if isinstance(value, int | float | str))

    @property
    def sharded(self) -> int:
        """Over how many processes the weights themselves are spread."""
        return self.num_processes if self.strategy in ("zero3", "fsdp2") else 1


def batches_that_divide(config: Config, num_processes: int, most: int) -> list[int]:
    """The values of rollout.batch_size up to ``most`` with which a run on so many processes is not refused, ascending."""
    found = []
    samples = config.rollout.prompts_per_step * config.rollout.group_size
    for size in range(1, most + 1):
        if samples % size:
            continue
        rollout = config.rollout.model_copy(update={"batch_size": size})
        other = config.model_copy(update={"rollout": rollout})
        try:
            check_config(other, num_processes)
        except ValueError:
            continue
        if fitted(other, num_processes).rollout.batch_size == size:
            found.append(size)
    return found


def accepts(config: Config, num_processes: int, settings: Sequence[str]) -> bool:
    """Whether the configuration takes settings, such as ``model.quantize=nf4``, and a run with them is not refused."""
    tree = json.loads(config.model_dump_json())
    try:
        for setting in settings:
            parse_overrides([setting], tree)
        check_config(parse_config(tree), num_processes)
    except ValueError:
        return False
    return True
