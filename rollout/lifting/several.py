"""Rows that cannot stand in one batch, one after the other: of a pipeline that takes one row at a time.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowsteer.rollout.lifting.conditioning import Conditioning, Layout, UnlikeConditioning, difference
from flowsteer.rollout.types import Schedule


@dataclass(frozen=True, kw_only=True)
class Several:
    """Conditionings of one row each. Each sample then takes a network pass of its own.

    Example: ``Several(parts=(row, row))`` are two samples of one prompt.
    """

    parts: tuple[Conditioning, ...]  # B

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def size(self) -> int:
        """B."""
        return len(self.parts)

    @property
    def schedule(self) -> Schedule:
        """The noise levels, the same for all rows."""
        return self.parts[0].schedule

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """X."""
        return self.parts[0].latent_shape

    @property
    def latent_dtype(self) -> torch.dtype:
        """What the pipeline starts its own loop with."""
        return self.parts[0].latent_dtype

    @property
    def base(self) -> Tensor | None:
        """What the first row starts from besides noise."""
        return self.parts[0].base

    @property
    def layout(self) -> dict[str, Layout]:
        """No value carries rows."""
        return {}

    def take(self, index: Sequence[int] | Tensor) -> Several:
        """The rows ``index``, in that order; rows may repeat. Raises ValueError for a row that is not there."""
        rows = torch.as_tensor(index).reshape(-1).tolist()
        if not rows or min(rows) < 0 or max(rows) >= len(self.parts):
            raise ValueError(f"rows {rows} of {len(self.parts)}; allowed are 0 to {len(self.parts) - 1}")
        return Several(parts=tuple(self.parts[row] for row in rows))

    def start(self, noise: Tensor) -> tuple[Tensor, Several]:
        """As `Conditioning.start`."""
        started = [part.start(own) for part, own in zip(self.parts, noise.split(1), strict=True)]
        return torch.cat([latents for latents, _ in started]), Several(parts=tuple(part for _, part in started))

    def each(self, latents: Tensor) -> Iterator[tuple[Tensor, Conditioning]]:
        """The latents [1, *X] of each row, and the row."""
        if len(latents) != len(self.parts):
            raise ValueError(f"{len(latents)} latents for {len(self.parts)} rows")
        return zip(latents.split(1), self.parts)

    def to(self, device: torch.device | str) -> Several:
        """The same with every tensor on ``device`` (the schedule stays on the CPU)."""
        return Several(parts=tuple(part.to(device) for part in self.parts))


Prepared = Conditioning | Several


def join(rows: Sequence[Conditioning]) -> Prepared:
    """The rows as one conditioning, or as `Several` where their pipeline takes one at a time.

    Raises UnlikeConditioning (a ValueError) where they share neither latents nor steps, or cannot stand in one batch.
    """
    if not rows or not rows[0].alone:
        return Conditioning.join(rows)
    first = rows[0]
    for place, other in enumerate(rows[1:], start=1):
        if first.latent_shape != other.latent_shape or not first.schedule.equals(other.schedule):
            raise UnlikeConditioning(f"conditioning 0 and conditioning {place} differ: {difference(first, other)}")
    return Several(parts=tuple(rows))
