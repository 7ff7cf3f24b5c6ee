"""Does a row that is encoded in a batch depend on its company? A run may encode several prompts at once only where it does not.

The last bits of a network pass depend on the batch's size, so that stays the same always. On some processors they depend on a
row's place in it, and then a row always has the same place, by its text. They must not depend on what stands beside a row: a
sample depends neither on its batch nor on the number of processes, and a resumed run draws what the unbroken one would.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flowsteer.rollout.data.prompts import Row
from flowsteer.rollout.lifting.conditioning import Conditioning, Key, difference, same

TOGETHER = 8
"""Prompts that a run encodes at once: few enough for the hidden states of a large encoder, many enough to fill it."""
_LANES = 16  # float32 numbers in the widest vector of a CPU
_TEXTS = ("a", "a red circle and a blue one")  # of unlike lengths, in few tokens


@dataclass(frozen=True, kw_only=True)
class Company:
    """How rows of a signature may be encoded together."""

    reason: str = ""  # why one by one; empty if together
    anywhere: bool = False  # a row has the same bits at every place of a batch, not just at its own

    def batches(self, rows: Sequence[Row], size: int) -> Iterator[tuple[list[Row], dict[int, Row]]]:
        """Batches of ``size`` rows, as few as may be: what is encoded, and the places whose result is to be kept.

        Empty places are filled with one of the batch's rows. What comes out there may have other bits, and is dropped.
        """
        waiting: dict[int, list[Row]] = {}
        for number, row in enumerate(rows):
            waiting.setdefault(number % size if self.anywhere else place_of(row, size), []).append(row)
        while any(waiting.values()):
            batch = {place: own.pop(0) for place, own in waiting.items() if own}
            yield [batch.get(place, next(iter(batch.values()))) for place in range(size)], batch


def _mixed_by_vectors(networks: Iterable[nn.Module]) -> bool:
    """Whether a vector instruction of a CPU may hold the end of one row and the beginning of the next.

    What it does with a number may then depend on its neighbour (an exponential takes another way if one of them is large).
    """
    return any(
        layer.weight.device.type == "cpu" and (layer.in_features % _LANES or layer.out_features % _LANES)
        for network in networks
        for layer in network.modules()
        if isinstance(layer, nn.Linear)
    )


def place_of(row: Row, size: int) -> int:
    """The place that a row always has, where its bits depend on it: by its text, and so the same on every process."""
    return zlib.crc32(row.text.encode()) % size


def find_company(
    batched: Callable[[Sequence[Row]], list[Conditioning]],
    alone: Callable[[Row], Conditioning],
    row: Row,
    size: int,
    *,
    ours: frozenset[Any],
    encoders: Iterable[nn.Module],
) -> Company:
    """How rows like this one may be encoded together.

    Two texts of unlike lengths tell, the same on every process. Each must get the same bits in a batch of the other and in a
    batch of its own kind, at the first and the last place, and values of the shapes that it has alone.

    Args:
        batched: prepares ``size`` rows at once.
        alone: prepares a row by itself.
        row: whose text is replaced.
        size: of the batch.
        ours: values that the sampler replaces, such as noise.
        encoders: the networks that the rows go through.
    """
    short, long = (row._replace(text=text) for text in _TEXTS)
    anywhere = True
    for own, other in ((short, long), (long, short)):
        try:
            first = batched([own, *[other] * (size - 1)])[0]
            last = batched([*[other] * (size - 1), own])[-1]
            same_kind = batched([own] * size)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a pipeline says of prompts of unlike lengths
            return Company(reason=f"{type(error).__name__}: {error}")
        if unlike := difference(alone(own), first) or difference(alone(own), last):
            return Company(reason=f"prompts of unlike lengths do not go together: {unlike}")
        keys = [key for key in first.layout if key not in ours]
        if moved := [key for key in keys if _unlike(key, first, same_kind[0]) or _unlike(key, last, same_kind[-1])]:
            return Company(reason=f"{', '.join(map(str, moved))} of a row depends on the other rows")
        anywhere = anywhere and not any(_unlike(key, same_kind[0], row) for key in keys for row in same_kind)
    if _mixed_by_vectors(encoders):
        return Company(reason=f"layers of its encoders have widths that are no multiple of {_LANES}")
    return Company(anywhere=anywhere)


def _unlike(key: Key, one: Conditioning, other: Conditioning) -> bool:
    return not same(one.values.get(key), other.values.get(key))
