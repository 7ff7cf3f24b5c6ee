"""The pipeline of a run: a diffusers pipeline that is lifted, or an adapter that somebody wrote by hand.

`flowsteer.rollout.lifting.protocol` says what an adapter is. A package makes one known with two lines of its
``pyproject.toml``::

    [project.entry-points."flowsteer.pipelines"]
    my_pipeline = "my_package.my_module:MyPipeline"

A configuration names it by ``model.adapter``; ``package.module:Name`` and ``path/to/file.py:Name`` do as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from flowsteer.rewards.doors import Door, blaming
from flowsteer.rl.export import SECOND
from flowsteer.rollout.lifting.company import TOGETHER
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.protocol import ARGUMENTS, METHODS, Pipeline
from flowsteer.rollout.lifting.quantize import Quantization, quantize_layers
from flowsteer.rollout.lifting.several import Prepared

DOOR = Door(group="flowsteer.pipelines", noun="pipeline adapter", article="a", kinds=("class", "function"))


def load_pipeline(
    path: str,
    *,
    adapter: str | None,
    dtype: torch.dtype,
    device: torch.device | str,
    height: int | None = None,
    width: int | None = None,
    call: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    quantize: Quantization | None = None,
    offload: Collection[str] = (),
    vae_dtype: torch.dtype | None = None,
    vae_modes: Collection[str] = (),
) -> Pipeline:
    """The pipeline at ``path``, lifted, or what the adapter makes of the same arguments; its denoisers may be quantised.

    Raises ValueError if there is no such pipeline or adapter, or if the adapter is not one, cannot be imported or made.
    """
    if adapter is None:
        size = {"height": height, "width": width}
        return FlowPipeline.load(
            path,
            dtype=dtype,
            device=device,
            call_kwargs=call,
            scheduler=scheduler,
            quantize=quantize,
            together=TOGETHER,
            offload=offload,
            vae_dtype=vae_dtype,
            vae_modes=vae_modes,
            **size,
        )
    if offload or vae_dtype is not None or vae_modes:
        raise ValueError(
            "model.offload and model.vae are for pipelines that are lifted; an adapter places its own networks: leave them out"
        )
    if scheduler:
        raise ValueError(
            "model.scheduler is for pipelines that are lifted; an adapter has a schedule of its own: leave it out"
        )
    make = DOOR.load(adapter)
    if not callable(make):
        raise ValueError(
            f"pipeline adapter {adapter!r} is a {type(make).__name__}; it must be a class, or a function that makes one"
        )
    given = {"path": path, "dtype": dtype, "device": device, "height": height, "width": width, "call": dict(call or {})}
    signature = inspect.signature(make)
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ValueError(
            f"pipeline adapter {adapter!r} takes {signature}, but is called with {', '.join(ARGUMENTS)} ({error}); give it "
            "these arguments by name"
        ) from error
    with blaming(f"pipeline adapter {adapter!r} cannot be made"):
        made = make(**given)
    pipeline = check_pipeline(adapter, made)
    if quantize is not None:
        for denoiser in pipeline.denoisers.values():
            quantize_layers(denoiser, quantize, device=device)
    return pipeline


def check_pipeline(name: str, made: Any) -> Pipeline:
    """What an adapter made, if it is a pipeline. Raises ValueError that says what it lacks."""
    missing = [method for method in METHODS if not callable(getattr(made, method, None))]
    if missing:
        raise ValueError(
            f"pipeline adapter {name!r}: {type(made).__name__} has no {', '.join(missing)}; a pipeline has denoisers, "
            f"{', '.join(METHODS)} (flowsteer.rollout.lifting.protocol.Pipeline)"
        )
    denoisers = getattr(made, "denoisers", None)
    if not isinstance(denoisers, dict) or not all(isinstance(network, nn.Module) for network in denoisers.values()):
        raise ValueError(
            f"pipeline adapter {name!r}: denoisers must be a dict of networks by name, it is {denoisers!r:.200}"
        )
    if len(denoisers.keys() - {SECOND}) != 1:
        raise ValueError(
            f"pipeline adapter {name!r}: denoisers are {', '.join(denoisers) or 'none'}; one network can be trained and "
            f"exported, and a second one by the name {SECOND}"
        )
    return made


def tail_is_idle(pipeline: Pipeline, conditioning: Prepared) -> bool:
    """Whether a step leaves the next latents as they are; of an adapter that is tried at every denoising index."""
    if isinstance(pipeline, FlowPipeline):
        return pipeline.lifted.ends_at_step
    device = next(parameter.device for network in pipeline.denoisers.values() for parameter in network.parameters())
    shape = (len(conditioning), *conditioning.latent_shape)
    latents, next_latents = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, conditioning.latent_dtype)
        for seed in (0, 1)
    )
    with torch.no_grad():
        return all(
            torch.equal(pipeline.begin(latents, index, conditioning).finish(next_latents.clone()), next_latents)
            for index in range(conditioning.schedule.num_steps)
        )


def name_of(pipeline: Pipeline) -> str:
    """The class of the diffusers pipeline, or of the adapter."""
    return type(pipeline.pipe if isinstance(pipeline, FlowPipeline) else pipeline).__name__
