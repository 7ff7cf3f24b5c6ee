"""Several rewards for one batch of images: weights, normalisation, and scores that are missing.

How one reward is asked, and what happens when it fails, is in contract.py.

Letters: B samples, T frames.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowsteer.rewards.columns import column_parameters
from flowsteer.rewards.contract import (
    NO_SCORE,
    SCORE,
    Answer,
    Shown,
    ask,
    ask_each,
    check_kind,
    is_groupwise,
    join,
    takes_videos,
    unscorable_by,
)
from flowsteer.rewards.frames import Frames, as_images, as_videos, is_video
from flowsteer.rewards.pictures import Kind, Picture, pictures_of
from flowsteer.rewards.types import Reward, Scores

logger = logging.getLogger(__name__)


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
            raise ValueError(f"the reward name {name!r} is used twice; metrics need distinct names; got {names}")
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
        columns: by name, what the reward calls a column -> what the prompt file calls it, where that is something else.
        frames: by name, which frames of a video a reward of images is shown; all, if it is not named.

    ``frame_rate`` is that of the pipeline's videos, in frames a second, or None; rewards with ``video = True`` get it as a
    column of that name, unless the prompt file has one.

    Raises:
        ValueError: no reward with a weight, a name twice or with ``/``, a weight that is no number, constants or columns or
            frames for a name that is not there, frames for a reward that takes videos, one column as pictures of two kinds.
    """

    def __init__(
        self,
        rewards: Iterable[tuple[str, Reward, float]],
        *,
        normalise: Mapping[str, Normalise] | None = None,
        columns: Mapping[str, Mapping[str, str]] | None = None,
        frames: Mapping[str, Frames] | None = None,
    ) -> None:
        entries = list(rewards)
        check_names_and_weights([(name, weight) for name, _, weight in entries])
        names = [name for name, _, _ in entries]
        for name, reward, _ in entries:
            if not callable(reward):
                raise ValueError(f"reward {name!r} is a {type(reward).__name__}, which cannot be called")
        normalise, columns, frames = dict(normalise or {}), dict(columns or {}), dict(frames or {})
        for what, own in (("normalise", normalise), ("columns", columns), ("frames", frames)):
            if unknown := sorted(set(own) - set(names)):
                raise ValueError(f"{what} names {', '.join(unknown)}, which is not among the rewards {names}")
        self.rewards: dict[str, Reward] = {name: reward for name, reward, _ in entries}
        self.weights: dict[str, float] = {name: weight for name, _, weight in entries}
        self.normalise: dict[str, Normalise] = {name: normalise.get(name, Normalise()) for name in names}
        self.columns: dict[str, Mapping[str, str]] = {name: columns.get(name, {}) for name in names}
        self.frames: dict[str, Frames] = frames
        self._told: set[str] = set()
        self.frame_rate: float | None = None
        for name in frames:
            if takes_videos(self.rewards[name]):
                raise ValueError(
                    f"rewards.{name}.frames={frames[name].text}: this reward takes videos itself (video = True), so it is "
                    "shown all frames; leave frames out"
                )
        self._wanted = {name: pictures_of(name, reward) for name, reward in self.rewards.items()}
        self.pictures: dict[str, Kind] = {}  # the columns of the prompt file that some reward wants as pictures
        for name in names:
            for own, kind in self._wanted[name].items():
                column = self.columns[name].get(own, own)
                if self.pictures.setdefault(column, kind) != kind:
                    raise ValueError(
                        f"reward {name!r} wants the column {column!r} as {kind}, another one as {self.pictures[column]}; give "
                        "them columns of their own (rewards.NAME.columns)"
                    )

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
        pictures: Mapping[str, Sequence[Picture | None]] | None = None,
    ) -> Scores:
        """Score one rollout batch.

        Args:
            images: float [B, 3, H, W] or [B, T, 3, H, W] in [0, 1], rounded once to 8 bits before all rewards; or uint8.
            prompts: B texts.
            columns: the prompt file's other columns, B values each.
            group: which samples a groupwise reward compares, B numbers; None: those of equal prompts.
            pictures: the columns of `RewardSet.pictures`, B pictures each.

        Returns:
            Scores: ``total`` is the weighted sum of the rewards' normalised scores, missing where that of a reward with a
            weight is missing. ``parts[name]`` is each reward's own normalised score, without its weight;
            ``parts["name/part"]`` a part of it as the reward gave it.

        Raises:
            ValueError: images, prompts and columns do not fit together, or a reward breaks its contract.
        """
        batch = Shown.of(images, prompts, columns or {}, group, pictures)
        return self.combine(batch, {name: self.ask(name, batch) for name in self.rewards})

    @torch.no_grad()
    def ask(self, name: str, batch: Shown) -> Answer:
        """What one of the rewards says of a batch. Raises ValueError when it breaks its contract."""
        batch = batch.for_reward(self._wanted[name], self.columns[name])
        check_kind(name, self.rewards[name], batch)
        if not is_video(batch):
            if takes_videos(self.rewards[name]) and "frame_rate" in column_parameters(self.rewards[name]):
                batch = replace(batch, columns={"frame_rate": [None] * len(batch), **batch.columns})
            if name in self.frames and name not in self._told:
                self._told.add(name)
                logger.warning("rewards.%s.frames=%s does nothing: there are no videos", name, self.frames[name].text)
            return self._ask(name, batch)
        if takes_videos(self.rewards[name]):
            rates = [self.frame_rate] * len(batch)
            return self._ask(name, replace(batch, columns={"frame_rate": rates, **batch.columns}))
        frames = self.frames.get(name, Frames()).chosen(batch.pixels.shape[1])
        return as_videos(self._ask(name, as_images(batch, frames)), frames)

    def _ask(self, name: str, batch: Shown) -> Answer:
        """The answer of a reward for a batch of what it takes, with what it says of prompts that nobody can score."""
        reward = self.rewards[name]
        answer = join(ask_each(name, reward, batch), batch) if is_groupwise(reward) else ask(name, reward, batch)
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

    def combine(self, batch: Shown, answers: Mapping[str, Answer]) -> Scores:
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


def _spread(values: list[float], rows: list[int], size: int) -> Tensor:
    """The values of some rows as float64 [B], NaN in the others."""
    spread = torch.full((size,), math.nan, dtype=torch.float64)
    spread[rows] = torch.tensor(values, dtype=torch.float64)
    return spread
