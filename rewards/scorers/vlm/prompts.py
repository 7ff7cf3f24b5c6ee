r"""What a vision-language judge is shown and asked, and how its reply is read. Pure functions; `judges.py` asks.

A reader raises ValueError where a reply does not say what was asked for: no number, one outside its range, another count. It
never guesses. Of several answers in one reply the last counts, since models reason before they conclude.

UnifiedReward (Wang et al. 2025, arXiv 2503.05236) was trained on fixed questions. The forms of its answers (``Final Score:
4``; ``Alignment Score (1-5): 4`` with ``Coherence`` and ``Style``) and of the caption are the published ones, the words
around them are ours: for scores in the very words of a model's card give those as ``template``.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

Part = dict[str, Any]  # of a chat message: a text or an image

AXES = ("alignment", "coherence", "style")
EDIT_PARTS = ("instruction", "preservation")

FINAL_SCORE = """\
You see one image that was generated from a text caption. Judge it by two criteria:
1. Alignment: are the objects, their attributes and their relations those of the caption?
2. Quality: is it clear, rich in detail, right in its colours and pleasing as a whole?
Weigh both and give one score from 1 (worst) to 5 (best) after the words 'Final Score:'.
Text Caption: [{prompt}]"""

AXIS_SCORES = """\
You see one image that was generated from a text caption. Rate it on three axes, each from 1 (worst) to 5 (best):
- Alignment Score: how well what it shows matches the caption.
- Coherence Score: how consistent it is in itself, without glitches and distorted objects.
- Style Score: how pleasing it looks, whatever the caption says.
Answer in exactly this form:
Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z
Text Caption: [{prompt}]"""

BETTER_OF_TWO = """\
Image 1 and Image 2 were generated from the same text caption. Which of them is better? Consider first how well each matches \
the caption (objects, attributes, relations, text), then how real and how pleasing it looks. Their order means nothing.
End with exactly one of these lines:
<answer>Image 1 is better</answer>
<answer>Image 2 is better</answer>
<answer>Tie</answer>
Text Caption: [{prompt}]"""

SCORE_EACH = """\
These {count} images were generated from the same text caption. Compare them: first how well each matches the caption \
(objects, attributes, relations, text), then how real and how pleasing it looks. Their order means nothing. Give each a \
score from 0 (worst) to 10 (best). End with one line that has the {count} scores in the order of the images:
Scores: <score of Image 1>, <score of Image 2>, ...
Text Caption: [{prompt}]"""

RANK_ALL = """\
These {count} images were generated from the same text caption. Compare them: first how well each matches the caption \
(objects, attributes, relations, text), then how real and how pleasing it looks. Their order means nothing. End with one line \
that has the numbers of all {count} images, the best first:
Ranking: <best> > <second> > ...
Text Caption: [{prompt}]"""

EDIT = """\
The first image was edited by the instruction below; the second image is the result. Give two scores from 0 (worst) to 10 \
(best):
- Instruction: how completely and how exactly the result carries out the instruction.
- Preservation: how well everything that the instruction does not speak of is as in the first image: other objects, faces, \
background, layout, style.
Answer in exactly this form:
Instruction Score: X
Preservation Score: Y
Instruction: [{prompt}]"""

NUMBER = r"-?\d+(?:\.\d+)?"
FINAL_SCORE_PATTERN = rf"Final Score:[\s*]*({NUMBER})"  # the asterisks are those of **Final Score:** 4
SCORE_PATTERN = rf"Score:[\s*]*({NUMBER})"
BETTER_PATTERN = r"<answer>\s*(?:Image\s*)?([12]|tie)\b"
_AXIS = re.compile(rf"\b({'|'.join(AXES)}) Score(?: ?\(1-5\))?:[\s*]*({NUMBER})", re.IGNORECASE)
_EDIT = re.compile(rf"\b(Instruction|Preservation) Score:[\s*]*({NUMBER})", re.IGNORECASE)
_SCORES = re.compile(r"Scores:[\s*]*(.+)", re.IGNORECASE)
_DRESSED = rf"[\s*\[(<]*{NUMBER}[\s*\])>.]*"
_NUMBERS = re.compile(rf"{_DRESSED}(?:,{_DRESSED})*")
_RANKING = re.compile(r"Ranking:[\s*]*(.+)", re.IGNORECASE)


def fill(template: str, **values: object) -> str:
    """The template with ``{name}`` replaced for each value. Other braces, of JSON say, and those of the values stay."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda found: str(values[found[1]]), template)


def image_part(image: np.ndarray, size: int | None) -> Part:
    """uint8 [H, W, 3] as a PNG, which loses nothing; ``size`` is that of the longer side, None leaves it."""
    picture = Image.fromarray(image)
    if size is not None and max(picture.size) != size:
        scale = size / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def labelled(shown: Sequence[Sequence[Part]], question: str) -> list[Part]:
    """The images, each after its number, and then the question."""
    parts: list[Part] = []
    for number, image in enumerate(shown, 1):
        parts += [text_part(f"Image {number}:"), *image]
    return [*parts, text_part(question)]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression whose one group holds the answer; upper and lower case are the same."""
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise ValueError(
            f"the pattern {pattern!r} has {compiled.groups} groups; it needs exactly one, around the answer. A group that "
            "is none is written (?:...)"
        )
    return compiled


def read_number(reply: str, pattern: re.Pattern[str], low: float, high: float) -> float:
    """The last number that the pattern finds; it must lie in [low, high]."""
    return _number(_last(reply, pattern), low, high)


def read_axes(reply: str) -> Mapping[str, float]:
    """UnifiedReward-2.0's three scores, 1 to 5, by `AXES`."""
    found = {axis.lower(): text for axis, text in _AXIS.findall(reply)}
    lacking = [axis for axis in AXES if axis not in found]
    if lacking:
        raise ValueError(f"no score for {' and '.join(lacking)}")
    return {axis: _number(found[axis], 1, 5) for axis in AXES}


def read_edit(reply: str) -> Mapping[str, float]:
    """The scores ``instruction`` and ``preservation`` of an edit, 0 to 10."""
    found = {name.lower(): text for name, text in _EDIT.findall(reply)}
    lacking = [name for name in EDIT_PARTS if name not in found]
    if lacking:
        raise ValueError(f"no score for {' and '.join(lacking)}")
    return {name: _number(found[name], 0, 10) for name in EDIT_PARTS}


def read_better(reply: str, pattern: re.Pattern[str]) -> float:
    """What Image 1 wins of a pair: 1 or 0, and 0.5 of a tie."""
    answer = _last(reply, pattern).lower()
    wins = {"1": 1.0, "2": 0.0, "tie": 0.5}
    if answer not in wins:
        raise ValueError(f"{answer!r} is none of 1, 2 and tie")
    return wins[answer]


def read_scores(reply: str, count: int) -> list[float]:
    """The scores of ``count`` images, 0 to 10, mapped to [0, 1]. A line with other words may hold other numbers."""
    line = _last(reply, _SCORES)
    if not _NUMBERS.fullmatch(line):
        raise ValueError(f"{line!r} is not {count} numbers with commas between them")
    texts = re.findall(NUMBER, line)
    if len(texts) != count:
        raise ValueError(f"{len(texts)} scores for {count} images")
    return [_number(text, 0, 10) / 10 for text in texts]


def read_ranking(reply: str, count: int) -> list[float]:
    """Of each of ``count`` images the share of the others that stand behind it: 1 for the best, 0 for the last."""
    places = [int(text) - 1 for text in re.findall(r"\d+", _last(reply, _RANKING))]  # best first
    if sorted(places) != list(range(count)):
        raise ValueError(f"the ranking does not name each of {count} images once")
    return [(count - 1 - places.index(image)) / (count - 1) for image in range(count)]


def _last(reply: str, pattern: re.Pattern[str]) -> str:
    found = pattern.findall(reply)
    if not found:
        raise ValueError("the answer is not in the form that was asked for")
    return found[-1]


def _number(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None
    if not low <= value <= high:  # NaN too
        raise ValueError(f"{text} is outside {low:g} to {high:g}")
    return value
