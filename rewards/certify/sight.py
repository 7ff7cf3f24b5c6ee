"""The checks of a certificate that look for what a reward does not look at: parts of the picture, words, columns, levels.

A sound reward may ignore some of these, so all but one of them only warn (`Suspected`). `remembers` refuses: a score that
depends on what was asked before is wrong whatever the reward is for.

Letters: B images of the trial, N images of one call.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flowsteer.rewards.certify.trial import ROUNDING, NotApplicable, Refused, Suspected, Trial, error_text
from flowsteer.rewards.columns import column_parameters, required_columns
from flowsteer.rewards.types import Reward

CELLS = 3  # a picture is changed in one of 3 x 3 cells at a time
LEAST_SIDE = 192  # pixels of the pictures for it: a reward that sees a corner of 64x64 then sees one cell of nine
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right")]
SHEAR_SIDE = 96  # pixels
LEVELS = (*range(0, 255, 4), 255)
PLAIN_SIDE = 32  # pixels of the pictures of one colour
LEAST_RISE, LEAST_FLAT = (
    3,
    16,
)  # steps between neighbours of LEVELS: a score that rises, then stands still for a quarter
LEAST_TIES = 3  # images with exactly the highest or the lowest score
LEVELS_BUDGET_S = 20.0  # after it no further ramp is begun
Picture = tuple[np.ndarray, str, dict[str, Any]]  # image [H, W, 3], prompt, columns of one pair


def only_suspects(check: Callable[[Trial], str]) -> Callable[[Trial], str]:
    """A check that only warns, also where the reward fails on what it is shown: that is refused by the checks of odd inputs."""

    @functools.wraps(check)
    def guarded(trial: Trial) -> str:
        try:
            return check(trial)
        except (Suspected, NotApplicable):
            raise
        except Exception as error:
            said = str(error) if isinstance(error, Refused) else f"raised {error_text(error)}"
            raise Suspected(f"it fails on what this check shows: {said}") from error

    return guarded


@only_suspects
def words_of_the_prompt(trial: Trial) -> str:
    """Another prompt of the same length gives another score, where prompts of other lengths do."""
    if not trial.uses_prompt:
        raise NotApplicable("the prompt plays no part, as declared")
    moved = False
    for pairs in [trial.rows] if trial.groupwise else [[pair] for pair in trial.samples]:
        images, prompts, columns = trial.arguments(pairs)
        own, before = prompts[0], trial.ask(images.copy(), list(prompts), columns)
        for other in dict.fromkeys((_next_letters(own), own[::-1])):
            if not trial.same(before, trial.ask(images.copy(), [other] * len(pairs), columns)):
                return "prompts of the same length with other letters get other scores"
        others = dict.fromkeys(prompt for prompt in trial.prompts if len(prompt) != len(own))
        moved = moved or any(
            not trial.same(before, trial.ask(images.copy(), [other] * len(pairs), columns))
            for other in list(others)[:4]
        )
    if not moved:
        raise NotApplicable("the prompt makes no difference")
    raise Suspected(
        "prompts of the same length with other letters always get the same score, prompts of other lengths do not: it may "
        "count the length of a prompt only"
    )


@only_suspects
def sees_the_columns(trial: Trial) -> str:
    """A column that the reward requires matters: with other rows' values, or changed ones, some score is another."""
    if not trial.columns:
        raise NotApplicable("no columns are given")
    named = [name for name in column_parameters(trial.reward) if name in trial.columns]
    ignored = [name for name in named if not _matters(trial, name)]
    for name in ignored:
        if name in required_columns(trial.reward):
            raise Suspected(
                f"requires the column {name!r}, but neither other rows' values nor changed ones change any score"
            )
    seen = [name for name in named if name not in ignored]
    return "; ".join(
        f"{what}: {', '.join(names)}"
        for what, names in (
            ("change scores", seen),
            ("change none", ignored),
            ("not among its arguments", [name for name in trial.columns if name not in named]),
        )
        if names
    )


@only_suspects
def whole_picture(trial: Trial) -> str:
    """A change anywhere in the picture changes some score."""
    side = min(trial.images.shape[1:3])
    scale = -(-LEAST_SIDE // side)  # rounded up
    height, width = (scale * size for size in trial.images.shape[1:3])
    unseen = _unseen(trial, height, width)
    if not unseen:
        return f"a change in any ninth of a {width}x{height} picture changes a score"
    if not trial.real_valued:
        raise NotApplicable("its scores are too coarse to show a change in a part of the picture")
    raise Suspected(
        f"of a {width}x{height} picture these ninths make no difference: {', '.join(unseen)}. Does it see the whole picture?"
    )


@only_suspects
def other_shapes(trial: Trial) -> str:
    """Wide and tall pictures are seen as square ones are: height and width are not swapped."""
    if not trial.real_valued:
        raise NotApplicable("its scores are too coarse to show it")
    square = set(_unseen(trial, LEAST_SIDE, LEAST_SIDE))
    for kind, height, width in (("wide", LEAST_SIDE, 2 * LEAST_SIDE), ("tall", 2 * LEAST_SIDE, LEAST_SIDE)):
        unseen = [place for place in _unseen(trial, height, width) if place not in square]
        if unseen:
            raise Suspected(
                f"of a {kind} picture of {width}x{height} these ninths make no difference, of a square one they do: "
                f"{', '.join(unseen)}. It crops, which may be meant, or height and width are swapped"
            )
    if _sheared(trial):
        raise Suspected(
            f"a picture of {SHEAR_SIDE + 1}x{SHEAR_SIDE} is scored as if its pixels were read as "
            f"{SHEAR_SIDE}x{SHEAR_SIDE + 1}: height and width are swapped"
        )
    images, prompts, columns = trial.arguments(trial.samples)
    own = trial.ask(images.copy(), list(prompts), columns)
    changes: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "mirrored": lambda all_: all_[:, :, ::-1],
        "upside down": lambda all_: all_[:, ::-1],
        "transposed": lambda all_: all_.swapaxes(1, 2),
        "shifted": lambda all_: np.roll(all_, all_.shape[2] // 4, axis=2),
    }
    said = [
        f"{kind} {'same score' if trial.same(own, _ask(trial, change(images), prompts, columns)) else 'another'}"
        for kind, change in changes.items()
    ]
    return f"wide and tall pictures are seen whole; {', '.join(said)}"


@only_suspects
def levels(trial: Trial) -> str:
    """Plain pictures from 0 to 255, grey and in each channel: the score neither stands still at an end nor wraps around."""
    if trial.groupwise:
        raise NotApplicable("the reward is groupwise: its scores are relative to the group")
    began, tried = time.monotonic(), []
    for kind, channels in {"grey": [0, 1, 2], "red": [0], "green": [1], "blue": [2]}.items():
        if time.monotonic() - began > LEVELS_BUDGET_S:
            break
        scores = _ramp(trial, channels)
        if np.isnan(scores).any():
            raise NotApplicable("pictures of one colour get no score")
        steps = np.diff(scores)
        steps[np.abs(steps) <= ROUNDING * np.abs(scores).max()] = 0
        if _wraps(steps, float(np.ptp(scores))):
            raise Suspected(
                f"from level 0 to 255 of {kind} the score goes one way and jumps back, as uint8 does beyond 255 or below 0; "
                "convert to float before you calculate"
            )
        still = _stands_still(steps)
        if still is not None:
            low, high = still
            raise Suspected(
                f"from level {low} to {high} of {kind} the score stands still, elsewhere it moves: it may be cut off, and "
                "teaches nothing there"
            )
        tried.append(kind)
    found = trial.own[trial.scored]
    for end, score in (("highest", found.max()), ("lowest", found.min())):
        equal = {trial.images[row].tobytes() for row in trial.scored if trial.own[row] == score}
        if trial.real_valued and score != 0 and len(equal) >= LEAST_TIES:  # zeros are counted by the check "answer"
            raise Suspected(
                f"{len(equal)} different images have exactly the {end} score, {score:.6g}: the score may be cut off, and "
                "teaches nothing beyond"
            )
    return f"levels 0 to 255 of {', '.join(tried)}: no jump back, no end where the score stands still"


def remembers(trial: Trial) -> str:
    """Pictures that are equal in one half get the scores of their own, whichever was asked first."""
    if trial.groupwise:
        raise NotApplicable("the reward is groupwise: it is asked whole groups")
    for kind, first, second in alike(trial):
        forward = [_ask_one(trial, picture) for picture in (first, second)]
        backward = [_ask_one(trial, picture, trial.other) for picture in (second, first)][::-1]
        if not trial.same(forward, backward):
            raise Refused(remembered(kind))
    return "pictures that are half the same get the same scores in either order"


def remembered(kind: str) -> str:
    """What is said of a reward that answers with the score of something that it saw before."""
    return (
        f"two {kind} get scores that depend on which was asked first: it keeps scores, and finds them by a part of what "
        "they depend on; use all pixels, the prompt and the columns as the key"
    )


def alike(trial: Trial) -> Iterator[tuple[str, Picture, Picture]]:
    """Pairs of a kind that a reward must not confuse, of pictures that no other check shows."""
    (images, prompts, columns), count = trial.arguments(trial.samples), len(trial.samples)
    kept, first, second = 255 - images[0], images[1 % count], images[2 % count]
    height, width = kept.shape[:2]
    halves = {
        "top": np.s_[: height // 2],
        "bottom": np.s_[height // 2 :],
        "left": np.s_[:, : width // 2],
        "right": np.s_[:, width // 2 :],
    }
    own = {name: values[0] for name, values in columns.items()}
    for name, half in halves.items():
        one, other = first.copy(), second.copy()
        one[half], other[half] = kept[half], kept[half]
        yield f"pictures that are equal in the {name} half", (one, prompts[0], own), (other, prompts[0], own)
    turned = np.ascontiguousarray(kept[::-1])
    if prompts[-1] != prompts[0]:
        yield "prompts for one picture", (turned, prompts[0], own), (turned, prompts[-1], own)


def _ask_one(trial: Trial, picture: Picture, reward: Reward | None = None) -> float:
    image, prompt, columns = picture
    beside = {name: [value] for name, value in columns.items()}
    return float(trial.ask(image[None].copy(), [prompt], beside, reward)[0])


def _ask(trial: Trial, images: np.ndarray, prompts: Sequence[str], columns: dict[str, list[Any]]) -> np.ndarray:
    return trial.ask(np.ascontiguousarray(images), list(prompts), columns)


def _next_letters(text: str) -> str:
    """The text with each letter and digit replaced by the next one."""
    rings = ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789")
    return text.translate({ord(a): b for ring in rings for a, b in zip(ring, ring[1:] + ring[0])})


def _matters(trial: Trial, name: str) -> bool:
    """Whether other values of a column change any score, or make the reward raise."""
    images, prompts, columns = trial.arguments(trial.rows)
    before, values = trial.score(trial.rows), columns[name]
    others = [values[1:] + values[:1], values[::-1], [_changed(value) for value in values]]
    for other in others:
        try:
            after = trial.ask(images.copy(), list(prompts), {**columns, name: other})
        except Exception:  # it looks at the value, and cannot use this one
            return True
        if not trial.same(before, after):
            return True
    return False


def _changed(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return 2 * value + 1
    if isinstance(value, np.ndarray):
        return 255 - value
    return value[::-1] + "x" if isinstance(value, str) else type(value)()


def _unseen(trial: Trial, height: int, width: int) -> list[str]:
    """The ninths of pictures of this size in which no change changes any score."""
    images, prompts, columns = trial.arguments(trial.samples)
    images = np.stack([_resized(image, height, width) for image in images])
    before = _ask(trial, images.copy(), prompts, columns)
    noise = np.random.default_rng(0).integers(0, 256, images.shape[1:], dtype=np.uint8)
    unseen = []
    for place, name in enumerate(PLACES):
        row, column = divmod(place, CELLS)
        cell = np.s_[
            : 1 if trial.groupwise else None,  # of a group one picture, so that it differs from the others
            row * height // CELLS : (row + 1) * height // CELLS,
            column * width // CELLS : (column + 1) * width // CELLS,
        ]
        for other in (255 - images, np.broadcast_to(noise, images.shape)):
            changed = images.copy()
            changed[cell] = other[cell]
            if not trial.same(before, _ask(trial, changed, prompts, columns)):
                break
        else:
            unseen.append(name)
    return unseen


def _sheared(trial: Trial) -> bool:
    """Whether one column more makes a square picture score as its pixels in rows of the old length would."""
    images, prompts, columns = trial.arguments(trial.samples)
    square = np.stack([_resized(image, SHEAR_SIDE, SHEAR_SIDE) for image in images])
    wide = np.concatenate([square, square[:, :, -1:]], axis=2)
    cut = wide.reshape(len(wide), SHEAR_SIDE + 1, SHEAR_SIDE, 3)[:, :SHEAR_SIDE]
    right, asked, wrong = (_ask(trial, shown, prompts, columns) for shown in (square, wide, cut))
    telling = np.abs(right - wrong) > 10 * trial.tolerance
    return telling.sum() > 1 and bool(np.all((np.abs(asked - wrong) < 0.1 * np.abs(asked - right))[telling]))


def _ramp(trial: Trial, channels: list[int]) -> np.ndarray:
    """Scores of plain pictures in which these channels have each of `LEVELS`, and the others 128."""
    images = np.full((len(LEVELS), PLAIN_SIDE, PLAIN_SIDE, 3), 128, dtype=np.uint8)
    images[..., channels] = np.array(LEVELS, dtype=np.uint8)[:, None, None, None]
    row = trial.samples[0][1]
    columns = {name: [values[row]] * len(LEVELS) for name, values in trial.columns.items()}
    return trial.ask(images, [trial.prompts[row]] * len(LEVELS), columns)


def _wraps(steps: np.ndarray, spread: float) -> bool:
    """Many small steps in one direction, and a few large ones back."""
    large = np.abs(steps) >= 0.5 * spread
    small = steps[~large]
    return bool(
        spread > 0
        and 1 <= large.sum() <= 4
        and np.all(np.abs(small) <= 0.1 * spread)
        and np.count_nonzero(small) >= 16
        and abs(small.sum()) >= 0.5 * spread
        and small.sum() * steps[large].sum() < 0
    )


def _stands_still(steps: np.ndarray) -> tuple[int, int] | None:
    """The levels at an end between which a score stands still, where it moves without a stop in one direction before."""
    for ascending, ordered in ((True, steps[::-1]), (False, steps)):
        moving = np.flatnonzero(ordered)
        flat = int(moving[0]) if len(moving) else 0
        rise = ordered[flat:]
        stop = int(np.argmax(rise == 0)) if np.any(rise == 0) else len(rise)
        if flat >= LEAST_FLAT and stop >= LEAST_RISE and abs(np.sign(rise[:stop]).sum()) == stop:
            return (LEVELS[len(LEVELS) - 1 - flat], 255) if ascending else (0, LEVELS[flat])
    return None


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


__all__ = [
    "alike",
    "levels",
    "other_shapes",
    "remembered",
    "remembers",
    "sees_the_columns",
    "whole_picture",
    "words_of_the_prompt",
]
