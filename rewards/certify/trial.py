"""A reward under examination: the ways in which the checks of ``flowsteer.rewards.certify.checks`` ask it.

Everything is said in pairs of a row of the trial's images and a row of its prompts, so that an image can be scored under
another's prompt, and any batch can be held against the scores of its pairs alone.

Letters: B images of the trial, N images of one call.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from flowsteer.rewards.certify.inputs import with_trial_columns
from flowsteer.rewards.contract import SCORE, is_groupwise, read_answer
from flowsteer.rewards.functions import FunctionReward
from flowsteer.rewards.types import Reward

Pair = tuple[int, int]  # the row of the image, the row of the prompt and its columns
Confusion = Literal["order", "pairing", "all against all", "batch"]

# Of the spread of the trial's scores. Learning divides by a group's deviation, so this moves an advantage by about as much,
# far below what it is worth; float32 networks give 1e-6 between batch sizes. Half precision needs more, about 1e-2.
TOLERANCE = 1e-4
# Of the largest score, for scores that differ little beside their size: some steps of float32, which are 1e-7.
ROUNDING = 1e-6
# Of a share of few things, and of a scale from 0 to 100. By chance another number is within ROUNDING of one once in 160.
LARGEST_DENOMINATOR = 100


class Refused(Exception):
    """The reward breaks the contract; the text says how, and what it should do."""


class Suspected(Exception):
    """The check found what is a fault of most rewards but may be meant; the text says what. The certificate only warns."""


class NotApplicable(Exception):
    """The check says nothing about this reward; the text says why."""


class Trial:
    """A reward under examination, and the ways in which the checks ask it.

    Every call gets copies, so that a reward that writes into its arguments spoils no other check.
    """

    def __init__(
        self,
        make: Callable[[], Reward],
        *,
        name: str,
        images: np.ndarray,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        uses_prompt: bool | None,
        tolerance: float,
        folder: Path | None = None,
    ) -> None:
        self.make, self.name, self.images, self.prompts = make, name, images, list(prompts)
        self._given, self._folder = columns, folder
        self.relative_tolerance = tolerance
        self.settings = process_settings()  # before the reward is made
        self._declared_use = uses_prompt
        self._made: list[Reward] = []
        self._alone: dict[Pair, float] = {}

    def new(self) -> Reward:
        """Another instance; `close` ends it."""
        self._made.append(self.make())
        return self._made[-1]

    def close(self) -> None:
        """End what the instances hold open, as the end of a run does."""
        with ExitStack() as all_of_them:  # also after one that raises
            for reward in self._made:
                all_of_them.callback(getattr(reward, "close", lambda: None))

    @functools.cached_property
    def reward(self) -> Reward:
        """The instance that most checks ask."""
        return self.new()

    @functools.cached_property
    def columns(self) -> dict[str, list[Any]]:
        """What the reward gets besides images and prompts: B values each, with pixels of the pictures that it declares."""
        return with_trial_columns(self.name, self.reward, self.images, self._given, self._folder)

    @functools.cached_property
    def other(self) -> Reward:
        """A second instance."""
        return self.new()

    @property
    def target(self) -> Any:
        """What its author wrote: the function in the adapter for TRL, else the reward itself."""
        return self.reward.function if isinstance(self.reward, FunctionReward) else self.reward

    @functools.cached_property
    def groupwise(self) -> bool:
        """Whether each call gets exactly one group."""
        return is_groupwise(self.reward)

    @functools.cached_property
    def uses_prompt(self) -> bool:
        """Whether the prompt must matter."""
        return getattr(self.reward, "uses_prompt", True) if self._declared_use is None else self._declared_use

    @property
    def fingerprint(self) -> dict[str, Any]:
        """As the reward declares it; empty where it declares none, or none that is a mapping."""
        given = getattr(self.reward, "fingerprint", None)
        return dict(given) if isinstance(given, Mapping) else {}

    @property
    def inputs(self) -> str:
        """Hash of the images, prompts and columns; without those that only the reward could tell if it was never made."""
        columns = self.columns if "columns" in vars(self) else {name: list(own) for name, own in self._given.items()}
        text = json.dumps([self.images.shape, self.prompts, columns], default=_text_of)
        return hashlib.sha256(self.images.tobytes() + text.encode()).hexdigest()

    def arguments(self, pairs: Sequence[Pair]) -> tuple[np.ndarray, list[str], dict[str, list[Any]]]:
        """Copies of the images [N, H, W, 3], prompts and columns of N pairs."""
        columns = {name: [copied(values[row]) for _, row in pairs] for name, values in self.columns.items()}
        return self.images[[row for row, _ in pairs]], [self.prompts[row] for _, row in pairs], columns

    def read(self, given: Any, size: int) -> np.ndarray:
        """Scores [N], NaN where missing, of an answer that keeps the contract."""
        try:
            return np.array(read_answer(self.name, given, size).parts[SCORE], dtype=np.float64)
        except ValueError as error:
            raise Refused(str(error)) from error

    def ask(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        reward: Reward | None = None,
    ) -> np.ndarray:
        """Scores [N] of images of one's own."""
        return self.read((reward or self.reward)(images, prompts, **columns), len(prompts))

    def score(self, pairs: Sequence[Pair], reward: Reward | None = None) -> np.ndarray:
        """Scores [N] of pairs of the trial, in one call."""
        images, prompts, columns = self.arguments(pairs)
        return self.read((reward or self.reward)(images, prompts, **columns), len(pairs))

    def alone(self, pair: Pair) -> float:
        """The score of a pair in a call of its own; asked once."""
        if pair not in self._alone:
            self._alone[pair] = float(self.score([pair])[0])
        return self._alone[pair]

    def under_prompt(self, image: int, row: int) -> float:
        """The score of an image alone, with its own columns, under the prompt of another row."""
        if not self.columns:
            return self.alone((image, row))
        images, _, columns = self.arguments([(image, image)])
        return float(self.ask(images, [self.prompts[row]], columns)[0])

    @property
    def rows(self) -> list[Pair]:
        """Each image with its own prompt; of a groupwise reward all images as one group under the first prompt."""
        return [(row, 0 if self.groupwise else row) for row in range(len(self.images))]

    @functools.cached_property
    def own(self) -> np.ndarray:
        """The scores that everything else is compared with [B]: each pair alone, or the whole group."""
        return self.score(self.rows) if self.groupwise else np.array([self.alone(pair) for pair in self.rows])

    @functools.cached_property
    def scored(self) -> list[int]:
        """The rows whose score is not missing."""
        return np.flatnonzero(np.isfinite(self.own)).tolist()

    @property
    def samples(self) -> list[Pair]:
        """Up to four pairs that have a score, of different prompts first."""
        first: dict[str, int] = {}
        for row in self.scored:
            first.setdefault(self.prompts[row], row)
        order = dict.fromkeys([*first.values(), *self.scored])
        return [self.rows[row] for row in order][:4]

    @functools.cached_property
    def tolerance(self) -> float:
        """What two scores may differ by and still be equal."""
        found = self.own[self.scored]
        return float(self.relative_tolerance * np.ptp(found) + ROUNDING * np.abs(found).max()) if len(found) else 0.0

    @functools.cached_property
    def real_valued(self) -> bool:
        """Whether most scores are no shares of few things: none of 0, 0.5 and 1, of won comparisons, of right letters."""
        found = np.abs(self.own[self.scored])
        shares = found[found > 0] / found.max(initial=0)
        coarse = [abs(Fraction(share).limit_denominator(LARGEST_DENOMINATOR) - share) <= ROUNDING for share in shares]
        return 2 * sum(coarse) < len(coarse)

    def same(self, first: Any, second: Any) -> bool:
        """Whether scores are equal up to float noise, and missing in the same places."""
        return np.allclose(first, second, rtol=0, atol=self.tolerance, equal_nan=True)

    @functools.cached_property
    def confusions(self) -> list[tuple[Confusion, str]]:
        """What goes wrong when pairs are scored together instead of alone, and in which batches."""
        rows, four = self.rows, self.samples
        shuffled = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
        batches = {
            "the whole batch": [rows],
            "the whole batch, shuffled": [shuffled],
            "batches of 2": [rows[start : start + 2] for start in range(0, len(rows), 2)],
            "batches of 7": [rows[start : start + 7] for start in range(0, len(rows), 7)],
            "every image twice": [rows + rows],
        }
        # in these, images in another order look like prompts in another order: they count where all is well in the others
        alike = {
            "one prompt for all images": [[(image, four[0][1]) for image, _ in four]],
            "one image for all prompts": [[(four[0][0], prompt) for _, prompt in four]],
        }
        return self._confusions(batches) or self._confusions(alike)

    def _confusions(self, batches: Mapping[str, Sequence[Sequence[Pair]]]) -> list[tuple[Confusion, str]]:
        found: list[tuple[Confusion, str]] = []
        for label, calls in batches.items():
            kinds: set[Confusion | None] = {self._confusion(pairs) for pairs in calls}
            found.extend((kind, label) for kind in kinds if kind is not None)
        return found

    def _confusion(self, pairs: Sequence[Pair]) -> Confusion | None:
        """How the scores of one call differ from those of each pair alone."""
        got, want = self.score(pairs), np.array([self.alone(pair) for pair in pairs])
        if self.same(got, want):
            return None
        if self.same(np.sort(got), np.sort(want)):
            return "order"
        others = list(dict.fromkeys(pairs))
        kinds: list[set[Confusion]] = []
        for place in [place for place in range(len(pairs)) if not self.same(got[place], want[place])][:4]:
            image, prompt = pairs[place]
            by_prompt = [self.alone((image, other)) for _, other in others]
            by_image = [self.alone((other, prompt)) for other, _ in others]
            kinds.append(set())
            if any(self.same(got[place], value) for value in by_prompt + by_image):
                kinds[-1].add("pairing")
            if any(self.same(got[place], np.mean(values)) for values in (by_prompt, by_image)):
                kinds[-1].add("all against all")
        common = set.intersection(*kinds)
        return "pairing" if "pairing" in common else "all against all" if common else "batch"


def copied(value: Any) -> Any:
    """A value of a column, as a reward may change it."""
    return value.copy() if isinstance(value, np.ndarray) else value


def _text_of(value: Any) -> str:
    """What stands for a value that is no JSON in a hash."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    return str(value)


def largest_difference(first: np.ndarray, second: np.ndarray) -> str:
    """Where two lists of scores differ most, in words."""
    distance = np.abs(first - second)
    distance[np.isnan(first) != np.isnan(second)] = np.inf
    row = int(np.nanargmax(distance))
    said = ["None" if np.isnan(score) else f"{score:.6g}" for score in (first[row], second[row])]
    return f"image {row} has {said[0]} against {said[1]}"


def process_settings() -> dict[str, Any]:
    """What of the process a reward has no business to change."""
    cudnn: Any = torch.backends.cudnn
    return {
        "working folder": os.getcwd(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's default type": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's float32 matmul precision": _value_of(torch.get_float32_matmul_precision),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn.benchmark": cudnn.benchmark,
        "cudnn.deterministic": cudnn.deterministic,
        "cudnn.allow_tf32": _value_of(lambda: cudnn.allow_tf32),
    }


def _value_of(setting: Callable[[], Any]) -> Any:
    """The setting, or why torch does not tell it: since somebody set it by its new names and by the old ones."""
    try:
        return setting()
    except RuntimeError as error:
        return error_text(error)


def error_text(error: BaseException) -> str:
    """An exception's type and words."""
    return f"{type(error).__name__}: {error}"


__all__ = [
    "ROUNDING",
    "TOLERANCE",
    "NotApplicable",
    "Pair",
    "Refused",
    "Suspected",
    "Trial",
    "copied",
    "error_text",
    "largest_difference",
    "process_settings",
]
