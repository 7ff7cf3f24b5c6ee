"""Typed, strict configuration: YAML plus ``key.sub=value`` on the command line.

Every class of the project takes plain arguments; only `build.py` reads these models. An unknown key is an error that names
the nearest one; nothing that a user set is dropped.
"""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from flowsteer.rl.algorithms import AlgorithmConfig
from flowsteer.rollout.prompts import check_divisible


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LoRAConfig(Section):
    """Low-rank adapters on the denoiser (arXiv 2106.09685)."""

    rank: PositiveInt = 32
    alpha: PositiveInt = 64
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the linear layers, matched at the end of a module's path. Each must match something."""


class ModelConfig(Section):
    """The pipeline to train."""

    path: str = "embedded"
    """A folder or hub id in diffusers' layout; ``embedded`` is the tiny pipeline that is shipped with the package."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    lora: LoRAConfig | None = LoRAConfig()
    """``null`` trains all weights of the denoiser."""
    gradient_checkpointing: bool = False
    call: dict[str, Any] = {}
    """Further arguments of the pipeline's own ``__call__``, such as ``max_sequence_length``."""


class PromptsConfig(Section):
    """What to draw."""

    train: str = "shapes_train.txt"
    """A text file with a prompt a line, JSON lines with a ``prompt`` key, or the name of a file that is shipped."""


class KernelConfig(Section):
    """One stochastic denoising step as a Gaussian (rollout/kernels.py)."""

    name: Literal["flow_sde", "dance_sde", "cps", "ddim"] = "flow_sde"
    noise_level: NonNegativeFloat = 0.7
    log_prob_weight: Literal["gaussian", "variance"] = "gaussian"
    """``gaussian``: the density's logarithm. ``variance``: times 2 std^2, the published convention of CPS."""


class AllPlan(Section):
    """Every step is stochastic, the last one only when asked."""

    name: Literal["all"] = "all"
    include_last: bool = False


class NonePlan(Section):
    """No step is stochastic: an ODE rollout, for forward-process algorithms."""

    name: Literal["none"] = "none"


class StepsPlan(Section):
    """The same given steps always."""

    name: Literal["steps"] = "steps"
    indices: tuple[int, ...]


class WindowPlan(Section):
    """Consecutive stochastic steps, deterministic ones outside (MixGRPO, Flow-GRPO-Fast)."""

    name: Literal["window"] = "window"
    strategy: Literal["fixed", "progressive", "random"] = "random"
    size: PositiveInt = 2
    low: int = 0
    """First step that a window may cover."""
    high: int | None = None
    """End (exclusive) of the steps that a window may cover; the default leaves the last step out."""
    stride: PositiveInt = 1
    iterations: PositiveInt = 25
    roll_back: bool = True


PlanConfig = Annotated[AllPlan | NonePlan | StepsPlan | WindowPlan, Field(discriminator="name")]


class RolloutConfig(Section):
    """How samples are drawn."""

    num_inference_steps: PositiveInt = 10
    guidance_scale: NonNegativeFloat = 1.0
    prompts_per_step: PositiveInt = 24
    group_size: Annotated[int, Field(ge=2)] = 16
    batch_size: PositiveInt = 64
    """Samples in one network pass, in sampling and in training: kernels that depend on the shape then agree."""
    plan: PlanConfig = NonePlan()
    kernel: KernelConfig = KernelConfig()
    solver: Literal["euler", "dpmpp_2m"] = "euler"
    shared_noise: bool = False
    """The samples of a group start from the same initial noise; what they have in common is computed once."""


class RewardConfig(Section):
    """One reward: ``weight * scale * (score - offset)``."""

    weight: float = 1.0
    scale: float = 1.0
    offset: float = 0.0
    options: dict[str, Any] = {}
    """Arguments of the reward's constructor."""


class AdvantageConfig(Section):
    """How a sample is compared with its group."""

    deviation: Literal["group", "global", "none"] = "group"
    clip: PositiveFloat | None = 5.0
    min_scored: Annotated[float, Field(ge=0, le=1)] = 0.9
    """The run stops, with everything saved, when less than this part of a step's samples has a score."""


class OptimizerConfig(Section):
    """AdamW; the learning rate is a pure function of the number of updates."""

    learning_rate: PositiveFloat = 3e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """``linear`` and ``cosine`` fall to 0 at the run's last update."""
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 1e-4
    epsilon: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0


class EngineConfig(Section):
    """Where and how it runs."""

    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed's ZeRO stage; ``null`` leaves DeepSpeed out."""
    device: Literal["auto", "cpu"] = "auto"
    timeout_s: PositiveInt = 1800
    """A process that keeps the others waiting longer than this ends the job."""


class EvaluationConfig(Section):
    """Fixed prompts and seeds, the deterministic sampler."""

    prompts: str = "shapes_reserved.txt"
    num_prompts: PositiveInt = 48
    """The first so many of the file, spread evenly over it."""
    num_seeds: PositiveInt = 1
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate after each so many steps; 0 evaluates only before the first step and after the last."""
    num_inference_steps: PositiveInt = 10
    guidance_scale: NonNegativeFloat = 1.0


class Config(Section):
    """A whole run."""

    output: str = "runs/run"
    seed: Annotated[int, Field(ge=0)] = 0
    num_steps: PositiveInt
    save_every: Annotated[int, Field(ge=0)] = 0
    """A checkpoint after each so many steps, and one at the end; 0 keeps only the last."""
    keep: PositiveInt = 2
    """How many checkpoints stay on disk."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Used where installed; JSON lines are always written."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: Annotated[dict[str, RewardConfig], Field(min_length=1)]
    advantage: AdvantageConfig = AdvantageConfig()
    algorithm: AlgorithmConfig
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the averaged weights that are evaluated and exported; 0 evaluates the current ones."""
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig | None = EvaluationConfig()

    def check(self, num_processes: int) -> None:
        """Refuse what no run can be made of. Raises ValueError that says what would work."""
        check_divisible(
            prompts_per_step=self.rollout.prompts_per_step,
            group_size=self.rollout.group_size,
            batch_size=self.rollout.batch_size,
            num_processes=num_processes,
            updates_per_rollout=self.algorithm.updates_per_rollout,
        )
        stochastic = self.rollout.plan.name != "none"
        if self.algorithm.needs_trajectory and not stochastic:
            raise ValueError(
                f"algorithm.name={self.algorithm.name} learns from stochastic transitions, but rollout.plan.name=none draws "
                "none; set rollout.plan to all, window or steps"
            )
        if not self.algorithm.needs_trajectory and stochastic:
            raise ValueError(
                f"algorithm.name={self.algorithm.name} noises the final latents again and ignores stochastic transitions; "
                "set rollout.plan.name=none"
            )
        if self.model.lora is None and self.model.dtype != "float32" and self.engine.zero_stage is None:
            raise ValueError(
                f"training all weights in {self.model.dtype} needs float32 master copies, which DeepSpeed keeps; "
                "set engine.zero_stage, or model.dtype=float32, or train a LoRA"
            )


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file (or the name of one that is shipped) and apply ``key.sub=value`` overrides in order.

    Raises ValueError for a file that is missing or not a mapping, an override without ``=``, and every key or value that
    the configuration does not allow, all of them in one message, each with its nearest allowed key.
    """
    data = _read(path)
    for override in overrides:
        _apply(data, override)
    return parse_config(data, source=str(path))


def parse_config(data: dict[str, Any], source: str = "the configuration") -> Config:
    """Validate a mapping. Raises ValueError with one line per fault."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        faults = "\n".join(f"  {_explain(fault)}" for fault in error.errors())
        raise ValueError(f"{source} is not a configuration that flowsteer can run:\n{faults}") from None


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration, every default spelled out, as YAML that `load_config` reads back."""
    Path(path).write_text(yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False), encoding="utf-8")


def shipped_configs() -> list[str]:
    """The names of the configurations in `flowsteer.configs`."""
    return sorted(
        entry.name for entry in resources.files("flowsteer.configs").iterdir() if entry.name.endswith(".yaml")
    )


def _read(path: str | Path) -> dict[str, Any]:
    name = str(path)
    file = Path(name)
    shipped = name if name.endswith(".yaml") else f"{name}.yaml"
    if not file.is_file() and shipped in shipped_configs():
        text = resources.files("flowsteer.configs").joinpath(shipped).read_text(encoding="utf-8")
    elif file.is_file():
        text = file.read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"there is no configuration {name!r}; give a YAML file, or one of {', '.join(shipped_configs())}"
        )
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{name} must hold a mapping of keys to values, it holds a {type(data).__name__}")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(
            f"the override {override!r} is not of the form key.sub=value, such as rollout.num_inference_steps=8"
        )
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ValueError(f"the override {override!r} goes through {parent!r}, which is not a section")
    data[last] = _value(text)


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not a YAML value: {error}") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        allowed = sorted(_allowed_keys(location[:-1]))
        near = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed here: {', '.join(allowed)}"
        return f"{key}: unknown key; {hint}"
    if fault["type"] == "union_tag_invalid":
        expected = fault["ctx"]["expected_tags"]
        return f"{key}: unknown {fault['ctx']['discriminator'].strip(chr(39))} {fault['ctx']['tag']!r}; allowed: {expected}"
    if fault["type"] == "missing":
        return f"{key}: this key is required"
    return f"{key}: {fault['msg']}, got {fault['input']!r}"


def _allowed_keys(location: list[str]) -> set[str]:
    """The keys of the section at ``location``, found by walking the JSON schema (it knows unions by their tag)."""
    schema = Config.model_json_schema()
    nodes = [schema]
    for part in location:
        following = []
        for node in _variants(nodes, schema):
            if part in node.get("properties", {}):
                following.append(node["properties"][part])
            elif isinstance(node.get("additionalProperties"), dict):
                following.append(node["additionalProperties"])
            elif (
                node.get("properties", {}).get("name", {}).get("const") == part
            ):  # a union's tag is part of the location
                following.append(node)
        nodes = following
    return {key for node in _variants(nodes, schema) for key in node.get("properties", {})}


def _variants(nodes: list[dict[str, Any]], schema: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for node in nodes:
        if "$ref" in node:
            found += _variants([schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]], schema)
        elif "anyOf" in node or "oneOf" in node:
            found += _variants(node.get("anyOf", []) + node.get("oneOf", []), schema)
        else:
            found.append(node)
    return found
