"""A pipeline's networks without weights: built on the meta device, shortened to a few blocks, or made of fake tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowsteer.rl.plan.files import Component
from flowsteer.rl.policy import Policy
from flowsteer.rl.targets import linear_layers, trainable
from flowsteer.rollout.lifting.protocol import Pipeline


@dataclass(frozen=True, kw_only=True)
class Size:
    """How many weights a network has, and how many of them are in linear layers, which alone are quantised.

    Example: ``Size(weights=2_243_171_520, linear=2_234_000_000, largest=9_437_184, block=85_000_000)``.
    """

    weights: int
    linear: int
    largest: int  # weights of the largest linear layer
    block: int  # weights of the largest repeated block


def build(component: Component) -> nn.Module:
    """The network on the meta device, in float32. Raises ValueError for a class that is not installed."""
    config = dict(component.config)
    with torch.device("meta"):
        if component.library == "diffusers":
            return _class_of("diffusers", component).from_config(config)
        cls = _class_of("transformers", component)
        config.pop("model_type", None)
        return cls(cls.config_class.from_dict(config))


def _class_of(library: str, component: Component) -> Any:
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    places = {"diffusers": diffusers, "transformers": transformers}
    found = getattr(places[library], component.cls, None)
    if component.cls == "StableDiffusionSafetyChecker":
        found = StableDiffusionSafetyChecker
    if found is None:
        raise ValueError(
            f"the installed {library} has no class {component.cls}, which the model's files name; update it"
        )
    return found


def size_of(component: Component) -> Size:
    """The sizes of a network."""
    return _size(component.library, component.cls, _frozen(component.config))


@cache
def _size(library: str, cls: str, config: Any) -> Size:
    network = build(Component(library=library, cls=cls, config=_thawed(config)))
    linear = [module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear)]
    blocks = [weights(block) for _, runs in repeated(network) for run in runs for block in run[:1]]
    return Size(
        weights=weights(network), linear=sum(linear), largest=max(linear, default=0), block=max(blocks, default=0)
    )


def weights(network: nn.Module) -> int:
    """How many weights a network has."""
    return sum(parameter.numel() for parameter in network.parameters())


def repeated(network: nn.Module) -> list[tuple[str, list[list[nn.Module]]]]:
    """The network's lists of blocks, each parted into runs of blocks of one kind, by the shapes of their weights.

    Example: Stable Diffusion 3.5 medium has one list of 13 blocks with two attentions, 10 with one, and a last one.
    """
    found = []
    for name, module in network.named_children():
        if not isinstance(module, nn.ModuleList):
            continue
        runs: list[tuple[Any, list[nn.Module]]] = []
        for block in module:
            kind = (type(block), *((key, tuple(value.shape)) for key, value in block.named_parameters()))
            if runs and runs[-1][0] == kind:
                runs[-1][1].append(block)
            else:
                runs.append((kind, [block]))
        found.append((name, [run for _, run in runs]))
    return found


def lengths(network: nn.Module) -> tuple[int, ...]:
    """How many blocks each run has."""
    return tuple(len(run) for _, runs in repeated(network) for run in runs)


def shorten(network: nn.Module, counts: Sequence[int]) -> None:
    """Keep only so many blocks of each run."""
    left = iter(counts)
    for name, runs in repeated(network):
        setattr(network, name, nn.ModuleList([block for run in runs for block in run[: next(left)]]))


def cast_to(network: nn.Module, dtype: torch.dtype) -> None:
    """As diffusers loads a network: in one dtype, but for the modules that its class keeps in float32."""
    keep = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, module in network.named_modules():
        if keep & set(name.split(".")):
            continue
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                if value is not None and value.is_floating_point() and key not in keep:
                    value.data = value.data.to(dtype)


def with_lora(network: nn.Module, rank: int, targets: tuple[str, ...] | str, *, shortened: bool = False) -> int:
    """Inject the current policy's adapters as a run does. Returns how many weights they have.

    Raises ValueError for a target that matches nothing, unless blocks that may hold it were left out.
    """
    named = tuple(trainable(network)) if isinstance(targets, str) else targets
    if shortened:
        layers = [f".{path}" for path in linear_layers(network)]
        named = tuple(name for name in named if any(layer.endswith(f".{name}") for layer in layers))
    if not named:
        network.requires_grad_(False)
        return 0
    pipeline = cast(Pipeline, SimpleNamespace(denoisers={"denoiser": network}))
    policy = Policy(pipeline, lora=(rank, rank, named), variants=frozenset(), seed=0)
    return sum(parameter.numel() for parameter in policy.parameters().values())


def lora_size(component: Component, rank: int, targets: tuple[str, ...] | str) -> int:
    """How many weights a LoRA on a denoiser has."""
    return _lora_size(component.cls, _frozen(component.config), rank, targets)


@cache
def _lora_size(cls: str, config: Any, rank: int, targets: tuple[str, ...] | str) -> int:
    return with_lora(build(Component(library="diffusers", cls=cls, config=_thawed(config))), rank, targets)


def make_fake(network: nn.Module) -> None:
    """Replace what is on the meta device by fake tensors on the CPU; under a FakeTensorMode."""
    for module in network.modules():
        for key, value in module._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype)
                module._parameters[key] = nn.Parameter(fake, requires_grad=value.requires_grad)
        plain = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        for store, held in ((module._buffers, module._buffers), (vars(module), plain)):
            for key, value in list(held.items()):
                if value is not None:
                    store[key] = torch.empty(value.shape, dtype=value.dtype)


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ("mapping", *((key, _frozen(own)) for key, own in value.items()))
    return ("list", *map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple):
        kind, *rest = value
        return {key: _thawed(own) for key, own in rest} if kind == "mapping" else [_thawed(own) for own in rest]
    return value
