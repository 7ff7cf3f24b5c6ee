"""Pictures of the prompt file that a reward compares with: its source, a mask, a reference.

A reward says which of its columns are pictures, ``pictures = {"source": "image", "mask": "mask"}``, and then gets pixels under
these names, and not the paths that stand in the file:

=========  ======================================
kind       pixels of one sample
=========  ======================================
``image``  uint8 [H, W, 3] in RGB
``mask``   uint8 [H, W], grey
``video``  uint8 [T, H, W, 3] in RGB
=========  ======================================

Sizes are the files' own and may differ from row to row. A row without a picture has None. The arrays are read-only, since
the samples of a group share them.

Letters: B samples, T frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np

Kind = Literal["image", "mask", "video"]


class Picture(Protocol):
    """A picture that can be loaded; two that are equal have the same pixels."""

    def pixels(self) -> np.ndarray:
        """As the table above says."""
        ...

    def __hash__(self) -> int: ...


def pictures_of(name: str, reward: Any) -> dict[str, Kind]:
    """The columns that a reward wants as pictures, and of which kind. Raises ValueError for what is no such mapping."""
    given = getattr(reward, "pictures", None) or {}
    if not isinstance(given, Mapping) or not all(isinstance(column, str) for column in given):
        raise ValueError(f"reward {name!r}: pictures is {given!r:.200}; it must map names of columns to kinds")
    for column, kind in given.items():
        if kind not in get_args(Kind):
            raise ValueError(
                f"reward {name!r}: pictures says that {column!r} is {kind!r}; a kind is one of {', '.join(get_args(Kind))}"
            )
    return dict(given)


def pixels_of(pictures: Sequence[Picture | np.ndarray | None]) -> list[np.ndarray | None]:
    """The pixels of each; equal pictures are loaded once and share an array. Arrays stay what they are."""
    loaded: dict[Picture, np.ndarray] = {}
    found: list[np.ndarray | None] = []
    for picture in pictures:
        if picture is None or isinstance(picture, np.ndarray):
            found.append(picture)
            continue
        if picture not in loaded:
            pixels = picture.pixels()
            pixels.flags.writeable = False
            loaded[picture] = pixels
        found.append(loaded[picture])
    return found


__all__ = ["Kind", "Picture", "pictures_of", "pixels_of"]
