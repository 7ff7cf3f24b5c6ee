"""What a run's settings are used for: a whole run on tiny models, with notes of what every place of use is given.

Nothing is replaced but what a test cannot have (rewards on other hosts, DeepSpeed): the spies call what they stand for. A
place is ``phase.what``; the phases are start, rollout, train and evaluation.
"""

from __future__ import annotations

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import fresh_process
from peft.tuners.lora import LoraLayer
from torch import Tensor

from flowsteer.rewards.registry import load_reward
from flowsteer.rl import build, build_rewards
from flowsteer.rl import start as starting
from flowsteer.rl.algorithms import forward, transitions
from flowsteer.rl.config import parse_config
from flowsteer.rl.engine import processes as engine
from flowsteer.rl.engine.optimizer import OptimizerSettings
from flowsteer.rl.engine.zero import STAGES, deepspeed_config
from flowsteer.rl.policy import Policy
from flowsteer.rl.train import train
from flowsteer.rollout import branches, sample
from flowsteer.rollout.lifting import pipeline, selfcheck
from flowsteer.rollout.lifting.waiting import Places
from flowsteer.rollout.offline import PictureWorker
from flowsteer.rollout.steps import kernels
from flowsteer.rollout.worker import RolloutWorker

_LOADED: dict[tuple[Any, ...], Any] = {}
_CHECKED: dict[str, Any] = {}


class Trace:
    """Notes by place, in the order in which they were made."""

    def __init__(self) -> None:
        self.phase = "start"
        self.policy: Policy | None = None
        self.seen: dict[str, list[Any]] = defaultdict(list)

    def note(self, place: str, value: Any) -> None:
        """Something was used at a place."""
        self.seen[place].append(value)

    def here(self, what: str, value: Any) -> None:
        """The same at a place of the phase that the run is in."""
        self.note(f"{self.phase}.{what}", value)

    @contextmanager
    def during(self, phase: str, then: str | None = None) -> Iterator[None]:
        """The phase inside the context; afterwards ``then``, or the one before."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = then or before


def digest(values: Any) -> str:
    """Of tensors, as they stand in memory."""
    found = hashlib.sha256()
    for value in [values] if isinstance(values, Tensor) else values:
        found.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def observe(config: Mapping[str, Any], tmp: Path) -> dict[str, list[Any]]:
    """What every place saw in a run, from its start to its export. ``tmp`` is the test's folder."""
    trace = Trace()
    with pytest.MonkeyPatch.context() as patch, fresh_process():
        _watch_models(trace, patch)
        _watch_sampling(trace, patch)
        _watch_training(trace, patch)
        _watch_parts(trace, patch)
        run = starting.start(parse_config(dict(config)), quiet=True)
        try:
            trace.note("folder", run.folder.relative_to(tmp).as_posix())
            train(run)
            trace.note("exported", digest(list(run.policy.state().values())))
            run.export()
        finally:
            run.close()
    names = (file.relative_to(run.folder).as_posix() for file in run.folder.rglob("*"))
    trace.seen["files"] = sorted({name.split(".tfevents")[0] for name in names})  # a time follows
    return dict(trace.seen)


def _wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put ``around(original, *args, **kwargs)`` in the place of a function or method."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


def _watch_models(trace: Trace, patch: pytest.MonkeyPatch) -> None:
    def load(original: Any, path: str, *, dtype: torch.dtype, device: Any, **more: Any) -> Any:
        trace.note("load.path", path)
        trace.note("load.dtype", dtype)
        if (key := (path, dtype, *more.values())) not in _LOADED:
            _LOADED[key] = original(path, dtype=dtype, device=device, **more)
        return copy.deepcopy(_LOADED[key])

    def quantized(original: Any, denoiser: Any, kind: str, *, device: Any) -> None:
        trace.note("quantize.kind", kind)
        original(denoiser, kind, device=device)

    def check(original: Any, lifted: Any, **arguments: Any) -> Any:
        for name, value in arguments.items():
            trace.note(f"check.{name}", value)
        key = f"{lifted.pipe.transformer.dtype} {arguments}"
        if key not in _CHECKED:
            _CHECKED[key] = original(lifted, **arguments)
        return _CHECKED[key]

    def prepare(original: Any, self: Any, prompts: list[str], **settings: Any) -> Any:
        for name, value in self.call_arguments(prompts, **settings).items():
            if name != "generator":  # an object of its own each time
                trace.here(f"pipe.{name}", value)
        return original(self, prompts, **settings)

    def move(original: Any, self: Places, name: str, device: torch.device) -> None:
        trace.here("moved", name)
        original(self, name, device)

    def decode(original: Any, self: Any, latents: Tensor, conditioning: Any) -> Tensor:
        vae = self.pipe.vae
        trace.here("vae.dtype", str(vae.dtype))
        trace.here("vae.modes", (vae.use_slicing, vae.use_tiling))
        return original(self, latents, conditioning)

    def begin(original: Any, self: Any, latents: Tensor, index: int, conditioning: Any) -> Any:
        trace.here("latents", (str(latents.dtype), tuple(latents.shape)))
        trace.here("index", index)
        tensors = [value for value in conditioning.values.values() if isinstance(value, Tensor)]
        trace.here("conditioning", digest(tensors))
        trace.here("policy", trace.policy.active if trace.policy else None)
        modules = [module for network in self.denoisers.values() for module in network.modules()]
        trace.here("checkpointing", any(getattr(module, "gradient_checkpointing", False) for module in modules))
        trace.here("merged", any(module.disable_adapters for module in modules if isinstance(module, LoraLayer)))
        return original(self, latents, index, conditioning)

    def made(original: Any, self: Policy, *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **more)
        trace.policy = self
        layers = {
            name: module
            for network in self.denoisers.values()
            for name, module in network.named_modules()
            if isinstance(module, LoraLayer)
        }
        trace.note("lora.layers", sorted(layers))
        trace.note("lora.rank", sorted({layer.r["current"] for layer in layers.values()}))
        trace.note("lora.scaling", sorted({layer.scaling["current"] for layer in layers.values()}))
        trace.note("trained", digest(self.parameters().values()))

    def follow(original: Any, self: Policy, name: str, decay: float) -> None:
        trace.note(f"follow.{name}", decay)
        original(self, name, decay)

    _wrap(patch, pipeline, "load_diffusers", load)
    _wrap(patch, pipeline, "quantize_layers", quantized)
    _wrap(patch, selfcheck, "check", check)
    _wrap(patch, pipeline.FlowPipeline, "prepare", prepare)
    _wrap(patch, pipeline.FlowPipeline, "begin", begin)
    _wrap(patch, Places, "_move", move)
    _wrap(patch, pipeline.FlowPipeline, "decode", decode)
    _wrap(patch, Policy, "__init__", made)
    _wrap(patch, Policy, "follow", follow)


def _watch_sampling(trace: Trace, patch: pytest.MonkeyPatch) -> None:
    def rollouts(original: Any, self: RolloutWorker | PictureWorker, step: int, **more: Any) -> Any:
        with trace.during("rollout", then="train"):
            drawn = original(self, step, **more)
        trace.note("rollout.steps", step)
        trace.note("rollout.windows", [rollout.trajectory and rollout.trajectory.indices for rollout in drawn])
        trace.note("rollout.prompts", [rollout.prompts for rollout in drawn])
        trace.note("rollout.groups", [rollout.group.tolist() for rollout in drawn])
        trace.note("rollout.images", digest([rollout.images for rollout in drawn]))
        return drawn

    def noise(name: str) -> Callable[..., Tensor]:
        def around(original: Any, seeds: Tensor, *arguments: Any) -> Tensor:
            trace.here(name, seeds.tolist())
            return original(seeds, *arguments)

        return around

    def kernel(name: str, original: Any) -> Any:
        def spied(velocity: Tensor, latents: Tensor, schedule: Any, index: int, level: float) -> Any:
            trace.here("kernel", (name, index, level))
            gaussian = original(velocity, latents, schedule, index, level)
            trace.here("std", gaussian.std)
            return gaussian

        return spied

    def solver(name: str, original: Any) -> Any:
        def spied(velocity: Tensor, latents: Tensor, schedule: Any, index: int, history: Any) -> Any:
            trace.here("solver", (name, index, schedule.sigma[index].item(), schedule.sigma[index + 1].item()))
            return original(velocity, latents, schedule, index, history)

        return spied

    def log_prob(original: Any, *arguments: Any, weight: str) -> Tensor:
        trace.here("log_prob_weight", weight)
        return original(*arguments, weight=weight)

    _wrap(patch, RolloutWorker, "sample", rollouts)
    _wrap(patch, PictureWorker, "sample", rollouts)
    for module in (sample, branches):
        _wrap(patch, module, "initial_noise", noise("initial_noise"))
        patch.setattr(module, "SOLVERS", {name: solver(name, own) for name, own in module.SOLVERS.items()})
    for module in (sample, branches, forward):
        _wrap(patch, module, "stream_noise", noise("stream_noise"))
    patch.setattr(kernels, "KERNELS", {name: kernel(name, own) for name, own in kernels.KERNELS.items()})
    _wrap(patch, kernels, "log_prob", log_prob)


def _watch_training(trace: Trace, patch: pytest.MonkeyPatch) -> None:
    def loss(original: Any, self: Any, policy: Any, batch: Any) -> Any:
        value, metrics = original(self, policy, batch)
        trace.note("train.indices", batch.index)
        trace.note("loss", float(value.detach()))
        trace.note("metrics", {name: (float(total), count) for name, (total, count) in metrics.items()})
        return value, metrics

    def step(original: Any, self: torch.optim.AdamW, *arguments: Any) -> Any:
        for name in ("lr", "betas", "eps", "weight_decay"):
            trace.note(f"optimizer.{name}", self.param_groups[0][name])
        return original(self, *arguments)

    def made(original: Any, self: Any, parameters: Any) -> Any:
        found = original(self, parameters)
        trace.note("optimizer.class", type(found).__name__)
        return found

    def clip(original: Any, parameters: Any, max_norm: float) -> Tensor:
        trace.note("clip", max_norm)
        return original(parameters, max_norm)

    def compare(original: Any, rollouts: Any, scores: Any, gather: Any, **settings: Any) -> Any:
        for name, value in settings.items():
            trace.note(f"compare.{name}", value)
        trace.note("scores", [score.total.tolist() for score in scores])
        comparisons, statistics = original(rollouts, scores, gather, **settings)
        trace.note("advantages", [made.advantage.tolist() for made in comparisons])
        trace.note("weights", [made.weight.tolist() for made in comparisons])
        return comparisons, statistics

    def evaluate(original: Any, *arguments: Any, **settings: Any) -> Any:
        with trace.during("evaluation"):
            result = original(*arguments, **settings)
        trace.note("evaluation.prompts", result.prompts)
        trace.note("evaluation.scores", {name: tuple(values.shape) for name, values in result.parts.items()})
        trace.note("evaluation.images", digest(result.images))
        return result

    _wrap(patch, transitions.TransitionAlgorithm, "loss", loss)
    _wrap(patch, forward.ForwardAlgorithm, "loss", loss)
    _wrap(patch, torch.optim.AdamW, "step", step)
    _wrap(patch, OptimizerSettings, "make", made)
    _wrap(patch, torch.nn.utils, "clip_grad_norm_", clip)
    _wrap(patch, build, "compare", compare)
    _wrap(patch, build, "evaluate", evaluate)


def _watch_parts(trace: Trace, patch: pytest.MonkeyPatch) -> None:
    """What has no inside to look into here: the arguments with which it is built."""

    def built(name: str, *, instead: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def around(original: Any, *arguments: Any, **settings: Any) -> Any:
            if arguments and isinstance(arguments[0], str):
                trace.note(f"{name}.first", arguments[0])
            for key, value in settings.items():
                if key != "config":  # holds all keys
                    trace.note(f"{name}.{key}", value)
            return (instead or original)(*arguments, **settings)

        return around

    def without_deepspeed(original: Any, processes: Any, policy: Any, settings: Any, **more: Any) -> Any:
        accumulation = more["batches"] * more["passes_per_batch"]
        told = {key: more[key] for key in ("dtype", "batch_size")}
        trace.note("strategy", more["strategy"])
        under_zero = more["strategy"] if more["strategy"] in STAGES else "zero1"
        trace.note("deepspeed", deepspeed_config(settings, strategy=under_zero, accumulation=accumulation, **told))
        return original(processes, policy, settings, **more | {"strategy": "plain"})

    def processes(original: Any, **settings: Any) -> Any:
        trace.note("Processes.cpu", settings["cpu"])
        return original(**settings)

    def jpeg(*_: Any, **__: Any) -> Any:
        return load_reward("jpeg_compressibility")

    _wrap(patch, build, "prepare", without_deepspeed)
    _wrap(patch, build, "Processes", processes)
    _wrap(patch, engine, "Accelerator", built("Accelerator"))
    _wrap(patch, engine, "InitProcessGroupKwargs", built("InitProcessGroupKwargs"))
    patch.setattr(torch.cuda, "is_available", lambda: False)
    _wrap(patch, starting, "Log", built("Log"))
    _wrap(patch, starting, "StepScorer", built("StepScorer"))
    _wrap(patch, build_rewards, "load_reward", built("load_reward"))
    _wrap(patch, build_rewards, "RewardSet", built("RewardSet"))
    _wrap(patch, build, "Kept", built("Kept"))
    located = built("locate", instead=lambda environment, target: (f"{environment}/python", target))
    _wrap(patch, build_rewards, "locate", located)
    _wrap(patch, build_rewards, "WorkerReward", built("WorkerReward", instead=jpeg))
    _wrap(patch, build_rewards, "HTTPReward", built("HTTPReward", instead=jpeg))
