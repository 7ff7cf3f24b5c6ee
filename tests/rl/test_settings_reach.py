"""Every key of the configuration reaches the place where it is used.

The schema is walked, plans and algorithms included. For every key a case says to what it is changed, in which run, and which
places must then see something else (`spies.py` says what a place sees); where a place sees the value itself, it must be that
value, and no other. A new key without a case here fails, and so does a case without a key.
"""

from __future__ import annotations

import copy
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import SIZE
from datasets import Dataset, DatasetDict
from pydantic import BaseModel
from spies import observe
from variants import VARIANTS

from flowsteer.rewards.frames import Frames
from flowsteer.rl.algorithms import ALGORITHMS
from flowsteer.rl.config import Config
from flowsteer.rl.config.data import SourceConfig

_SOURCES = "the class of prompts.train, read by the same function; prompts.train.* has the cases"
NOTHING_OBSERVED: dict[str, str] = {
    **{f"evaluation.prompts.*.{name}": _SOURCES for name in SourceConfig.model_fields},
    "prompts.train.*.made_by": "said only where the file is not there; tests/rollout/test_pictures.py reads the message",
    "model.attention": "this network's attention takes no back-end; tests/rl/test_passes.py has one that does",
    "engine.context_parallel": "wants as many processes; tests/whole/test_context_parallel.py trains on them",
    "model.compile": "takes minutes; tests/rl/test_passes.py trains with it",
    "model.quantize": "needs packages of its own; tests/quantization/test_quantized.py draws and trains with it",
    "prompts.pictures.kind": "this pipeline draws pictures; videos are in tests/rollout/test_pictures.py",
    "inputs.*.kind": "no argument of this pipeline takes values of two kinds; tests/rollout/test_inputs.py reads each kind",
}
"""Keys that no place can see, each with the reason."""


@dataclass(frozen=True)
class Case:
    """``key`` changed to ``value`` in the run ``given``: every place of ``at`` must see something else than without.

    ``reads``: what the first place must see, each time that it looks, instead of the value itself.
    """

    value: Any
    at: tuple[str, ...]
    given: dict[str, Any] = field(default_factory=dict)
    reads: Any = None
    also: dict[str, Any] = field(default_factory=dict)
    """What must change with it, for the run to be possible."""


def direct(place: str, value: Any, *more: str, reads: Any = None, **given: Any) -> Case:
    """The place sees the value itself; further places see something else."""
    return Case(value, (place, *more), {key.replace("__", "."): own for key, own in given.items()}, reads or (value,))


def moves(value: Any, *at: str, **given: Any) -> Case:
    """The places see something else; ``a__b`` in ``given`` is the key ``a.b``."""
    return Case(value, at, {key.replace("__", "."): own for key, own in given.items()})


NFT = VARIANTS["diffusion_nft"]
STEPS = {"name": "steps", "indices": [1, 2]}
WINDOW = {"name": "window", "size": 1}
BOTH = {"jpeg_compressibility": {}, "jpeg_incompressibility": {"weight": 0.1}}
CAPTIONED = {"prompts__train": "CAPTIONED"}
BRIGHT = {"rewards": {"brightness:Brightness": {}}}
EVALUATED = {"evaluation": {"prompts": "OTHER", "num_prompts": 2, "num_inference_steps": 2}}


def pictured(value: Any, *at: str, **pictures: Any) -> Case:
    """A key of pictures to learn from."""
    sizes = {"rollout.prompts_per_step": 4, "rollout.group_size": 2} if "chosen" in pictures else {}
    return Case(value, at, NFT | sizes | {"prompts.train": "PICTURES", "prompts.pictures": pictures})


def plan(**settings: Any) -> dict[str, Any]:
    """A moving window of one step; four training steps, so that it moves."""
    return {"rollout.plan": WINDOW | settings, "num_steps": 4}


def host(value: Any, place: str, **settings: Any) -> Case:
    """A key of a reward that runs elsewhere."""
    return Case(value, (place,), {"rewards": {"far": {"host": settings}}}, (value,))


def evaluated(value: Any, *at: str, **settings: Any) -> Case:
    """A key of the evaluation."""
    return Case(value, at, {"evaluation": EVALUATED["evaluation"] | settings})


def branching(value: Any, *at: str, **settings: Any) -> Case:
    """A key of groups that part."""
    return Case(value, at, {"rollout.plan": STEPS, "rollout.branching": settings})


CASES: dict[str, list[Case]] = {
    "output": [Case("elsewhere", ("folder",))],
    "seed": [
        moves(1, "rollout.prompts", "rollout.initial_noise", "rollout.stream_noise", "trained"),
        Case(1, ("rollout.windows", "rollout.kernel"), plan(strategy="random")),
        Case(1, ("train.indices",), VARIANTS["dance_grpo"]),  # which transitions are trained
        Case(1, ("train.indices", "train.stream_noise"), NFT),
        Case(1, ("train.indices", "train.stream_noise"), VARIANTS["dgpo"]),
        Case(1, ("train.indices",), VARIANTS["awm"]),
    ],
    "num_steps": [moves(2, "rollout.steps", "optimizer.lr", optimizer__schedule="linear")],
    "save_every": [moves(1, "files", num_steps=2)],
    "save_every_s": [moves(1e-3, "files", num_steps=2)],
    "keep": [moves(1, "files", save_every=1, num_steps=2)],
    "trackers": [direct("Log.trackers", ["tensorboard"], "files", reads=(("tensorboard",),))],
    "ema_decay": [direct("follow.ema", 0.9, "evaluation.policy", "evaluation.images", "exported", **EVALUATED)],
    "ema_ramp": [moves(True, "follow.ema", ema_decay=0.9)],
    "ema_every": [moves(2, "follow.ema", ema_decay=0.9)],
    "evaluation": [moves(EVALUATED["evaluation"], "files", "evaluation.images")],
    "model.path": [direct("load.path", "OTHER_MODEL")],
    "model.adapter": [moves(f"{Path(__file__).parents[1] / 'negative.py'}:Negative", "rollout.images")],
    "model.dtype": [moves("bfloat16", "load.dtype", "rollout.latents", "train.latents", "evaluation.latents", **EVALUATED)],
    "model.height": [direct("rollout.pipe.height", 32, "rollout.latents", "train.latents")],
    "model.width": [direct("rollout.pipe.width", 32, "rollout.latents", "train.latents")],
    "model.lora": [moves(None, "lora.layers", "trained")],
    "model.lora.rank": [direct("lora.rank", 2, reads=([2],))],
    "model.lora.alpha": [direct("lora.scaling", 8, reads=([2.0],))],
    "model.lora.targets": [moves(["to_q"], "lora.layers")],
    "model.gradient_checkpointing": [direct("train.checkpointing", True)],
    "rollout.merge_lora": [Case(True, ("rollout.merged",), NFT, (True,))],
    "model.offload.text_encoders": [moves(True, "rollout.moved"), moves(True, "evaluation.moved", **EVALUATED)],
    "model.offload.vae": [moves(True, "rollout.moved"), moves(True, "evaluation.moved", **EVALUATED)],
    "model.vae.dtype": [direct("rollout.vae.dtype", "bfloat16", "rollout.images", reads=("torch.bfloat16",))],
    "model.vae.slicing": [moves(True, "rollout.vae.modes"), moves(True, "evaluation.vae.modes", **EVALUATED)],
    "model.vae.tiling": [moves(True, "rollout.vae.modes"), moves(True, "evaluation.vae.modes", **EVALUATED)],
    "model.scheduler": [moves({"shift": 1.0}, "rollout.images")],
    "model.selfcheck": [moves("never", "check.guidance_scale")],
    "model.call": [
        direct("rollout.pipe.max_sequence_length", {"max_sequence_length": 16}, "rollout.conditioning", reads=(16,))
    ],
    "prompts.train": [moves("OTHER", "rollout.prompts")],
    "prompts.train.*.file": [moves("OTHER", "rollout.prompts", prompts__train=[{"file": "TRAIN"}])],
    "prompts.train.*.dataset": [
        Case("DATA", ("rollout.prompts",), {"prompts.train": [{"file": "TRAIN"}]}, None, {"prompts.train.*.file": None})
    ],
    "prompts.train.*.split": [moves("second", "rollout.prompts", prompts__train=[{"dataset": "DATA"}])],
    "prompts.train.*.prompt": [moves("caption", "rollout.prompts", prompts__train=[{"file": "CAPTIONED"}])],
    "prompts.train.*.weight": [moves(7, "rollout.prompts", prompts__train=[{"file": "TRAIN"}, {"file": "OTHER"}])],
    "prompts.train.*.comments": [moves(True, "rollout.prompts", prompts__train=[{"file": "COMMENTED"}])],
    "prompts.pictures": [
        Case({"image": "pictures"}, ("rollout.images", "loss"), NFT | {"prompts.train": "PICTURES"})
    ],
    "prompts.pictures.image": [pictured("others", "rollout.images", "scores", image="pictures")],
    "prompts.pictures.score": [pictured("scores", "scores", "advantages", image="pictures")],
    "prompts.pictures.chosen": [pictured("worst", "rollout.images", chosen="best", rejected="worst")],
    "prompts.pictures.rejected": [pictured("best", "rollout.images", chosen="best", rejected="worst")],
    "prompts.pictures.cache": [pictured("CACHE", "Kept.folder", image="pictures")],
    "inputs": [
        Case(
            {"negative_prompt": "caption"},
            ("rollout.pipe.negative_prompt", "rollout.conditioning", "train.conditioning"),
            {"prompts.train": [{"file": "CAPTIONED"}], "rollout.guidance_scale": 3.0},
        )
    ],
    "inputs.*.column": [
        Case(
            "caption",
            ("rollout.pipe.negative_prompt", "rollout.conditioning"),
            {
                "prompts.train": [{"file": "CAPTIONED"}],
                "inputs": {"negative_prompt": {"column": "avoid"}},
                "rollout.guidance_scale": 3.0,
            },
        )
    ],
    "rollout.num_inference_steps": [direct("rollout.pipe.num_inference_steps", 4, "rollout.index", "train.indices")],
    "rollout.guidance_scale": [
        direct("rollout.pipe.guidance_scale", 3.0, "rollout.conditioning", "train.conditioning", "check.guidance_scale")
    ],
    "rollout.negative_prompt": [
        Case(
            "blurry",
            ("rollout.pipe.negative_prompt", "rollout.conditioning", "train.conditioning", "check.negative_prompt"),
            {"rollout.guidance_scale": 3.0},
            (["blurry"],),
        )
    ],
    "rollout.prompts_per_step": [moves(4, "rollout.prompts", "rollout.groups")],
    "rollout.group_size": [moves(8, "rollout.groups")],
    "rollout.batch_size": [moves(2, "rollout.latents", "train.latents"), moves(1, "evaluation.latents", **EVALUATED)],
    "rollout.updates": [moves("mixed", "rollout.groups", rollout__batch_size=2)],
    "rollout.train_batch_size": [Case(2, ("train.latents",), NFT)],
    "rollout.kernel.name": [moves("cps", "rollout.kernel", "rollout.std", "train.kernel")],
    "rollout.kernel.noise_level": [moves(0.5, "rollout.kernel", "rollout.std", "train.kernel")],
    "rollout.kernel.decay": [
        Case("exponential", ("rollout.kernel", "rollout.std", "train.kernel"), {"rollout.plan": own})
        for own in (WINDOW | {"low": 1}, STEPS, {"name": "all"})
    ],
    "rollout.kernel.decay_rate": [
        Case(0.5, ("rollout.kernel", "train.kernel"), {"rollout.plan": own, "rollout.kernel": {"decay": "exponential"}})
        for own in (WINDOW | {"low": 1}, STEPS, {"name": "all"})
    ],
    "rollout.kernel.keep_budget": [
        moves(True, "rollout.kernel", "rollout.std", "train.kernel", rollout__kernel={"decay": "exponential"})
    ],
    "rollout.kernel.log_prob_weight": [direct("rollout.log_prob_weight", "variance", "train.log_prob_weight")],
    "rollout.solver": [moves("dpmpp_2m", "rollout.solver", rollout__plan=STEPS)],
    "rollout.shared_noise": [moves(True, "rollout.initial_noise")],
    "rollout.tail_fraction": [moves(0.4, "rollout.solver", rollout__plan={"name": "steps", "indices": [1]})],
    "rollout.train_guidance_scale": [Case(3.0, ("train.conditioning",), NFT)],
    "rollout.branching": [moves({}, "rollout.groups", rollout__plan=STEPS)],
    "rollout.branching.trunk": [branching("resampled", "rollout.images")],
    "rollout.branching.finish": [branching("denoised", "rollout.index", "rollout.images")],
    "rollout.branching.granularities": [branching([2], "rollout.solver")],
    "rollout.branching.first": [branching(2, "rollout.groups")],
    "rollout.plan[all].name": [moves({"name": "all"}, "rollout.windows", rollout__plan=STEPS)],
    "rollout.plan[all].include_last": [moves(True, "rollout.windows")],
    "rollout.plan[none].name": [
        Case({"name": "none"}, ("rollout.windows", "rollout.solver"), also={"algorithm": {"name": "diffusion_dpo"}})
    ],
    "rollout.plan[steps].name": [moves(STEPS, "rollout.windows")],
    "rollout.plan[steps].indices": [moves([0, 2], "rollout.windows", "rollout.kernel", rollout__plan=STEPS)],
    "rollout.plan[window].name": [moves(WINDOW, "rollout.windows")],
    "rollout.plan[window].strategy": [Case("fixed", ("rollout.windows",), plan())],
    "rollout.plan[window].size": [Case(2, ("rollout.windows",), plan())],
    "rollout.plan[window].low": [Case(2, ("rollout.windows",), plan(strategy="fixed"))],
    "rollout.plan[window].high": [Case(1, ("rollout.windows",), plan())],
    "rollout.plan[window].stride": [Case(2, ("rollout.windows",), plan(strategy="progressive", size=2, iterations=1))],
    "rollout.plan[window].iterations": [Case(1, ("rollout.windows",), plan(strategy="progressive", iterations=2))],
    "rollout.plan[window].min_iterations": [Case(2, ("rollout.windows",), plan(strategy="linear_decay", iterations=2, high=2))],
    "rollout.plan[window].decay_start": [
        Case(1, ("rollout.windows",), plan(strategy="exponential_decay", iterations=2, low=1, decay_rate=3.0))
    ],
    "rollout.plan[window].decay_rate": [
        Case(3.0, ("rollout.windows",), plan(strategy="exponential_decay", iterations=2, low=1))
    ],
    "rollout.plan[window].roll_back": [Case(False, ("rollout.windows",), plan(strategy="progressive", iterations=1, high=2))],
    "rewards": [moves({"jpeg_incompressibility": {}}, "load_reward.first", "scores")],
    "rewards.*.weight": [moves(2.0, "scores")],
    "rewards.*.scale": [moves(3.0, "scores")],
    "rewards.*.offset": [moves(0.5, "scores")],
    "rewards.*.options": [direct("load_reward.quality", {"quality": 30}, "scores", reads=(30,))],
    "rewards.*.columns": [
        direct("RewardSet.columns", {"own": "caption"}, reads=({"jpeg_compressibility": {"own": "caption"}},), **CAPTIONED)
    ],
    "rewards.*.frames": [
        Case("first", ("RewardSet.frames",), BRIGHT, ({"brightness:Brightness": Frames(limit=1)},)),
        Case({"every": 2}, ("RewardSet.frames",), BRIGHT, ({"brightness:Brightness": Frames(every=2)},)),
    ],
    "rewards.*.workers": [
        moves(2, "load_reward.first"),
        Case(2, ("WorkerReward.name",), {"rewards": {"far": {"host": {"python": "p"}}}}),
    ],
    "rewards.*.host": [moves({"python": "some/python"}, "WorkerReward.first")],
    "rewards.*.host.environment": [host("vlm", "locate.first"), host("vlm", "locate.first", target="a:b")],
    "rewards.*.host.python": [host("some/python", "WorkerReward.python")],
    "rewards.*.host.url": [host("http://far:1", "HTTPReward.first")],
    "rewards.*.host.target": [host("a:b", "WorkerReward.first", python="some/python")],
    "rewards.*.host.token_file": [host("secret", "HTTPReward.token_file", url="http://far:1")],
    "rewards.*.host.start_timeout_s": [
        host(5.0, "WorkerReward.start_timeout_s", python="p"), host(5.0, "HTTPReward.start_timeout_s", url="http://far:1"),
    ],
    "rewards.*.host.deadline_s": [
        host(5.0, "WorkerReward.deadline_s", python="p"), host(5.0, "HTTPReward.deadline_s", url="http://far:1"),
    ],
    "rewards.*.host.deadline_per_image_s": [
        host(5.0, "WorkerReward.deadline_per_image_s", python="p"),
        host(5.0, "HTTPReward.deadline_per_image_s", url="http://far:1"),
    ],
    "rewards.*.host.max_restarts": [host(5, "WorkerReward.max_restarts", python="p")],
    "rewards.*.host.max_body_bytes": [host(500, "WorkerReward.max_body_bytes", python="p")],
    "advantage.deviation": [moves("none", "advantages")],
    "advantage.ddof": [moves(1, "advantages")],
    "advantage.epsilon": [moves(0.5, "advantages")],
    "advantage.clip": [moves(0.5, "advantages"), Case(3.0, ("loss",), NFT)],
    "advantage.combine": [moves("gdpo", "advantages", rewards=BOTH)],
    "advantage.best_and_worst": [moves(2, "weights")],
    "advantage.tied": [direct("compare.tied", "drop")],
    "advantage.min_scored": [direct("compare.min_scored", 0.5)],
    "optimizer.name": [
        Case("adafactor", ("optimizer.class", "exported"), {"optimizer": {"learning_rate": 3e-2}}, ("Adafactor",))
    ],
    "optimizer.learning_rate": [direct("optimizer.lr", 0.01)],
    "optimizer.schedule": [moves("cosine", "optimizer.lr")],
    "optimizer.warmup_updates": [moves(2, "optimizer.lr")],
    "optimizer.betas": [direct("optimizer.betas", [0.8, 0.95], reads=((0.8, 0.95),))],
    "optimizer.weight_decay": [direct("optimizer.weight_decay", 0.03)],
    "optimizer.epsilon": [direct("optimizer.eps", 1e-5)],
    "optimizer.max_grad_norm": [direct("clip", 0.3, "deepspeed")],
    "engine.strategy": [direct("strategy", "zero2", "deepspeed")],
    "engine.device": [direct("Processes.cpu", "auto", reads=(False,))],
    "engine.timeout_s": [moves(77, "InitProcessGroupKwargs.timeout", "StepScorer.timeout_s")],
    "evaluation.prompts": [evaluated("TRAIN", "evaluation.prompts")],
    "evaluation.num_prompts": [evaluated(3, "evaluation.prompts")],
    "evaluation.num_seeds": [evaluated(2, "evaluation.scores", "evaluation.initial_noise")],
    "evaluation.every": [Case(1, ("files",), EVALUATED | {"num_steps": 2})],
    "evaluation.num_inference_steps": [evaluated(3, "evaluation.pipe.num_inference_steps", "evaluation.index")],
    "evaluation.guidance_scale": [evaluated(3.0, "evaluation.pipe.guidance_scale", "evaluation.conditioning")],
    "evaluation.negative_prompt": [
        evaluated("blurry", "evaluation.pipe.negative_prompt", "evaluation.conditioning", guidance_scale=3.0)
    ],
    "algorithm[dgpo].reference": [Case("old", ("loss",), VARIANTS["dgpo"] | {"num_steps": 2})],
}  # fmt: skip

ALGORITHM_CASES: dict[str, tuple[str, Any, tuple[str, ...], dict[str, Any]]] = {
    # key: variant, value, places, further settings of the algorithm
    "flow_grpo.clip_range": ("flow_grpo", 1e-5, ("loss", "metrics"), {}),
    "flow_grpo.kl_coef": ("flow_grpo", 0.7, ("loss",), {}),
    "flow_grpo.transitions_per_sample": ("flow_grpo", 1, ("train.indices",), {}),
    "grpo_guard.clip_range": ("grpo_guard", 0.5, ("metrics",), {"clip_range": 1e-6}),
    "grpo_guard.kl_coef": ("grpo_guard", 0.7, ("loss",), {}),
    "step_dpo.beta": ("step_dpo", 3.0, ("loss",), {}),
    "step_dpo.threshold": ("step_dpo", 0.5, ("metrics",), {}),
    "pso.beta": ("pso", 3.0, ("loss",), {}),
    "dgpo.beta": ("dgpo", 500.0, ("loss",), {}),
    "dgpo.clip_range": ("dgpo", 10.0, ("metrics",), {}),
    "dgpo.kl_coef": ("dgpo", 0.7, ("loss",), {}),
    "dgpo.old_decay_slope": ("dgpo", 0.05, ("follow.old",), {}),
    "dgpo.old_decay_max": ("dgpo", 0.2, ("follow.old",), {"old_decay_slope": 1.0}),
    "diffusion_nft.beta": ("diffusion_nft", 0.5, ("loss",), {}),
    "diffusion_nft.kl_coef": ("diffusion_nft", 0.7, ("loss",), {}),
    "diffusion_nft.old_decay_slope": ("diffusion_nft", 0.05, ("follow.old",), {}),
    "diffusion_nft.old_decay_max": ("diffusion_nft", 0.2, ("follow.old",), {"old_decay_slope": 1.0}),
    "diffusion_nft.old_decay_start": ("diffusion_nft", 1, ("follow.old",), {}),
    "awm.weighting": ("awm", "sigma", ("loss",), {}),
    "awm.clip_range": ("awm", 0.1, ("rollout.policy", "metrics"), {}),
    "awm.kl_coef": ("awm", 0.7, ("loss",), {}),
    "awm.old_coef": ("awm", 0.3, ("loss",), {}),
    "awm.old_decay_slope": ("awm", 0.05, ("follow.old",), {}),
    "awm.old_decay_max": ("awm", 0.2, ("follow.old",), {"old_decay_slope": 1.0}),
    "diffusion_dpo.beta": ("diffusion_dpo", 3.0, ("loss",), {}),
    "diffusion_dpo.refresh_every": ("diffusion_dpo", 1, ("follow.old",), {}),
    "weighted_sft.weights": ("weighted_sft", "positive", ("loss",), {}),
    "weighted_sft.temperature": ("weighted_sft exponential", 0.1, ("loss",), {}),
    "weighted_sft.refresh_every": ("weighted_sft exponential", 1, ("rollout.policy",), {}),
    "weighted_sft.kl_coef": ("weighted_sft", 0.7, ("loss",), {}),
}


def algorithm_cases() -> Iterator[tuple[str, Case]]:
    """Those above, and what all algorithms, or all on the forward process, have alike."""
    for key, (variant, value, at, settings) in ALGORITHM_CASES.items():
        name, _, own = key.partition(".")
        chosen = VARIANTS[variant]
        yield f"algorithm[{name}].{own}", Case(value, at, chosen | {"algorithm": chosen["algorithm"] | settings})
    for config in ALGORITHMS:
        name = config.model_fields["name"].default
        given, fields = VARIANTS[name], config.model_fields
        other = {"algorithm": VARIANTS["flow_grpo" if name != "flow_grpo" else "grpo_guard"]["algorithm"]}
        yield f"algorithm[{name}].name", Case(given["algorithm"], ("metrics",), other, also=given)
        yield f"algorithm[{name}].updates_per_rollout", Case(1, ("optimizer.lr",), given)
        if "noise_levels_per_sample" in fields:
            few = given | {"algorithm": given["algorithm"] | {"noise_levels_per_sample": 1}}
            yield f"algorithm[{name}].noise_levels_per_sample", Case(2, ("train.indices",), few)
            yield f"algorithm[{name}].first_level", Case(3, ("train.indices",), few)
            yield f"algorithm[{name}].end_level", Case(1, ("train.indices",), few)


for _key, _case in algorithm_cases():
    CASES.setdefault(_key, []).append(_case)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key: ``a.b``; ``a[variant].b`` where a section can be one of several; ``a.*.b`` for any name of the user's."""
    for name, about in model.model_fields.items():
        path = prefix + name
        sections, optional, named = inside(about.annotation)
        if not sections or optional or named:
            yield path
        for section in sections:
            variant = f"[{section.model_fields['name'].default}]" if len(sections) > 1 else ""
            yield from keys(section, f"{path}{variant}{'.*' if named else ''}.")


def inside(annotation: Any) -> tuple[list[type[BaseModel]], bool, bool]:
    """The sections that a key can hold, whether it can be null, and whether there are several of the user's."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation], False, False
    origin, found = typing.get_origin(annotation), [inside(own) for own in typing.get_args(annotation)]
    if origin not in (typing.Union, types.UnionType, typing.Annotated, dict, tuple):
        return [], False, False
    sections = [section for own, _, _ in found for section in own]
    null = type(None) in typing.get_args(annotation) or any(own for _, own, _ in found)
    many = origin is dict or (origin is tuple and bool(sections))
    return sections, null, many or any(own for _, _, own in found)


KEYS = list(keys(Config))


def test_every_key_has_a_case_or_a_reason() -> None:
    assert len(KEYS) > 150
    assert {"rollout.plan[window].size", "algorithm[dgpo].beta", "rewards.*.host.url", "seed"} < set(KEYS)
    assert not [key for key in KEYS if (key in CASES) == (key in NOTHING_OBSERVED)], "no case, or a case and a reason"
    assert not sorted({*CASES, *NOTHING_OBSERVED} - set(KEYS)), "there are no such keys"


def base(tmp: Path) -> dict[str, Any]:
    """Flow-GRPO for one training step of two updates."""
    return {
        "num_steps": 1,
        "trackers": [],
        "model": {
            "selfcheck": "always",  # what it is asked is looked at
            "lora": {"rank": 4, "alpha": 12, "targets": ["to_q", "to_k", "to_v", "to_out.0"]},
            **copy.deepcopy(SIZE),
        },
        "rollout": {
            "num_inference_steps": 5,
            "prompts_per_step": 2,
            "group_size": 4,
            "batch_size": 4,
            "plan": {"name": "all"},
        },
        "rewards": {"jpeg_compressibility": {"options": {"quality": 10}}},
        "algorithm": {"name": "flow_grpo", "kl_coef": 0.1, "clip_range": 0.05},
        "optimizer": {"learning_rate": 3e-2, "epsilon": 1e-3},
        "engine": {"device": "cpu"},
        "evaluation": None,
        "output": str(tmp / "run"),
    }


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key; one with ``*`` in the reward that is there; ``a[b].name`` sets the section."""
    key = re.sub(r"\[\w+\]\.name$", "", key)
    section = config
    *parents, last = re.sub(r"\[\w+\]", "", key).split(".")
    for parent in parents:
        if isinstance(section, list):
            section = section[0]
        else:
            section = section.setdefault(next(iter(section)) if parent == "*" else parent, {})
    if isinstance(section, list):
        section = section[0]
    section[last] = value


class World:
    """The folders and files of this file's runs, and what was seen in those that several cases are compared with."""

    def __init__(self, tmp: Path, model: Path, prompts: Path, pictures: Path) -> None:
        self.tmp, self.model = tmp, model
        other = tmp / "other.txt"
        other.write_text("a dog\na blue hat\na lake\na red house", encoding="utf-8")
        linked = tmp / "model"
        linked.symlink_to(model)
        rows = [{"prompt": text, "caption": f"no {text}", "avoid": "blur"} for text in ("a dog", "a hat", "a lake")]
        captioned = tmp / "captioned.jsonl"
        captioned.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        commented = tmp / "commented.txt"
        commented.write_text("# animals\na dog\n# things\na hat\na cup", encoding="utf-8")
        splits = {name: Dataset.from_list(own) for name, own in (("train", rows[:2]), ("second", rows[1:]))}
        DatasetDict(splits).save_to_disk(tmp / "data")
        with_others = tmp / "pictures.jsonl"
        of_pictures = [json.loads(line) for line in pictures.read_text(encoding="utf-8").splitlines()]
        for row in of_pictures:
            row["pictures"] = [str(pictures.parent / name) for name in row["pictures"]]
            row["best"], row["worst"] = (str(pictures.parent / row[name]) for name in ("best", "worst"))
        for row, following in zip(of_pictures, [*of_pictures[1:], of_pictures[0]]):
            row["others"] = following["pictures"]
        with_others.write_text("\n".join(map(json.dumps, of_pictures)), encoding="utf-8")
        self.names = {
            "PICTURES": str(with_others),
            "CACHE": str(tmp / "cache"),
            "DATA": str(tmp / "data"),
            "CAPTIONED": str(captioned),
            "COMMENTED": str(commented),
        }
        self.names |= {"OTHER": str(other), "TRAIN": str(prompts), "OTHER_MODEL": str(linked)}
        self.seen: dict[str, dict[str, list[Any]]] = {}
        self.count = 0

    def observe(self, given: dict[str, Any], key: str | None = None, value: Any = None) -> dict[str, list[Any]]:
        """What the places see in a run; one with the same settings is made once."""
        folder = self.tmp / str(self.count)
        config = base(folder)
        config["model"]["path"], config["prompts"] = str(self.model), {"train": self.names["TRAIN"]}
        for name, own in copy.deepcopy(given).items():
            put(config, name, own)
        config["algorithm"].setdefault("updates_per_rollout", 2)
        if key == "output":
            value = str(folder / value)
        if key is not None:
            put(config, key, value)
        text = json.dumps(config)
        for name, own in self.names.items():
            text = text.replace(f'"{name}"', json.dumps(own))
        known = text.replace(str(folder), "")
        if known not in self.seen:
            self.count += 1
            self.seen[known] = observe(json.loads(text), folder)
        return self.seen[known]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sd3: Path, prompt_file: Path, picture_file: Path) -> World:
    return World(tmp_path_factory.mktemp("reach"), tiny_sd3, prompt_file, picture_file)


def without(given: dict[str, Any], key: str) -> dict[str, Any]:
    """The run to compare with: some keys are asked for only where another one is there."""
    needs = {"rewards.*.host.environment": {"python": "p"}, "rewards.*.host.python": {"environment": "vlm"}}
    needs["rewards.*.host.url"] = {"python": "p"}
    return given | {"rewards": {"far": {"host": needs[key]}}} if key in needs else given


@pytest.mark.parametrize("key", CASES)
def test_the_key_reaches_its_places(key: str, world: World) -> None:
    for case in CASES[key]:
        before = world.observe(without(case.given, key))
        after = world.observe(case.given | case.also, key, case.value)
        for place in case.at:
            assert after.get(place) != before.get(place), f"{key}={case.value!r} is not seen at {place}"
            assert place in after or place in before, f"nothing is seen at {place} at all"
        if case.reads is not None:
            (expected,) = case.reads
            expected = world.names.get(expected, expected) if isinstance(expected, str) else expected
            seen = after[case.at[0]]
            assert all(own == expected for own in seen), f"{case.at[0]} sees {seen}, not {expected!r}"


def test_the_same_settings_are_seen_alike(world: World) -> None:
    """Or a difference would say nothing."""
    once = world.observe(EVALUATED)
    world.seen.clear()
    again = world.observe(EVALUATED)
    assert once.keys() == again.keys()
    assert [place for place in once if once[place] != again[place]] == []
