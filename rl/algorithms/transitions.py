"""Algorithms that learn from stochastic transitions: what they have in common.

An algorithm of this family declares its settings and `per_sample`, a pure function of one `TransitionTerms`. Network passes,
the reference and old policies, weights, distances, metrics and the mean are here.

Letters: B samples, R of them that take part in a loss, K stored transitions, S states that samples left, X latent shape of one
sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from flowsteer.rl.algorithms.losses import Terms, weighted
from flowsteer.rl.algorithms.pairs import best_and_worst, preference_loss
from flowsteer.rl.types import Algorithm, Comparison, Metrics, PolicyView, Setting, schedule_of
from flowsteer.rollout.steps import kernels
from flowsteer.rollout.steps.noise import mix
from flowsteer.rollout.types import Rollout, Trajectory


@dataclass(frozen=True, kw_only=True)
class TransitionTerms:
    """One stochastic step of a batch, as a loss sees it.

    Example: for R = 2 samples with latents of shape [4, 8, 8], ``current.mean`` and ``next_latents`` are [2, 4, 8, 8],
    ``advantage`` is ``tensor([1., -1.])``, and ``log_prob - old_log_prob`` is 0 before the first update.
    """

    current: kernels.Gaussian  # the step under the current policy, mean [R, *X]
    old: kernels.Gaussian | None  # under the policy that drew it, where the rollouts keep their means
    reference: (
        kernels.Gaussian | None
    )  # under the reference, where the algorithm compares with it or is held near to it
    next_latents: Tensor  # [R, *X], what was drawn
    old_log_prob: Tensor  # [R]
    advantage: Tensor  # [R]
    length: float  # sigma - sigma_next of the step
    log_prob_weight: kernels.LogProbWeight

    @property
    def log_prob(self) -> Tensor:
        """[R], of what was drawn, under the current policy; differentiable."""
        return kernels.log_prob(self.current, self.next_latents, weight=self.log_prob_weight)

    @property
    def reference_log_prob(self) -> Tensor:
        """[R], under the reference."""
        if self.reference is None:
            raise ValueError("reference_log_prob needs the reference policy: name it in compares_with")
        return kernels.log_prob(self.reference, self.next_latents, weight=self.log_prob_weight)

    @property
    def kl_to_old(self) -> Tensor:
        """[R], of the current policy's step to that of the policy that drew it; differentiable."""
        if self.old is None:
            raise ValueError("kl_to_old needs the means of the rollouts' steps: set keeps_means = True in the class")
        return kernels.kl(self.current, self.old)


@dataclass(frozen=True, kw_only=True)
class TransitionBatch:
    """One stochastic step of one rollout batch."""

    rollout: Rollout
    comparison: Comparison
    transition: int  # k, the place in the trajectory

    rows: Tensor | None = None  # [R] int64, the rollout's samples that take part; None: all, R = B

    @property
    def trajectory(self) -> Trajectory:
        """The rollout's trajectory, which a configuration for these algorithms guarantees."""
        assert self.rollout.trajectory is not None
        return self.rollout.trajectory

    @property
    def index(self) -> int:
        """The denoising index."""
        return self.trajectory.indices[self.transition]

    @property
    def next_latents(self) -> Tensor:
        """[R, *X]."""
        return _rows(self.trajectory.next_latents[:, self.transition], self.rows)

    @property
    def old_log_prob(self) -> Tensor:
        """[R], under the policy that drew it."""
        return _rows(self.trajectory.log_prob[:, self.transition], self.rows)


class TransitionAlgorithm(Algorithm[TransitionBatch]):
    """The base of the family. `per_sample`, or for preferences `logits`, is what a subclass adds to its settings."""

    learns_from: ClassVar[Literal["transitions", "final latents"]] = "transitions"
    possible_anchors: ClassVar[frozenset[str]] = frozenset({"reference"})

    def per_sample(self, step: TransitionTerms) -> Terms:
        """The loss of each sample [R] and what to report."""
        raise NotImplementedError

    def logits(self, step: TransitionTerms) -> Tensor:
        """Of algorithms on pairs, [2 P] samples with the winners first: the logit of each preference, [P]."""
        raise NotImplementedError

    def threshold_of_pairs(self) -> float:
        """By how much the probabilities of preference of a pair must differ; see `best_and_worst`."""
        return 0.0

    def transitions_trained(self) -> int | None:
        """How many of each batch's transitions are trained, drawn at random; None: all."""
        return None

    def check(self, setting: Setting) -> Iterator[str]:
        """What transitions need."""
        name = f"algorithm.name={self.label}"
        if not setting.stochastic:
            yield (
                f"{name} learns from stochastic transitions, but rollout.plan.name=none draws none; set rollout.plan.name to "
                "all, window or steps"
            )
        yield from super().check(setting)
        if setting.train_guidance:
            yield (
                f"{name} trains the very steps that were drawn, with their guidance; leave "
                "rollout.train_guidance_scale out"
            )

    @property
    def passes_per_batch(self) -> int:
        """One for each transition that is trained."""
        return self.transitions_trained() or self.facts.num_transitions

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[TransitionBatch]:
        """Every transition that is trained of every rollout batch."""
        yield from transition_batches(
            rollouts,
            comparisons,
            step=step,
            seed=self.facts.seed,
            each=self.transitions_trained(),
            common=self.facts.common_indices,
        )

    def loss(self, policy: PolicyView, batch: TransitionBatch) -> tuple[Tensor, Metrics]:
        """The loss of one transition; with preferences only the pairs' samples pass the network.

        Otherwise the whole batch passes: the ratio is exactly 1 only at the batch shape that was sampled. If no sample
        counts, a single one passes, so that every process makes the same number of passes.
        """
        if self.on_pairs:
            pairs = best_and_worst(batch.rollout.group, batch.comparison, threshold=self.threshold_of_pairs())
            terms = self._terms(policy, replace(batch, rows=pairs.sides()))
            return preference_loss(self.logits(terms), pairs)
        over = len(batch.rollout)
        if not bool((batch.comparison.weight > 0).any()):
            batch = replace(batch, rows=torch.zeros(1, dtype=torch.int64))
        terms = self._terms(policy, batch)
        weight = _rows(batch.comparison.weight, batch.rows).to(terms.advantage.device)
        distances = {} if terms.reference is None else {"reference": kernels.kl(terms.current, terms.reference)}
        return weighted(self.per_sample(terms), weight, distances, self.anchors, over=over)

    def _terms(self, policy: PolicyView, batch: TransitionBatch) -> TransitionTerms:
        reference = None
        if "reference" in self.variants:  # before the pass that is trained: its activations do not wait meanwhile
            with torch.no_grad(), policy.using("reference"):
                reference = gaussian(policy, batch, self.facts.kernel)
        current = gaussian(policy, batch, self.facts.kernel)
        means = batch.trajectory.mean
        old = None if means is None else means[:, batch.transition]
        sigma = schedule_of(batch.rollout).sigma
        advantage = batch.comparison.advantage.to(current.mean.device)
        return TransitionTerms(
            current=current,
            old=None if old is None else kernels.Gaussian(mean=_rows(old, batch.rows), std=current.std),
            reference=reference,
            next_latents=batch.next_latents,
            old_log_prob=batch.old_log_prob,
            advantage=_rows(advantage, batch.rows),
            length=float(sigma[batch.index] - sigma[batch.index + 1]),
            log_prob_weight=self.facts.log_prob_weight,
        )


def _rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """Those of the samples that take part: [B, ...] -> [R, ...]."""
    return values if rows is None else values[rows]


def transition_batches(
    rollouts: Sequence[Rollout],
    comparisons: Sequence[Comparison],
    *,
    step: int,
    seed: int = 0,
    each: int | None = None,
    common: bool = False,
) -> Iterator[TransitionBatch]:
    """Every transition of every batch once, or ``each`` of its transitions, drawn for each step and batch.

    Rollouts that share their trajectory are one pool that was finished in several ways (G2RPO's granularities): their
    advantages add up. With ``common`` the draw is for all batches of a step.
    """
    for _, same in groupby(zip(rollouts, comparisons), key=lambda pair: id(pair[0].trajectory)):
        ways = list(same)
        rollout, comparison = ways[0]
        if len(ways) > 1:
            comparison = _of_all_ways([other for _, other in ways])
        assert rollout.trajectory is not None, "the configuration guarantees stochastic steps"
        count = len(rollout.trajectory.indices)
        generator = np.random.default_rng(mix(seed, step, *([] if common else [int(rollout.sample[0])])))
        chosen = range(count) if each is None else sorted(generator.permutation(count)[:each].tolist())
        for transition in chosen:
            yield TransitionBatch(rollout=rollout, comparison=comparison, transition=transition)


def _of_all_ways(ways: Sequence[Comparison]) -> Comparison:
    """One comparison of a pool that was finished in several ways: what weight times advantage comes to in all of them."""
    weights = torch.stack([comparison.weight for comparison in ways])  # [W, B], 0 where one was not compared
    advantages = torch.stack([comparison.advantage for comparison in ways])
    weight = weights.mean(0)
    return Comparison(
        score=torch.stack([comparison.score for comparison in ways]).mean(0),
        advantage=torch.where(weight > 0, (weights * advantages).sum(0) / weight.clamp(min=1e-12), 0.0),
        weight=weight,
    )


def gaussian(policy: PolicyView, batch: TransitionBatch, kernel: str) -> kernels.Gaussian:
    """The step under the active policy, mean [R, *X]. One network pass over the states serves all samples that left them."""
    of_states, shared = state_gaussian(policy, batch, kernel), batch.trajectory.shared
    if shared is None:
        return of_states
    return replace(of_states, mean=of_states.mean[shared.state if batch.rows is None else shared.state[batch.rows]])


def state_gaussian(policy: PolicyView, batch: TransitionBatch, kernel: str) -> kernels.Gaussian:
    """The step under the active policy, mean [S, *X]: one for each state, of those that take part where none is shared."""
    trajectory, k = batch.trajectory, batch.transition
    # contiguous as when they were drawn: strided ones take other kernels in half precision, and the ratio leaves 1
    latents = trajectory.latents[:, k].contiguous()  # [S, *X]
    shared = trajectory.shared
    conditioning = batch.rollout.conditioning if shared is None else shared.conditioning
    if shared is None and batch.rows is not None:
        latents, conditioning = latents[batch.rows], conditioning.take(batch.rows)
    velocity = policy.velocity(latents, batch.index, conditioning)
    return kernels.KERNELS[kernel](
        velocity, latents, schedule_of(batch.rollout), batch.index, trajectory.noise_levels[k]
    )
