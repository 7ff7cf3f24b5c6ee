"""Policies as LoRA adapters (arXiv 2106.09685) of one set of base weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from flowsteer.rl.engine.shares import kept
from flowsteer.rl.targets import endings, linear_layers

CURRENT = "current"


class Adapters:
    """Policies as LoRA adapters of the same base weights; the reference is the base alone.

    With ``lend`` the trained adapter stays the active one, and a policy lends it its values while it is in use; the reference
    lends zeros. So all of them pass one compiled graph.
    """

    def __init__(
        self,
        denoisers: dict[str, nn.Module],
        variants: frozenset[str],
        *,
        rank: int,
        alpha: int,
        targets: Sequence[str],
        seed: int,
        lend: bool = False,
    ) -> None:
        self.names = variants
        self._denoisers = denoisers
        self._bases: dict[LoraLayer, Tensor] = {}  # weights as they are without what is merged
        self._lend = lend
        self._own: dict[str, Tensor] = {}  # the trained adapter's values, while others stand in their place
        _check_targets(denoisers, targets)
        with torch.random.fork_rng(devices=[]):
            for name in sorted({CURRENT, *variants} - {"reference"}):
                torch.manual_seed(seed)  # every adapter starts as the same policy
                for denoiser in denoisers.values():
                    config = LoraConfig(
                        r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian"
                    )
                    with warnings.catch_warnings():  # several adapters are what we want
                        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                        inject_adapter_in_model(config, denoiser, adapter_name=name)
        self._layers = [m for d in denoisers.values() for m in d.modules() if isinstance(m, LoraLayer)]
        for layer in self._layers:
            _compute_in_the_input_type(layer)
        for name in {CURRENT, *variants} - {"reference"}:
            for parameter in self.parameters(name).values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(name == CURRENT)
        self.switch(CURRENT, CURRENT)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        return {
            key.replace(f".{name}.", "."): value
            for component, denoiser in self._denoisers.items()
            for key, value in denoiser.named_parameters(prefix=component)
            if ".lora_" in key and f".{name}." in key
        }

    def parts(self, name: str) -> list[Tensor]:
        return [kept(parameter) for parameter in self.parameters(name).values()]

    def switch(self, before: str, after: str) -> None:
        if self._lend:
            self._borrow(after)
            after = CURRENT
        # PEFT's own set_adapter also changes requires_grad, which the optimiser and ZeRO rely on; its fields do not.
        for layer in self._layers:
            layer._disable_adapters = after == "reference"
            layer._active_adapter = [CURRENT if after == "reference" else after]

    def _borrow(self, name: str) -> None:
        """Put a policy's values in the place of the trained adapter's, or these back."""
        current = self.parameters(CURRENT)
        for key, value in self._own.items():
            current[key].data = value
        self._own = {} if name == CURRENT else {key: parameter.data for key, parameter in current.items()}
        if name == "reference":
            for key, parameter in current.items():
                if ".lora_B." in key:
                    parameter.data = torch.zeros_like(parameter.data)
        elif name != CURRENT:
            for key, parameter in self.parameters(name).items():
                current[key].data = parameter.data

    @contextmanager
    def merged(self, name: str) -> Iterator[None]:
        if name == "reference":
            yield
            return
        layers: list[Any] = self._layers
        try:
            for layer in layers:
                weight = layer.get_base_layer().weight
                if (
                    layer not in self._bases
                ):  # the base is never trained: one copy is enough, where it is in nobody's way
                    self._bases[layer] = weight.detach().to("cpu", copy=True)
                (adapter,) = layer._active_adapter
                down, up = (factor[adapter].weight.detach().float() for factor in (layer.lora_A, layer.lora_B))
                added = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)  # of a convolution, too
                weight.data.copy_(weight.data.float() + layer.scaling[adapter] * added)
                layer._disable_adapters = True
            yield
        finally:
            for layer in layers:
                if layer in self._bases:
                    layer.get_base_layer().weight.data.copy_(self._bases[layer])
                layer._disable_adapters = False

    def ready(self) -> None:
        pass


class _CastLinear(nn.Linear):
    """A linear layer that is computed in the type of its input, whatever the type of its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]; the gradient of the weight has the weight's type."""
        return functional.linear(input, self.weight.to(input.dtype))


class _CastConv2d(nn.Conv2d):
    """The same for a convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, in, height, width] -> [B, out, height, width]."""
        return self._conv_forward(input, self.weight.to(input.dtype), None)


_CAST: dict[type, type] = {nn.Linear: _CastLinear, nn.Conv2d: _CastConv2d}


def _compute_in_the_input_type(layer: LoraLayer) -> None:
    """PEFT casts the input to the adapter's float32, and autograd keeps that copy; here the small factors are cast."""
    layer.cast_input_dtype_enabled = False  # type: ignore[assignment]
    for factors in (layer.lora_A, layer.lora_B):
        for factor in factors.values():
            if type(factor) in _CAST:  # not yet, by an adapter that was put in before
                factor.__class__ = _CAST[type(factor)]


def _check_targets(denoisers: dict[str, nn.Module], targets: Sequence[str]) -> None:
    """PEFT trains nothing, silently, for a name that matches nothing; here it is an error."""
    layers = {f".{key}" for denoiser in denoisers.values() for key in linear_layers(denoiser)}
    idle = [target for target in targets if not any(key.endswith(f".{target}") for key in layers)]
    if idle:
        found = sorted({ending for denoiser in denoisers.values() for ending in endings(denoiser)})
        raise ValueError(
            f"model.lora.targets: {', '.join(map(repr, idle))} match no linear layer of {', '.join(denoisers)}; "
            f"its layers end in {', '.join(found)}"
        )
