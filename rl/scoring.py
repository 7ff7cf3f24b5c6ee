"""The second act: rollouts go to the rewards while the next are drawn, and their scores are collected in order."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.hosts.inprocess import PendingScores, Scorer, collect
from flowsteer.rewards.types import Scores
from flowsteer.rollout.types import Rollout

logger = logging.getLogger(__name__)

_NAMED = 5  # prompts that a message names


def check_scorable(
    rewards: RewardSet,
    prompts: Sequence[str],
    *,
    key: str,
    steps: Iterable[Sequence[int]] = (),
    min_scored: float = 0.0,
) -> None:
    """Say which prompts of a file the rewards cannot score, before anything is drawn.

    Args:
        rewards: asked by their optional method ``unscorable``.
        prompts: of the file, as often as they stand there.
        key: the setting that names the file and the file, for the message: ``prompts.train=own.txt``.
        steps: of each training step the rows that it draws; empty only warns.
        min_scored: the part of a step's samples, 0 to 1, that must have a score.

    Raises:
        ValueError: a step draws so many of these prompts that it would end the run.
    """
    reasons = rewards.unscorable(prompts)
    count = sum(prompt in reasons for prompt in prompts)
    if not count:
        return
    named = [f"{prompt!r} ({reason})" for prompt, reason in list(reasons.items())[:_NAMED]]
    more = f", and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
    text = f"{key}: {count} of {len(prompts)} prompts cannot be scored: {', '.join(named)}{more}"
    for step, rows in enumerate(steps):
        lost = sum(prompts[row] in reasons for row in rows)
        if (len(rows) - lost) / len(rows) < min_scored:
            raise ValueError(
                f"{text}. Training step {step} draws {lost} of them among its {len(rows)} prompts, which would end the run: "
                f"advantage.min_scored={min_scored} asks that {min_scored:.1%} of a step's samples have a score. Change or "
                "remove these prompts, or lower it"
            )
    logger.warning("%s; their samples will have no score", text)


def warn_of_single_images(rewards: RewardSet, *, num_seeds: int, key: str) -> None:
    """Warn, with advice, where a reward that compares the images of a prompt will be shown one of each in evaluations.

    ``key`` is the setting that ``num_seeds`` comes from. It is no error: a reward may know what to say of one image.
    """
    if num_seeds == 1 and rewards.groupwise:
        logger.warning(
            "the reward %r compares the images of a prompt, but %s=1 draws one image of each; unless it can score one alone, "
            "evaluations have no score (nan). Set %s to 2 or more",
            rewards.groupwise[0],
            key,
            key,
        )


class StoredScorer:
    """In the place of a `StepScorer` where the file says what its pictures are worth: no reward is asked.

    Args:
        scorer: of the same run's evaluations, which is closed with this one.
    """

    def __init__(self, scorer: StepScorer) -> None:
        self._scorer = scorer
        self._stored: list[Scores] = []

    def submit(self, rollout: Rollout) -> None:
        """Take the scores that the rollout carries."""
        assert rollout.stored_scores is not None, "pictures carry their scores"
        missing = torch.nonzero(rollout.stored_scores.isnan()).flatten().tolist()
        reasons = dict.fromkeys(missing, "the prompt file has no score for the picture")
        self._stored.append(Scores(total=rollout.stored_scores, failures=reasons))

    def collect(self) -> list[Scores]:
        """The scores of everything that was submitted, in that order."""
        stored, self._stored = self._stored, []
        return stored

    def close(self) -> None:
        """End the rewards of the evaluations."""
        self._scorer.close()


class StepScorer:
    """Scores the rollouts of one training step after another.

    Args:
        rewards: what a sample is worth.
        timeout_s: how long the scores of a step are waited for after its last sample was drawn.
    """

    def __init__(self, rewards: RewardSet, *, timeout_s: float | None = None) -> None:
        self.rewards = rewards
        self.timeout_s = timeout_s
        self._scorer = Scorer(rewards)
        self._pending: list[PendingScores] = []

    def submit(self, rollout: Rollout) -> None:
        """Begin to score a rollout batch; returns at once."""
        batch = (rollout.images, rollout.prompts, rollout.columns, rollout.group.tolist(), rollout.pictures)
        self._pending.append(self._scorer.submit(*batch))

    def collect(self) -> list[Scores]:
        """Wait for everything that was submitted, in that order. Scores that are not there in time are missing.

        Raises ValueError for a reward that breaks its contract.
        """
        pending, self._pending = self._pending, []
        return collect(pending, self.timeout_s)

    def close(self) -> None:
        """End the rewards that want to be closed, which lets go of whoever waits for them, and then the threads."""
        try:
            self.rewards.close()
        finally:
            self._scorer.close()


class Team(Protocol):
    """Processes that have the same samples; see `flowsteer.rl.engine.processes.Processes`."""

    team_size: int

    @property
    def leads(self) -> bool: ...

    def from_leader(self, said: bytes, /) -> bytes: ...


class LedScorer:
    """In the place of a `StepScorer` where processes have the same samples: the first of them asks the rewards, and says the
    others what they answered. So each sample is scored once, and all of them learn from the same number.

    Args:
        scorer: of this process; the others' wait for their evaluations.
        team: who has the same samples.
    """

    def __init__(self, scorer: StepScorer, team: Team) -> None:
        self._scorer = scorer
        self._team = team

    @staticmethod
    def of(scorer: StepScorer, team: Team) -> StepScorer | LedScorer:
        """The scorer itself where a process shares its samples with none."""
        return scorer if team.team_size == 1 else LedScorer(scorer, team)

    def submit(self, rollout: Rollout) -> None:
        """Begin to score a rollout batch, if this process does."""
        if self._team.leads:
            self._scorer.submit(rollout)

    def collect(self) -> list[Scores]:
        """The scores of everything that was submitted, in that order, the same on every process of the team."""
        own = self._scorer.collect() if self._team.leads else []
        return read_scores(self._team.from_leader(written_scores(own)))

    def close(self) -> None:
        """End the rewards."""
        self._scorer.close()


def written_scores(scores: Sequence[Scores]) -> bytes:
    """As JSON, which holds float32 exactly; `read_scores` takes it back."""
    table = [
        [one.total.tolist(), {name: part.tolist() for name, part in one.parts.items()}, list(one.failures.items())]
        for one in scores
    ]
    return json.dumps(table).encode()


def read_scores(text: bytes) -> list[Scores]:
    """What `written_scores` wrote."""
    return [
        Scores(
            total=torch.tensor(total),
            parts={name: torch.tensor(part) for name, part in parts.items()},
            failures={row: reason for row, reason in failures},
        )
        for total, parts, failures in json.loads(text)
    ]
