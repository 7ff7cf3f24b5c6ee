"""What a lifted loop needs besides latents, as rows: one row per sample.

The local variables of a prologue are of many kinds: tensors with the batch in some dimension, [negative; positive]
blocks of a batch, Python lists of samples, batch sizes, and things that are the same for all. ``find_layout`` learns
which is which by comparing the prologue at batch 2 with the prologue at batch 3; nothing else is known of a pipeline.

Letters: B samples, K blocks, T denoising steps, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowsteer.rollout.lifting.lift import ADAPTER_ADVICE
from flowsteer.rollout.types import Schedule


class UnlikeConditioning(ValueError):
    """Conditionings that cannot stand in one batch: prompts whose embeddings have different lengths, for example."""


@dataclass(frozen=True)
class Rows:
    """A tensor with ``blocks * B`` rows in dimension ``dim``.

    Block after block, as in [negative; positive]; within a block, each sample may have several rows (``inner``), one after the
    other, as the frames of a video.
    """

    dim: int
    blocks: int  # rows of a sample in all
    inner: int = 1  # rows of a sample that stand together

    def take(self, value: Tensor, index: Tensor, size: int) -> Tensor:
        """The rows ``index`` of each block; ``size`` is B."""
        outer, inner = torch.arange(self.blocks // self.inner), torch.arange(self.inner)
        rows = (outer[:, None, None] * size + index[:, None]) * self.inner + inner  # [blocks, samples, inner]
        return value.index_select(self.dim, rows.flatten().to(value.device))

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """Block by block, the values' rows one after the other."""
        blocks = self.blocks // self.inner
        parts = [value.chunk(blocks, self.dim) for value in values]
        return torch.cat([part[block] for block in range(blocks) for part in parts], self.dim)

    def shape(self, value: Any, size: int) -> Any:
        """What must be equal for two values to join; None where the value does not have ``size`` rows."""
        if not isinstance(value, Tensor) or value.dim() <= self.dim or value.shape[self.dim] != size * self.blocks:
            return None
        return value.dtype, value.shape[: self.dim], value.shape[self.dim + 1 :]

    def ordered(self, alone: Sequence[Any], together: Any) -> Rows:
        """The same with the order of its rows, from the values of two rows by themselves and of both in one batch."""
        shapes = {self.shape(one, 1) for one in alone} | {self.shape(together, 2)}
        if self.blocks == 1 or len(shapes) > 1 or None in shapes:
            return self

        def distance(layout: Rows) -> float:
            taken = [layout.take(together, torch.tensor([row]), 2).float() for row in (0, 1)]
            return sum((own - one.float()).abs().sum().item() for own, one in zip(taken, alone))

        orders = [replace(self, inner=inner) for inner in range(2, self.blocks + 1) if self.blocks % inner == 0]
        best = min(orders, key=distance)
        # far closer, not just closer: some values hold noise that a batch draws otherwise
        return best if distance(best) < 0.1 * distance(self) else self


@dataclass(frozen=True)
class ListRows:
    """A list (or tuple) of ``blocks * B`` entries, block after block."""

    blocks: int

    def take(self, value: Sequence, index: Tensor, size: int) -> Sequence:
        """The entries ``index`` of each block."""
        rows = index.tolist()
        return _like(value, [value[row + block * size] for block in range(self.blocks) for row in rows])

    def join(self, values: Sequence[Sequence]) -> Sequence:
        """Block by block, the values' entries one after the other."""
        sizes = [len(value) // self.blocks for value in values]
        joined = [
            entry
            for block in range(self.blocks)
            for value, size in zip(values, sizes)
            for entry in value[block * size : (block + 1) * size]
        ]
        return _like(values[0], joined)

    def shape(self, value: Any, size: int) -> Any:
        """Entries may differ in shape: the pipeline takes them apart itself."""
        return list if isinstance(value, (list, tuple)) and len(value) == size * self.blocks else None


@dataclass(frozen=True)
class Count:
    """An int that is ``blocks * B``."""

    blocks: int

    def take(self, value: int, index: Tensor, size: int) -> int:
        """How many were taken."""
        return len(index) * self.blocks

    def join(self, values: Sequence[int]) -> int:
        """How many there are together."""
        return sum(values)

    def shape(self, value: Any, size: int) -> Any:
        """All counts join."""
        return int if value == size * self.blocks else None


@dataclass(frozen=True)
class Nested:
    """A list, tuple or dict of fixed length, some of whose entries carry rows."""

    inner: Mapping[Any, Any]  # key or place -> layout

    def take(self, value: Any, index: Tensor, size: int) -> Any:
        """Each entry that carries rows is taken from, the others stay."""
        return self._map(value, lambda layout, key: layout.take(value[key], index, size))

    def join(self, values: Sequence[Any]) -> Any:
        """Each entry that carries rows is joined, the others stay the first's."""
        return self._map(values[0], lambda layout, key: layout.join([value[key] for value in values]))

    def shape(self, value: Any, size: int) -> Any:
        """The shapes of all entries that carry rows."""
        known = (
            value.keys() if isinstance(value, dict) else range(len(value) if isinstance(value, (list, tuple)) else 0)
        )
        if not all(key in known for key in self.inner):
            return None
        shapes = tuple(layout.shape(value[key], size) for key, layout in self.inner.items())
        return None if None in shapes else shapes

    def _map(self, value: Any, change: Callable[[Any, Any], Any]) -> Any:
        changed = {key: change(layout, key) for key, layout in self.inner.items()}
        if isinstance(value, dict):
            return {**value, **changed}
        return _like(value, [changed.get(place, entry) for place, entry in enumerate(value)])


Layout = Rows | ListRows | Count | Nested
PLAIN = (int, float, str, np.ndarray)  # values, which must be equal to be shared


def find_layout(two: Any, three: Any, name: str) -> Layout | None:
    """How a value carries the batch, from its two forms at batch 2 and 3; None where it is the same for all.

    Raises ValueError where the two forms have nothing to do with each other.
    """
    if isinstance(two, Tensor) and isinstance(three, Tensor) and two.dim() == three.dim():
        differing = [dim for dim in range(two.dim()) if two.shape[dim] != three.shape[dim]]
        if not differing:
            return None
        blocks = _blocks(two.shape[differing[0]], three.shape[differing[0]])
        if len(differing) == 1 and blocks:
            return Rows(differing[0], blocks)
    elif isinstance(two, dict) and isinstance(three, dict) and two.keys() == three.keys():
        return _nested({key: find_layout(two[key], three[key], f"{name}[{key!r}]") for key in two})
    elif isinstance(two, (list, tuple)) and type(two) is type(three):
        if len(two) == len(three):
            return _nested({k: find_layout(a, b, f"{name}[{k}]") for k, (a, b) in enumerate(zip(two, three))})
        blocks = _blocks(len(two), len(three))
        if blocks:
            return ListRows(blocks)
    elif isinstance(two, int) and isinstance(three, int):
        blocks = _blocks(two, three)
        if two == three or blocks:
            return Count(blocks) if blocks else None
    elif type(two) is type(three) and (not isinstance(two, PLAIN) or same(two, three)):
        return None  # an object with a state of its own, such as a scheduler, stands for all rows
    raise ValueError(
        f"the pipeline's local {name} is {_describe(two)} for two prompts and {_describe(three)} for three: no dimension "
        f"of it counts the prompts; {ADAPTER_ADVICE}"
    )


def _like(value: Sequence[Any], entries: list[Any]) -> Sequence[Any]:
    return tuple(entries) if isinstance(value, tuple) else entries


def _blocks(two: int, three: int) -> int:
    """K where the sizes are 2K and 3K, else 0."""
    blocks = three - two
    return blocks if blocks > 0 and two == 2 * blocks else 0


def _nested(found: dict[Any, Layout | None]) -> Nested | None:
    inner = {key: layout for key, layout in found.items() if layout is not None}
    return Nested(inner) if inner else None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple, dict)) else repr(value)


class Attribute(NamedTuple):
    """The key of something that a prologue set on the pipeline itself, ``self.name``; locals have their name as the key."""

    name: str

    def __str__(self) -> str:
        return f"self.{self.name}"


Key = str | Attribute


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the lifted loop needs besides latents, for B samples.

    ``values`` holds the prologue's locals by name, and by `Attribute` what it set on the pipeline.
    Rows are taken and joined by ``layout``; what has no layout is the same for all rows.
    """

    schedule: Schedule
    latent_shape: tuple[int, ...]  # X
    latent_dtype: torch.dtype  # what the pipeline starts its own loop with
    size: int  # B
    values: Mapping[Key, Any]
    layout: Mapping[Key, Layout]
    items: tuple[Any, ...]  # T, what the pipeline's loop iterates over, mostly (i, timestep)
    alone: bool = False  # the pipeline takes one row at a time: B is 1
    stepped: Tensor | None = None  # [N], where the latents stand in a sample's state, if a step takes a part of it
    rest: Tensor | None = None  # [B, *], that state, whose other places stay as they are
    base: Tensor | None = None  # [B, *X], what sampling starts from besides noise, such as a picture; None is nothing
    gain: Tensor | float = 1.0  # [*X] or one number: sampling starts from base + gain * noise
    noise_names: frozenset[Key] = frozenset()  # values [B, *X] that are this noise, for the loop to use again
    start_names: frozenset[Key] = frozenset()  # values [B, *X] that are what sampling starts from, likewise
    # of several states (picture and sound) that make up the latents; () is one
    shapes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name, layout in self.layout.items():
            if name in self.values and layout.shape(self.values[name], self.size) is None:
                raise ValueError(
                    f"the pipeline's local {name} is {_describe(self.values[name])} for {self.size} prompts; after "
                    f"probing with two and three prompts {layout} was expected"
                )

    def __len__(self) -> int:
        return self.size

    def start(self, noise: Tensor) -> tuple[Tensor, Conditioning]:
        """The latents with which the loop begins, from standard normal noise, [B, *X] -> [B, *X], and the same rows with it."""
        if noise.shape != (self.size, *self.latent_shape):
            raise ValueError(f"noise {list(noise.shape)} for {self.size} rows of latents {list(self.latent_shape)}")
        gain = self.gain.to(noise) if isinstance(self.gain, Tensor) else self.gain
        latents = noise if self.base is None else self.base.to(noise) + gain * noise
        own = {key: noise.to(self.values[key]) for key in self.noise_names}
        own |= {key: latents.to(self.values[key]) for key in self.start_names}
        return latents, replace(self, values={**self.values, **own}) if own else self

    def take(self, index: Sequence[int] | Tensor) -> Conditioning:
        """The rows ``index``, in that order; rows may repeat: ``take([0] * G)`` gives a group the prompt of row 0.

        Raises ValueError for a row that is not there.
        """
        rows = torch.as_tensor(index, dtype=torch.long, device="cpu").reshape(-1)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= self.size:
            raise ValueError(
                f"rows {rows.tolist()} of a conditioning with {self.size} rows; allowed are 0 to {self.size - 1}"
            )
        taken = {
            name: layout.take(self.values[name], rows, self.size)
            for name, layout in self.layout.items()
            if name in self.values
        }
        whole = {name: value[rows.to(value.device)] for name, value in self._by_row().items()}
        return replace(self, size=len(rows), values={**self.values, **taken}, **whole)

    @staticmethod
    def join(parts: Sequence[Conditioning]) -> Conditioning:
        """All rows of the parts, one part after the other.

        Raises UnlikeConditioning (a ValueError) where steps, shapes or anything that rows must share differ.
        """
        if not parts:
            raise ValueError("there is no conditioning to join; give at least one")
        first = parts[0]
        for place, other in enumerate(parts[1:], start=1):
            if unlike := difference(first, other):
                raise UnlikeConditioning(
                    f"conditioning 0 and conditioning {place} cannot stand in one batch: {unlike}; "
                    "prepare and sample these prompts one by one"
                )
        joined = {
            name: layout.join([part.values[name] for part in parts])
            for name, layout in first.layout.items()
            if name in first.values
        }
        size = sum(part.size for part in parts)
        if len(parts) == 1:
            return first
        rows = [part._by_row() for part in parts]
        whole = {name: torch.cat([own[name] for own in rows]) for name in rows[0]}
        return replace(first, size=size, values={**first.values, **joined}, **whole)

    def to(self, device: torch.device | str) -> Conditioning:
        """The same with every tensor on ``device`` (the schedule stays on the CPU)."""
        return self._changed(lambda tensor: tensor.to(device))

    def pinned(self) -> Conditioning:
        """The same with every tensor in pinned memory of the CPU."""
        return self._changed(lambda tensor: tensor.cpu().pin_memory())

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """The same with every tensor changed."""
        return replace(
            self,
            values={name: _each(value, change) for name, value in self.values.items()},
            items=tuple(_each(item, change) for item in self.items),
            **{name: change(value) for name, value in self._by_row().items()},
        )

    def _by_row(self) -> dict[str, Tensor]:
        """The fields that have a row for each sample, by name."""
        return {name: value for name, value in (("rest", self.rest), ("base", self.base)) if value is not None}


def find_layouts(two: Conditioning, three: Conditioning) -> dict[Key, Layout]:
    """Which values carry rows. Raises ValueError where two batches have nothing to do with each other."""
    some_only = sorted(map(str, two.values.keys() ^ three.values.keys()))
    if some_only:
        raise ValueError(f"{', '.join(some_only)} are there for some batch sizes only")
    found = {key: find_layout(two.values[key], three.values[key], str(key)) for key in two.values}
    return {name: rows for name, rows in found.items() if rows is not None}


def difference(a: Conditioning, b: Conditioning) -> str | None:
    """Why two conditionings cannot be joined, or None."""
    if a.latent_shape != b.latent_shape or a.latent_dtype != b.latent_dtype:
        return f"latents {a.latent_shape} {a.latent_dtype} and {b.latent_shape} {b.latent_dtype}"
    if not a.schedule.equals(b.schedule):
        return f"noise levels {a.schedule.sigma.tolist()} and {b.schedule.sigma.tolist()}"
    if a._by_row().keys() != b._by_row().keys() or not same(a.gain, b.gain):
        return "one starts from noise alone and the other does not, or from another share of noise"
    if a.values.keys() != b.values.keys() or a.layout != b.layout:
        unlike = sorted(map(str, a.values.keys() ^ b.values.keys()))
        return f"locals {unlike} are in one of them only, or carry rows differently"
    for name, value in a.values.items():
        layout, other = a.layout.get(name), b.values[name]
        if not same(value, other) if layout is None else layout.shape(value, a.size) != layout.shape(other, b.size):
            return f"{name} is {_describe(value)} and {_describe(other)}"
    return None


def same(a: Any, b: Any) -> bool:
    """Equality of what all rows share; objects that hold state of their own need only be of one type."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, PLAIN) or isinstance(b, PLAIN):
        return type(a) is type(b) and bool(a == b)
    return type(a) is type(b)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(entry, change) for key, entry in value.items()}
    return _like(value, [_each(entry, change) for entry in value]) if isinstance(value, (list, tuple)) else value
