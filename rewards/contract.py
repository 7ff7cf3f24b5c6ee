"""How one reward is asked, and what its answer must be.

A failed score is missing, never zero; a reward that breaks its contract ends the run at once:

===============================================  =====================================================================
the reward gives ``None`` for a sample           that score is missing
the reward raises for a batch                    each image is scored alone; those that still raise are missing
a groupwise reward raises for a group            all scores of that group are missing
a connection fails or a deadline passes          all scores of that batch are missing
an image holds NaN or inf                        it is shown to no reward; its scores are missing
another number of scores, NaN, inf, no number    ValueError with the reward's name
===============================================  =====================================================================

Letters: B samples of a rollout batch, R of them that are shown to a reward, T frames.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsteer.rewards.pictures import Picture, pixels_of
from flowsteer.rewards.pixels import as_shown, check_images
from flowsteer.rewards.types import Reward, Values

logger = logging.getLogger(__name__)

SCORE = "score"
NO_SCORE = "gave no score (None)"


def is_groupwise(reward: Reward) -> bool:
    """Whether each call of a reward gets the images of one group, to compare them: its class says ``groupwise = True``."""
    return getattr(reward, "groupwise", False) is True


def takes_videos(reward: Reward) -> bool:
    """Whether a reward is shown videos as they are, and not frame by frame: its class says ``video = True``."""
    return getattr(reward, "video", False) is True


def takes_sound(reward: Reward) -> bool:
    """Whether a reward is given sound, float32 [B, C, N]: its class says ``sound = True``."""
    return getattr(reward, "sound", False) is True


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


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the rewards are shown: the samples of a rollout batch whose images hold numbers only, R of B."""

    size: int  # B
    rows: list[int]  # R, their places in the rollout batch
    pixels: np.ndarray  # uint8 [R, H, W, 3] or [R, T, H, W, 3]; of sound float32 [R, C, N]
    prompts: list[str]  # R
    columns: dict[str, list[Any]]  # R each
    group: list[int]  # R
    pictures: dict[str, list[np.ndarray | None]] = field(default_factory=dict)  # R each, see pictures.py

    @classmethod
    def of(
        cls,
        images: Tensor,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        group: Sequence[int] | None = None,
        pictures: Mapping[str, Sequence[Picture | None]] | None = None,
    ) -> Shown:
        """The arguments are `RewardSet.score`'s. Raises ValueError when they do not fit together."""
        _check_batch(images, prompts, {**columns, **(pictures or {})}, group)
        whole = torch.isfinite(images).flatten(1).all(1)  # [B]
        rows: list[int] = torch.nonzero(whole).flatten().tolist()
        known = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        numbers = [known[prompt] for prompt in prompts] if group is None else [int(own) for own in group]
        return cls(
            size=len(images),
            rows=rows,
            pixels=as_shown(images[rows] if len(rows) < len(images) else images),
            prompts=[prompts[row] for row in rows],
            columns={name: [values[row] for row in rows] for name, values in columns.items()},
            group=[numbers[row] for row in rows],
            pictures={name: pixels_of([all_[row] for row in rows]) for name, all_ in (pictures or {}).items()},
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def groups(self) -> dict[int, list[int]]:
        """The places [R] of each group's samples, in order of appearance."""
        places: dict[int, list[int]] = {}
        for place, own in enumerate(self.group):
            places.setdefault(own, []).append(place)
        return places

    def some(self, places: Sequence[int]) -> Shown:
        """The batch that has only these samples."""
        return Shown(
            size=len(places),
            rows=list(range(len(places))),
            pixels=self.pixels[list(places)],
            prompts=[self.prompts[place] for place in places],
            columns={name: [values[place] for place in places] for name, values in self.columns.items()},
            group=[self.group[place] for place in places],
            pictures={name: [pictures[place] for place in places] for name, pictures in self.pictures.items()},
        )

    def for_reward(self, pictures: Collection[str], names: Mapping[str, str]) -> Shown:
        """The batch as one reward gets it: with the pixels of the columns that it wants as pictures, no others.

        Args:
            pictures: what the reward calls them.
            names: what the reward calls a column -> what the prompt file calls it, where that is something else.
        """
        columns = self.columns | {own: self.columns[name] for own, name in names.items() if name in self.columns}
        shown = {own: names.get(own, own) for own in pictures}
        columns |= {own: self.pictures[name] for own, name in shown.items() if name in self.pictures}
        return replace(self, columns=columns, pictures={})

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


def _check_batch(
    images: Tensor, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], group: Sequence[int] | None
) -> None:
    check_images(images)
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


def check_kind(name: str, reward: Reward, batch: Shown) -> None:
    """Raise ValueError where a reward of pictures is given sound, or one of sound is given pictures."""
    if (batch.pixels.ndim == 3) != takes_sound(reward):
        has, wants = ("sound", "pictures") if batch.pixels.ndim == 3 else ("pictures", "sound")
        raise ValueError(
            f"the pipeline draws {has}, and reward {name!r} is for {wants}; a reward of sound says `sound = True` and runs "
            "in the trainer's process"
        )


def ask(name: str, reward: Reward, batch: Shown) -> Answer:
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
        return join(ask_each(name, reward, alone), alone)
    return read_answer(name, given, len(batch))


def ask_each(name: str, reward: Reward, batch: Shown) -> dict[int, Answer]:
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


def join(answers: Mapping[int, Answer], batch: Shown) -> Answer:
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
