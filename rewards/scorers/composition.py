"""Does the picture show what its caption says? Verified from the pixels, for captions of ``flowsteer.rewards.scorers.world``.

GenEval (Ghosh et al. 2023, arXiv 2310.11513) detects objects with a segmenter and reads the answer off boxes and colours. In a
world of flat coloured shapes the same is done exactly and in a fraction of a millisecond:

1. every pixel that has a hue belongs to the nearest of the six colours; the connected regions of one colour are the objects;
2. an object's shape is the one that overlaps most with it (intersection over union), each drawn into its bounding box;
3. the objects are matched to what the caption names; number, colours, shapes, direction, place and background are compared.

Each comparison gives a number in [0, 1] that is 1 exactly when nothing is left to improve, so that one pass gives all
three scores:

``graded``    0.8 times the mean of the comparisons plus 0.2 times ``strict``: something to climb from the start.
``tolerant``  1 if all that was asked for is there, 0 otherwise; more may be there too, and borders are wide.
``strict``    1 if the picture shows exactly what the caption says, 0 otherwise. Claim this one.

Left out, because the world has none of it: overlapping objects, objects of several colours.

Letters: B samples, N objects found in all of them, M objects of one picture, W objects wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from flowsteer.rewards.extras import need
from flowsteer.rewards.scorers.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZE,
    Caption,
    NotACaption,
    Thing,
    parse_caption,
)

Score = Literal["graded", "tolerant", "strict"]

MIN_AREA = 6  # pixels; a smaller region is a speck, no object
SHAPE_OVERLAP = 0.72  # intersection over union of a clear shape
SHAPE_OVERLAP_NONE = 0.40  # of a region that is no hint of a shape
MAX_ASPECT = 1.5  # longer side over shorter side of a shape's bounding box
DIRECTION_COSINE = 0.5  # 60 degrees around the named direction, as in GenEval
NEAR_EDGE = 12.5  # pixels from the edge to the centre of an object "at the left"
NEAR_CENTER = 4.0  # pixels from the centre, in either axis
PLACE_SLOPE = 8.0  # pixels beyond these over which the credit falls to 0
BACKGROUND_SHARE = 0.93  # of the pixels beside the objects that must have the background's value
VALUE_TOLERANCE = 40.0  # of a background's value, in 0..255
CHROMA_TOLERANCE = 45.0  # of a background's distance from gray
TOLERANT = 0.6  # the credit that each comparison needs in the tolerant score

_PALETTE = np.array(list(COLORS.values()), np.float32)
_CHROMA = _PALETTE - _PALETTE.mean(1, keepdims=True)  # [6, 3], the part of a colour that is not gray
_CHROMA_NORM = np.linalg.norm(_CHROMA, axis=1)  # [6]
_GRAYS = np.array(list(BACKGROUNDS.values()), np.float32)


@dataclass(frozen=True, slots=True)
class Found:
    """One object in a picture; positions in pixels of the 32x32 picture."""

    color: str
    overlap: tuple[float, ...]  # with each of SHAPES in its bounding box, in [0, 1]
    x: float  # centre of the bounding box
    y: float
    aspect: float  # longer over shorter side
    size: float  # longer side of the bounding box

    @property
    def shape(self) -> str:
        """The shape that it overlaps most."""
        return SHAPES[int(np.argmax(self.overlap))]


class CompositionReward:
    """Scores pictures of the world of shapes; see the module's docstring.

    Pictures of any size are first brought to 32x32 by averaging. A prompt outside the world cannot be judged: its scores
    are ``None``, and `unscorable` says why. Takes about 0.25 ms per picture.

    Parameters
    ----------
    score
        which of the three parts is ``"score"``, the one that counts.

    Raises
    ------
    ValueError
        an unknown score, or OpenCV (``pip install 'flowsteer[composition]'``) is not there.
    """

    score_range = (0.0, 1.0)

    def __init__(self, score: Score = "graded") -> None:
        if score not in ("graded", "tolerant", "strict"):
            raise ValueError(f"score={score!r} is not known; use 'graded', 'tolerant' or 'strict'")
        self.score = score
        cv2 = _opencv()
        self.fingerprint = {
            "reward": "composition",
            "version": "1",
            "score": score,
            "opencv": cv2.__version__,
        }

    def unscorable(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts that cannot be judged, and why: prompt -> reason."""
        reasons = {}
        for prompt in prompts:
            try:
                parse_caption(prompt)
            except NotACaption as error:
                reasons[prompt] = error.reason
        return reasons

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]
    ) -> dict[str, list[float | None]]:
        """uint8 [B, H, W, 3] in RGB and B prompts to the parts graded, tolerant, strict and score, each in [0, 1]."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(prompts):
            raise ValueError(
                f"composition scores uint8 pictures [B, H, W, 3] with B prompts, got {images.dtype} {images.shape} "
                f"with {len(prompts)} prompts"
            )
        parts: dict[str, list[float | None]] = {"graded": [], "tolerant": [], "strict": []}
        for prompt, found, shares in zip(prompts, *find(to_world_size(images))):
            try:
                values = judge(parse_caption(prompt), found, shares)
            except NotACaption:
                values = dict.fromkeys(parts)
            for name, value in values.items():
                parts[name].append(value)
        return {"score": parts[self.score], **parts}


def judge(caption: Caption, found: Sequence[Found], shares: np.ndarray) -> dict[str, float]:
    """Compare what is in a picture with its caption.

    Parameters
    ----------
    caption
        what was asked for.
    found
        the M objects of the picture.
    shares
        [3], how much of the rest has the value of each of BACKGROUNDS, in [0, 1].
    """
    matched = match(caption.things, found)
    credits = [credit for credit, _ in matched]
    wanted = len(caption.things)
    comparisons = [(2.0, sum(credits) / wanted), (1.0, max(0.0, 1 - abs(len(found) - wanted) / wanted))]
    objects = [thing for _, thing in matched if thing is not None]
    place = _place_credit(caption, objects)
    if place is not None:
        comparisons.append((1.0, place * min(credits)))
    names = list(BACKGROUNDS)
    share = float(shares.max() if caption.background is None else shares[names.index(caption.background)])
    comparisons.append((1.0, min(1.0, share / BACKGROUND_SHARE)))
    soft = sum(weight * value for weight, value in comparisons) / sum(weight for weight, _ in comparisons)
    strict = float(all(value == 1 for _, value in comparisons))
    enough = min(credits) >= TOLERANT and (place is None or place >= TOLERANT) and share >= TOLERANT
    return {"graded": 0.8 * soft + 0.2 * strict, "tolerant": float(enough), "strict": strict}


def match(wanted: Sequence[Thing], found: Sequence[Found]) -> list[tuple[float, Found | None]]:
    """For each wanted thing its credit in [0, 1] and its object, none twice; the best fitting pair is taken first."""
    credits = np.array([[thing_credit(thing, candidate) for candidate in found] for thing in wanted])
    return [(credit, None if place is None else found[place]) for credit, place in assign(credits)]


def assign(credits: np.ndarray) -> list[tuple[float, int | None]]:
    """For each row of credits [W, M] its credit and its column, none twice; the largest credit is taken first."""
    left = credits.copy()
    result: list[tuple[float, int | None]] = [(0.0, None)] * len(left)
    for _ in range(min(left.shape)):
        row, column = np.unravel_index(int(np.argmax(left)), left.shape)
        result[int(row)] = (float(left[row, column]), int(column))
        left[row, :] = left[:, column] = -1
    return result


def find(images: np.ndarray) -> tuple[list[list[Found]], np.ndarray]:
    """The objects of each picture, uint8 [B, 32, 32, 3], and the share of the rest that is of each background [B, 3]."""
    cv2, batch = _opencv(), len(images)
    if batch == 0:
        return [], np.zeros((0, len(BACKGROUNDS)))
    pixels = images.astype(np.float32)
    value = pixels @ np.full(3, 1 / 3, np.float32)  # [B, 32, 32]; the mean, but numpy is slow along short axes
    chroma = pixels - value[..., None]
    strength = chroma @ (_CHROMA / _CHROMA_NORM[:, None]).T  # [B, 32, 32, 6], along each colour's direction
    nearest = strength.argmax(-1)
    strongest = np.take_along_axis(strength, nearest[..., None], axis=-1)[..., 0]
    colored = strongest >= 0.5 * _CHROMA_NORM[nearest]  # at least half covered by a shape
    # one tall picture: a plane per sample and colour, an empty line below each, so that no region crosses over
    planes = np.zeros((batch, len(COLORS), SIZE + 1, SIZE), np.uint8)
    planes[:, :, :SIZE] = colored[:, None] & (nearest[:, None] == np.arange(len(COLORS))[:, None, None])
    regions: Any = cv2.connectedComponentsWithStats(planes.reshape(-1, SIZE), connectivity=4)
    _, labels, stats, _ = regions
    large = stats[:, cv2.CC_STAT_AREA] >= MIN_AREA
    large[0] = False  # OpenCV's first region is what belongs to none
    found: list[list[Found]] = [[] for _ in range(batch)]
    for label in np.flatnonzero(large):
        left, top, width, height, _ = (int(number) for number in stats[label])
        sample, color = divmod(top // (SIZE + 1), len(COLORS))
        mask = labels[top : top + height, left : left + width] == label
        found[sample].append(
            Found(
                color=list(COLORS)[color],
                overlap=_overlaps(mask),
                x=left + width / 2,
                y=top % (SIZE + 1) + height / 2,
                aspect=max(width, height) / min(width, height),
                size=float(max(width, height)),
            )
        )
    inside = large[labels].reshape(planes.shape)[:, :, :SIZE].any(1)  # [B, 32, 32]
    return found, _background_shares(value, np.sqrt(np.einsum("bhwc,bhwc->bhw", chroma, chroma)), inside)


def _background_shares(value: np.ndarray, strength: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """[B, 3]: how much of what lies outside the objects, by more than their blended edge, has each background's value."""
    near = inside.copy()  # [B, 32, 32], objects widened by one pixel
    near[:, 1:] |= inside[:, :-1]
    near[:, :-1] |= inside[:, 1:]
    wide = near.copy()
    wide[:, :, 1:] |= near[:, :, :-1]
    wide[:, :, :-1] |= near[:, :, 1:]
    rest = ~wide & (strength < CHROMA_TOLERANCE)
    alike = [np.count_nonzero(rest & (np.abs(value - gray) < VALUE_TOLERANCE), axis=(1, 2)) for gray in _GRAYS]
    return np.stack(alike, axis=1) / np.maximum(np.count_nonzero(~wide, axis=(1, 2)), 1)[:, None]


def _overlaps(mask: np.ndarray) -> tuple[float, ...]:
    """Intersection over union of a region [h, w] with each of SHAPES drawn into its bounding box."""
    ideal, area = _ideal_shapes(*mask.shape)
    both = ideal @ mask.ravel().astype(np.float32)  # [5]
    circle, square, *triangles = (both / (area + mask.sum() - both)).tolist()
    return circle, square, max(triangles)


@cache
def _ideal_shapes(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels [5, h * w] of which a circle, a square, and three triangles cover at least half, and how many [5].

    The thin top of a small triangle covers no pixel by half: the box of what is seen begins 0, 1 or 2 pixels below it.
    """
    fine = 8
    x, y = np.meshgrid((np.arange(width * fine) + 0.5) / (width * fine), (np.arange(height * fine) + 0.5) / fine)
    masks = [(x - 0.5) ** 2 + (y / height - 0.5) ** 2 <= 0.25, np.ones_like(x, dtype=bool)]
    masks += [np.abs(x - 0.5) <= (y + cut) / (height + cut) / 2 for cut in (0, 1, 2)]
    covered = np.stack(masks).reshape(-1, height, fine, width, fine).mean((2, 4)) >= 0.5
    flat = covered.reshape(len(masks), -1).astype(np.float32)
    return flat, flat.sum(1)


def thing_credit(wanted: Thing, found: Found) -> float:
    """How well an object is what is wanted: the mean of shape and, where one is named, colour."""
    overlap = found.overlap[SHAPES.index(wanted.shape)]
    clear = min(1.0, max(0.0, (overlap - SHAPE_OVERLAP_NONE) / (SHAPE_OVERLAP - SHAPE_OVERLAP_NONE)))
    shape = 0.5 + 0.5 * clear if found.shape == wanted.shape else 0.4 * clear
    if found.aspect > MAX_ASPECT:
        shape *= 0.8
    return shape if wanted.color is None else (shape + float(found.color == wanted.color)) / 2


def _place_credit(caption: Caption, objects: Sequence[Found]) -> float | None:
    """How well the objects lie where the caption says, in [0, 1]; None where it says nothing about it."""
    if caption.relation is not None:
        if len(objects) < 2:
            return 0.0
        dx, dy = objects[1].x - objects[0].x, objects[1].y - objects[0].y
        along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[caption.relation]
        cosine = along / max(float(np.hypot(dx, dy)), 1e-6)
        return min(1.0, (cosine + 1) / (DIRECTION_COSINE + 1))
    if caption.placement is not None:
        if not objects:
            return 0.0
        x, y = objects[0].x, objects[0].y
        excess = {
            "left": x - NEAR_EDGE,
            "right": SIZE - x - NEAR_EDGE,
            "top": y - NEAR_EDGE,
            "bottom": SIZE - y - NEAR_EDGE,
            "center": max(abs(x - SIZE / 2), abs(y - SIZE / 2)) - NEAR_CENTER,
        }[caption.placement]
        return min(1.0, max(0.0, 1 - excess / PLACE_SLOPE))
    return None


def _opencv() -> Any:
    return need("cv2", extra="composition", what="the reward 'composition'")


def to_world_size(images: np.ndarray) -> np.ndarray:
    """uint8 [B, H, W, 3] to [B, 32, 32, 3]: averaging where the picture is larger."""
    if images.shape[1:3] == (SIZE, SIZE):
        return images
    cv2 = _opencv()
    return np.array([cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for image in images])


__all__ = ["CompositionReward", "Found", "assign", "find", "judge", "match", "thing_credit", "to_world_size"]
