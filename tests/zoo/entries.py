"""A wider zoo: one entry for each pipeline class, with its pictures; the modules ``zoo.*_*`` hold them.

An entry says how to build a tiny pipeline of one class offline and how the class wants to be called.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import wave
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_ftfy_available
from PIL import Image
from torch import nn

from flowsteer.rollout.data.inputs import Media, kind_of
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from zoo import NOISE

MODULES = (
    "zoo.flow_images_sd3",
    "zoo.flow_images_flux",
    "zoo.flow_images_flux2",
    "zoo.flow_images_qwen",
    "zoo.flow_images_zimage",
    "zoo.flow_images_sana",
    "zoo.flow_images_text",
    "zoo.flow_images_vision",
    "zoo.video",
    "zoo.audio",
    "zoo.epsilon_images",
    "zoo.epsilon_video",
)

NOT_BUILT: dict[str, str] = {
    "OmniGenPipeline": "Its constructor makes an OmniGenMultiModalProcessor, which composes its transforms from torchvision.",
}
"""Classes that have no entry, with the reason."""
if not is_ftfy_available():
    NOT_BUILT |= {
        "PRXPipeline": "It cleans every prompt with ftfy, which is not installed.",
        "PRXPixelPipeline": "It cleans every prompt with ftfy, which is not installed.",
    }

GUIDED_APART = ("HunyuanImagePipeline", "PRXPipeline", "PRXPixelPipeline", "ace_step")
"""Entries that are refused only with guidance."""

Build = Callable[[], DiffusionPipeline]
Inputs = Callable[[int], dict[str, Any]]


def no_media(_: int) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How to build a tiny pipeline of one class, and how the class wants to be called."""

    build: Build
    """A fresh pipeline of real classes. The caller seeds it and jitters its weights, as ``built`` does."""
    call: dict[str, Any]
    """Further arguments of every call, without height and width."""
    size: dict[str, int]
    """Height and width in pixels; empty if ``__call__`` takes none."""
    guided: float | None
    """A value of guidance that switches it on; None if the class has no such argument."""
    guidance_name: str = "guidance_scale"
    """``guider`` if guidance is a component of the pipeline, made with this value, and no argument."""
    inputs: Inputs = no_media
    """The media arguments for row k, one row's value each: a picture, a list of references, a mask."""
    prompts: tuple[str, str, str] = ("a red circle", "a blue field", "a dark cloud")
    """Three prompts of one length."""
    prompt_name: str = "prompt"
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Settings of the scheduler that a run has to change; the class itself is built without them."""


def entries() -> dict[str, Entry]:
    """The entries of every module of the zoo that is there, by the name of the pipeline's class."""
    found: dict[str, Entry] = {}
    for name in MODULES:
        if importlib.util.find_spec(name) is not None:
            found |= importlib.import_module(name).ENTRIES
    return found | _called_otherwise(found)


def _called_otherwise(found: dict[str, Entry]) -> dict[str, Entry]:
    """Pipelines that are refused as they are usually called, and not so: without guidance, or with other arguments."""
    unguided = {f"{name}_unguided": replace(found[name], guided=None) for name in GUIDED_APART if name in found}
    other_calls = {
        "stable_audio_3_audio2audio": {"init_noise_level": 0.99},  # at 0.8 its first level is below its second
        "QwenImage21Pipeline": {"use_kv_cache": False},
    }
    called = {
        f"{name}_called": replace(found[name], call=found[name].call | call) for name, call in other_calls.items()
    }
    return unguided | called


def built(entry: Entry) -> DiffusionPipeline:
    """The entry's pipeline with live random weights, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = entry.build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
                for parameter in component.parameters():
                    parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_input(argument: str, value: Any) -> Any:
    """A picture, a tensor, a list of them, or a sound, as a prompt file would give it; other values as they are."""
    if isinstance(value, torch.Tensor) and value.dim() == 2 and kind_of(argument) == "audio":
        return _media("audio", [_wav(value)])
    given: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    if given and all(isinstance(one, torch.Tensor) for one in given):
        files = [io.BytesIO() for _ in given]
        for file, one in zip(files, given):
            np.save(file, one.numpy())
        return _media("tensors" if isinstance(value, (list, tuple)) else "tensor", [file.getvalue() for file in files])
    several = isinstance(value, (list, tuple)) and all(isinstance(one, Image.Image) for one in value)
    if not several and not isinstance(value, Image.Image):
        return value
    kind: Any = kind_of(argument)
    if several and kind not in ("video", "images"):
        kind = "images"
    elif not several:
        kind = {"L": "mask", "RGBA": "rgba"}.get(given[0].mode, "image")
    kept = []
    for one in given:
        buffer = io.BytesIO()
        one.save(buffer, "PNG")
        kept.append(buffer.getvalue())
    return _media(kind, kept)


def _media(kind: Any, files: list[bytes]) -> Media:
    return Media(kind, hashlib.sha256(b"".join(files)).hexdigest()[:16], tuple(files))


def _wav(sound: torch.Tensor) -> bytes:  # [channels, samples] in [-1, 1]
    """A WAV file of 32 bits."""
    whole = (sound.double() * (2**31 - 1)).round().to(torch.int32)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as opened:
        opened.setnchannels(len(sound))
        opened.setsampwidth(4)
        opened.setframerate(16000)
        opened.writeframes(whole.T.contiguous().numpy().tobytes())
    return buffer.getvalue()


def lifted(entry: Entry) -> tuple[FlowPipeline, list[dict[str, Any]] | None, str | None]:
    """The entry's pipeline, the inputs of three rows if it takes any, and its negative prompt."""
    call = {name: value for name, value in entry.call.items() if name not in ("negative_prompt", "output_type")}
    pipeline = FlowPipeline(built(entry), **entry.size, call_kwargs=call, scheduler=entry.scheduler)
    inputs = [{name: as_input(name, value) for name, value in entry.inputs(row).items()} for row in range(3)]
    return pipeline, inputs if inputs[0] else None, entry.call.get("negative_prompt")


def from_zoo(
    *, path: str, dtype: torch.dtype, device: Any, height: int | None, width: int | None, call: Any
) -> FlowPipeline:
    """An adapter for pipelines that cannot be loaded from a folder without torchvision: ``path`` is the entry's name."""
    return FlowPipeline(built(entries()[path]), height=height, width=width, call_kwargs=call)
