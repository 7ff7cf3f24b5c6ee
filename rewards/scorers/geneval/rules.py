"""GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513, ``evaluate_images.py``) as functions of what was detected.

The original answers yes or no. Here each comparison gives a number in [0, 1] that is 1 exactly when GenEval is content
with it, so one pass gives both scores, as in `flowsteer.rewards.scorers.composition`:

``graded``  0.8 times the mean of the comparisons plus 0.2 times ``strict``: something to climb from the start.
``strict``  1 if GenEval's rules call the image correct, 0 otherwise. Claim this one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

POSITION_MARGIN = 0.1  # of both objects' sizes: how far centres must differ at least to lie beside one another
POSITION_COSINE = 0.5  # 60 degrees around the named direction
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # rightwards, downwards


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One object in an image."""

    box: Box
    confidence: float
    color: str | None = None  # one of COLORS; None where nobody looked


@dataclass(frozen=True, kw_only=True)
class Clause:
    """One entry of ``include`` or ``exclude``: so many objects of a class, perhaps of a colour, perhaps beside others."""

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None  # relation, and the place in ``include`` of the objects that it relates to


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a prompt asks for."""

    include: tuple[Clause, ...]  # at least as many, each
    exclude: tuple[Clause, ...]  # fewer than as many, each
    counting: bool


def read_metadata(include: Any, exclude: Any, tag: Any, *, names: Sequence[str]) -> Metadata | None:
    """A row of GenEval's metadata; None where it includes nothing.

    Args:
        include: as ``[{"class": "bench", "count": 2, "color": "red", "position": ["left of", 0]}]``.
        exclude: likewise, or None.
        tag: the task, of which only ``counting`` has rules of its own; or None.
        names: the classes that can be detected.

    Raises:
        ValueError: metadata of another form, or a class, colour or relation that does not exist.
    """
    if not include:
        return None
    for given in (include, exclude or []):
        if not isinstance(given, list | tuple):
            raise ValueError(f"geneval cannot read {given!r}; include and exclude are lists of objects")
    return Metadata(
        include=tuple(_clause(clause, place, names) for place, clause in enumerate(include)),
        exclude=tuple(_clause(clause, 0, names) for clause in exclude or ()),
        counting=tag == "counting",
    )


def judge(wanted: Metadata, objects: Mapping[str, Sequence[Detection]]) -> dict[str, float]:
    """Compare what was found with what is wanted.

    Args:
        wanted: the prompt's metadata.
        objects: by class, the surest first; coloured where a clause names a colour.

    Returns:
        ``graded`` and ``strict``.
    """
    groups = [list(objects.get(clause.name, ()))[: clause.count] for clause in wanted.include]
    comparisons = []
    for clause, group in zip(wanted.include, groups):
        comparisons.append(len(group) / clause.count)
        if clause.color is not None:
            comparisons.append(sum(found.color == clause.color for found in group) / clause.count)
        if clause.position is not None:
            relation, target = clause.position
            pairs = [_place_credit(relation, found.box, other.box) for found in group for other in groups[target]]
            comparisons.append(sum(pairs) / len(pairs) if pairs else 0.0)
    for clause in wanted.exclude:
        excess = max(0, len(objects.get(clause.name, ())) - clause.count + 1)
        comparisons.append(max(0.0, 1 - excess / clause.count))
    strict = float(all(value == 1 for value in comparisons))
    return {"graded": 0.8 * sum(comparisons) / len(comparisons) + 0.2 * strict, "strict": strict}


def relations(box: Box, other: Box) -> set[str]:
    """Where the first box lies as seen from the second: none to two of RELATIONS."""
    along, distance = _offset(box, other)
    # what is left of the distance in each axis after both objects' margins
    apart = [
        math.copysign(max(abs(part) - POSITION_MARGIN * (_extent(box, axis) + _extent(other, axis)), 0), part)
        for axis, part in enumerate(along)
    ]
    if max(map(abs, apart)) < 1e-3:
        return set()
    return {
        name
        for name, direction in RELATIONS.items()
        if sum(a * b for a, b in zip(apart, direction)) / distance > POSITION_COSINE
    }


def _place_credit(relation: str, box: Box, other: Box) -> float:
    """1 where the relation holds, else up to 0.5 by how far the direction is from the named one."""
    if relation in relations(box, other):
        return 1.0
    along, distance = _offset(box, other)
    cosine = sum(a * b for a, b in zip(along, RELATIONS[relation])) / max(distance, 1e-6)
    return (cosine + 1) / 4


def _offset(box: Box, other: Box) -> tuple[tuple[float, float], float]:
    """From the centre of the second to the centre of the first, and how far that is."""
    x, y = ((box[axis] + box[axis + 2] - other[axis] - other[axis + 2]) / 2 for axis in (0, 1))
    return (x, y), math.hypot(x, y)


def _extent(box: Box, axis: int) -> float:
    return abs(box[axis + 2] - box[axis])


def _clause(given: Any, place: int, names: Sequence[str]) -> Clause:
    try:
        name, count = str(given["class"]), int(given["count"])
        color, position = given.get("color"), given.get("position")
        if position is not None:
            position = str(position[0]), int(position[1])
    except (TypeError, KeyError, ValueError, IndexError, AttributeError, OverflowError):
        raise ValueError(
            f'geneval cannot read {given!r}; a clause is an object like {{"class": "bench", "count": 1, "color": "red", '
            '"position": ["left of", 0]}, of which color and position may lack'
        ) from None
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise ValueError(f"geneval cannot detect {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    if count < 1:
        raise ValueError(f"geneval counts from 1, got {count} of {name!r}")
    if color is not None and color not in COLORS:
        raise ValueError(f"geneval knows the colours {', '.join(COLORS)}, got {color!r}")
    if position is not None and (position[0] not in RELATIONS or not 0 <= position[1] < place):
        raise ValueError(
            f"geneval knows the positions {', '.join(RELATIONS)} of an earlier clause, got {list(position)} in clause {place}"
        )
    return Clause(name=name, count=count, color=color, position=position)


__all__ = ["COLORS", "RELATIONS", "Box", "Clause", "Detection", "Metadata", "judge", "read_metadata", "relations"]
