"""Several rewards for one batch of images: weights, normalisation, and scores that are missing.

A failed score is missing, never zero; a reward that breaks its contract ends the run at once:

===============================================  =====================================================================
the reward gives ``None`` for a sample           that score is missing
the reward raises for a batch                    each image is scored alone; those that still raise are missing
a groupwise reward raises for a group            all scores of that group are missing
a connection fails or a deadline passes          all scores of that batch are missing
an image holds NaN or inf                        it is shown to no reward; its scores are missing
another number of scores, NaN, inf, no number    ValueError with the reward's name
===============================================  =====================================================================

Letters: B samples, T frames.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsteer.rewards.types import Reward, Scores, Values

logger = logging.getLogger(__name__)

SCORE = "score"
NO_SCORE = "gave no score (None)"
RANGE_TOLERANCE = 1e-2  # rounding of a half-precision decoder beyond [0, 1]; an image in [-1, 1] is far outside


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """``(score - offset) * scale``, constants of a reward: a sample's score may not depend on its batch.

    PickScore, whose scores are about 18 to 24, is usually given ``scale = 1 / 26``.
    """

    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and math.isfinite(self.offset)) or self.scale == 0:
            raise ValueError(
                "a reward's scale and offset must be finite and the scale not 0, got "
                f"scale={self.scale} offset={self.offset}"
            )


def check_names_and_weights(rewards: Sequence[tuple[str, float]]) -> None:
    """Raise ValueError for names or weights that no set of rewards can have; asked before anything heavy is loaded."""
    names = [name for name, _ in rewards]
    for name, weight in rewards:
        if not name or "/" in name:
            raise ValueError(f"the reward name {name!r} must not be empty, and without '/'; got {names}")
        if names.count(name) > 1:
            raise ValueError(f"the reward name {name!r} must be its own: metrics are told apart by it; got {names}")
        if name == "total":
            raise ValueError("the reward name 'total' stands for the weighted sum; choose another")
        if not math.isfinite(weight):
            raise ValueError(f"reward {name!r} has the weight {weight}; it must be a finite number")
    if not any(weight for _, weight in rewards):
        raise ValueError(f"of the rewards {names}, at least one needs a weight that is not 0")


class RewardSet:
    """The rewards of a run with their weights.

    Args:
        rewards: (name, reward, weight) each. A weight may be negative; 0 only reports. Names are distinct, without ``/``.
        normalise: constants by name, for the rewards that want some.

    Raises:
        ValueError: no reward with a weight, a name twice or with ``/``, a weight that is no number, constants for a name
            that is not there.
    """

    def __init__(
        self, rewards: Iterable[tuple[str, Reward, float]], *, normalise: Mapping[str, Normalise] | None = None
    ) -> None:
        entries = list(rewards)
        check_names_and_weights([(name, weight) for name, _, weight in entries])
        names = [name for name, _, _ in entries]
        for name, reward, _ in entries:
            if not callable(reward):
                raise ValueError(f"reward {name!r} is a {type(reward).__name__}, which cannot be called")
        normalise = dict(normalise or {})
        unknown = sorted(set(normalise) - set(names))
        if unknown:
            raise ValueError(f"normalise names {', '.join(unknown)}, which is not among the rewards {names}")
        self.rewards: dict[str, Reward] = {name: reward for name, reward, _ in entries}
        self.weights: dict[str, float] = {name: weight for name, _, weight in entries}
        self.normalise: dict[str, Normalise] = {name: normalise.get(name, Normalise()) for name in names}

    @property
    def groupwise(self) -> tuple[str, ...]:
        """Names of the rewards that compare the images of a group."""
        return tuple(name for name, reward in self.rewards.items() if is_groupwise(reward))

    @property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """What each reward's scores depend on besides its options, as far as it says so; as JSON would give it back.

        Raises ValueError for one that JSON cannot hold.
        """
        said = {}
        for name, reward in self.rewards.items():
            try:
                text = json.dumps(dict(getattr(reward, "fingerprint", None) or {}), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"the fingerprint of reward {name!r} must map names to texts and finite numbers: {error}"
                ) from error
            said[name] = json.loads(text)
        return said

    def range_of(self, name: str) -> tuple[float, float] | None:
        """The lowest and the highest score that there can be, of ``total``, a reward or a part of it; None: not known.

        Known is what rewards say by their optional ``score_range``. As in `score`, normalised, but parts are not.
        """
        if name == "total":
            ends = [
                sorted((weight * known[0], weight * known[1])) if (known := self.range_of(own)) else None
                for own, weight in self.weights.items()
                if weight
            ]
            return None if None in ends else (sum(end[0] for end in ends if end), sum(end[1] for end in ends if end))
        own, _, part = name.partition("/")
        given = getattr(self.rewards[own], "score_range", None)
        if given is None:
            return None
        constants = Normalise() if part else self.normalise[own]
        low, high = sorted((float(end) - constants.offset) * constants.scale for end in given)
        return low, high

    def score(
        self,
        images: Tensor,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
        group: Sequence[int] | None = None,
    ) -> Scores:
        """Score one rollout batch.

        Args:
            images: float [B, 3, H, W] or [B, T, 3, H, W] in [0, 1]; rounded once to 8 bits, before all rewards.
            prompts: B texts.
            columns: the prompt file's other columns, B values each.
            group: which samples a groupwise reward compares, B numbers; None: those of equal prompts.

        Returns:
            Scores: ``total`` is the weighted sum of the rewards' normalised scores, missing where that of a reward with a
            weight is missing. ``parts[name]`` is each reward's own normalised score, without its weight;
            ``parts["name/part"]`` a part of it as the reward gave it.

        Raises:
            ValueError: images, prompts and columns do not fit together, or a reward breaks its contract.
        """
        batch = Batch.of(images, prompts, columns or {}, group)
        return self.combine(batch, {name: self.ask(name, batch) for name in self.rewards})

    @torch.no_grad()
    def ask(self, name: str, batch: Batch) -> Answer:
        """What one of the rewards says of a batch. Raises ValueError when it breaks its contract."""
        reward = self.rewards[name]
        answer = _join(_ask_each(name, reward, batch), batch) if is_groupwise(reward) else _ask(name, reward, batch)
        unexplained = [place for place, reason in answer.failures.items() if reason == NO_SCORE]
        if not unexplained:
            return answer
        known = unscorable_by(name, reward, [batch.prompts[place] for place in unexplained])
        why = {place: known[batch.prompts[place]] for place in unexplained if batch.prompts[place] in known}
        explained = {place: f"{NO_SCORE}: {reason}" for place, reason in why.items()}
        return replace(answer, failures=answer.failures | explained)

    def unscorable(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts that no image can be scored for, and why: prompt -> reason, with the reward's name.

        Asks the rewards with a weight that have the optional method `unscorable`; the others may still find nothing to say.
        Raises ValueError when the answer is no mapping of prompts to texts.
        """
        reasons: dict[str, list[str]] = {}
        for name, reward in self.rewards.items():
            if self.weights[name]:
                for prompt, reason in unscorable_by(name, reward, prompts).items():
                    reasons.setdefault(prompt, []).append(f"reward {name!r}: {reason}")
        return {prompt: "; ".join(reasons[prompt]) for prompt in dict.fromkeys(prompts) if prompt in reasons}

    def close(self) -> None:
        """Close the rewards that want to be, all of them, also where one raises."""
        with contextlib.ExitStack() as closing:
            for reward in self.rewards.values():
                close = getattr(reward, "close", None)
                if callable(close):
                    closing.callback(close)

    def combine(self, batch: Batch, answers: Mapping[str, Answer]) -> Scores:
        """The scores of a batch, from what each of the rewards said of it."""
        rows, size = batch.rows, batch.size
        reasons: dict[int, list[str]] = {
            row: ["the image holds NaN or inf"] for row in sorted(set(range(size)) - set(rows))
        }
        parts: dict[str, Tensor] = {}
        total = torch.zeros(size, dtype=torch.float64)
        for name in self.rewards:
            answer = answers[name]
            own = _spread(answer.parts[SCORE], rows, size)
            own = (own - self.normalise[name].offset) * self.normalise[name].scale
            if torch.isinf(own.float()).any():
                raise ValueError(f"reward {name!r} gave a score beyond what float32 holds; give it a smaller scale")
            parts[name] = own.float()
            for part, values in answer.parts.items():
                if part != SCORE:
                    parts[f"{name}/{part}"] = _spread(values, rows, size).float()
            if self.weights[name]:
                total = total + self.weights[name] * own
                for place, reason in answer.failures.items():
                    reasons.setdefault(rows[place], []).append(f"reward {name!r} {reason}")
            elif answer.failures:  # nothing is missing for want of a reward that only reports, so only the log says it
                some = next(iter(answer.failures.values()))
                logger.warning("reward %r, of weight 0, gave no score of %d: it %s", name, len(answer.failures), some)
        return Scores(
            total=total.float(),
            parts=parts,
            failures={row: "; ".join(texts) for row, texts in sorted(reasons.items())},
        )


def is_groupwise(reward: Reward) -> bool:
    """Whether each call of a reward gets the images of one group, to compare them: its class says ``groupwise = True``."""
    return getattr(reward, "groupwise", False) is True


def unscorable_by(name: str, reward: Reward, prompts: Sequence[str]) -> dict[str, str]:
    """What a reward's optional method ``unscorable(prompts)`` says, prompt -> reason; empty where it has none.

    Raises ValueError when the answer is no mapping of some of the prompts to texts.
    """
    ask = getattr(reward, "unscorable", None)
    if not callable(ask):
        return {}
    asked = dict.fromkeys(prompts)
    said: Any = ask(list(asked))
    if not isinstance(said, Mapping) or not all(
        key in asked and isinstance(reason, str) for key, reason in said.items()
    ):
        raise ValueError(
            f"reward {name!r}: unscorable(prompts) gave {said!r:.200}; it must map those of the prompts that cannot be "
            "scored to the reasons, as texts"
        )
    return dict(said)


def to_uint8(images: Tensor) -> np.ndarray:
    """Float [B, 3, H, W] or [B, T, 3, H, W] in [0, 1] to uint8 [B, H, W, 3] or [B, T, H, W, 3], rounded, not cut off.

    The same pixels as diffusers' ``numpy_to_pil``, so a reward sees what a user of the pipeline sees.

    Raises:
        ValueError: another shape, another type, or values outside [0, 1].
    """
    _check_images(images)
    if images.numel():
        low, high = (value.item() for value in torch.aminmax(images))
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
            raise ValueError(
                f"images must lie in [0, 1], got values from {low:.3g} to {high:.3g}; rescale what the decoder gives"
            )
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).contiguous().cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What the rewards are shown: the samples of a rollout batch whose images hold numbers only, R of B."""

    size: int  # B
    rows: list[int]  # R, their places in the rollout batch
    pixels: np.ndarray  # uint8 [R, H, W, 3] or [R, T, H, W, 3]
    prompts: list[str]  # R
    columns: dict[str, list[Any]]  # R each
    group: list[int]  # R

    @classmethod
    def of(
        cls,
        images: Tensor,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        group: Sequence[int] | None = None,
    ) -> Batch:
        """The arguments are `RewardSet.score`'s. Raises ValueError when they do not fit together."""
        _check_batch(images, prompts, columns, group)
        whole = torch.isfinite(images).flatten(1).all(1)  # [B]
        rows: list[int] = torch.nonzero(whole).flatten().tolist()
        known = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        numbers = [known[prompt] for prompt in prompts] if group is None else [int(own) for own in group]
        return cls(
            size=len(images),
            rows=rows,
            pixels=to_uint8(images[rows] if len(rows) < len(images) else images),
            prompts=[prompts[row] for row in rows],
            columns={name: [values[row] for row in rows] for name, values in columns.items()},
            group=[numbers[row] for row in rows],
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def groups(self) -> dict[int, list[int]]:
        """The places [R] of each group's samples, in order of appearance."""
        places: dict[int, list[int]] = {}
        for place, own in enumerate(self.group):
            places.setdefault(own, []).append(place)
        return places

    def some(self, places: Sequence[int]) -> Batch:
        """The batch that has only these samples."""
        return Batch(
            size=len(places),
            rows=list(range(len(places))),
            pixels=self.pixels[list(places)],
            prompts=[self.prompts[place] for place in places],
            columns={name: [values[place] for place in places] for name, values in self.columns.items()},
            group=[self.group[place] for place in places],
        )

    def shown_to(self, reward: Reward) -> Any:
        """The reward's answer, as it comes. It gets a copy: what it does to the images, the next one does not see."""
        return reward(
            self.pixels.copy(), list(self.prompts), **{name: list(values) for name, values in self.columns.items()}
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a reward said of a batch of R samples."""

    parts: dict[str, list[float]]  # name -> R, NaN where missing; "score" is always there
    failures: dict[int, str] = field(default_factory=dict)  # place -> why its score is missing


def _check_images(images: Tensor) -> None:
    if images.dim() not in (4, 5) or images.shape[-3] != 3 or not images.is_floating_point():
        raise ValueError(
            "images must be floats [B, 3, H, W] or [B, T, 3, H, W], got "
            f"{images.dtype} of the shape {tuple(images.shape)}"
        )


def _check_batch(
    images: Tensor, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], group: Sequence[int] | None
) -> None:
    _check_images(images)
    size = len(images)
    if group is not None and len(group) != size:
        raise ValueError(f"{size} images need {size} group numbers, got {len(group)}")
    if len(prompts) != size:
        raise ValueError(f"{size} images need {size} prompts, got {len(prompts)}")
    for name, values in columns.items():
        if name in ("images", "prompts"):
            raise ValueError(f"a column may not be called {name!r}: rewards get the {name} under that name; rename it")
        if len(values) != size:
            raise ValueError(f"column {name!r} has {len(values)} values for {size} images")


def _ask(name: str, reward: Reward, batch: Batch) -> Answer:
    """The reward's answer for the batch; where it raises, its answers image by image, or none of a group."""
    if not len(batch):
        return Answer(parts={SCORE: []})
    try:
        given = batch.shown_to(reward)
    except Exception as error:  # whatever a plug-in raises, the run goes on without those scores
        logger.warning("reward %r failed on a batch of %d: %s", name, len(batch), _text(error))
        # a connection that is down is no image's fault, and no image of a group can be judged alone
        if is_groupwise(reward) or len(batch) == 1 or isinstance(error, ConnectionError | TimeoutError):
            return failed(error, len(batch))
        alone = replace(batch, group=list(range(len(batch))))
        return _join(_ask_each(name, reward, alone), alone)
    return read_answer(name, given, len(batch))


def _ask_each(name: str, reward: Reward, batch: Batch) -> dict[int, Answer]:
    """The answers for the groups of a batch, asked one after another; all others are missing once a connection is down."""
    answers: dict[int, Answer] = {}
    down: Exception | None = None
    for group, places in batch.groups().items():
        own = batch.some(places)
        try:
            if down is not None:
                raise down
            given = own.shown_to(reward)
        except Exception as error:  # whatever a plug-in raises
            down = error if isinstance(error, ConnectionError | TimeoutError) else None
            answers[group] = failed(error, len(own))
        else:
            answers[group] = read_answer(name, given, len(own))
    return answers


def _join(answers: Mapping[int, Answer], batch: Batch) -> Answer:
    """The answers for the groups of a batch, by group, as one; a part that some do not have is missing there."""
    parts: dict[str, list[float]] = {SCORE: [math.nan] * len(batch)}
    failures: dict[int, str] = {}
    for group, places in batch.groups().items():
        answer = answers[group]
        for part, values in answer.parts.items():
            column = parts.setdefault(part, [math.nan] * len(batch))
            for place, value in zip(places, values):
                column[place] = value
        failures |= {places[own]: reason for own, reason in answer.failures.items()}
    return Answer(parts=parts, failures=dict(sorted(failures.items())))


def failed(error: Exception, size: int) -> Answer:
    """No score for any of ``size`` samples, because of an error."""
    return Answer(parts={SCORE: [math.nan] * size}, failures=dict.fromkeys(range(size), f"raised {_text(error)}"))


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def read_answer(name: str, given: Any, size: int) -> Answer:
    """Hold an answer to the contract: B finite numbers or None, for the score and for each part."""
    parts = dict(given) if isinstance(given, Mapping) else {SCORE: given}
    if SCORE not in parts:
        raise ValueError(f"reward {name!r} gave the parts {list(parts)}; one of them must be called {SCORE!r}")
    numbers = {
        part: _numbers(name if part == SCORE else f"{name}/{part}", values, size) for part, values in parts.items()
    }
    missing = [place for place, value in enumerate(numbers[SCORE]) if math.isnan(value)]
    return Answer(parts=numbers, failures=dict.fromkeys(missing, NO_SCORE))


def _numbers(name: str, values: Values, size: int) -> list[float]:
    """B finite numbers, NaN in place of None."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ValueError(
            f"reward {name!r} gave a {type(values).__name__}; expected a list of {size} numbers, one per image"
        )
    values = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else list(values)
    if not isinstance(values, list) or len(values) != size:
        got = len(values) if isinstance(values, list) else "a single number"
        raise ValueError(f"reward {name!r} gave {got} scores, expected {size}, one per image")
    numbers = []
    for place, value in enumerate(values):
        if value is None:
            numbers.append(math.nan)
            continue
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reward {name!r} gave {value!r} for image {place} of the batch; expected a number or None"
            ) from error
        if isinstance(value, str) or not math.isfinite(number):
            raise ValueError(
                f"reward {name!r} gave {value!r} for image {place} of the batch; a score is a finite number, "
                "or None where there is none"
            )
        numbers.append(number)
    return numbers


def _spread(values: list[float], rows: list[int], size: int) -> Tensor:
    """The values of some rows as float64 [B], NaN in the others."""
    spread = torch.full((size,), math.nan, dtype=torch.float64)
    spread[rows] = torch.tensor(values, dtype=torch.float64)
    return spread


__all__ = [
    "Answer",
    "Batch",
    "Normalise",
    "RewardSet",
    "check_names_and_weights",
    "failed",
    "is_groupwise",
    "read_answer",
    "to_uint8",
]
