"""Rows with pictures to learn from, in place of samples: one picture, several of one prompt, or a chosen and a rejected one.

The pictures of a prompt form a group, which is compared like the samples of a prompt. Files are opened and checked when the
prompt file is read, and loaded when they are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flowsteer.rollout.data.files import Table
from flowsteer.rollout.data.inputs import Media, read_value

PictureKind = Literal["image", "video"]


@dataclass(frozen=True, kw_only=True)
class PictureColumns:
    """Which columns hold pictures: ``image``, perhaps with ``score``, or ``chosen`` and ``rejected``.

    Example: ``PictureColumns(chosen="best", rejected="worst", group_size=2)``.
    """

    image: str | None = None  # a path, or a list of them
    score: str | None = None  # a number for each
    chosen: str | None = None
    rejected: str | None = None
    kind: PictureKind = "image"
    group_size: int  # with 1, rows stay as they are; otherwise those of one prompt form one group

    @property
    def names(self) -> tuple[str, ...]:
        """The columns."""
        return tuple(name for name in (self.image, self.score, self.chosen, self.rejected) if name is not None)


@dataclass(frozen=True)
class Picture:
    """A picture of one row, what it is worth, and what else its row says."""

    media: Media
    score: float | None  # None where the file says nothing
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def said(self) -> list[Any]:
        """For fingerprints."""
        return [str(self.media), self.score, self.columns]


Group = tuple[Picture, ...]


def read_groups(pictures: PictureColumns, table: Table, columns: Mapping[str, Sequence[Any]]) -> tuple[Group, ...]:
    """The pictures of each row; a chosen one has the score 1, a rejected one 0.

    Args:
        pictures: which columns hold what.
        table: the file's rows.
        columns: those that each picture keeps, for rewards.

    Raises:
        ValueError: no such column; a picture or a score that is not there or cannot be read, with its row.
    """
    for key in ("image", "score", "chosen", "rejected"):
        name = getattr(pictures, key)
        if name is not None and name not in table.columns:
            raise ValueError(
                f"prompts.pictures.{key}={name}: {table.where[0].partition(',')[0]} has no such column; it has "
                f"{', '.join(table.columns) or 'none besides the prompt'}"
            )
    groups = []
    for place, where in enumerate(table.where):
        own = {name: values[place] for name, values in columns.items()}
        try:
            groups.append(_group(pictures, table, place, own))
        except (ValueError, OSError, TypeError) as error:
            raise ValueError(f"{where} (prompts.pictures): {error}") from error
    return tuple(groups)


def merged(
    groups: Sequence[Group], rows: Sequence[Hashable], where: Sequence[str], pictures: PictureColumns
) -> tuple[tuple[Group, ...], list[int]]:
    """The groups of the distinct rows, and the first place of each: rows of one prompt and equal inputs go together.

    Chosen and rejected pictures are groups already, and for groups of one nothing has to go together.

    Raises:
        ValueError: a prompt with fewer pictures than a group has, with its row.
    """
    places: dict[Hashable, list[int]] = {}
    for place, row in enumerate(rows):
        alone = pictures.image is None or pictures.group_size == 1
        places.setdefault(place if alone else row, []).append(place)
    found = tuple(tuple(picture for place in own for picture in groups[place]) for own in places.values())
    for own, group in zip(places.values(), found):
        if len(group) < pictures.group_size:
            raise ValueError(
                f"{where[own[0]]}: rollout.group_size={pictures.group_size}, but this prompt has {len(group)} picture(s); "
                "give more, in a list or in further rows of the same prompt, or set rollout.group_size to the smallest number"
            )
    return found, [own[0] for own in places.values()]


def _group(pictures: PictureColumns, table: Table, place: int, columns: Mapping[str, Any]) -> Group:
    def values(name: str) -> list[Any]:
        value = table.columns[name][place]
        return list(value) if isinstance(value, (list, tuple)) else [value]

    def read(name: str) -> list[Media]:
        return [_media(value, name, pictures.kind, table) for value in values(name)]

    if pictures.image is None:
        assert pictures.chosen is not None
        assert pictures.rejected is not None
        (chosen,), (rejected,) = _one(read(pictures.chosen), "chosen"), _one(read(pictures.rejected), "rejected")
        return Picture(chosen, 1.0, columns), Picture(rejected, 0.0, columns)
    media = read(pictures.image)
    if pictures.score is None:
        return tuple(Picture(own, None, columns) for own in media)
    scores = values(pictures.score)
    if len(scores) != len(media):
        raise ValueError(f"{len(media)} picture(s) and {len(scores)} score(s) in the column {pictures.score!r}")
    return tuple(Picture(own, _score(score, pictures.score), columns) for own, score in zip(media, scores))


def _one(media: list[Media], key: str) -> list[Media]:
    if len(media) != 1:
        raise ValueError(f"one picture is {key}, got a list of {len(media)}")
    return media


def _media(value: Any, name: str, kind: PictureKind, table: Table) -> Media:
    media = read_value(value, kind, table.folder)
    if not isinstance(media, Media):
        raise ValueError(f"the column {name!r} has no picture in this row")
    return media


def _score(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"a score is a finite number, got {value!r} in the column {name!r}")
    return float(value)
