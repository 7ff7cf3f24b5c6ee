"""What passes between the stages of learning.

Letters: B samples, N samples of a training step over all processes, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, PrivateAttr
from torch import Tensor

from flowsteer.rollout.steps.kernels import LogProbWeight
from flowsteer.rollout.types import ConditioningRows, Rollout, Schedule


class Mean(NamedTuple):
    """A mean over samples: sums and counts are added over batches and processes before the division.

    Example: ``Mean(3.0, 3).plus(Mean(5.0, 1))`` stands for 2, not for the 3 that a mean of the means would be.
    """

    total: Tensor | float
    count: float

    def plus(self, other: Mean) -> Mean:
        """Of the samples of both."""
        return Mean(self.total + other.total, self.count + other.count)


class Max(NamedTuple):
    """The largest value over batches and processes. Example: ``Max(3.0).plus(Max(5.0)) == Max(5.0)``."""

    value: Tensor | float

    def plus(self, other: Max) -> Max:
        """The larger one."""
        return other if float(other.value) > float(self.value) else self


class Last(NamedTuple):
    """The value after the last update, which every process has. Example: ``Last(3e-4).plus(Last(2e-4)) == Last(2e-4)``."""

    value: float

    def plus(self, other: Last) -> Last:
        """The later one."""
        return other


Metrics = Mapping[str, Mean | Max | Last]
"""What is reported, by name; each value carries its own reduction over batches and processes."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much better than its group each sample of one rollout batch is.

    Example: a group of two with scores 1 and 0, compared by the group's deviation, has ``score=[1, 0]``,
    ``advantage`` of nearly ``[1, -1]`` (a small constant is added to the deviation) and ``weight=[1, 1]``.
    """

    score: Tensor  # [B] float32, the weighted sum of its rewards, NaN where missing
    advantage: Tensor  # [B] float32, 0 if the sample has no comparable peer
    weight: Tensor  # [B] float32, 0 for samples that carry no comparison; its mean over the step's N samples is 1

    def take(self, rows: Tensor | None) -> Comparison:
        """Only the samples ``rows`` [R] int64; None: all."""
        return self if rows is None else self._each(lambda values: values[rows])

    def to(self, device: torch.device) -> Comparison:
        """On another device."""
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Comparison:
        return Comparison(score=change(self.score), advantage=change(self.advantage), weight=change(self.weight))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The part of a configuration that an algorithm may have demands on; see `Algorithm.check`.

    Example: ``Setting(stochastic=True, branching=False, kernel="flow_sde", log_prob_weight="gaussian", group_size=16,
    batch_size=64, num_processes=1, advantage_clip=5.0, best_and_worst=None, advantage_changed=frozenset(),
    train_guidance=False)`` is plain Flow-GRPO.
    """

    stochastic: bool  # the plan has stochastic steps
    branching: bool  # samples of a group leave common states (``rollout.branching``)
    kernel: str
    log_prob_weight: str
    group_size: int
    batch_size: int
    num_processes: int
    advantage_clip: float | None
    best_and_worst: int | None
    advantage_changed: frozenset[str]  # keys of ``advantage`` that are not the defaults
    train_guidance: bool  # ``rollout.train_guidance_scale`` is given
    pictures: bool = False  # pictures of a file stand in for samples (``prompts.pictures``)

    def groups_are_whole(self, *, across_processes: bool = False) -> bool:
        """Are all samples of a group in one batch, or else in the batches that the processes train on at the same time?"""
        at_once = self.batch_size * (self.num_processes if across_processes else 1)
        return at_once % self.group_size == 0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run tells its algorithm, once (`Algorithm.bind`).

    Example: ``Facts(kernel="flow_sde", log_prob_weight="gaussian", num_inference_steps=10, num_transitions=9,
    group_size=16, advantage_clip=5.0, seed=0, common_indices=False, gather=engine.gather)``.
    """

    kernel: str  # the name of the kernel that draws the rollouts
    log_prob_weight: LogProbWeight  # the convention of its log density, see `kernels.log_prob`
    num_inference_steps: int  # T
    num_transitions: int  # K, stored transitions of each sample
    group_size: int  # G
    advantage_clip: float | None
    seed: int
    common_indices: bool  # all batches of a training step are trained at the same denoising indices
    gather: Callable[[Tensor], Tensor]  # concatenates [B] over processes to [N]
    train_parts: int = 1  # a rollout batch passes the network in so many equal parts when it is trained on


def changed(section: BaseModel) -> set[str]:
    """The keys whose values are not the defaults: a saved configuration has all keys."""
    return {name for name, field in type(section).model_fields.items() if getattr(section, name) != field.default}


class PolicyView(Protocol):
    """What an algorithm may ask of the policy."""

    def velocity(self, latents: Tensor, index: int, conditioning: ConditioningRows) -> Tensor:
        """The active policy's prediction, [B, *X] -> [B, *X]; differentiable for the current policy."""
        ...

    def using(self, name: str) -> AbstractContextManager[None]:
        """Make ``old``, ``reference`` or ``ema`` the active policy inside the context."""
        ...


LossTerm = TypeVar("LossTerm")  # what one loss is computed on: one transition, or one noise level, of a rollout batch


class Algorithm(BaseModel, Generic[LossTerm]):
    """An algorithm is its validated settings and a loss per sample: `batches` says on what, `loss` says how much.

    What is shared stands in the two families, `TransitionAlgorithm` and `ForwardAlgorithm`; a subclass declares its settings
    and `per_sample`. `bind` hands over what it has to know of the run, and gives the algorithm that trains.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    learns_from: ClassVar[Literal["transitions", "final latents"]]
    on_pairs: ClassVar[bool] = False
    """The best and the worst sample of every group are compared; advantages are not asked for."""
    over_groups: ClassVar[bool] = False
    """The loss of a sample reads the other samples of its group in the same pass."""
    possible_anchors: ClassVar[frozenset[str]] = frozenset()
    """The policies that a loss of this family can be held near to."""
    keeps_means: ClassVar[bool] = False
    """Rollouts store the means of their stochastic steps."""

    updates_per_rollout: PositiveInt = 1
    """Optimiser updates that a training step's samples are shared among."""

    _facts: Facts | None = PrivateAttr(default=None)

    @property
    def facts(self) -> Facts:
        """What the run has told; there once the algorithm is bound."""
        assert self._facts is not None, "an algorithm trains once it is bound to a run"
        return self._facts

    def bind(self, facts: Facts) -> Self:
        """The algorithm for one run. Raises ValueError where the run cannot give what the settings ask for."""
        held = {name for name, weight in self.anchors.items() if weight}
        if self.on_pairs and held:
            raise ValueError(f"{self.label} learns from pairs, whose loss has no distances; `anchors` must be empty")
        if unknown := held - self.possible_anchors:
            raise ValueError(
                f"{self.label} cannot be held near to {', '.join(sorted(unknown))} (`anchors`), only to "
                f"{' or '.join(sorted(self.possible_anchors))}"
            )
        bound = self.model_copy()
        bound._facts = facts
        return bound

    # ---- what it asks of the configuration

    def check(self, setting: Setting) -> Iterator[str]:
        """One sentence for everything in the configuration that the algorithm cannot be trained with."""
        name = f"algorithm.name={self.label}"
        if self.on_pairs and not setting.branching and not setting.groups_are_whole():
            yield not_whole(name, setting)
        if self.on_pairs and (idle := sorted(setting.advantage_changed - {"min_scored"})):
            yield (
                f"{name} ranks the weighted sum of the scores and asks for no advantage; leave "
                f"{' and '.join(f'advantage.{key}' for key in idle)} out"
            )

    def idle(self) -> Iterator[str]:
        """One sentence for every setting that would do nothing."""
        yield from ()

    @property
    def compares(self) -> bool:
        """Whether samples are compared by their scores; if not, each of them has the weight 1."""
        return True

    @property
    def label(self) -> str:
        """The name in the configuration."""
        return type(self).model_fields["name"].default

    # ---- which policies take part

    @property
    def acting(self) -> str:
        """The policy that draws the rollouts: ``current`` or ``old``."""
        return "current"

    @property
    def compares_with(self) -> frozenset[str]:
        """The policies besides the current one that the loss reads: ``old``, ``reference``."""
        return frozenset()

    @property
    def anchors(self) -> Mapping[str, float]:
        """The policies that the current one is held near to, with the weight of the distance to each."""
        return {}

    @property
    def variants(self) -> frozenset[str]:
        """Every policy besides the current one that the run has to keep."""
        held = {name for name, weight in self.anchors.items() if weight}
        return frozenset(held | self.compares_with | ({"old"} if self.acting == "old" else set()))

    def old_decay(self, num_updates: int) -> float:
        """How much of the old policy stays when it follows the current one at the end of a training step."""
        return 0.0

    # ---- training

    @property
    def passes_per_batch(self) -> int:
        """How many losses one rollout batch gives."""
        raise NotImplementedError

    def batches(self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int) -> Iterator[LossTerm]:
        """The step's loss terms, in the order of the rollouts: those of the first update come first."""
        raise NotImplementedError

    def loss(self, policy: PolicyView, batch: LossTerm) -> tuple[Tensor, Metrics]:
        """The weighted mean loss of one term, a scalar, and what to report of it."""
        raise NotImplementedError


def not_whole(what: str, setting: Setting, *, across_processes: bool = False) -> str:
    """The sentence for groups that are cut apart."""
    at_once = setting.batch_size * (setting.num_processes if across_processes else 1)
    return (
        f"{what} needs whole groups in the samples that pass the network together: {at_once} do, and rollout.group_size is "
        f"{setting.group_size}; set rollout.batch_size to a multiple of it"
    )


def schedule_of(rollout: Rollout) -> Schedule:
    """The schedule that a rollout was drawn on."""
    return rollout.conditioning.schedule
