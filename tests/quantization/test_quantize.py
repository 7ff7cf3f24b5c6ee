"""Quantised layers: which they are, how many bytes they hold, and that gradients come through them."""

from __future__ import annotations

import sys

import bitsandbytes
import pytest
import torch
import zoo
from torch import Tensor, nn

from flowsteer.rollout.lifting.quantize import PACKAGES, held_bytes, quantize_layers

SIZE = 256


def layer() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(SIZE, SIZE)


def plain(weight: Tensor) -> Tensor:
    """The weight that stands for a quantised one."""
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize()


class Network(nn.Module):
    """Layers of every kind that must stay as they are, and two that must not."""

    _keep_in_fp32_modules = ("time_embedder",)

    def __init__(self) -> None:
        super().__init__()
        self.time_embedder = nn.Sequential(layer())
        self.attention = nn.MultiheadAttention(8, 2)  # it reads the weights of its layer by itself
        self.conv = nn.Conv2d(2, 2, 1)
        self.blocks = nn.ModuleList([layer()])
        self.out = layer()


@pytest.mark.parametrize(
    ("kind", "bytes_per_weight"), [("int8", 1 + 5 / SIZE), ("fp8", 1 + 4 / SIZE), ("nf4", 0.5 + 4 / 64)]
)
def test_the_linear_layers_are_narrow_and_all_else_is_not(kind: str, bytes_per_weight: float) -> None:
    """A float32 scale for each row of 256, or for each 64 weights; int8 has a zero point of a byte beside it."""
    network = Network()
    before, bare = held_bytes(network), held_bytes(nn.Sequential(layer())) - 4 * SIZE
    assert bare == 4 * SIZE**2
    quantize_layers(network, kind, device="cpu")  # type: ignore[arg-type]
    assert held_bytes(network) == before - 2 * bare + 2 * SIZE**2 * bytes_per_weight
    changed = [
        path
        for path, module in network.named_modules()
        if type(getattr(module, "weight", None)) not in (nn.Parameter, type(None))
    ]
    assert changed == ["blocks.0", "out"]
    assert not any(weight.requires_grad for weight in (network.blocks[0].weight, network.out.weight))


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("fp8", 0.03), ("nf4", 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_the_same_with_and_without_gradient(kind: str, error: float, dtype: torch.dtype) -> None:
    """Also after a pass without one, when bitsandbytes would lay out its weights for products that have no gradient."""
    exact = layer().to(dtype)
    network = nn.Sequential(layer().to(dtype)).eval()
    quantize_layers(network, kind, device="cpu")  # type: ignore[arg-type]
    weight = plain(network[0].weight).float()
    assert (weight - exact.weight.float()).norm() / exact.weight.float().norm() < error
    given = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        sampled = network(given)
    trained = network(given.requires_grad_())
    assert torch.equal(sampled, trained)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(
        trained.float(), given.float() @ weight.T + exact.bias.float(), rtol=rounding, atol=3 * rounding
    )
    trained.sum().backward()
    assert given.grad is not None
    expected = weight.sum(0).expand(3, SIZE)
    torch.testing.assert_close(given.grad.float(), expected, rtol=rounding, atol=10 * rounding)


@pytest.mark.parametrize("kind", PACKAGES)
@pytest.mark.parametrize("family", [pytest.param(name, marks=[pytest.mark.slow] * (name != "wan")) for name in zoo.ZOO])
def test_every_family_predicts_alike_in_sampling_and_in_training(family: str, kind: str) -> None:
    """Two transformers, layers that are kept in float32, packed latents."""
    pipeline = zoo.lifted(family, zoo.build(family, torch.bfloat16))
    for denoiser in pipeline.denoisers.values():
        quantize_layers(denoiser, kind, device="cpu")  # type: ignore[arg-type]
        denoiser.requires_grad_(False)
        assert denoiser.dtype == torch.bfloat16  # what the pipelines ask for
    rows = pipeline.prepare(["a cat"], num_inference_steps=2, guidance_scale=zoo.ZOO[family].guided)
    noise = torch.randn((1, *rows.latent_shape), generator=torch.Generator().manual_seed(0))
    latents, rows = rows.start(noise.to(rows.latent_dtype))
    for index in range(2):
        with torch.no_grad():
            sampled = pipeline.begin(latents, index, rows).velocity
        trained = pipeline.begin(latents.requires_grad_(), index, rows).velocity
        assert trained.requires_grad
        assert torch.equal(sampled, trained)
        assert sampled.isfinite().all()


@pytest.mark.parametrize(("kind", "module"), [("int8", "torchao.quantization"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_named(kind: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=rf"model.quantize={kind} needs the package {PACKAGES[kind]}, which is not installed; run"
    ):
        quantize_layers(nn.Sequential(layer()), kind, device="cpu")  # type: ignore[arg-type]


def test_what_cannot_run_here_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: object) -> Tensor:
        raise NotImplementedError("no kernel for this device\nand a trace")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", no_kernel)
    with pytest.raises(
        ValueError, match=r"nf4 does not run on cpu with .* \(no kernel for this device\); use another of int8"
    ):
        quantize_layers(nn.Sequential(layer()), "nf4", device="cpu")
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda self, given: given.detach().requires_grad_())
    with pytest.raises(ValueError, match="no gradient comes through"):
        quantize_layers(nn.Sequential(layer()), "nf4", device="cpu")
