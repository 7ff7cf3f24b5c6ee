"""A small world of coloured shapes: its captions, what each of them means, and how one is drawn.

Pictures are 32x32. A caption belongs to one of GenEval's six tasks (Ghosh et al. 2023, arXiv 2310.11513):

==============  ============================================  ==========================================
task            example                                       what is asked for
==============  ============================================  ==========================================
single_object   ``a circle at the top on black``              one shape, possibly somewhere
two_object      ``a circle and a red square``                 two shapes, at most one with a colour
counting        ``three red circles on gray``                 two to four equal shapes
colors          ``a red circle at the left``                  one shape of a colour, possibly somewhere
position        ``a circle left of a blue square on white``   two shapes, one beside or above the other
color_attr      ``a red circle and a blue square``            two shapes, each of its own colour
==============  ============================================  ==========================================

A background that is not named is any one of the three, a colour that is not named any one of the six. The longest
caption has ten words. The backgrounds have no hue and the colours have full hue, so blending a shape's edge with the
background changes its strength, never its colour.

These captions are canonical: the base model and the shipped prompt files use no others. `parse_caption` also takes other
wordings of them, and two shapes that each have a colour and a relation ("a red circle left of a blue square").

Some meanings are *reserved* for evaluation: no training, of the base model or of a policy, ever draws them. What is
reserved is the scene without its background and without the order of words, so that "a circle left of a square" is
reserved together with "a square right of a circle", on every background.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np

from flowsteer.rewards.extras import need

SIZE = 32  # pixels
SHAPES = ("circle", "square", "triangle")
COLORS: dict[str, tuple[int, int, int]] = {  # RGB; hues about 60 degrees apart
    "red": (230, 40, 40),
    "yellow": (225, 215, 40),
    "green": (40, 190, 50),
    "cyan": (40, 205, 215),
    "blue": (50, 70, 230),
    "purple": (195, 50, 210),
}
BACKGROUNDS: dict[str, int] = {"black": 15, "gray": 128, "white": 240}  # the value of all three channels
PLACEMENTS = {
    "top": "at the top",
    "bottom": "at the bottom",
    "left": "at the left",
    "right": "at the right",
    "center": "in the center",
}
RELATIONS = ("left of", "right of", "above", "below")
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = {2: "two", 3: "three", 4: "four"}
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# How many meanings of each task are reserved: those with the smallest sha256. Four backgrounds each, and two orders of
# words where there are two objects, make 264 captions.
NUM_RESERVED = {"single_object": 6, "two_object": 6, "counting": 12, "colors": 12, "position": 6, "color_attr": 6}

_SUPERSAMPLE = 4
MARGIN = 1.0  # pixels between a shape and the picture's edge
_GAP = 2.0  # pixels between the bounding boxes of two shapes
RADII = {1: (5.0, 8.5), 2: (4.5, 6.5), 3: (4.0, 5.5), 4: (4.0, 5.0)}  # by number of objects, in pixels
_PLACED_RADII = (4.5, 7.0)


@dataclass(frozen=True)
class Thing:
    """One object: its shape, and its colour where it matters."""

    shape: str
    color: str | None = None

    @property
    def words(self) -> str:
        """As it is written, without its article: ``red circle``."""
        return self.shape if self.color is None else f"{self.color} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption and what it asks for. ``None`` means that anything of the world will do."""

    task: str
    text: str
    things: tuple[Thing, ...]  # all objects in the picture, in the order of the text
    relation: str | None = None  # how the first of two lies to the second, one of RELATIONS
    placement: str | None = None  # where the only object lies, one of PLACEMENTS
    background: str | None = None  # one of BACKGROUNDS

    @property
    def meaning(self) -> str:
        """The scene without background and order of words; equal for two captions that say the same."""
        things, relation = self.things, self.relation
        if relation in ("right of", "below"):
            things, relation = things[::-1], MIRRORED[relation]
        words = [thing.words for thing in things]
        if relation is None:
            words.sort()
        return "|".join([self.task, ",".join(words), relation or "", self.placement or ""])


@cache
def all_captions() -> tuple[Caption, ...]:
    """Every caption of the world, by task; 3,036 of them, each text once."""
    return tuple(
        Caption(
            task=task,
            text=_text(things, relation, placement, background),
            things=things,
            relation=relation,
            placement=placement,
            background=background,
        )
        for task in TASKS
        for things, relation, placement in _scenes(task)
        for background in (None, *BACKGROUNDS)
    )


@cache
def reserved_captions() -> tuple[Caption, ...]:
    """The captions that only evaluation may use, a fixed set; see the module's docstring."""
    return tuple(caption for caption in all_captions() if caption.meaning in _reserved_meanings())


@cache
def train_captions() -> tuple[Caption, ...]:
    """All other captions; none of them means the same as a reserved one."""
    return tuple(caption for caption in all_captions() if caption.meaning not in _reserved_meanings())


class NotACaption(ValueError):
    """A text that the world of shapes cannot verify; ``reason`` says why, in one line."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(
            f"{text!r} is not a caption of the world of shapes: {reason}. It knows the shapes {', '.join(SHAPES)}, the "
            f"colours {', '.join(COLORS)}, the backgrounds {', '.join(BACKGROUNDS)}, and sentences such as "
            "'a red circle left of a blue square on black' (`all_captions()` lists the canonical ones)"
        )
        self.reason = reason


def parse_caption(text: str) -> Caption:
    """What a text asks for.

    Case, white space, a full stop, articles and beginnings such as "a photo of" do not matter. A text that says the same
    as one of `all_captions` gives that caption. Beyond those, two shapes may each have a colour and a relation
    ("a red circle left of a blue square"), and be of one shape or one colour, as long as no object can be both of them.

    Raises
    ------
    NotACaption
        a ValueError, if the text cannot be verified; its ``reason`` says why.
    """
    caption = _by_text().get(text)
    if caption is not None:
        return caption
    key = _key(text)
    return _by_key().get(key) or _parse_pair(text, key)


def draw(caption: Caption, rng: np.random.Generator) -> np.ndarray:
    """Draw one picture of the caption: uint8 [32, 32, 3], RGB. What the caption leaves open is drawn from ``rng``.

    Raises ValueError where OpenCV is not installed.
    """
    background = caption.background or str(rng.choice(list(BACKGROUNDS)))
    colors = _pick_colors(caption, rng)
    boxes = _place(caption, rng)
    return draw_shapes(
        background, [(thing.shape, color, *box) for thing, color, box in zip(caption.things, colors, boxes)]
    )


def draw_shapes(background: str, shapes: Iterable[tuple[str, str, float, float, float]]) -> np.ndarray:
    """Draw shapes on a background: uint8 [32, 32, 3], RGB.

    Each is (shape, color, x, y, radius): its centre and half of its width, in pixels. Raises ValueError where OpenCV is
    not installed.
    """
    cv2 = need("cv2", extra="composition", what="drawing the world of shapes")
    canvas = np.full((SIZE * _SUPERSAMPLE,) * 2 + (3,), BACKGROUNDS[background], np.uint8)
    for shape, color, x, y, radius in shapes:
        _draw_shape(canvas, shape, x, y, radius, COLORS[color])
    return cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def _scenes(task: str) -> Iterator[tuple[tuple[Thing, ...], str | None, str | None]]:
    """All (things, relation, placement) of a task."""
    colored = tuple(product(SHAPES, COLORS))
    if task == "single_object":
        yield from (((Thing(shape),), None, where) for shape in SHAPES for where in (None, *PLACEMENTS))
    elif task == "colors":
        yield from (((Thing(*thing),), None, where) for thing in colored for where in (None, *PLACEMENTS))
    elif task == "counting":
        for count, shape, color in product(COUNTS, SHAPES, (None, *COLORS)):
            yield (Thing(shape, color),) * count, None, None
    elif task == "two_object":
        yield from ((pair, None, None) for pair in _pairs_with_at_most_one_color())
    elif task == "position":
        yield from ((pair, relation, None) for pair in _pairs_with_at_most_one_color() for relation in RELATIONS)
    elif task == "color_attr":
        for shapes, colors in product(permutations(SHAPES, 2), permutations(COLORS, 2)):
            yield (Thing(shapes[0], colors[0]), Thing(shapes[1], colors[1])), None, None


def _pairs_with_at_most_one_color() -> Iterator[tuple[Thing, Thing]]:
    for first, second in permutations(SHAPES, 2):
        yield Thing(first), Thing(second)
        for color in COLORS:
            yield Thing(first, color), Thing(second)
            yield Thing(first), Thing(second, color)


def _text(things: tuple[Thing, ...], relation: str | None, placement: str | None, background: str | None) -> str:
    if len(set(things)) == 1 and len(things) > 1:
        words = [COUNTS[len(things)], things[0].words + "s"]
    else:
        words = [f" {relation or 'and'} ".join(f"a {thing.words}" for thing in things)]
    if placement is not None:
        words.append(PLACEMENTS[placement])
    if background is not None:
        words.append(f"on {background}")
    return " ".join(words)


# Other wordings of the same, in a text without articles: pattern -> the word that canonical captions use.
_OPENING = re.compile(r"^(photo|photograph|picture|image|drawing)s? (of|showing) ")
_WORDINGS = (
    (re.compile(r"\bgrey\b"), "gray"),
    (re.compile(r"\bcentre\b"), "center"),
    (re.compile(r"\b(?:to|on) (left|right) of\b"), r"\1 of"),
    (re.compile(rf"\bon ({'|'.join(BACKGROUNDS)}) background$"), r"on \1"),
)
_ARTICLES = frozenset({"a", "an", "the"})
_THING = rf"(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
_PAIR = re.compile(rf"{_THING} ({'|'.join(('and', *RELATIONS))}) {_THING}(?: on ({'|'.join(BACKGROUNDS)}))?")


def _key(text: str) -> str:
    """A text without what does not change its meaning: case, white space, final full stop, articles, "a photo of"."""
    words = text.lower().strip().removesuffix(".").split()
    key = _OPENING.sub("", " ".join(word for word in words if word not in _ARTICLES))
    for pattern, word in _WORDINGS:
        key = pattern.sub(word, key)
    return key


def _parse_pair(text: str, key: str) -> Caption:
    """Two shapes that no canonical caption has together. Raises NotACaption."""
    found = _PAIR.fullmatch(key)
    if found is None:
        raise NotACaption(text, _why_not(key))
    color, shape, between, other_color, other_shape, background = found.groups()
    things = (Thing(shape, color), Thing(other_shape, other_color))
    if shape == other_shape and (None in (color, other_color) or color == other_color):
        raise NotACaption(
            text, f"one {shape} could be both of its shapes; give the two different shapes, or each a colour of its own"
        )
    relation = None if between == "and" else between
    return Caption(
        task="color_attr" if relation is None else "position",
        text=_text(things, relation, None, background),
        things=things,
        relation=relation,
        background=background,
    )


def _why_not(key: str) -> str:
    """Why a text without articles is no caption."""
    words = key.split()
    if not words:
        return "it is empty"
    unknown = [word for word in words if word not in _vocabulary()]
    if unknown:
        return f"it does not know {', '.join(map(repr, dict.fromkeys(unknown)))}"
    return (
        "it knows these words but not this sentence (one shape and where it lies, two shapes and how one lies to the "
        "other, or two to four equal shapes; the background last)"
    )


@cache
def _vocabulary() -> frozenset[str]:
    return frozenset(word for key in _by_key() for word in key.split())


@cache
def _by_key() -> dict[str, Caption]:
    return {_key(caption.text): caption for caption in all_captions()}


@cache
def _by_text() -> dict[str, Caption]:
    return {caption.text: caption for caption in all_captions()}


@cache
def _reserved_meanings() -> frozenset[str]:
    chosen: set[str] = set()
    for task, count in NUM_RESERVED.items():
        meanings = {caption.meaning for caption in all_captions() if caption.task == task}
        chosen.update(sorted(meanings, key=lambda meaning: hashlib.sha256(meaning.encode()).hexdigest())[:count])
    return frozenset(chosen)


def _pick_colors(caption: Caption, rng: np.random.Generator) -> list[str]:
    """A colour for each thing; equal shapes that are counted share theirs."""
    if caption.task == "counting":
        return [caption.things[0].color or str(rng.choice(list(COLORS)))] * len(caption.things)
    return [thing.color or str(rng.choice(list(COLORS))) for thing in caption.things]


def _place(caption: Caption, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and radius of each thing, by rejection: apart from each other, and as the caption says."""
    count = len(caption.things)
    low, high = RADII[count] if caption.placement is None else _PLACED_RADII
    while True:
        radii = rng.uniform(low, high, count)
        # the sizes of counted things differ little, so that they look alike
        if caption.task == "counting":
            radii = radii.mean() + 0.3 * (radii - radii.mean())
        centers = rng.uniform((radii + MARGIN)[:, None], (SIZE - radii - MARGIN)[:, None], (count, 2))
        if caption.placement is not None:
            centers[0] = _move_to(caption.placement, centers[0], radii[0], rng)
        if are_apart(centers, radii) and (caption.relation is None or _is_clear(caption.relation, *centers)):
            return [(float(x), float(y), float(r)) for (x, y), r in zip(centers, radii)]


def _move_to(placement: str, center: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Move a centre [2] to where the caption wants it, leaving open what it leaves open."""
    x, y = center
    near, middle = rng.uniform(radius + MARGIN, 10.5), rng.uniform(SIZE / 2 - 2, SIZE / 2 + 2, 2)
    moved = {
        "left": (near, y),
        "right": (SIZE - near, y),
        "top": (x, near),
        "bottom": (x, SIZE - near),
        "center": tuple(middle),
    }
    return np.array(moved[placement])


def are_apart(centers: np.ndarray, radii: np.ndarray) -> bool:
    """Whether no two bounding boxes come closer than the gap; centers [N, 2], radii [N]."""
    distance = np.abs(centers[:, None] - centers[None]).max(-1) - radii[:, None] - radii[None]
    np.fill_diagonal(distance, np.inf)
    return bool((distance >= _GAP).all())


def _is_clear(relation: str, first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the direction between two centres is within 40 degrees of what the relation says."""
    dx, dy = second - first
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return along > 0.77 * float(np.hypot(dx, dy))


def _draw_shape(canvas: np.ndarray, shape: str, x: float, y: float, radius: float, color: tuple[int, int, int]) -> None:
    """Fill a shape into the supersampled canvas; the radius is half of its width."""
    cv2 = need("cv2", extra="composition", what="drawing the world of shapes")
    fraction = 1 << 4  # OpenCV draws at sixteenths of a pixel
    scale = _SUPERSAMPLE * fraction
    if shape == "circle":
        center = (round(x * scale - fraction / 2), round(y * scale - fraction / 2))
        cv2.circle(canvas, center, round(radius * scale), color, -1, cv2.LINE_8, 4)
        return
    corners = {
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 1), (-1, 1)],
    }[shape]
    points = (np.array([(x, y)]) + radius * np.array(corners)) * scale - fraction / 2
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], color, cv2.LINE_8, 4)
