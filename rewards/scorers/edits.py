"""Edits in the world of shapes: a picture, an instruction, and the picture that it asks for.

Pictures are those of ``flowsteer.rewards.scorers.world``, 32x32, with one to three shapes whose (shape, colour) all differ, so
that an instruction names one of them without doubt:

=======  ==========================================  ==============================================
kind     example                                     what is asked for
=======  ==========================================  ==============================================
recolor  ``make the red circle blue``                another colour
reshape  ``turn the red circle into a square``       another shape, as wide and in the same place
remove   ``remove the red circle``                   one shape less; at least one is left
add      ``add a red circle``                        one shape more, anywhere; three at the most
=======  ==========================================  ==============================================

Everything else stays as it was: the other shapes, their places and sizes, and the background.

One meaning in ten is *reserved* for evaluation: no training, of the base model or of a policy, ever draws it. A meaning is the
instruction together with the shapes and colours that are in the picture, without their places and without the background.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flowsteer.rewards.scorers.world import (
    BACKGROUNDS,
    COLORS,
    MARGIN,
    RADII,
    SHAPES,
    SIZE,
    Thing,
    are_apart,
    draw_shapes,
)

Kind = Literal["recolor", "reshape", "remove", "add"]
KINDS: tuple[Kind, ...] = ("recolor", "reshape", "remove", "add")
MAX_THINGS = 3
NUM_THINGS_SHARE = {1: 0.2, 2: 0.5, 3: 0.3}  # how often a picture has so many shapes before its edit
RESERVED_ONE_IN = 10


@dataclass(frozen=True)
class Placed:
    """A shape of a colour, its centre and half of its width in pixels.

    Example: ``Placed(Thing("circle", "red"), x=10.0, y=20.5, radius=5.0)``.
    """

    thing: Thing
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that is in a picture."""

    background: str  # one of BACKGROUNDS
    things: tuple[Placed, ...]

    def draw(self) -> np.ndarray:
        """The picture: uint8 [32, 32, 3], RGB. Raises ValueError where OpenCV is not installed."""
        shapes = [(str(one.thing.shape), str(one.thing.color), one.x, one.y, one.radius) for one in self.things]
        return draw_shapes(self.background, shapes)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One instruction. ``before`` is the shape that it names or None, ``after`` what it becomes or None."""

    kind: Kind
    before: Thing | None
    after: Thing | None

    @property
    def text(self) -> str:
        """The instruction: ``make the red circle blue``."""
        before, after = self.before, self.after
        if before is None:
            assert after is not None
            return f"add a {after.words}"
        if after is None:
            return f"remove the {before.words}"
        if self.kind == "recolor":
            return f"make the {before.words} {after.color}"
        return f"turn the {before.words} into a {after.shape}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture to edit, the edit, and one picture that it may become.

    Example: ``Case.expected`` of "add a red circle" to a blue square on black is ``{"background": "black", "things":
    [{"shape": "square", "color": "blue", "x": 10.0, "y": 20.5, "size": 12.0}, {"shape": "circle", "color": "red", "x":
    None, "y": None, "size": None}]}``.
    """

    source: Scene
    edit: Edit
    target: Scene  # where an added shape lies is one possibility

    @property
    def meaning(self) -> str:
        """The instruction and what is in the picture, without places and background."""
        return meaning(self.edit, [one.thing for one in self.source.things])

    @property
    def expected(self) -> dict[str, Any]:
        """What a reward looks for, in pixels; an added shape may lie anywhere: its place and its size are None."""
        things = [
            {"shape": one.thing.shape, "color": one.thing.color}
            | (
                dict.fromkeys(("x", "y", "size"))
                if self.edit.before is None and one.thing == self.edit.after
                else {"x": round(one.x, 2), "y": round(one.y, 2), "size": round(2 * one.radius, 2)}
            )
            for one in self.target.things
        ]
        return {"background": self.target.background, "things": things}


def all_things() -> tuple[Thing, ...]:
    """The 18 shapes of a colour."""
    return tuple(Thing(shape, color) for shape in SHAPES for color in COLORS)


def edits_of(things: Sequence[Thing], kind: Kind) -> Iterator[Edit]:
    """All edits of a kind that a picture with these shapes allows; no two shapes become the same."""
    if kind == "add":
        if len(things) < MAX_THINGS:
            yield from (Edit(kind=kind, before=None, after=new) for new in all_things() if new not in things)
        return
    for before in things:
        if kind == "remove":
            if len(things) > 1:
                yield Edit(kind=kind, before=before, after=None)
        elif kind == "recolor":
            others = (Thing(before.shape, color) for color in COLORS if color != before.color)
            yield from (Edit(kind=kind, before=before, after=after) for after in others if after not in things)
        else:
            others = (Thing(shape, before.color) for shape in SHAPES if shape != before.shape)
            yield from (Edit(kind=kind, before=before, after=after) for after in others if after not in things)


def meaning(edit: Edit, things: Sequence[Thing]) -> str:
    """The instruction and the shapes of the picture that it is given for."""
    return f"{edit.text}|{','.join(sorted(thing.words for thing in things))}"


def is_reserved(meaning: str) -> bool:
    """Whether only evaluation may use it: the sha256 of one in ten is divisible by ten."""
    return int(hashlib.sha256(meaning.encode()).hexdigest(), 16) % RESERVED_ONE_IN == 0


def sample_case(rng: np.random.Generator, *, reserved: bool, kind: Kind | None = None) -> Case:
    """Draw a case at random; the four kinds are equally frequent unless one is given."""
    while True:
        chosen = KINDS[rng.integers(len(KINDS))] if kind is None else kind
        count = int(rng.choice(list(NUM_THINGS_SHARE), p=list(NUM_THINGS_SHARE.values())))
        kinds = all_things()
        things = [kinds[place] for place in rng.choice(len(kinds), count, replace=False)]
        allowed = [edit for edit in edits_of(things, chosen) if is_reserved(meaning(edit, things)) == reserved]
        if allowed:
            return place_case(things, allowed[rng.integers(len(allowed))], rng)


def place_case(things: Sequence[Thing], edit: Edit, rng: np.random.Generator) -> Case:
    """Draw places, sizes and a background; there is room for what is added."""
    background = str(rng.choice(list(BACKGROUNDS)))
    added = [edit.after] if edit.before is None and edit.after is not None else []
    placed = [Placed(thing, *box) for thing, box in zip([*things, *added], _boxes(len(things) + len(added), rng))]
    source = Scene(background=background, things=tuple(placed[: len(things)]))
    target = edited(Scene(background=background, things=tuple(placed)), edit)
    return Case(source=source, edit=edit, target=target)


def edited(scene: Scene, edit: Edit) -> Scene:
    """The scene after an edit, everything where it was; what is added lies in it already."""
    things = []
    for one in scene.things:
        if one.thing != edit.before:
            things.append(one)
        elif edit.after is not None:
            things.append(Placed(edit.after, one.x, one.y, one.radius))
    return Scene(background=scene.background, things=tuple(things))


def spoiled(case: Case, rng: np.random.Generator) -> Scene:
    """A wrong target, as pairs that models made often have: nothing was done, something else was, or something more.

    The three are equally frequent. What is done instead or besides is another colour, another shape or a removal; done besides,
    it may undo the edit.
    """
    fault = rng.integers(3)
    if fault == 0:
        return case.source
    scene = case.source if fault == 1 else case.target
    things = [one.thing for one in scene.things]
    others = [edit for kind in KINDS if kind != "add" for edit in edits_of(things, kind) if edit != case.edit]
    return edited(scene, others[rng.integers(len(others))])


def _boxes(count: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and radius of each shape, by rejection: apart from each other."""
    while True:
        radii = rng.uniform(*RADII[count], count)
        centers = rng.uniform((radii + MARGIN)[:, None], (SIZE - radii - MARGIN)[:, None], (count, 2))
        if are_apart(centers, radii):
            return [(float(x), float(y), float(r)) for (x, y), r in zip(centers, radii)]


__all__ = [
    "KINDS",
    "MAX_THINGS",
    "Case",
    "Edit",
    "Kind",
    "Placed",
    "Scene",
    "all_things",
    "edited",
    "edits_of",
    "is_reserved",
    "meaning",
    "place_case",
    "sample_case",
    "spoiled",
]
