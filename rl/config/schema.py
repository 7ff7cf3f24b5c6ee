"""Typed, strict configuration: YAML plus ``key.sub=value`` on the command line.

Every class of the project takes plain arguments; `build.py` turns these models into them. An unknown key is an error that names
the nearest one; nothing that a user set is dropped.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from flowsteer.rl.algorithms import AnyAlgorithm
from flowsteer.rl.config.data import Inputs, PromptsConfig, SourceConfig, Sources
from flowsteer.rl.config.optimizer import OptimizerConfig
from flowsteer.rl.config.placement import OffloadConfig, VAEConfig
from flowsteer.rl.config.rewards import RewardConfig
from flowsteer.rl.config.section import Section, auto_or_names, by_name

logger = logging.getLogger(__name__)


def by_names(given: Any) -> Any:
    """A reward's name, or a list of them, stands for these rewards with the defaults; so does a name without a section."""
    names = [given] if isinstance(given, str) else given
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is listed twice")
        return {name: {} for name in names}
    if isinstance(given, dict):
        return {name: {} if section is None else section for name, section in given.items()}
    return given


def as_checkpointing(given: Any) -> Any:
    """Which blocks are checkpointed. Raises ValueError in one sentence for all of its forms."""
    every = given.get("every") if isinstance(given, dict) and len(given) == 1 else None
    if not isinstance(given, bool) and not (type(every) is int and every > 0):
        raise ValueError("give true, false, or {every: NUMBER} with a number from 1 on")
    return given


class LoRAConfig(Section):
    """Low-rank adapters on the denoiser (arXiv 2106.09685)."""

    rank: PositiveInt = 32
    """Rank of the two factors of each adapter."""
    alpha: PositiveInt = 64
    """An adapter's output is multiplied by alpha / rank."""
    targets: Annotated[Literal["auto"] | tuple[str, ...], BeforeValidator(auto_or_names)] = "auto"
    """``auto``: the linear layers of the denoiser's attention and feed-forward networks that a gradient reaches. Or names,
    matched at the end of a layer's path, such as ``[to_q, to_k, to_v, to_out.0]``; each must match something."""


class ModelConfig(Section):
    """The pipeline to train."""

    path: str = "embedded"
    """A folder or hub id in diffusers' layout; ``embedded`` and ``embedded_edit``, which edits a picture, are the tiny
    pipelines that are shipped with the package."""
    adapter: str | None = None
    """A pipeline written by hand in place of the lifted one: an entry point of the group ``flowsteer.pipelines``,
    ``package.module:Name`` or ``path/to/file.py:Name`` (rollout/lifting/protocol.py)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights. float16 is left out: its gradients vanish without a loss scale, which a resumed run
    would need."""
    height: PositiveInt | None = None
    """In pixels; null is the pipeline's own."""
    width: PositiveInt | None = None
    """In pixels; null is the pipeline's own."""
    lora: LoRAConfig | None = LoRAConfig()
    """``null`` trains all weights of the denoiser."""
    quantize: Literal["int8", "fp8", "nf4"] | None = None
    """Keep the denoiser's linear layers in fewer bits, for a LoRA: ``int8`` and ``fp8`` (torchao, a byte a weight), ``nf4``
    (bitsandbytes, 0.56 bytes). Lossy for the model, which draws other pictures. Sampling and training use the same weights,
    so the first ratio stays exactly 1. The result is a LoRA for a base that is quantised alike (docs/quantization.md)."""
    gradient_checkpointing: Annotated[bool | dict[Literal["every"], PositiveInt], BeforeValidator(as_checkpointing)] = (
        False
    )
    """Compute activations again in the backward pass: less memory, more time; lossless. ``true``: those of every block;
    ``{every: 2}``: of every second one."""
    attention: str | None = None
    """Which attention of diffusers, such as ``native``, ``flash``, ``_flash_3`` or ``xformers``; null is torch's own choice.
    Sampling and training use the same one, so ratios stay exact. Refused for networks whose attention takes none (Stable
    Diffusion 3), and without a backward pass (``sage``)."""
    compile: bool = False
    """Compile the network's repeated blocks with ``torch.compile``: the first passes take a minute or more, all others less
    time. What is compiled rounds differently with and without gradients, so the steps whose ratio is trained are drawn by the
    compiled graph of training."""
    offload: OffloadConfig = OffloadConfig()
    vae: VAEConfig = VAEConfig()
    scheduler: dict[str, Any] = {}
    """Settings of the scheduler that differ from those that it was saved with, such as ``{timestep_spacing: leading}``."""
    selfcheck: Literal["cached", "always", "never"] = "cached"
    """Whether a run begins with the self-check of `flowsteer check-model`, some fifteen network passes. ``cached``: unless it
    held before for the same weights, settings, versions and device (kept in ``$FLOWSTEER_CACHE/selfcheck``, by default in the
    user's cache folder)."""
    call: dict[str, Any] = {}
    """Further arguments of the pipeline's own ``__call__``, such as ``max_sequence_length``."""

    @property
    def checkpoint_every(self) -> int | None:
        """Every so many blocks compute their activations again; None: no block does."""
        given = self.gradient_checkpointing
        return given["every"] if isinstance(given, dict) else 1 if given else None


class KernelConfig(Section):
    """One stochastic denoising step as a Gaussian (rollout/steps/kernels.py)."""

    name: Literal["flow_sde", "dance_sde", "cps", "ddim"] = "flow_sde"
    """Whose stochastic step: Flow-GRPO's, DanceGRPO's, CPS's, or DDIM's with eta."""
    noise_level: NonNegativeFloat = 0.7
    """Scales the noise of a stochastic step; 0 is none."""
    decay: Literal["constant", "linear", "power", "cosine", "exponential"] = "constant"
    """How the noise level falls from step to step; ``linear``, ``power`` and ``cosine`` reach 0 at the last one."""
    decay_rate: PositiveFloat = 1.0
    """Rate of the decays ``power`` (the exponent) and ``exponential`` (per step)."""
    keep_budget: bool = False
    """Scale a decaying noise level so that the variances of the steps add up to those of the constant one."""
    log_prob_weight: Literal["gaussian", "variance"] = "gaussian"
    """``gaussian``: the density's logarithm. ``variance``: times 2 std^2, the published convention of CPS."""


class AllPlan(Section):
    """Every step is stochastic, the last one only when asked."""

    name: Literal["all"] = "all"
    include_last: bool = False
    """The last step is stochastic, too."""


class NonePlan(Section):
    """No step is stochastic: an ODE rollout, for forward-process algorithms."""

    name: Literal["none"] = "none"


class StepsPlan(Section):
    """The same given steps always."""

    name: Literal["steps"] = "steps"
    indices: tuple[int, ...]
    """The denoising steps that are stochastic, counted from 0."""


class WindowPlan(Section):
    """Consecutive stochastic steps, deterministic ones outside (MixGRPO, Flow-GRPO-Fast)."""

    name: Literal["window"] = "window"
    strategy: Literal["fixed", "progressive", "random", "linear_decay", "exponential_decay"] = "random"
    """How the window moves: not at all, step by step, at random, or step by step and ever faster."""
    size: PositiveInt = 2
    """Steps in the window."""
    low: int = 0
    """First step that a window may cover."""
    high: int | None = None
    """End (exclusive) of the steps that a window may cover; the default leaves the last step out."""
    stride: PositiveInt = 1
    """Steps that the window moves by, at most its size."""
    iterations: PositiveInt = 25
    """Training steps at each place; at the first ones when they decay."""
    min_iterations: PositiveInt = 1
    """``linear_decay``: training steps at the last place."""
    decay_start: NonNegativeInt = 0
    """``exponential_decay``: places up to here keep their iterations."""
    decay_rate: PositiveFloat = 0.1
    """``exponential_decay``: the rate per place."""
    roll_back: bool = True
    """Start again at the first place after the last one; otherwise stay there."""


PlanConfig = Annotated[AllPlan | NonePlan | StepsPlan | WindowPlan, Field(discriminator="name")]

_DEFAULT_PLANS = {"transitions": "all", "final latents": "none"}  # by what an algorithm learns from


class BranchingConfig(Section):
    """Samples of a group leave the same state at each stochastic step of the plan (G2RPO, step-aware DPO)."""

    trunk: Literal["deterministic", "resampled"] = "deterministic"
    """How the common state goes on: by the deterministic sampler, or from one of the candidates, drawn at random."""
    finish: Literal["deterministic", "denoised"] = "deterministic"
    """How candidates become images: led to the end, or by the model's prediction of the clean image. Rewards get the noise
    level of the prediction as the column ``sigma``."""
    granularities: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    """Denoising steps taken in one on the way to the end; each makes an image of every candidate."""
    first: NonNegativeInt = 0
    """Stochastic steps before this one have no candidates: they are drawn once for each group."""


class RolloutConfig(Section):
    """How samples are drawn."""

    num_inference_steps: PositiveInt = 10
    """Denoising steps."""
    guidance_scale: NonNegativeFloat = 1.0
    """In the unit of the pipeline's own guidance argument; 1 is without (a guidance-distilled model is told 1). 0 is what
    some models publish for the same (SDXL Turbo, FLUX.1-schnell): pipelines guide above 1 only."""
    negative_prompt: str | None = None
    """What guidance leads away from; null is none."""
    prompts_per_step: PositiveInt = 24
    """Prompts drawn in each training step, over all processes."""
    group_size: PositiveInt = 16
    """Samples of each prompt, which are compared with one another. 1 only where nothing is compared: fine-tuning on pictures
    (``weighted_sft`` with ``weights=all``)."""
    batch_size: PositiveInt = 64
    """The most samples in a network pass, the same in sampling and in training. Used is the largest number up to it that
    holds whole groups or divides a group, and with which a step's samples can be shared evenly among processes and updates; it
    is printed at the start."""
    updates: Literal["by_prompt", "mixed"] = "by_prompt"
    """What each of several updates of a step trains on. ``by_prompt``: all samples of some of the prompts. ``mixed``: a random
    part of the samples of nearly all prompts, as published codes do; it needs ``batch_size`` below ``group_size``."""
    train_batch_size: PositiveInt | None = None
    """The most samples in a network pass of training, where the algorithm noises final latents again; null is as many as in
    sampling. A rollout batch is cut into equal parts, of whole groups for algorithms that compare within a pass (dgpo,
    diffusion_dpo). Lossless: the gradient is the same but for rounding, with less memory. Refused for algorithms that learn
    from transitions, whose ratio is 1 only in the batches that were drawn."""
    plan: Annotated[PlanConfig, BeforeValidator(by_name)] = NonePlan()
    """Which steps are stochastic; by default ``all`` for algorithms that learn from transitions, ``none`` for others."""
    kernel: Annotated[KernelConfig, BeforeValidator(by_name)] = KernelConfig()
    solver: Literal["euler", "dpmpp_2m"] = "euler"
    """Solver of the deterministic steps; the second-order one is used after the last stochastic step."""
    shared_noise: bool = False
    """The samples of a group start from the same initial noise; what they have in common is computed once."""
    merge_lora: bool = False
    """Add the LoRA to the base's weights while samples are drawn, which saves its share of every pass. Only for algorithms
    that train no ratio: the sums are rounded otherwise than in training. Lossy in bfloat16, where small updates vanish."""
    branching: BranchingConfig | None = None
    """Score every stochastic step by itself, with candidates that part only there; null draws whole trajectories."""
    tail_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only this fraction of the denoising steps after the last stochastic one is taken; each is longer (MixGRPO-Flash: 0.4)."""
    train_guidance_scale: NonNegativeFloat | None = None
    """Guidance in training where the algorithm noises final latents again; null is that of sampling."""


class AdvantageConfig(Section):
    """How a sample is compared with its group."""

    deviation: Literal["group", "global", "none"] = "group"
    """What differences to the group's mean are divided by: its own deviation, that of all samples, or nothing."""
    ddof: Literal[0, 1] = 0
    """The standard deviation divides by n - ddof: 0 in Flow-GRPO, 1 in DanceGRPO, MixGRPO and G2RPO."""
    epsilon: NonNegativeFloat = 1e-4
    """Added to the deviation; DanceGRPO, MixGRPO and G2RPO have 1e-8."""
    clip: PositiveFloat | None = 5.0
    """Largest size of an advantage; null does not clip."""
    combine: Literal["rewards", "advantages", "gdpo"] = "rewards"
    """Several rewards: sum the scores; or compare each on its own scale and sum that; or normalise that sum once more."""
    best_and_worst: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Learn from so many samples of each group only, its best and its worst; null learns from all."""
    tied: Literal["keep", "drop"] = "keep"
    """Samples of a group whose scores are all equal: they count, with an advantage of 0, so that they feel a KL; or they are
    left out of the mean, as in Flow-GRPO's code."""
    min_scored: Annotated[float, Field(ge=0, le=1)] = 0.9
    """The run stops, with everything saved, when less than this part of a step's samples has a score."""


class EngineConfig(Section):
    """Where and how it runs."""

    strategy: Literal["plain", "zero1", "zero2", "zero3", "fsdp2"] = "plain"
    """What each process keeps a share of. ``plain``: of nothing. DeepSpeed's ZeRO: the optimiser (``zero1``), gradients too
    (``zero2``), weights too (``zero3``). torch's ``fsdp2``: optimiser and weights; it adds gradients up before it exchanges
    them once per update."""
    context_parallel: PositiveInt = 1
    """So many consecutive processes share each sample: they split the sequence of the network's tokens, for videos and pictures
    that one device has no room for. Lossless: the same samples, seeds and gradient as on one process, up to the order of sums.
    Divides the number of processes, the attention heads and the tokens. For Wan, FLUX and FLUX.2."""
    device: Literal["auto", "cpu"] = "auto"
    """``auto``: an accelerator if there is one."""
    timeout_s: PositiveInt = 1800
    """A process that keeps the others waiting longer than this ends the job."""


class EvaluationConfig(Section):
    """Fixed prompts and seeds, the deterministic sampler."""

    prompts: Sources = (SourceConfig(file="shapes_reserved.txt"),)
    """As ``prompts.train``; ``inputs`` are taken from it, too."""
    num_prompts: PositiveInt = 48
    """So many of the file's, spread evenly over it."""
    num_seeds: PositiveInt = 1
    """Samples of each prompt; rewards that compare the images of a prompt need at least 2."""
    every: Annotated[int, Field(ge=0)] = 0
    """Evaluate after each so many steps; 0 evaluates only before the first step and after the last."""
    num_inference_steps: PositiveInt = 10
    """Denoising steps."""
    guidance_scale: NonNegativeFloat = 1.0
    """As in ``rollout.guidance_scale``."""
    negative_prompt: str | None = None
    """As in ``rollout.negative_prompt``."""


class Config(Section):
    """A whole run."""

    output: str = "runs/run"
    """The run's folder, which must be new or empty, or that of the run to resume."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides all random draws: prompts, noise, windows and new weights."""
    num_steps: PositiveInt
    """Training steps of the whole run."""
    save_every: Annotated[int, Field(ge=0)] = 0
    """A checkpoint after each so many steps; 0: none by the number of steps. There is always one at the end."""
    save_every_s: NonNegativeFloat = 600.0
    """A checkpoint after the first step that ends at least so many seconds after the last one; 0: none by time."""
    keep: PositiveInt = 2
    """How many checkpoints stay on disk."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Used where installed; JSON lines are always written."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    inputs: Inputs = {}
    """What the pipeline is given besides prompts: its argument and the column of the prompt file that holds it. A column's name
    alone stands for the kind that the argument's name says, as in ``inputs={image: source}``."""
    rollout: RolloutConfig = RolloutConfig()
    rewards: Annotated[dict[str, RewardConfig], Field(min_length=1), BeforeValidator(by_names)]
    """By name: one of `flowsteer rewards list`, ``package.module:attribute``, or ``path/to/file.py:attribute``."""
    advantage: AdvantageConfig = AdvantageConfig()
    algorithm: Annotated[AnyAlgorithm, BeforeValidator(by_name)]
    """What is learned from the comparisons (`docs/algorithms.md`)."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the averaged weights, which are evaluated and exported; 0 takes the current weights."""
    ema_ramp: bool = False
    """Average faster at first: after n updates the decay is min((1 + n) / (10 + n), ``ema_decay``)."""
    ema_every: PositiveInt = 1
    """The averaged weights move after each so many optimiser updates, counted over the whole run."""
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig | None = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _plan_of_the_algorithm(cls, data: Any) -> Any:
        """The default of ``rollout.plan`` follows the algorithm."""
        if not isinstance(data, dict) or "algorithm" not in data:
            return data
        algorithm, rollout = by_name(data["algorithm"]), data.get("rollout", {})
        name = algorithm.get("name") if isinstance(algorithm, dict) else getattr(algorithm, "name", None)
        choices = get_args(cls.model_fields["algorithm"].annotation)
        known = {own.model_fields["name"].default: own.learns_from for own in choices}
        if not isinstance(name, str) or name not in known:
            return data
        plan = {"name": _DEFAULT_PLANS[known[name]]}
        if isinstance(rollout, RolloutConfig) and "plan" not in rollout.model_fields_set:
            return {**data, "rollout": {**rollout.model_dump(exclude_unset=True), "plan": plan}}
        if isinstance(rollout, dict) and "plan" not in rollout:
            return {**data, "rollout": {**rollout, "plan": plan}}
        return data

    @property
    def num_updates(self) -> int:
        """Optimiser updates of the whole run."""
        return self.num_steps * self.algorithm.updates_per_rollout

    @property
    def training_asks_no_reward(self) -> bool:
        """Whether pictures have scores in their file, or all count alike; then rewards are for evaluations only."""
        pictures = self.prompts.pictures
        return pictures is not None and (pictures.has_scores or not self.algorithm.compares)
