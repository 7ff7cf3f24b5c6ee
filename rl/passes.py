"""How the denoisers make their passes: which blocks keep their activations, by which attention, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn
from torch.utils.checkpoint import checkpoint

MOST_GRAPHS = 256  # of one block: each policy, with and without gradients, at each shape, has a graph of its own


def set_passes(
    denoisers: Mapping[str, nn.Module],
    *,
    checkpoint_every: int | None = None,
    attention: str | None = None,
    compiled: bool = False,
) -> None:
    """Set up the networks of a pipeline for their passes.

    Args:
        denoisers: by component name.
        checkpoint_every: every so many of the repeated blocks compute their activations again in the backward pass; None: no
            block does.
        attention: one of diffusers' attention back-ends; None: torch's own choice.
        compiled: compile the repeated blocks with ``torch.compile``.

    Raises:
        ValueError: a network is not one of diffusers', or cannot do what is asked for.
    """
    asked = {
        "model.gradient_checkpointing": checkpoint_every is not None,
        "model.attention": attention is not None,
        "model.compile": compiled,
    }
    for name, denoiser in denoisers.items():
        keys = " and ".join(key for key, wanted in asked.items() if wanted)
        if keys and not isinstance(denoiser, ModelMixin):
            raise ValueError(
                f"{keys} is for diffusers' networks; {name} of model.adapter is a {type(denoiser).__name__}: leave it out, and "
                "let the network do it by itself"
            )
    for name, denoiser in denoisers.items():
        assert isinstance(denoiser, ModelMixin) or not any(asked.values())
        if checkpoint_every is not None:
            _checkpoint(denoiser, checkpoint_every)
        if attention is not None:
            _attend(name, denoiser, attention)
        if compiled:
            _compile(name, denoiser)


def attention_names() -> tuple[str, ...]:
    """The back-ends that this release of diffusers knows; whether one is installed is another question."""
    return tuple(member.value for member in AttentionBackendName)


@contextmanager
def uncompiled(compiled: bool) -> Iterator[None]:
    """Inside, compiled networks run as they are written: for a few passes whose graphs nobody needs again."""
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _checkpoint(denoiser: Any, every: int) -> None:
    places: dict[int, int] = {}  # of each block among those that can be checkpointed, in the order of their first pass

    def run(block: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        owner = getattr(block, "__self__", block)  # some networks give a block's method, a new object each time
        if places.setdefault(id(owner), len(places)) % every:
            return block(*arguments, **keywords)
        return checkpoint(block, *arguments, use_reentrant=False, **keywords)

    denoiser.enable_gradient_checkpointing(run)


def _attend(name: str, denoiser: Any, attention: str) -> None:
    if attention.startswith(("sage", "_sage")):  # it has no backward pass, and nothing would say so
        raise ValueError(
            f"model.attention={attention} is for inference: no gradient comes through it; choose another one"
        )
    if attention not in attention_names():
        raise ValueError(
            f"model.attention={attention} is not known to diffusers; it has {', '.join(attention_names())}"
        )
    if not any(hasattr(getattr(layer, "processor", None), "_attention_backend") for layer in denoiser.modules()):
        raise ValueError(
            f"model.attention={attention}: the attention of {name}, a {type(denoiser).__name__}, takes no back-end of "
            "diffusers; leave it out"
        )
    try:
        denoiser.set_attention_backend(attention)
    except (RuntimeError, ValueError, ImportError, OSError) as error:  # OSError: a kernel that cannot be fetched
        raise ValueError(f"model.attention={attention} cannot be used here by {name}: {error}") from error


def _compile(name: str, denoiser: Any) -> None:
    repeated = repeated_blocks(denoiser)
    if not repeated:
        raise ValueError(
            f"model.compile compiles the repeated blocks of a network, and {name}, a {type(denoiser).__name__}, names none; "
            "leave it out"
        )
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = MOST_GRAPHS
    for block in repeated:
        # each shape has its own graph: a graph for all shapes would give other bits to a shape that was compiled before
        block.compile(fullgraph=True, dynamic=False)


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks that a network of diffusers repeats: what it names for compilation, or else for placement."""
    names = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or ()
    return [module for module in denoiser.modules() if type(module).__name__ in names]
