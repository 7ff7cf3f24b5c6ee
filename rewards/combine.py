"""Several rewards for one batch of images: weights, normalisation, and scores that are missing.

A failed score is missing, never zero; a reward that breaks its contract ends the run at once:

===============================================  =====================================================================
the reward gives ``None`` for a sample           that score is missing
the reward raises for a batch                    each image is scored alone; those that still raise are missing
an image holds NaN or inf                        it is shown to no reward; its scores are missing
another number of scores, NaN, inf, no number    ValueError with the reward's name
===============================================  =====================================================================

Letters: B samples, T frames.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsteer.rewards.types import Reward, Scores, Values

logger = logging.getLogger(__name__)

SCORE = "score"
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
        names = [name for name, _, _ in entries]
        for name, reward, weight in entries:
            if not name or "/" in name or names.count(name) > 1:
                raise ValueError(f"the reward name {name!r} must be its own, not empty, and without '/'; got {names}")
            if name == "total":
                raise ValueError("the reward name 'total' stands for the weighted sum; choose another")
            if not callable(reward):
                raise ValueError(f"reward {name!r} is a {type(reward).__name__}, which cannot be called")
            if not math.isfinite(weight):
                raise ValueError(f"reward {name!r} has the weight {weight}; it must be a finite number")
        if not any(weight for _, _, weight in entries):
            raise ValueError(f"of the rewards {names}, at least one needs a weight that is not 0")
        normalise = dict(normalise or {})
        unknown = sorted(set(normalise) - set(names))
        if unknown:
            raise ValueError(f"normalise names {', '.join(unknown)}, which is not among the rewards {names}")
        self.rewards: dict[str, Reward] = {name: reward for name, reward, _ in entries}
        self.weights: dict[str, float] = {name: weight for name, _, weight in entries}
        self.normalise: dict[str, Normalise] = {name: normalise.get(name, Normalise()) for name in names}

    @torch.no_grad()
    def score(
        self, images: Tensor, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> Scores:
        """Score one rollout batch.

        Args:
            images: float [B, 3, H, W] or [B, T, 3, H, W] in [0, 1]; rounded once to 8 bits, before all rewards.
            prompts: B texts.
            columns: the prompt file's other columns, B values each.

        Returns:
            Scores: ``total`` is the weighted sum of the rewards' normalised scores, missing where that of a reward with a
            weight is missing. ``parts[name]`` is each reward's own normalised score, without its weight;
            ``parts["name/part"]`` a part of it as the reward gave it.

        Raises:
            ValueError: images, prompts and columns do not fit together, or a reward breaks its contract.
        """
        columns = columns or {}
        _check_batch(images, prompts, columns)
        size = len(images)
        broken = ~torch.isfinite(images).flatten(1).all(1)  # [B]
        rows: list[int] = torch.nonzero(~broken).flatten().tolist()
        pixels = to_uint8(images[rows] if len(rows) < size else images)
        batch = _Batch(
            pixels=pixels,
            prompts=[prompts[row] for row in rows],
            columns={name: [values[row] for row in rows] for name, values in columns.items()},
        )
        reasons: dict[int, list[str]] = {
            row: ["the image holds NaN or inf"] for row in torch.nonzero(broken).flatten().tolist()
        }
        parts: dict[str, Tensor] = {}
        total = torch.zeros(size, dtype=torch.float64)
        for name, reward in self.rewards.items():
            answer = _ask(name, reward, batch)
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
        return Scores(
            total=total.float(),
            parts=parts,
            failures={row: "; ".join(texts) for row, texts in sorted(reasons.items())},
        )


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
class _Batch:
    """What a reward is shown."""

    pixels: np.ndarray  # uint8 [B, H, W, 3] or [B, T, H, W, 3]
    prompts: list[str]  # B
    columns: dict[str, list[Any]]  # B each

    def __len__(self) -> int:
        return len(self.prompts)

    def one(self, place: int) -> _Batch:
        """The batch that has only this sample."""
        return _Batch(
            pixels=self.pixels[place : place + 1],
            prompts=[self.prompts[place]],
            columns={name: [values[place]] for name, values in self.columns.items()},
        )

    def shown_to(self, reward: Reward) -> Any:
        """The reward's answer, as it comes. It gets a copy: what it does to the images, the next one does not see."""
        return reward(
            self.pixels.copy(), list(self.prompts), **{name: list(values) for name, values in self.columns.items()}
        )


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What a reward said of a batch."""

    parts: dict[str, list[float]]  # name -> B, NaN where missing; "score" is always there
    failures: dict[int, str] = field(default_factory=dict)  # place -> why its score is missing


def _check_images(images: Tensor) -> None:
    if images.dim() not in (4, 5) or images.shape[-3] != 3 or not images.is_floating_point():
        raise ValueError(
            "images must be floats [B, 3, H, W] or [B, T, 3, H, W], got "
            f"{images.dtype} of the shape {tuple(images.shape)}"
        )


def _check_batch(images: Tensor, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
    _check_images(images)
    size = len(images)
    if len(prompts) != size:
        raise ValueError(f"{size} images need {size} prompts, got {len(prompts)}")
    for name, values in columns.items():
        if name in ("images", "prompts"):
            raise ValueError(f"a column may not be called {name!r}: rewards get the {name} under that name; rename it")
        if len(values) != size:
            raise ValueError(f"column {name!r} has {len(values)} values for {size} images")


def _ask(name: str, reward: Reward, batch: _Batch) -> _Answer:
    """The reward's answer for the batch; where it raises, its answers image by image."""
    if not len(batch):
        return _Answer(parts={SCORE: []})
    try:
        given = batch.shown_to(reward)
    except Exception as error:  # whatever a plug-in raises, the run goes on without those scores
        logger.warning("reward %r failed on a batch of %d: %s", name, len(batch), _text(error))
        return _ask_one_by_one(name, reward, batch, error)
    return _read(name, given, len(batch))


def _ask_one_by_one(name: str, reward: Reward, batch: _Batch, first: Exception) -> _Answer:
    """Find the images that the reward fails on. A connection that is down is no image's fault: then all are missing."""
    answers: list[_Answer] = []
    for place in range(len(batch)):
        if len(batch) == 1 or isinstance(first, ConnectionError | TimeoutError):
            answers.append(_failed(first))
            continue
        alone = batch.one(place)
        try:
            given = alone.shown_to(reward)
        except Exception as error:  # this image's score is missing, with the reason
            answers.append(_failed(error))
            continue
        answers.append(_read(name, given, 1))
    names = dict.fromkeys(part for answer in answers for part in answer.parts)
    return _Answer(
        parts={part: [answer.parts.get(part, [math.nan])[0] for answer in answers] for part in names},
        failures={place: reason for place, answer in enumerate(answers) for reason in answer.failures.values()},
    )


def _failed(error: Exception) -> _Answer:
    return _Answer(parts={SCORE: [math.nan]}, failures={0: f"raised {_text(error)}"})


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _read(name: str, given: Any, size: int) -> _Answer:
    """Hold an answer to the contract: B finite numbers or None, for the score and for each part."""
    parts = dict(given) if isinstance(given, Mapping) else {SCORE: given}
    if SCORE not in parts:
        raise ValueError(f"reward {name!r} gave the parts {list(parts)}; one of them must be called {SCORE!r}")
    numbers = {
        part: _numbers(name if part == SCORE else f"{name}/{part}", values, size) for part, values in parts.items()
    }
    missing = [place for place, value in enumerate(numbers[SCORE]) if math.isnan(value)]
    return _Answer(parts=numbers, failures=dict.fromkeys(missing, "gave no score (None)"))


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


__all__ = ["Normalise", "RewardSet", "to_uint8"]
