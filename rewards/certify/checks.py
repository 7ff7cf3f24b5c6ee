"""The checks that make a certificate, one function each: what it found, or `Refused`, `Suspected` or `NotApplicable`.

Those that hand it odd inputs are in ``odd.py``, those that look for what it does not look at in ``sight.py``; a second
process is in ``process.py``, thousands of pictures in ``many.py``, how it behaves in its process in ``manners.py``. From
outside nothing proves that threads never disturb each other; `threads` makes it likely. A reward that hangs makes these
hang: deadlines are the matter of ``flowsteer.rewards.hosts``.

Letters: B images of the trial, N images of one call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from flowsteer.rewards.certify.manners import changes, inputs_untouched, no_gradient, speed, surroundings, threads
from flowsteer.rewards.certify.many import many_pictures
from flowsteer.rewards.certify.odd import (
    grey_levels,
    impossible_images,
    missing_pictures,
    odd_batches,
    odd_prompts,
    plain_images,
    sizes,
    video,
)
from flowsteer.rewards.certify.process import another_process
from flowsteer.rewards.certify.sight import (
    levels,
    other_shapes,
    remembers,
    sees_the_columns,
    whole_picture,
    words_of_the_prompt,
)
from flowsteer.rewards.certify.trial import (
    Confusion,
    NotApplicable,
    Refused,
    Trial,
    error_text,
    largest_difference,
    process_settings,
)
from flowsteer.rewards.columns import example_line, required_columns
from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.functions import name_of

CheckFunction = Callable[[Trial], str]


def load(trial: Trial) -> str:
    """It can be made, and making it leaves the process as it is."""
    started = time.perf_counter()
    kind = type(trial.reward).__name__
    changed = changes(trial.settings, process_settings())
    if changed:
        raise Refused(f"the constructor changes {', '.join(changed)}, on which the training beside it depends")
    return f"{kind} is ready after {time.perf_counter() - started:.2f} s"


def answer(trial: Trial) -> str:
    """B finite numbers or None; the reward can judge the trial's images."""
    whole = trial.score(trial.rows)
    found = trial.own[trial.scored]
    if len(found) < 4:
        raise Refused(
            f"only {len(found)} of {len(whole)} images got a score, the others None: nothing can be said; give images and "
            "prompts that this reward judges"
        )
    missing = f", {len(whole) - len(found)} missing (None)" if len(found) < len(whole) else ""
    zeros = f", {np.sum(found == 0)} of {len(found)} are exactly 0" if not found.all() else ""
    return f"{len(found)} scores from {found.min():.6g} to {found.max():.6g}{zeros}{missing}"


def fingerprint(trial: Trial) -> str:
    """A mapping that JSON gives back unchanged, since it is kept with a run and compared later."""
    given = getattr(trial.reward, "fingerprint", None)
    if given is None:
        raise NotApplicable("declares none")
    if not isinstance(given, Mapping):
        raise Refused(f"fingerprint is a {type(given).__name__}; it must be a mapping of names to texts and numbers")
    try:
        kept = json.loads(json.dumps(trial.fingerprint, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise Refused(f"JSON cannot hold the fingerprint: {error}; give texts and finite numbers") from error
    changed = [str(name) for name, value in trial.fingerprint.items() if kept.get(name) != value]
    if changed:
        raise Refused(f"JSON gives back something else for {', '.join(changed)}; give names, texts, numbers and lists")
    return f"declares {', '.join(kept)}"


def call(trial: Trial) -> str:
    """(images, prompts, **columns), by position or by name, with columns that it has never heard of."""
    missing = [name for name in required_columns(trial.reward) if name not in trial.columns]
    if missing:
        named = ", ".join(map(repr, missing))
        raise Refused(
            f"requires the column {named}, which these inputs lack. Give pictures of your own with --images DIR: a folder "
            f"whose metadata.jsonl has a line for each, {example_line('file_name', ['prompt', *missing])}; in Python, "
            f"certify(..., images=, prompts=, columns=). If it can do without {named}, give the argument a default value"
        )
    images, prompts, columns = trial.arguments(trial.rows)
    columns["a_column_of_another_reward"] = [None] * len(prompts)
    trial.reward(images=images.copy(), prompts=list(prompts), **columns)
    try:
        trial.reward(images, prompts, **columns)
    except Exception as error:
        raise Refused(
            "answers reward(images=..., prompts=...) but not reward(images, prompts): are its arguments in the other order? It "
            f"raised {error_text(error)}"
        ) from error
    return "takes (images, prompts, **columns)"


def order(trial: Trial) -> str:
    """The score of each image stands at that image's row."""
    if trial.groupwise:
        places = np.random.default_rng(0).permutation(len(trial.rows))
        shuffled = trial.score([trial.rows[place] for place in places])
        if not trial.same(shuffled, trial.own[places]):
            raise Refused("a group in another order gets other scores: each score must stay with its image")
        return "a shuffled group gets the shuffled scores"
    _refuse_confusion(trial, "order", "the scores are the right ones, but at the rows of other images")
    return "each score stands at its image's row, shuffled or not"


def pairing(trial: Trial) -> str:
    """Each image is scored with the prompt of its own row."""
    _pointwise_only(trial, "a group has one prompt")
    _refuse_confusion(trial, "pairing", "images are scored with the prompts of other rows")
    return "each image is scored with its own prompt"


def all_against_all(trial: Trial) -> str:
    """No score is a mean over the matrix of all images and all prompts."""
    _pointwise_only(trial, "a group has one prompt")
    text = "a score is the mean of its image over all prompts, or of its prompt over all images; take the diagonal"
    _refuse_confusion(trial, "all against all", text)
    return "no score mixes prompts"


def determinism(trial: Trial) -> str:
    """The same call gives the same scores, also to a second instance."""
    first = trial.score(trial.rows)
    for who, reward in (("the same instance, asked again,", trial.reward), ("a second instance", trial.other)):
        other = trial.score(trial.rows, reward)
        if not trial.same(first, other):
            again = " in another order" if trial.same(np.sort(first), np.sort(other)) else ""
            raise Refused(f"{who} gives other scores{again}: {largest_difference(first, other)}")
    return "two calls and two instances agree"


def batch_independence(trial: Trial) -> str:
    """A score depends neither on the size of its batch nor on what else is in it."""
    _pointwise_only(trial, "its scores are relative to the group")
    text = "scores differ from those of each pair alone; they may depend on their own image and prompt only"
    _refuse_confusion(trial, "batch", text)
    return f"1, 2, 7 and {len(trial.rows)} at a time agree to {trial.tolerance:.1e}"


def duplicates(trial: Trial) -> str:
    """One pair twice in a call gets one score twice."""
    first, second = np.split(trial.score(trial.rows + trial.rows), 2)
    if not trial.same(first, second):
        raise Refused(
            f"the same image and prompt twice in one call get two scores: {largest_difference(first, second)}"
        )
    return "equal images get equal scores"


def silent_zero(trial: Trial) -> str:
    """No zeros as of a failure that nobody noticed: not all scores, nor all under one prompt where others are real numbers.

    A single 0 says nothing: a picture may show nothing of what was asked for. A 0 for each image, whatever it shows, where
    other scores are no coarse shares (`Trial.real_valued`), is the prompt's, and most likely an error's.
    """
    if not np.any(trial.own[trial.scored]):
        raise Refused(
            f"all {len(trial.scored)} scores are exactly 0, as of a reward that swallows its errors; raise, or answer None "
            "for what cannot be scored. If 0 is right, give images and prompts that earn more"
        )
    if trial.real_valued and not trial.groupwise:
        for prompt, row in {trial.prompts[row]: row for row in np.flatnonzero(trial.own == 0).tolist()}.items():
            scores = trial.score([(image, row) for image, _ in trial.rows])
            if np.any(scores == 0) and not np.any(scores[np.isfinite(scores)]):
                raise Refused(
                    f"each image scores exactly 0 under the prompt {prompt[:60]!r}, while other scores are real numbers: as "
                    "of a reward that swallows its errors; raise, or answer None for what cannot be scored. If 0 is right, "
                    "give an image that earns more under this prompt"
                )
    return "the scores are not all 0"


def sees_the_image(trial: Trial) -> str:
    """Another image under the same prompt gets another score."""
    if not np.any(trial.own[trial.scored]):
        raise NotApplicable("all scores are 0")
    effect = float(np.ptp(trial.own)) if trial.groupwise else _largest_spread(_matrix(trial).T)
    if not effect > trial.tolerance:
        raise Refused(
            f"the image makes no difference: {trial.own[trial.scored[0]]:.6g} for each, under the same prompt"
        )
    return f"under one prompt the image moves the score by up to {effect:.4g}"


def sees_the_prompt(trial: Trial) -> str:
    """Another prompt for the same image gives another score, unless the reward declares that the prompt plays no part."""
    if not np.any(trial.own[trial.scored]):
        raise NotApplicable("all scores are 0")
    prompts = {prompt: row for row, prompt in enumerate(trial.prompts)}
    if len(prompts) == 1:
        raise NotApplicable("all images have the same prompt")
    if trial.groupwise:
        images, own, columns = trial.arguments(trial.rows)
        asked = [trial.ask(images.copy(), [prompt] * len(own), columns) for prompt in list(prompts)[:4]]
        effect = _largest_spread(np.stack(asked, axis=1))
    else:
        pairs = trial.samples
        effect = _largest_spread(np.array([[trial.under_prompt(image, row) for _, row in pairs] for image, _ in pairs]))
    seen = effect > trial.tolerance
    if seen and not trial.uses_prompt:
        raise Refused(f"declares uses_prompt = False, but the prompt moves the score by up to {effect:.4g}")
    if not seen and trial.uses_prompt:
        if trial.columns and not trial.groupwise and _largest_spread(_matrix(trial)) > trial.tolerance:
            raise NotApplicable("the columns make a difference, the prompt without them makes none")
        raise Refused(
            "the prompt makes no difference; if that is meant, declare uses_prompt = False: as a line of the class, or of a "
            f"function as an attribute, `{name_of(trial.target)}.uses_prompt = False` below it"
        )
    return f"for one image the prompt moves the score by up to {effect:.4g}" if seen else "plays no part, as declared"


def as_the_trainer_asks(trial: Trial) -> str:
    """Asked by way of float images k / 255, which reach the reward as exactly k, it gives the same scores."""
    images, prompts, columns = trial.arguments(trial.rows)
    floats = torch.from_numpy(images).movedim(-1, -3) / 255
    scores = RewardSet([("reward", trial.reward, 1.0)]).score(floats, prompts, columns)
    total = scores.total.double().numpy()
    directly = trial.score(trial.rows)
    if not trial.same(total, directly):
        why = "; ".join(dict.fromkeys(scores.failures.values()))
        raise Refused(f"other scores than when it is asked directly: {largest_difference(total, directly)}. {why}")
    return "the same scores by way of float images and a reward set"


CHECKS: dict[str, CheckFunction] = {
    "load": load,
    "call": call,
    "answer": answer,
    "fingerprint": fingerprint,
    "order": order,
    "pairing": pairing,
    "all against all": all_against_all,
    "determinism": determinism,
    "batch independence": batch_independence,
    "duplicates": duplicates,
    "silent zero": silent_zero,
    "sees the image": sees_the_image,
    "sees the prompt": sees_the_prompt,
    "words of the prompt": words_of_the_prompt,
    "sees the columns": sees_the_columns,
    "whole picture": whole_picture,
    "other shapes": other_shapes,
    "levels": levels,
    "remembers": remembers,
    "odd batches": odd_batches,
    "sizes": sizes,
    "plain images": plain_images,
    "video": video,
    "grey levels": grey_levels,
    "as the trainer asks": as_the_trainer_asks,
    "odd prompts": odd_prompts,
    "missing pictures": missing_pictures,
    "impossible images": impossible_images,
    "inputs untouched": inputs_untouched,
    "surroundings": surroundings,
    "no gradient": no_gradient,
    "threads": threads,
    "another process": another_process,
    "many pictures": many_pictures,
    "speed": speed,
}
GATES = ("load", "call", "answer", "determinism")  # the checks after these compare scores


def _pointwise_only(trial: Trial, reason: str) -> None:
    if trial.groupwise:
        raise NotApplicable(f"the reward is groupwise: {reason}")


def _refuse_confusion(trial: Trial, kind: Confusion, text: str) -> None:
    where = [label for found, label in trial.confusions if found == kind]
    if where:
        raise Refused(f"{text} ({'; '.join(where)})")


def _matrix(trial: Trial) -> np.ndarray:
    """Scores of up to four images (rows) under each of their prompts."""
    pairs = trial.samples
    return np.array([[trial.alone((image, prompt)) for _, prompt in pairs] for image, _ in pairs])


def _largest_spread(scores: np.ndarray) -> float:
    """The largest difference inside a row, missing ones aside; 0 where no row has two."""
    rows = [row[np.isfinite(row)] for row in scores]
    return max((float(np.ptp(row)) for row in rows if len(row)), default=0.0)


__all__ = ["CHECKS", "GATES", "CheckFunction"]
