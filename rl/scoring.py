"""The second act: rollouts go to the rewards while the next are drawn, and their scores are collected in order."""

from __future__ import annotations

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.hosts.inprocess import PendingScores, Scorer, collect
from flowsteer.rewards.types import Scores
from flowsteer.rollout.types import Rollout


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
        self._pending.append(
            self._scorer.submit(rollout.images, rollout.prompts, rollout.columns, rollout.group.tolist())
        )

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
