"""Was the picture edited as asked, and nothing else? Verified from the pixels, for ``flowsteer.rewards.scorers.edits``.

The objects of a picture are found as ``flowsteer.rewards.scorers.composition`` does. They are then compared with the column
``expected`` of the prompt file, which says what the edited picture holds:

.. code-block:: json

    {"background": "black", "things": [{"shape": "square", "color": "blue", "x": 10.0, "y": 20.5, "size": 12.0},
                                       {"shape": "circle", "color": "red", "x": null, "y": null, "size": null}]}

``x`` and ``y`` are the centre and ``size`` the width, in pixels of a 32x32 picture; a thing without them may lie anywhere. Kept
and edited things are listed alike: whatever the instruction does not name has to be where it was.

Each comparison gives a number in [0, 1] that is 1 exactly when nothing is left to improve:

``graded``  0.8 times the mean of the comparisons plus 0.2 times ``strict``: something to climb from the start.
``strict``  1 if the edit was made and everything else is as it was, 0 otherwise. Claim this one.

Letters: B samples, M objects found in a picture, W things expected in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from flowsteer.rewards.extras import need
from flowsteer.rewards.scorers.composition import (
    BACKGROUND_SHARE,
    Found,
    assign,
    find,
    thing_credit,
    to_world_size,
)
from flowsteer.rewards.scorers.world import BACKGROUNDS, COLORS, SHAPES, Thing

Score = Literal["graded", "strict"]

# Pixels. The bounding box of what covers half a pixel is up to two pixels lower than a triangle is, and its centre one.
PLACE_TOLERANCE = 2.5  # of a centre, along either axis
SIZE_TOLERANCE = 3.0  # of the longer side of a bounding box
SLOPE = 8.0  # beyond these, the distance over which the credit falls to 0


class EditCompositionReward:
    """Scores edited pictures of the world of shapes; see the module's docstring.

    Pictures of any size are first brought to 32x32 by averaging. A row whose ``expected`` is empty cannot be judged: its
    scores are None. Takes about 0.3 ms per picture.

    Parameters
    ----------
    score
        which of the two parts is ``"score"``, the one that counts.

    Raises
    ------
    ValueError
        an unknown score, or OpenCV (``pip install 'flowsteer[composition]'``) is not there.
    """

    score_range = (0.0, 1.0)
    uses_prompt = False  # what is asked for stands in ``expected``

    def __init__(self, score: Score = "graded") -> None:
        if score not in ("graded", "strict"):
            raise ValueError(f"score={score!r} is not known; use 'graded' or 'strict'")
        self.score = score
        cv2 = need("cv2", extra="composition", what="the reward 'edit_composition'")
        self.fingerprint = {
            "reward": "edit_composition",
            "version": "1",
            "score": score,
            "opencv": cv2.__version__,
        }

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        expected: Sequence[Mapping[str, Any] | None],
        **columns: Sequence[Any],
    ) -> dict[str, list[float | None]]:
        """uint8 [B, H, W, 3] in RGB and B expected scenes to the parts score, graded and strict, each in [0, 1].

        Raises ValueError if a row of ``expected`` is no scene of the world.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(expected):
            raise ValueError(
                f"edit_composition scores uint8 pictures [B, H, W, 3] with B values of 'expected', got {images.dtype} "
                f"{images.shape} with {len(expected)} values"
            )
        parts: dict[str, list[float | None]] = {"graded": [], "strict": []}
        for scene, found, shares in zip(expected, *find(to_world_size(images))):
            values = judge(scene, found, shares) if scene else dict.fromkeys(parts)
            for name, value in values.items():
                parts[name].append(value)
        return {"score": parts[self.score], **parts}


def judge(expected: Mapping[str, Any], found: Sequence[Found], shares: np.ndarray) -> dict[str, float]:
    """Compare what is in a picture with what it should hold.

    Parameters
    ----------
    expected
        background and things, as in the module's docstring.
    found
        the M objects of the picture.
    shares
        [3], how much of the rest has the value of each of BACKGROUNDS, in [0, 1].
    """
    background, wanted = _read(expected)
    credits = np.array([[_credit(one, candidate) for candidate in found] for one in wanted])
    matched = [credit for credit, _ in assign(credits.reshape(len(wanted), len(found)))]
    count = max(len(wanted), 1)
    comparisons = [
        (2.0, sum(matched) / count if wanted else 1.0),
        (1.0, max(0.0, 1 - abs(len(found) - len(wanted)) / count)),
        (1.0, min(1.0, float(shares[list(BACKGROUNDS).index(background)]) / BACKGROUND_SHARE)),
    ]
    soft = sum(weight * value for weight, value in comparisons) / sum(weight for weight, _ in comparisons)
    strict = float(all(value == 1 for _, value in comparisons))
    return {"graded": 0.8 * soft + 0.2 * strict, "strict": strict}


def _read(expected: Mapping[str, Any]) -> tuple[str, list[Mapping[str, Any]]]:
    """Background and things of a row. Raises ValueError where it is no scene of the world."""
    try:
        background, wanted = expected["background"], [*expected["things"]]
        known = background in BACKGROUNDS and all(
            one["shape"] in SHAPES
            and one["color"] in COLORS
            and all(one.get(name) is None or np.isfinite(float(one[name])) for name in ("x", "y", "size"))
            for one in wanted
        )
    except (TypeError, KeyError, ValueError, AttributeError):
        known = False
    if not known:
        raise ValueError(
            f"no scene of the world of shapes: {str(expected)[:200]}; a value of the column 'expected' is like "
            '{"background": "black", "things": [{"shape": "square", "color": "blue", "x": 10.0, "y": 20.5, "size": 12.0}]}'
        )
    return background, wanted


def _credit(wanted: Mapping[str, Any], found: Found) -> float:
    """How well an object is what is wanted, where it is wanted, in [0, 1]."""
    credit = thing_credit(Thing(wanted["shape"], wanted["color"]), found)
    for name, value, tolerance in (
        ("x", found.x, PLACE_TOLERANCE),
        ("y", found.y, PLACE_TOLERANCE),
        ("size", found.size, SIZE_TOLERANCE),
    ):
        if wanted.get(name) is not None:
            excess = abs(value - float(wanted[name])) - tolerance
            credit *= min(1.0, max(0.0, 1 - excess / SLOPE))
    return credit


__all__ = ["EditCompositionReward", "judge"]
