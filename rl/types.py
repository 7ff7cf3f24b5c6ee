"""What passes between the stages of learning.

Letters: B samples, N samples of a training step over all processes, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from flowsteer.rollout.types import Rollout, Schedule

Metrics = dict[str, tuple[Tensor | float, float]]
"""name -> (sum over samples, count of samples): sums and counts can be added over batches and processes."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much better than its group each sample of one rollout batch is."""

    score: Tensor  # [B] float32, the weighted sum of its rewards, NaN where missing
    advantage: Tensor  # [B] float32, 0 where nothing can be said
    weight: Tensor  # [B] float32, 0 for samples that carry no comparison; its mean over the step's N samples is 1


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What an algorithm needs of rollouts; the configuration is held to it before anything starts."""

    transitions: bool
    """Stochastic transitions, or else deterministic rollouts."""
    means: bool = False
    """The kernel's means are stored."""
    gaussian_log_prob: bool = False
    """Log densities in the Gaussian convention."""
    flow: bool = False
    """A flow's kernel: a change of the prediction moves the mean by about the difference of the noise levels times as much."""
    pools: bool = False
    """Samples of a group leave the same state (``rollout.branching``)."""
    groups_in_a_batch: bool = False
    """All samples of a group are in one rollout batch."""
    groups_in_a_pass: bool = False
    """All samples of a group are in the batches that the processes train on at the same time."""
    scores_only: bool = False
    """Ranks the scores of a group; advantages are not asked for."""
    clipped_advantage: bool = False
    """The clip of the advantage, which is part of the loss."""
    zero_sum_advantage: bool = False
    """The advantages of a whole group sum to 0."""


def changed(section: BaseModel) -> set[str]:
    """The keys whose values are not the defaults: a saved configuration has all keys."""
    return {name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default}


class AlgorithmSettings(BaseModel):
    """What the configurations of all algorithms have."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    needs: ClassVar[Requirements]

    updates_per_rollout: PositiveInt = 1
    """Optimiser updates that a training step's samples are shared among."""

    def idle(self) -> Iterator[str]:
        """One sentence for every setting that would do nothing."""
        yield from ()


class PolicyView(Protocol):
    """What an algorithm may ask of the policy."""

    def velocity(self, latents: Tensor, index: int, conditioning: Any) -> Tensor:
        """The active policy's prediction, [B, *X] -> [B, *X]; differentiable for the current policy."""
        ...

    def using(self, name: str) -> AbstractContextManager[None]:
        """Make ``old``, ``reference`` or ``ema`` the active policy inside the context."""
        ...


class Algorithm(Protocol):
    """Turns comparisons into an update: `batches` says on what, `loss` says how much."""

    acting: str
    """The policy that draws the rollouts: ``current`` or ``old``."""

    passes_per_batch: int
    """How many losses one rollout batch gives."""

    @property
    def variants(self) -> frozenset[str]:
        """The policies besides the current one that the algorithm asks for."""
        ...

    def batches(self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int) -> Iterator[Any]:
        """The step's loss terms, in the order of the rollouts: those of the first update come first."""
        ...

    def loss(self, policy: PolicyView, batch: Any) -> tuple[Tensor, Metrics]:
        """The weighted mean loss of one term, a scalar, and what to report of it."""
        ...

    def old_decay(self, num_updates: int) -> float:
        """How much of the old policy stays when it follows the current one at the end of a training step."""
        ...


def schedule_of(rollout: Rollout) -> Schedule:
    """The schedule that a rollout was drawn on."""
    return rollout.conditioning.schedule
