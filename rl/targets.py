"""Which linear layers a LoRA trains: ``model.lora.targets: auto``, and what it finds by its names.

Pipelines name their layers alike: a block's attention is called ``attn``, ``attn1``, ``self_attention``, its feed-forward
network ``ff``, ``ffn``, ``img_mlp``, ``feed_forward``. Those of modulation, norms and embeddings are left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from flowsteer.rollout.data.prompts import Row
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.sample import prepare_rows

_BLOCK_PARTS = {"attn", "attention", "ff", "ffn", "mlp", "forward", "to"}
"""Words of names such as ``img_attn``, ``feed_forward`` and ``to_q``."""
_LEFT_ALONE = {"norm", "mod", "modulation", "adaln", "emb", "embed", "embedder", "embedding"}


def automatic_targets(
    pipeline: Pipeline, row: Row, *, num_inference_steps: int, guidance_scale: float, negative_prompt: str | None = None
) -> tuple[str, ...]:
    """The paths of the layers that a LoRA should train: attention and feed-forward layers that a gradient reaches.

    Costs a forward and a backward pass at batch 1, or two where the pipeline has two denoisers. Freezes their weights.

    Raises:
        ValueError: a denoiser has no such layer.

    Example:
        Of a Stable Diffusion 3 with two blocks ``("transformer_blocks.0.attn.to_q", ..., "transformer_blocks.1.ff.net.2")``;
        the last block's text queries lead nowhere, so ``transformer_blocks.1.attn.add_q_proj`` is not among them.
    """
    layers = {}
    for component, denoiser in pipeline.denoisers.items():
        denoiser.requires_grad_(False)
        layers |= {(component, path): module for path, module in trainable(denoiser).items()}
    _check_each_has_some(pipeline, layers)
    conditioning = prepare_rows(
        pipeline,
        [row],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
    )
    called: set[tuple[str, str]] = set()
    reached: set[tuple[str, str]] = set()
    generator = torch.Generator().manual_seed(0)
    last = conditioning.schedule.num_steps - 1
    for index in dict.fromkeys((0, last, *range(last))):  # two denoisers share the steps: one the first, one the last
        noise = torch.randn((1, *conditioning.latent_shape), generator=generator)
        device = next(iter(layers.values())).weight.device
        latents, started = conditioning.start(noise.to(device, conditioning.latent_dtype))
        with ExitStack() as watched:
            for key, module in layers.items():
                watched.callback(_watch(module, key, called, reached).remove)
            velocity = pipeline.begin(latents, index, started).velocity
            if velocity.requires_grad:
                (velocity.float() * torch.randn(velocity.shape, generator=generator).to(device)).sum().backward()
        if {component for component, _ in called} >= pipeline.denoisers.keys():
            break
    # a layer that a step leaves out while its like are in use, such as one of many experts, is trained as they are
    used = {(component, like(path)) for component, path in called}
    found = reached | {key for key in layers.keys() - called if (key[0], like(key[1])) in used}
    _check_each_has_some(pipeline, found)
    return tuple(sorted({path for _, path in found}, key=_by_number))


def _check_each_has_some(pipeline: Pipeline, layers: Collection[tuple[str, str]]) -> None:
    for component, denoiser in pipeline.denoisers.items():
        if not any(own == component for own, _ in layers):
            raise ValueError(
                f"model.lora.targets=auto finds no attention or feed-forward layer that a gradient reaches in {component}; "
                f"list its layers in model.lora.targets: they end in {', '.join(endings(denoiser))}"
            )


def trainable(denoiser: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of attention and feed-forward networks in a denoiser's repeated blocks, by path."""
    linear = {path: module for path, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    return {path: module for path, module in linear.items() if _is_of_a_block(path, linear)}


def like(path: str) -> str:
    """What a layer is called in its block: ``transformer_blocks.7.attn.to_out.0`` and ``attn.to_out.0`` are one kind."""
    parts = path.split(".")
    place = next((place for place, part in enumerate(parts) if _words(part) & _BLOCK_PARTS), len(parts) - 1)
    return ".".join(parts[place:])


def summary(paths: Collection[str]) -> str:
    """How many layers of which kinds: ``attn.to_q 24, attn.to_k 24, ff.net.0.proj 24``."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(map(like, paths)).items())


def linear_layers(denoiser: nn.Module) -> list[str]:
    """The paths of all layers that a LoRA can train: linear ones and convolutions."""
    return [path for path, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def endings(denoiser: nn.Module) -> list[str]:
    """The last names of all layers that a LoRA can train, for a message."""
    parts = [path.split(".") for path in linear_layers(denoiser)]
    return sorted({".".join(names[-2:]) if names[-1].isdigit() else names[-1] for names in parts})


def _is_of_a_block(path: str, linear: Mapping[str, Any]) -> bool:
    parts = path.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    words = {word for part in parts[first:] for word in _words(part)}
    if words & _LEFT_ALONE:
        return False
    if words & _BLOCK_PARTS:
        return True
    block, _, name = path.rpartition(".")  # FLUX's single blocks: proj_mlp and its way back, proj_out
    return name == "proj_out" and f"{block}.proj_mlp" in linear


def _words(part: str) -> set[str]:
    """``attn1`` -> {"attn"}, ``adaLN_modulation`` -> {"adaln", "modulation"}."""
    return {word.rstrip("0123456789") for word in part.lower().split("_")}


def _watch(
    layer: nn.Linear, key: tuple[str, str], called: set[tuple[str, str]], reached: set[tuple[str, str]]
) -> torch.utils.hooks.RemovableHandle:
    """Note while the layer is watched whether it is called, and whether a gradient that is not zero comes back to it."""

    def note(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        called.add(key)
        output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        if output.requires_grad:
            output.register_hook(lambda gradient: reached.add(key) if gradient.any() else None)
        return output

    return layer.register_forward_hook(note)


def _by_number(path: str) -> list[tuple[bool, int, str]]:
    """Block 2 before block 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]
