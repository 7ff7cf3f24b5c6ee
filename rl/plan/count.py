"""Live bytes of a pass, counted under fake tensors: what a forward pass keeps, and what a backward pass takes besides.

A network of many equal blocks is counted with one and two blocks of each kind; what it keeps is linear in their number, and
what a single block needs beside it does not depend on it. The same holds for the rows of a batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowsteer.rl.plan.files import ModelFiles, read_model
from flowsteer.rl.plan.inputs import Shapes, shapes_of
from flowsteer.rl.plan.networks import build, cast_to, lengths, make_fake, shorten, with_lora


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that come into being inside of it and are still there."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}
        for tensor in known:  # weights, gradients and inputs are other parts
            self._add(tensor, counts=False)

    def _add(self, tensor: Tensor, *, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if counts else 0
        self._seen[key] = weakref.finalize(storage, self._gone, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what the operation makes."""
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return made


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Bytes of one pass."""

    kept: float  # after the forward pass, for the backward pass
    beside: float  # at most, on top of it, while the backward pass runs
    sampling: float  # at most, of a forward pass without a gradient


def count_pass(
    model: ModelFiles,
    shapes: Shapes,
    *,
    dtype: torch.dtype,
    lora: tuple[int, tuple[str, ...] | str] | None,
    checkpointing: bool,
    rows: int,
    counts: Sequence[int] | None = None,
    sampling: bool = True,
) -> Pass:
    """Count a forward and a backward pass of a batch, and a forward pass without a gradient.

    Args:
        model: whose first denoiser is asked.
        shapes: of its inputs.
        dtype: of the weights.
        lora: rank and targets, None to train all weights.
        checkpointing: of every block.
        rows: of the batch.
        counts: how many blocks of each kind are kept; None keeps all.
        sampling: count the pass without a gradient, too.
    """
    network: Any = build(model.components[model.denoisers[0]])
    if counts is not None:
        shorten(network, counts)
    cast_to(network, dtype)
    if lora is None:
        network.requires_grad_(True)
    else:
        with_lora(network, *lora, shortened=counts is not None)
    if checkpointing:
        network.enable_gradient_checkpointing()
    network.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(network)
        for parameter in network.parameters():
            if parameter.requires_grad:  # as in any but the first pass of an update
                parameter.grad = torch.empty_like(parameter)
        arguments = shapes.call(rows, dtype)
        known = [
            *network.parameters(),
            *network.buffers(),
            *(parameter.grad for parameter in network.parameters() if parameter.grad is not None),
            *(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)),
        ]
        with LiveBytes(known) as live:
            velocity = _velocity(network, arguments)
            kept, live.peak = live.now, live.now
            velocity.float().square().mean().backward()
            beside = live.peak - kept
        drawn = 0
        if sampling:
            with LiveBytes(known) as live, torch.no_grad():
                velocity = _velocity(network, arguments)
                drawn = live.peak
        del velocity
    return Pass(kept=kept, beside=beside, sampling=drawn)


def _velocity(network: nn.Module, arguments: dict[str, Any]) -> Tensor:
    out = network(**arguments, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes of passes of any number of rows: fixed, and for each row."""

    fixed: Pass
    per_row: Pass

    def at(self, rows: float) -> Pass:
        """Of a batch of so many rows."""
        return Pass(
            **{
                name: max(getattr(self.fixed, name), 0) + rows * getattr(self.per_row, name)
                for name in ("kept", "beside", "sampling")
            }
        )


@cache
def activations(
    model_path: str,
    height: int | None,
    width: int | None,
    call: tuple[tuple[str, Any], ...],
    dtype: torch.dtype,
    lora: tuple[int, tuple[str, ...] | str] | None,
    checkpointing: bool,
) -> Activations:
    """Of a model's denoiser at a size, from passes through shortened networks of one and of two rows."""
    model = read_model(model_path)
    shapes = shapes_of(model, height=height, width=width, call=dict(call))
    whole = lengths(build(model.components[model.denoisers[0]]))

    def count(rows: int, counts: Sequence[int], sampling: bool) -> Pass:
        return count_pass(
            model,
            shapes,
            dtype=dtype,
            lora=lora,
            checkpointing=checkpointing,
            rows=rows,
            counts=counts,
            sampling=sampling,
        )

    one, two = (extrapolated(lambda c, s, r=rows: count(r, c, s), whole) for rows in (1, 2))
    per_row = {name: getattr(two, name) - getattr(one, name) for name in ("kept", "beside", "sampling")}
    fixed = {name: getattr(one, name) - per_row[name] for name in per_row}
    return Activations(fixed=Pass(**fixed), per_row=Pass(**per_row))


def extrapolated(count: Callable[[Sequence[int], bool], Pass], whole: Sequence[int]) -> Pass:
    """A pass through the whole network, from passes with one block of each kind and with one more of each in turn.

    The backward pass goes through the kinds from the last to the first. When it comes to a kind, what the later ones kept is
    free again: passes without the earlier kinds say what each of them needs beside it.
    """
    kinds = range(len(whole))
    first = count([1 for _ in kinds], True)
    if max(whole, default=1) == 1:  # a U-Net: no two blocks are alike
        return first
    more = {kind: count([1 + (own == kind) for own in kinds], False) for kind in kinds if whole[kind] > 1}
    slopes = [more[kind].kept - first.kept if kind in more else 0.0 for kind in kinds]
    needed = []
    for kind in kinds:
        if kind == 0:
            beside = max(first.beside, more[kind].beside if kind in more else 0.0)
        else:  # two, so that one of them hands a gradient on
            beside = count(
                [0 if own < kind else min(2, whole[own]) if own == kind else 1 for own in kinds], False
            ).beside
        needed.append(beside - sum((whole[later] - 1) * slopes[later] for later in kinds if later > kind))
    kept = first.kept + sum((number - 1) * slope for number, slope in zip(whole, slopes))
    return Pass(kept=kept, beside=max(needed), sampling=first.sampling)


@cache
def decoding(
    model_path: str,
    height: int | None,
    width: int | None,
    call: tuple[tuple[str, Any], ...],
    dtype: torch.dtype,
    tiling: bool,
) -> int:
    """Bytes at most while the VAE decodes one sample; 0 where the pipeline has none."""
    model = read_model(model_path)
    if "vae" not in model.components:
        return 0
    shapes = shapes_of(model, height=height, width=width, call=dict(call))
    vae: Any = build(model.components["vae"])
    cast_to(vae, dtype)
    if tiling and hasattr(vae, "enable_tiling"):
        vae.enable_tiling()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        make_fake(vae)
        latents = torch.empty(1, *shapes.decoded, dtype=dtype)
        with LiveBytes([*vae.parameters(), *vae.buffers(), latents]) as live:
            vae.decode(latents, return_dict=False)
            return live.peak
