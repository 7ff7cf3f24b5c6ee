"""Algorithms that learn on the forward process: what they have in common. The final latents are noised again.

They need no likelihood, so any solver may draw the rollouts. Training happens at the sampler's own noise levels, because a
lifted pipeline is asked by denoising index; published codes that draw levels from a continuum differ there. An algorithm of
this family declares its settings and `per_sample`, a pure function of one `ForwardTerms`.

Letters: B samples, R of them that take part in a loss, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveInt, PrivateAttr
from torch import Tensor

from flowsteer.rl.algorithms.losses import Terms, weighted
from flowsteer.rl.algorithms.pairs import best_and_worst, preference_loss, rows_that_count
from flowsteer.rl.types import Algorithm, Comparison, Facts, Metrics, PolicyView, Setting, schedule_of
from flowsteer.rollout.steps.kernels import denoised
from flowsteer.rollout.steps.noise import mix, stream_noise
from flowsteer.rollout.types import ConditioningRows, Rollout, Schedule, flat_mean

_NOISE_STREAM = 1 << 20  # apart from the sampler's streams, which are denoising indices


@dataclass(frozen=True, kw_only=True)
class ForwardTerms:
    """One noise level of a batch, as a loss sees it.

    Example: for R = 2 samples with latents of shape [4, 8, 8] at sigma 0.5, ``prediction`` and ``target`` are [2, 4, 8, 8]
    and ``advantage`` is ``tensor([1., -1.])``; ``error()`` is [2], equal to ``error("reference")`` before the first update.
    """

    prediction: Tensor  # [R, *X] float32, of the current policy; differentiable
    others: Mapping[str, Tensor]  # [R, *X] float32, of the policies that the algorithm compares with or is held near to
    target: Tensor  # [R, *X] float32, what a perfect model of this sample predicts
    clean: Tensor  # [R, *X], the final latents
    denoise: Callable[[Tensor], Tensor]  # a prediction [R, *X] to the clean latents that it implies
    sigma: float
    group: Tensor  # [R] int64
    comparison: Comparison  # of the R samples, on the prediction's device
    share: Tensor  # [R] float32, see `ForwardAlgorithm.shares`
    facts: Facts

    @property
    def advantage(self) -> Tensor:
        """[R]."""
        return self.comparison.advantage

    def error(self, name: str | None = None) -> Tensor:
        """The squared error of the current policy's prediction or of another one's, [R]."""
        return matching_loss(self.prediction if name is None else self.others[name], self.target)


@dataclass(frozen=True, kw_only=True)
class ForwardBatch:
    """One noise level of one rollout batch."""

    rollout: Rollout
    comparison: Comparison
    index: int
    noise_seeds: Tensor  # [R] int64: samples with equal ones get the same noise

    rows: Tensor | None = None  # [R] int64, the rollout's samples that take part; None: all, R = B

    @property
    def schedule(self) -> Schedule:
        """Of the rollout."""
        return schedule_of(self.rollout)

    @property
    def conditioning(self) -> ConditioningRows:
        """R rows."""
        return self.rollout.conditioning if self.rows is None else self.rollout.conditioning.take(self.rows)

    @property
    def group(self) -> Tensor:
        """[R] int64, of the samples."""
        return self.rollout.group if self.rows is None else self.rollout.group[self.rows]

    @property
    def clean(self) -> Tensor:
        """The final latents, [R, *X]."""
        return self.rollout.latents if self.rows is None else self.rollout.latents[self.rows]

    def of_rows(self, rows: Tensor, *, noise_from: Tensor) -> ForwardBatch:
        """Only these samples [R], each with the noise of the sample ``noise_from`` [R]."""
        return replace(self, rows=rows, noise_seeds=self.rollout.seeds[noise_from])

    def part(self, places: Tensor) -> ForwardBatch:
        """Only those at these places [R] of the samples that take part, with their noise."""
        rows = places if self.rows is None else self.rows[places]
        return replace(self, rows=rows, noise_seeds=self.noise_seeds[places])

    def noised(self) -> tuple[Tensor, Tensor]:
        """The final latents noised to the batch's level [R, *X], and the model's target there [R, *X] float32."""
        schedule, clean = self.schedule, self.clean
        sigma, alpha = float(schedule.sigma[self.index]), float(schedule.alpha[self.index])
        noise = stream_noise(self.noise_seeds, _NOISE_STREAM + self.index, clean.shape[1:]).to(clean.device)
        noised = (alpha * clean.float() + sigma * noise).to(clean.dtype)
        if schedule.prediction == "epsilon":
            return noised, noise
        if schedule.prediction == "v_prediction":  # arXiv 2202.00512, appendix D
            return noised, alpha * noise - sigma * clean.float()
        return noised, noise - clean.float()


class NoiseLevels:
    """Which of the sampler's noise levels a training step uses.

    Args:
        num_inference_steps: T, denoising steps of the rollout's schedule.
        count: noise levels of each rollout batch.
        first, end: the range of denoising indices, ``first <= index < end``; ``end`` None leaves out the last step.
        seed: of the choice.
        common: all batches of a step get the same ones.

    Raises:
        ValueError: the range holds fewer noise levels than ``count``.
    """

    def __init__(
        self,
        num_inference_steps: int,
        *,
        count: int,
        first: int = 0,
        end: int | None = None,
        seed: int,
        common: bool = False,
    ) -> None:
        end = max(num_inference_steps - 1, 1) if end is None else end
        if not 0 <= first < end <= num_inference_steps:
            raise ValueError(
                f"noise levels {first} to {end - 1} are not among the {num_inference_steps} of the schedule; set "
                "algorithm.first_level and algorithm.end_level (exclusive) within them"
            )
        if count > end - first:
            raise ValueError(
                f"algorithm.noise_levels_per_sample={count} is more than the {end - first} that can be trained (indices "
                f"{first} to {end - 1} of {num_inference_steps}); set it to {end - first} or less, or raise "
                "rollout.num_inference_steps"
            )
        self.count, self.first, self.end, self.seed, self.common = count, first, end, seed, common

    def spread(self, step: int, sample: int | None = None) -> list[int]:
        """``count`` different indices, uniformly, for the batch that begins with a sample; None: for all of the step."""
        generator = self._generator(step, sample)
        return [self.first + int(place) for place in generator.permutation(self.end - self.first)[: self.count]]

    def stratified(self, step: int, sample: int | None = None) -> list[int]:
        """``count`` indices, one from each of as many equal strata (AWM)."""
        generator = self._generator(step, sample)
        edges = np.linspace(self.first, self.end, self.count + 1).astype(int)
        return [int(generator.integers(low, high)) for low, high in pairwise(edges)]

    def _generator(self, step: int, sample: int | None) -> np.random.Generator:
        return np.random.default_rng(mix(self.seed, step, *([] if sample is None or self.common else [sample])))


class ForwardAlgorithm(Algorithm[ForwardBatch]):
    """The base of the family. `per_sample`, or for preferences `logits`, is what a subclass adds to its settings."""

    learns_from: ClassVar[Literal["transitions", "final latents"]] = "final latents"
    possible_anchors: ClassVar[frozenset[str]] = frozenset({"reference", "old"})

    noise_levels_per_sample: PositiveInt = 1
    """How many of the sampler's noise levels each rollout batch is trained at."""
    first_level: Annotated[int, Field(ge=0)] = 0
    """See ``end_level``."""
    end_level: PositiveInt | None = None
    """Denoising indices to train at, ``first_level <= index < end_level``; null leaves out the last one."""

    _levels: NoiseLevels | None = PrivateAttr(default=None)

    def per_sample(self, terms: ForwardTerms) -> Terms:
        """The loss of each sample [R] and what to report."""
        raise NotImplementedError

    def logits(self, terms: ForwardTerms) -> Tensor:
        """Of algorithms on pairs, [2 P] samples with the winners first: the logit of each preference, [P]."""
        raise NotImplementedError

    def shares(self, group: Tensor, comparison: Comparison) -> Tensor:
        """How much each sample of a batch counts besides its weight, [B]; the loss of one with 0 must be 0.

        It is computed from the whole batch. Only samples with a weight pass the network; where no distance to another policy
        counts, only those with a share. `per_sample` sees these alone.
        """
        return torch.ones_like(comparison.weight)

    def indices(self, levels: NoiseLevels, step: int, rollout: Rollout) -> list[int]:
        """The denoising indices that a rollout batch is trained at."""
        return levels.spread(step, int(rollout.sample[0]))

    def noise_seeds(self, rollout: Rollout, step: int) -> Tensor:
        """[B] int64: samples with equal ones get the same noise."""
        return rollout.seeds

    def check(self, setting: Setting) -> Iterator[str]:
        """No step may be stochastic."""
        if setting.stochastic:
            yield (
                f"algorithm.name={self.label} noises the final latents again and ignores stochastic transitions; set "
                "'rollout.plan={name: none}'"
            )
        yield from super().check(setting)

    def bind(self, facts: Facts) -> Self:
        """Draw noise levels from the run's schedule. Raises ValueError where it has too few."""
        bound = super().bind(facts)
        bound._levels = NoiseLevels(
            facts.num_inference_steps,
            count=self.noise_levels_per_sample,
            first=self.first_level,
            end=self.end_level,
            seed=facts.seed,
            common=facts.common_indices,
        )
        return bound

    @property
    def passes_per_batch(self) -> int:
        """One for each noise level and part of the batch."""
        return self.noise_levels_per_sample * self.facts.train_parts

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[ForwardBatch]:
        """Every rollout batch at the noise levels that are drawn for it, in as many parts as it is trained in."""
        assert self._levels is not None, "an algorithm trains once it is bound to a run"
        for rollout, comparison in zip(rollouts, comparisons):
            seeds = self.noise_seeds(rollout, step)
            for index in self.indices(self._levels, step, rollout):
                whole = ForwardBatch(rollout=rollout, comparison=comparison, index=index, noise_seeds=seeds)
                if self.facts.train_parts == 1:
                    yield whole
                else:
                    yield from map(whole.part, torch.arange(len(rollout)).chunk(self.facts.train_parts))

    def loss(self, policy: PolicyView, batch: ForwardBatch) -> tuple[Tensor, Metrics]:
        """The loss of one noise level; only samples that count pass the network, with preferences those of pairs."""
        if self.on_pairs:
            of_groups = best_and_worst(batch.group, batch.comparison.take(batch.rows))
            pairs = of_groups.counting()
            win, lose = (side if batch.rows is None else batch.rows[side] for side in (pairs.win, pairs.lose))
            chosen = batch.of_rows(torch.cat([win, lose]), noise_from=win.repeat(2))
            logits = self.logits(self._terms(policy, chosen))
            return preference_loss(logits, pairs, over=len(of_groups.weight))
        over = len(batch.group)
        batch = self.counting(batch)
        terms = self._terms(policy, batch)
        held = {name for name, weight in self.anchors.items() if weight}
        distances = {name: matching_loss(terms.prediction, terms.others[name]) for name in held}
        return weighted(self.per_sample(terms), terms.comparison.weight, distances, self.anchors, over=over)

    def counting(self, batch: ForwardBatch) -> ForwardBatch:
        """The samples whose loss has a gradient; one where there is none, so that each batch makes its passes."""
        held = any(self.anchors.values())
        counts = batch.comparison.weight > 0
        if not held:
            counts &= self.shares(batch.rollout.group, batch.comparison) > 0
        kept = rows_that_count(counts if batch.rows is None else counts[batch.rows])
        return batch if kept is None else batch.part(kept)

    def _terms(self, policy: PolicyView, batch: ForwardBatch) -> ForwardTerms:
        share = self.shares(batch.rollout.group, batch.comparison)
        noised, target = batch.noised()
        read = self.compares_with | {name for name, weight in self.anchors.items() if weight}
        # before the pass that is trained: its activations do not wait meanwhile
        others = {name: prediction_of(policy, name, noised, batch) for name in sorted(read)}
        prediction = policy.velocity(noised, batch.index, batch.conditioning).float()
        return ForwardTerms(
            prediction=prediction,
            others=others,
            target=target,
            clean=batch.clean,
            denoise=lambda output: denoised(output, noised, batch.schedule, batch.index),
            sigma=float(batch.schedule.sigma[batch.index]),
            group=batch.group.to(prediction.device),
            comparison=batch.comparison.take(batch.rows).to(prediction.device),
            share=(share if batch.rows is None else share[batch.rows]).to(prediction.device),
            facts=self.facts,
        )


def ramp(num_updates: int, slope: float, most: float) -> float:
    """How much of the old policy stays after so many updates: min(slope * n, most)."""
    return min(slope * max(num_updates, 0), most)


def renewed(every: int | None, updates_per_rollout: int, num_updates: int) -> float:
    """0 when the policy that draws is due to be replaced, after ``every`` training steps; 1 when it stays."""
    return 0.0 if every is not None and num_updates % (every * updates_per_rollout) == 0 else 1.0


def unclipped(label: str, setting: Setting) -> Iterator[str]:
    """The sentence for an algorithm that scales advantages by their clip, where there is none."""
    if setting.advantage_clip is None:
        yield f"algorithm.name={label} scales advantages by their clip; set advantage.clip, 5.0 is published"


def matching_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The squared error of a prediction, as the mean over the latent: [B, *X] -> [B]."""
    return flat_mean((prediction.float() - target) ** 2)


@torch.no_grad()
def prediction_of(policy: PolicyView, name: str, noised: Tensor, batch: ForwardBatch) -> Tensor:
    """What another policy predicts, [B, *X] float32, without a gradient."""
    with policy.using(name):
        return policy.velocity(noised, batch.index, batch.conditioning).float()
