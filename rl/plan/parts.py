"""The sum: the memory of the process that has most, by part, while it draws and while it trains; host memory; disk.

All sizes are bytes. What cannot be counted from shapes is stated as a constant here: what CUDA and NCCL take
(`CUDA_CONTEXT`), DeepSpeed's buckets, and what a process takes of the host (`HOST_PROCESS`). Not counted: workspaces of
convolutions, fragmentation, and rewards that run on the trainer's device. A card of "80 GB" has 85 of 1e9 bytes; the
difference is left for these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flowsteer.rl.plan.count import Activations, Pass, activations, decoding
from flowsteer.rl.plan.files import ModelFiles, read_model
from flowsteer.rl.plan.inputs import Shapes, shapes_of
from flowsteer.rl.plan.networks import Size, lora_size, size_of
from flowsteer.rl.plan.settings import BYTES, OPTIMISER, PROCESSES_PER_NODE, PROMPT_CACHE, QUANTISED, Settings

CUDA_CONTEXT = 2e9
"""Of a process: the CUDA context, the workspaces of cuBLAS and cuDNN, NCCL's buffers."""
HOST_PROCESS = 3e9
"""Of a process in host memory: Python, torch with its CUDA libraries, prompt files."""
BUCKET = 500_000_000
"""Elements of a bucket of DeepSpeed's reductions (stages 1 to 3)."""
LIVE = 1_000_000_000
"""Weights that DeepSpeed's stage 3 keeps gathered at most (``stage3_max_live_parameters``)."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes. ``rollout`` and ``update`` are bytes by part, each at the peak of its phase.

    Example: ``Estimate(rollout={"denoiser": 4.5e9, ...}, update={...}, moments={"sampling": 7e8, ...},
    host=2.4e11, disk=2.9e8, trained=18_000_000)``.
    """

    rollout: Mapping[str, float]
    update: Mapping[str, float]
    moments: Mapping[str, float]  # what encoding, sampling and decoding each take; the most is in ``rollout``
    host: float  # of a node
    disk: float  # of a checkpoint
    trained: int  # weights that are trained

    @property
    def peak(self) -> float:
        """Of the device, over both phases."""
        return max(sum(self.rollout.values()), sum(self.update.values()))


def estimate(settings: Settings) -> Estimate:
    """The memory of a run. Raises ValueError for a model whose files are not there, or that a plan does not know."""
    model = read_model(settings.path)
    shapes = shapes_of(model, height=settings.height, width=settings.width, call=dict(settings.arguments))
    sizes = {name: size_of(component) for name, component in model.components.items()}
    width = BYTES[settings.dtype]
    denoisers = [sizes[name] for name in model.denoisers]
    whole = sum(size.weights for size in denoisers)
    encoders = width * sum(size.weights for name, size in sizes.items() if name.startswith("text_encoder"))
    vae = BYTES[settings.vae_dtype] * (sizes["vae"].weights if "vae" in sizes else 0)
    named = {*model.denoisers, "vae", *(name for name in sizes if name.startswith("text_encoder"))}
    others = width * sum(size.weights for name, size in sizes.items() if name not in named)
    trained = whole if settings.rank is None else sum(
        lora_size(model.components[name], settings.rank, settings.targets) for name in model.denoisers
    )  # fmt: skip
    always = {
        "denoiser": _denoiser(settings, denoisers),
        "text encoders": 0.0 if settings.offload_text_encoders else encoders,
        "VAE": 0.0 if settings.offload_vae else vae,
        "other networks": others,
        "adapters and other policies": _policies(settings, trained),
        "optimiser": _optimiser(settings, trained),
        "stored rollouts": _rollouts(settings, shapes),
        "prompt cache": _prompts(settings, shapes),
        "CUDA context": CUDA_CONTEXT,
    }
    sampling = _pass(settings, shapes, settings.batch_size, guided=settings.guided).sampling
    decode = _decoding(settings, shapes) + (vae if settings.offload_vae else 0)
    encode = encoders if settings.offload_text_encoders else 0.0
    parked = encode + (vae if settings.offload_vae else 0.0)
    gathers = _gathers(settings, denoisers)
    train = _pass(settings, shapes, settings.trained_rows, guided=settings.train_guided)
    work = train.kept + train.beside + _dequantised(settings, denoisers)
    step = _step(settings, trained)
    update = {
        **always,
        "gradients": _gradients(settings, trained),
        "gathers and reductions": gathers + _reductions(settings, trained),
        "activations": work,
        "the optimiser's step, where it is more": max(step - work, 0.0),
    }
    stored = always["stored rollouts"]  # prompts are encoded before the step's samples are there
    encode = max(encode - stored, 0.0)
    moment = {"sampling": sampling + _dequantised(settings, denoisers), "decoding": decode, "encoding": encode}
    name = max(moment, key=lambda each: moment[each])
    before = {"stored rollouts": 2 * stored}  # the page drops those of the step before once the new ones are complete
    rollout = {**always, **before, "gathers and reductions": gathers, name: moment[name]}
    loaded = width * sum(size.weights for size in sizes.values())
    return Estimate(
        rollout=rollout,
        update=update,
        moments=moment,
        host=_host(settings, shapes, loaded, parked),
        disk=_disk(settings, trained),
        trained=trained,
    )


def _denoiser(settings: Settings, denoisers: list[Size]) -> float:
    width = BYTES[settings.dtype]
    whole, linear = (sum(getattr(size, name) for size in denoisers) for name in ("weights", "linear"))
    if settings.quantize is not None:
        return QUANTISED[settings.quantize] * linear + width * (whole - linear)
    return width * whole / settings.sharded


def _dequantised(settings: Settings, denoisers: list[Size]) -> float:
    """The layer at work, of a quantised base."""
    return BYTES[settings.dtype] * max(size.largest for size in denoisers) if settings.quantize else 0.0


def _policies(settings: Settings, trained: int) -> float:
    """The LoRA and its other versions in float32; of all weights, those beside the live ones, from each process's share."""
    others = len(settings.moving)
    if settings.rank is not None:
        return 4.0 * trained * (1 + others)
    if settings.strategy == "plain":
        width = BYTES[settings.dtype]
        return trained * (width * (others + settings.reference) + (4 * others if width < 4 else 0))
    return 4.0 * trained * (others + settings.reference) / settings.num_processes


def _optimiser(settings: Settings, trained: int) -> float:
    """The optimiser's state, and float32 masters where the engine has them."""
    state = OPTIMISER[settings.optimizer]
    if settings.strategy == "plain":
        return trained * state
    return trained * (4 + state) / settings.num_processes


def _gradients(settings: Settings, trained: int) -> float:
    """Sums in float32: whole ones where passes are not reduced one by one (plain, ZeRO-1, FSDP2), or this process's share."""
    shared = settings.num_processes if settings.strategy in ("zero2", "zero3") else 1
    return 4.0 * trained / shared


def _gathers(settings: Settings, denoisers: list[Size]) -> float:
    """Weights that are gathered for a pass."""
    width, whole = BYTES[settings.dtype], sum(size.weights for size in denoisers)
    if settings.num_processes == 1:
        return 0.0
    if settings.strategy == "zero3":
        return width * min(whole, LIVE)
    if settings.strategy == "fsdp2":  # the block at work and the one that is fetched
        return 2.0 * width * max(size.block or size.weights for size in denoisers)
    return 0.0


def _reductions(settings: Settings, trained: int) -> float:
    """Buffers for gradients on their way, beside the gradients."""
    width = BYTES[settings.dtype]
    if settings.strategy in ("zero1", "zero2", "zero3"):
        return 2.0 * width * min(trained, BUCKET)
    return 0.0


def _step(settings: Settings, trained: int) -> float:
    """What an update takes besides: the flat message of gradients, and AdamW's copies of what it works on."""
    copies = 4.0 if settings.optimizer in ("adamw", "adafactor") else 0.0
    if settings.strategy == "plain":
        return trained * (copies + (4.0 if settings.num_processes > 1 else 0.0))
    return trained * (4.0 + copies) / settings.num_processes  # float32 gradients of the share


def _pass(settings: Settings, shapes: Shapes, batch: int, *, guided: bool) -> Pass:
    """Bytes of a pass of a batch, with what guidance makes of it."""
    doubled = guided and shapes.guidance == "batch"
    rows = 2 * batch if doubled else batch
    counted = _activations(settings, checkpointing=settings.checkpointing > 0).at(rows)
    if settings.checkpointing > 1:  # the other blocks keep what they would keep without it
        plain, part = _activations(settings, checkpointing=False).at(rows), 1 / settings.checkpointing
        counted = Pass(
            kept=part * counted.kept + (1 - part) * plain.kept,
            beside=max(counted.beside, plain.beside),
            sampling=counted.sampling,
        )
    passes = 2 if guided and shapes.guidance == "passes" else 1
    return Pass(kept=passes * counted.kept, beside=counted.beside, sampling=counted.sampling)


def _activations(settings: Settings, *, checkpointing: bool) -> Activations:
    return activations(
        settings.path,
        settings.height,
        settings.width,
        settings.arguments,
        DTYPES[settings.dtype],
        None if settings.rank is None else (settings.rank, settings.targets),
        checkpointing,
    )


def _decoding(settings: Settings, shapes: Shapes) -> float:
    """The VAE's own peak, and the pictures in float32 as they leave it and as they are brought to [0, 1]."""
    dtype = DTYPES[settings.vae_dtype]
    one = decoding(settings.path, settings.height, settings.width, settings.arguments, dtype, settings.vae_tiling)
    pictures = settings.batch_size * 3 * math.prod(shapes.frames) * (4 + dtype.itemsize)
    return one * (1 if settings.vae_slicing else settings.batch_size) + pictures


def _rollouts(settings: Settings, shapes: Shapes) -> float:
    """Latents, trajectories and conditioning of a training step's samples on one process."""
    width, latent = BYTES[settings.dtype], math.prod(shapes.latent)
    if settings.pools:  # each pool stores its candidates, the states that they left, and an end for every way
        latents = settings.pools * (width * (1 + settings.ways) + width / settings.group_size)
    else:
        latents = width * (1 + 2 * settings.transitions) + (4 * settings.transitions if settings.means else 0)
    twice = shapes.guidance != "embedded"  # a row and its negative
    rows = 1 + (settings.guided and twice)
    rows += (1 + (settings.train_guided and twice)) if settings.two_conditionings else 0
    return settings.samples * (latent * latents + width * shapes.row * rows)


def _prompts(settings: Settings, shapes: Shapes) -> float:
    """Prepared prompts that are remembered on the device; in host memory where the encoders are parked."""
    if settings.offload_text_encoders:
        return 0.0
    twice = settings.guided and shapes.guidance != "embedded"
    return PROMPT_CACHE * BYTES[settings.dtype] * shapes.row * (1 + twice)


def _host(settings: Settings, shapes: Shapes, loaded: float, parked: float) -> float:
    """Of a node: every process loads the whole pipeline there; pictures stay there in 8 bits, and parked networks."""
    processes = min(settings.num_processes, PROCESSES_PER_NODE)
    pictures = settings.samples * max(settings.pools * settings.ways, 1) * 3 * math.prod(shapes.frames)
    return processes * (HOST_PROCESS + max(loaded, parked + pictures))


def _disk(settings: Settings, trained: int) -> float:
    """Of a checkpoint: the trained weights in float32, the optimiser's state, the averages; with shares, the live weights."""
    live = 0 if settings.strategy in ("zero1", "zero2") and settings.rank is None else BYTES[settings.dtype]
    policy = 4 if settings.rank is not None else live
    return trained * (policy + 4 + OPTIMISER[settings.optimizer] + 4 * len(settings.moving))


def checked_of(settings: Settings) -> str:
    """How far the model's files are confirmed."""
    model: ModelFiles = read_model(settings.path)
    return model.checked
