"""Tiny random pipelines of six families, built offline from the real diffusers and transformers classes.

Random weights of the real initialisation leave many networks near zero (gates, last layers), where a parity test would
compare nothing with nothing. So every parameter of every denoiser gets 0.08 * randn on top.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import nn

from flowsteer.rollout.lifting.pipeline import FlowPipeline
from zoo import parts
from zoo.families import flux, qwen_image, stable_diffusion_3, stable_diffusion_xl, wan, z_image

torch.set_num_threads(
    1
)  # for networks this small, waiting for a second thread on a busy machine costs ten times the work


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to build a tiny pipeline and how it wants to be called."""

    build: Callable[[], DiffusionPipeline]
    guided: float  # a guidance_scale that switches guidance on
    size: dict[str, int] = field(default_factory=lambda: {"height": 16, "width": 16})
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    guidance_name: str = "guidance_scale"
    off: float = 1.0  # the pipeline's own way to say "no guidance"
    dead_lora: tuple[str, ...] = ()  # parts of LoRA names that get no gradient, with the reason beside them


ZOO: dict[str, Family] = {
    "sd3": Family(build=stable_diffusion_3, guided=4.0, call_kwargs={"max_sequence_length": 32}),
    "flux": Family(build=flux, guided=3.5, call_kwargs={"max_sequence_length": 48}),
    "qwen": Family(
        build=qwen_image, guided=4.0, call_kwargs={"max_sequence_length": 512}, guidance_name="true_cfg_scale"
    ),
    "zimage": Family(build=z_image, guided=4.0, call_kwargs={"max_sequence_length": 64}, off=0.0),
    "wan": Family(build=wan, guided=4.0, call_kwargs={"num_frames": 9, "max_sequence_length": 32}),
    "sdxl": Family(build=stable_diffusion_xl, guided=5.0),
}

NOISE = 0.08


def build(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A pipeline of the zoo with live random weights, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = ZOO[name].build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
                for parameter in component.parameters():
                    parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def lifted(name: str, pipe: DiffusionPipeline | None = None) -> FlowPipeline:
    """A fresh FlowPipeline over a pipeline of the zoo."""
    family = ZOO[name]
    return FlowPipeline(pipe or build(name), **family.size, call_kwargs=family.call_kwargs)


@functools.cache
def shared(name: str) -> FlowPipeline:
    """One FlowPipeline per test session, for tests that change nothing about it."""
    return lifted(name)


# Lines of Stable Diffusion 3's loop, to be replaced in variants of it.
STEP = "                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]\n"
CACHE = """\
                if i == 0:
                    kept = noise_pred
                noise_pred = noise_pred + 0.1 * kept
"""


def variant(folder: Path, name: str, *changes: tuple[str, str]) -> type[StableDiffusion3Pipeline]:
    """Stable Diffusion 3 with some of its lines replaced, as somebody's own pipeline class in a file of its own."""
    original = Path(inspect.getfile(StableDiffusion3Pipeline))
    source = original.read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
        source = source.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(source)
    # beside the original, so that its relative imports are right
    spec = importlib.util.spec_from_file_location(f"diffusers.pipelines.stable_diffusion_3.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.StableDiffusion3Pipeline


def build_variant(folder: Path, name: str, *changes: tuple[str, str]) -> DiffusionPipeline:
    """A pipeline of such a class, with the zoo's Stable Diffusion 3 components."""
    cls = variant(folder, name, *changes)
    pipe = cls(**build("sd3").components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_class_without_guidance() -> DiffusionPipeline:
    """A flow pipeline whose ``__call__`` has no guidance argument."""

    class Unguided(DiffusionPipeline):
        def __init__(self, transformer: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, prompt: list[str], num_inference_steps: int = 3, output_type: str = "pt") -> tuple:
            self.scheduler.set_timesteps(num_inference_steps)
            latents = torch.randn(len(prompt), 3, 4, 4)
            for t in self.scheduler.timesteps:
                latents = self.scheduler.step(self.transformer(latents), t, latents)[0]
            return (latents,)

    return Unguided(transformer=nn.Conv2d(3, 3, 1), scheduler=FlowMatchEulerDiscreteScheduler())


__all__ = [
    "ZOO",
    "Family",
    "build",
    "build_class_without_guidance",
    "build_variant",
    "lifted",
    "parts",
    "shared",
    "variant",
]
