"""Sheets of an evaluation's pictures, cut into single ones again, and pictures as they stand in the page.

A picture of a sheet is a list of its frames: one, or those of a video.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from flowsteer.rl.films import webp

_GRID_COLUMNS = 12  # of `evaluate.image_grid`
_MAX_WIDTH = 1800  # pixels; wider pictures are reduced, or the page would weigh tens of megabytes


def sheets_of(picture: Path) -> list[Image.Image]:
    """The sheet of an evaluation; of videos the frames of the moving one beside it, which know how long they are shown."""
    moving = picture.with_suffix(".webp")
    if not moving.exists():
        return [read_picture(picture)]
    try:
        with Image.open(moving) as film:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(film)]
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{moving} is not a film that can be read: {error}") from None


def cut_films(films: Sequence[list[Image.Image]], count: int) -> list[list[list[Image.Image]]] | None:
    """Of each moving sheet its ``count`` pictures, each as its frames; None where `cut_grids` has none."""
    cut = cut_grids([sheet for film in films for sheet in film], count)
    if cut is None:
        return None
    left = iter(cut)
    return [[list(frames) for frames in zip(*(next(left) for _ in film))] for film in films]


def cut_grids(sheets: Sequence[Image.Image], count: int) -> list[list[Image.Image]] | None:
    """Each sheet of `evaluate.image_grid` as its ``count`` pictures, without the gutters; None where it is no such sheet."""
    columns = min(_GRID_COLUMNS, count)
    lines = math.ceil(count / columns)
    width, height = sheets[0].width // columns, sheets[0].height // lines
    if any(sheet.size != (width * columns, height * lines) for sheet in sheets):
        return None
    white = np.stack([np.asarray(sheet) for sheet in sheets]).min((0, 3)) == 255  # [lines * height, columns * width]
    right = _trailing(white.all(0).reshape(columns, width).all(0))
    below = _trailing(white.all(1).reshape(lines, height).all(0))
    corners = [((place % columns) * width, (place // columns) * height) for place in range(count)]
    return [
        [sheet.crop((left, top, left + width - right, top + height - below)) for left, top in corners]
        for sheet in sheets
    ]


def _trailing(flags: np.ndarray) -> int:
    """How many flags at the end are set; 0 if all are."""
    unset = np.flatnonzero(~flags)
    return len(flags) - 1 - int(unset[-1]) if len(unset) else 0


def embed_tile(frames: Sequence[Image.Image], width: int) -> str:
    """A picture, or the frames of a video, as a data URI, reduced to at most ``width`` pixels."""
    if len(frames) == 1:
        return embed(frames[0], width)
    small = [_reduced(frame, width) for frame in frames]
    data = webp(small, [frame.info["duration"] for frame in frames])
    return f"data:image/webp;base64,{base64.b64encode(data).decode('ascii')}"


def embed(picture: Image.Image, width: int = _MAX_WIDTH) -> str:
    """PNG as a data URI, reduced to at most ``width`` pixels."""
    file = io.BytesIO()
    _reduced(picture, width).save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _reduced(picture: Image.Image, width: int) -> Image.Image:
    if picture.width <= width:
        return picture
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def read_picture(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not a picture that can be read: {error}") from None


__all__ = ["cut_films", "cut_grids", "embed", "embed_tile", "read_picture", "sheets_of"]
