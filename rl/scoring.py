"""The second act: rollouts go to the rewards while the next are drawn, and their scores are collected in order."""

from __future__ import annotations

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.hosts.inprocess import PendingScores, Scorer
from flowsteer.rewards.types import Scores
from flowsteer.rollout.types import Rollout


class StepScorer:
    """Scores the rollouts of one training step after another.

    Args:
        rewards: what a sample is worth.
    """

    def __init__(self, rewards: RewardSet) -> None:
        self.rewards = rewards
        self._scorer = Scorer(rewards)
        self._pending: list[PendingScores] = []

    def submit(self, rollout: Rollout) -> None:
        """Begin to score a rollout batch; returns at once."""
        self._pending.append(self._scorer.submit(rollout.images, rollout.prompts, rollout.columns))

    def collect(self) -> list[Scores]:
        """Wait for everything that was submitted, in that order. Raises ValueError for a reward that breaks its contract."""
        pending, self._pending = self._pending, []
        return [scores.result() for scores in pending]

    def close(self) -> None:
        """End the thread."""
        self._scorer.close()
