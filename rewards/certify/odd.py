"""The checks of a certificate that hand a reward odd inputs: sizes, colours, videos, prompts, and what is no image at all.

From outside not everything shows: that pixels are cut off only where a score is fine enough to notice (`grey_levels`), that an
odd answer is an error only where it is a zero or a constant (`odd_prompts`, `impossible_images`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flowsteer.rewards.certify.trial import ROUNDING, NotApplicable, Refused, Trial, error_text
from flowsteer.rewards.pictures import pictures_of

SIZES = ((32, 32), (64, 48), (48, 64), (224, 224), (16, 256))  # height, width
ODD_PROMPTS = {
    "an empty prompt": "",
    "a prompt of 10,000 characters": "a red one, " * 909 + "a",
    "emoji and other scripts": "\U0001f431\u200d\U0001f464 \u732b \u0441\u043e\u0431\u0430\u043a\u0430 e\u0301",
    "blanks and line breaks": " \n\t ",
}
DARK_LEVELS = 41  # 0..40: every usual way there and back through floats loses one of them when it is cut off
TEXTURE_SIDE = 64  # pixels
TEXTURES = 12  # a score that finds each two neighbours equal by chance half of the time fails once in 100 certificates


def odd_batches(trial: Trial) -> str:
    """No image, one, three, seven."""
    if trial.groupwise:
        if np.isfinite(trial.score(trial.rows[:1])).any():
            raise Refused("gives a score to a group of one, which there is nothing to compare with; answer None")
        for size in (2, 3, 7):
            trial.score(trial.rows[:size])
        return "takes groups of 2, 3 and 7; a group of 1 has no score"
    try:
        trial.score([])
    except Exception as error:
        raise Refused(f"no image: {_said(error)}; the answer to none is an empty list") from error
    for size in (1, 3, 7):
        trial.score(trial.rows[:size])
    return "takes 0, 1, 3 and 7 images"


def sizes(trial: Trial) -> str:
    """Small, large, tall, wide: an answer, and not a 0 for all images of one shape."""
    shapes = {f"{width}x{height}": lambda image, h=height, w=width: _resized(image, h, w) for height, width in SIZES}
    return _every_shape(trial, shapes, refuse_zeros=bool(trial.real_valued and trial.own[trial.scored].all()))


def plain_images(trial: Trial) -> str:
    """All black, all white, without colour."""
    kinds: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "black": np.zeros_like,
        "white": lambda image: np.full_like(image, 255),
        "grey": lambda image: np.repeat(image.mean(-1, keepdims=True).round().astype(np.uint8), 3, axis=-1),
    }
    return _every_shape(trial, kinds)


def video(trial: Trial) -> str:
    """[B, T, H, W, 3] gives B scores."""
    images, prompts, columns = trial.arguments(trial.samples[:2])
    try:
        scores = trial.ask(np.repeat(images[:, None], 3, axis=1), prompts, columns)
    except Exception as error:  # the answer may break the contract as well
        if getattr(trial.reward, "video", False):
            raise Refused(f"declares video = True, but {_said(error)}") from error
        raise NotApplicable(f"takes no videos: {_said(error)}") from error
    still = "as" if trial.same(scores, trial.score(trial.samples[:2])) else "not as"
    return f"takes videos; one that stands still scores {still} its image"


def grey_levels(trial: Trial) -> str:
    """Nothing is cut off on the way: through float and back to uint8, cutting off makes some neighbouring levels one.

    ``uint8(x / 255 * 255)`` loses nothing, as it happens; through CLIP's mean and deviation, through [-1, 1] or with 256 in
    place of 255, in half, single or double precision, at least one of the levels 1 to 40 becomes the one below it. A
    score that tells most of these levels apart and some never, on no texture at all, has lost those.
    """
    lost = list(range(1, DARK_LEVELS))
    for texture in range(TEXTURES):  # equal by chance, as file sizes are, happens on one texture and on another not
        levels = sorted({near for level in lost for near in (level - 1, level)})
        scores = _score_levels(trial, levels, seed=texture)
        if np.isnan(scores).any():
            raise NotApplicable("textures get no score")
        found, noise = dict(zip(levels, scores)), ROUNDING * np.abs(scores).max()
        lost = [level for level in lost if abs(found[level] - found[level - 1]) <= noise]
        if not lost:
            return f"tells the {DARK_LEVELS} darkest levels apart"
        if len(lost) > DARK_LEVELS / 2:
            raise NotApplicable("its scores are too coarse to show one grey level of 255")
    raise Refused(
        f"never tells these grey levels from the one below: {', '.join(map(str, lost))}; but tells most apart. Pixels are "
        "cut off somewhere: round before you convert to integers, or stay with floats. Or they go through a colour space of "
        "8 bits, such as OpenCV's Lab of uint8, which makes neighbours one although nothing is cut off: convert floats"
    )


def odd_prompts(trial: Trial) -> str:
    """Empty, very long, of other scripts: a number or None, no exception, no 0 in place of an error, no harm to others."""
    pairs = trial.samples[:2]
    zeros_are_usual = not np.all(trial.own[trial.scored])
    answers: list[str] = []
    constant: dict[float, list[str]] = {}  # score -> the prompts that got it
    for kind, prompt in ODD_PROMPTS.items():
        images, prompts, columns = trial.arguments(pairs)
        if trial.groupwise:
            prompts[0] = prompt
        prompts[1] = prompt
        try:
            beside, odd = trial.ask(images, prompts, columns)
        except Exception as error:
            raise Refused(f"{kind}: {_said(error)}; answer None where a prompt cannot be judged") from error
        if odd == 0 and not zeros_are_usual:
            raise Refused(f"{kind} scores exactly 0, as no ordinary one does; answer None where nobody can tell")
        if not trial.groupwise and not trial.confusions and not trial.same(beside, trial.alone(pairs[0])):
            raise Refused(f"{kind} changes the score of the image beside it")
        constant.setdefault(float(odd), []).append(prompt)
        answers.append(f"{kind} {'None' if np.isnan(odd) else f'{odd:.4g}'}")
    if trial.uses_prompt and trial.real_valued and not trial.groupwise:
        for score, same in constant.items():
            images, _, columns = trial.arguments(pairs[:1] * len(same))
            if score != 0 and len(same) > 2 and np.all(trial.ask(images, same, columns) == score):
                raise Refused(
                    f"{len(same)} of {len(ODD_PROMPTS)} odd prompts get the score {score:.6g}, whatever the image: an error in "
                    "disguise; answer None where nobody can tell"
                )
    return "; ".join(answers)


def missing_pictures(trial: Trial) -> str:
    """A sample without a picture gets a number or None, and changes nothing for the sample beside it."""
    wanted = [name for name in pictures_of(trial.name, trial.reward) if name in trial.columns]
    if not wanted:
        raise NotApplicable("declares no pictures")
    pairs, said = trial.samples[:2], []
    expected = trial.score(pairs)
    for name in wanted:
        images, prompts, columns = trial.arguments(pairs)
        columns[name][1] = None
        try:
            beside, odd = trial.ask(images, prompts, columns)
        except Exception as error:
            raise Refused(
                f"a sample without {name!r} (None): {_said(error)}; answer None where the picture is needed"
            ) from error
        if not trial.groupwise and not trial.same(beside, expected[0]):
            raise Refused(f"a sample without {name!r} changes the score of the sample beside it")
        said.append(f"without {name} {'None' if np.isnan(odd) else f'{odd:.4g}'}")
    return "; ".join(said)


def impossible_images(trial: Trial) -> str:
    """What is no image makes it raise or answer None, never a 0 or another constant in place of an error.

    Without a column a sound score may be the usual one or another one, as where less is asked for. It is an error where each
    image gets the same unusual number, 0 or another, from a reward whose scores are no coarse shares (`Trial.real_valued`).
    """
    images, prompts, columns = trial.arguments(trial.samples)
    broken: dict[str, tuple[np.ndarray, dict[str, list[Any]]]] = {
        "floats that are all NaN": (np.full(images.shape, np.nan, np.float32), columns),
        "images with two channels": (np.ascontiguousarray(images[..., :2]), columns),
        "images without pixels": (images[:, :0, :0], columns),
    }
    seen: dict[float, str] = {}
    for kind, (shown, beside) in broken.items():
        try:
            given = trial.reward(shown.copy(), list(prompts), **beside)
            found = trial.read(given, len(prompts))
        except Exception:  # loud, as it should be; of the contract's own refusals as well
            continue
        for score in {float(score) for score in found[np.isfinite(found)]}:
            if score == 0 or score in seen:
                both = f" and to {seen[score]}" if score in seen else ""
                raise Refused(
                    f"gives the score {score:.6g} to {kind}{both}: an error in disguise; raise, or answer None, "
                    "where images are not uint8 [B, H, W, 3]"
                )
            seen[score] = kind
    for name in columns:
        try:
            found = trial.ask(images.copy(), list(prompts), columns | {name: [None] * len(prompts)})
        except Exception:  # loud as well
            continue
        constant = len(found) > 1 and np.all(found == found[0]) and not np.any(trial.own == found[0])
        if constant and trial.real_valued and not trial.same(found, trial.score(trial.samples)):
            raise Refused(
                f"gives each image the score {found[0]:.6g} where a column {name!r} is None, as no ordinary one is: an error "
                "in disguise; answer None where a column is needed"
            )
    kinds = [*broken, *(f"a column {name!r} of None" for name in columns)]
    return f"{', '.join(kinds)}: no error becomes a score"


def _every_shape(
    trial: Trial, kinds: Mapping[str, Callable[[np.ndarray], np.ndarray]], *, refuse_zeros: bool = False
) -> str:
    """The samples in each kind get an answer."""
    images, prompts, columns = trial.arguments(trial.samples)
    refused, missing = [], []
    for kind, change in kinds.items():
        try:
            scores = trial.ask(np.stack([change(image) for image in images]), list(prompts), columns)
        except Exception as error:
            refused.append(f"{kind}: {_said(error)}")
            continue
        missing += [kind] if np.isnan(scores).all() else []
        if refuse_zeros and np.any(scores == 0) and not np.any(scores[np.isfinite(scores)]):
            refused.append(f"{kind}: each image scores exactly 0, as no ordinary one does; raise, or answer None")
    if refused:
        raise Refused("; ".join(refused))
    return f"takes {', '.join(kinds)}" + (f"; no score (None) for {', '.join(missing)}" if missing else "")


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, Refused) else f"raised {error_text(error)}"


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _score_levels(trial: Trial, levels: Sequence[int], *, seed: int) -> np.ndarray:
    """Scores of one texture, once for each level, in half of its pixels."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (TEXTURE_SIDE, TEXTURE_SIDE, 3), dtype=np.uint8)
    where = rng.random((TEXTURE_SIDE, TEXTURE_SIDE)) < 0.5
    images = np.stack([np.where(where[..., None], np.uint8(level), texture) for level in levels])
    row = trial.samples[0][1]
    columns = {name: [values[row]] * len(levels) for name, values in trial.columns.items()}
    return trial.ask(images, [trial.prompts[row]] * len(levels), columns)


__all__ = [
    "grey_levels",
    "impossible_images",
    "missing_pictures",
    "odd_batches",
    "odd_prompts",
    "plain_images",
    "sizes",
    "video",
]
