"""Frozen weights in 8 or 4 bits: the linear layers of a denoiser, each moved to the device and quantised there.

The layers are those that diffusers quantises: all but the ones that a model keeps in float32. So a base that diffusers loads
with `HOW_IN_DIFFUSERS` has the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Quantization = Literal["int8", "fp8", "nf4"]
PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
HOW_IN_DIFFUSERS = {
    "int8": "TorchAoConfig(Int8WeightOnlyConfig())",
    "fp8": "TorchAoConfig(Float8WeightOnlyConfig())",
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)',
}


def quantize_layers(denoiser: nn.Module, kind: Quantization, *, device: torch.device | str) -> None:
    """Quantise the linear layers of a frozen network in place, and move all of it to the device.

    A layer is moved before it is quantised, so the device never holds more than the result and one layer.

    Raises:
        ValueError: the package is not installed, or it cannot compute such a layer or its gradient on the device.
    """
    _check_that_it_runs(kind, torch.device(device))
    for parent, name, layer in list(_layers(denoiser)):
        setattr(parent, name, _quantized(layer, kind, torch.device(device)))
    denoiser.to(device)


def _layers(denoiser: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers, each with its parent and its name there."""
    whole = getattr(denoiser, "_keep_in_fp32_modules", None) or []
    for path, module in denoiser.named_modules():
        for name, child in module.named_children():
            full = f"{path}.{name}" if path else name
            if any(f"{key}." in f"{full}.weight" for key in whole):
                continue
            if isinstance(child, nn.Linear) and not isinstance(child, NonDynamicallyQuantizableLinear):
                yield module, name, child


def _quantized(layer: nn.Linear, kind: Quantization, device: torch.device) -> nn.Module:
    layer.requires_grad_(False)
    if kind == "nf4":
        import bitsandbytes  # pyright: ignore[reportMissingImports]

        bias, dtype = layer.bias is not None, layer.weight.dtype
        four: Any = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=bias, compute_dtype=dtype, quant_type="nf4",
            compress_statistics=False, device="meta",
        )  # fmt: skip
        about: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False, "module": four}
        four.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, **about)
        four.bias = layer.bias
        # On some CPUs it would lay out the weights anew in the first pass without gradient, for a product that has none:
        # gradients would end there, and sampling and training would round differently.
        four.support_avx512bf16_for_cpu = False
        return four.to(device).train(layer.training)
    from torchao.quantization import (  # pyright: ignore[reportMissingImports]
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    # PEFT says for each layer that it cannot merge an adapter into it; nothing here does
    warnings.filterwarnings("ignore", message=".*instantiated without `get_apply_tensor_subclass`")
    quantize_(layer.to(device), Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    layer.weight.requires_grad_(False)
    return layer


def _check_that_it_runs(kind: Quantization, device: torch.device) -> None:
    """A layer of 64 x 64 forward and backward on the device. Raises ValueError with the reason where that fails."""
    try:
        layer = _quantized(nn.Linear(64, 64), kind, device)
        given = torch.ones(2, 64, device=device, requires_grad=True)
        layer(given).sum().backward()
        reason = None if given.grad is not None and bool(given.grad.any()) else "no gradient comes through"
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model.quantize={kind} needs the package {PACKAGES[kind]}, which is not installed; run: pip install "
            "'flowsteer[quantization]'"
        ) from error
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if reason is not None:
        raise ValueError(
            f"model.quantize={kind} does not run on {device.type} with the installed {PACKAGES[kind]} ({reason}); use another "
            f"of {', '.join(PACKAGES)}, or leave it out"
        )


def held_bytes(network: nn.Module) -> int:
    """The bytes of a network's weights as they lie in memory, the scales of quantised ones included."""
    parts = [part for weight in network.parameters() for part in stored(weight)]
    return sum(part.numel() * part.element_size() for part in parts)


def stored(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is kept as: itself, or its narrow numbers and their scales."""
    flatten = getattr(weight, "__tensor_flatten__", None)  # torchao's
    if flatten is not None:
        names, _ = flatten()
        return [part for name in names for part in stored(getattr(weight, name))]
    state: Any = getattr(weight, "quant_state", None)  # bitsandbytes'
    return [weight] if state is None else [weight, state.absmax]
