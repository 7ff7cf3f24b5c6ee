"""PSO: preferences between whole trajectories, for models that are distilled to a few steps (arXiv 2410.03190).

The best and the worst sample of a group label each of their own transitions: the loss of a step is
-log sigmoid(beta (log r_w - log r_l)), with the ratios of the policy to the reference at the states that each one passed.
Only the sampler's own transitions are trained, so a step-distilled model stays one; losses on the forward process (DPO,
NFT, AWM, DGPO) blur it. Its Euler-ancestral sampler is the ddim kernel with noise level 1.

Differences from the published code: best and worst of a group of any size (published: groups of 2); the loss is a softplus,
and ratios are not clamped to 1 +- 0.1, which would end their gradient there. Left out: the offline form, whose
pictures are the user's.

Letters: B samples, P groups of a batch, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from flowsteer.rl.pairs import best_and_worst, preference_loss
from flowsteer.rl.transitions import TransitionBatch, gaussian, transition_batches
from flowsteer.rl.types import AlgorithmSettings, Comparison, Metrics, PolicyView, Requirements
from flowsteer.rollout import kernels
from flowsteer.rollout.types import Rollout


class PSOConfig(AlgorithmSettings):
    """PSO's hyper-parameters; the defaults are the published ones for SDXL-Turbo."""

    needs: ClassVar[Requirements] = Requirements(scores_only=True, transitions=True, groups_in_a_batch=True)

    name: Literal["pso"] = "pso"
    beta: PositiveFloat = 50.0
    """How sharply preferences are fitted, in units of the mean log ratio; of one latent dimension, not of all."""


class PSO:
    """See the module's docstring.

    Args:
        kernel: name of the kernel that drew the rollouts.
        log_prob_weight: its log-density convention, see `kernels.log_prob`.
        num_transitions: K, stored transitions per sample.
        beta: as in `PSOConfig`.
    """

    acting = "current"
    variants = frozenset({"reference"})

    def __init__(
        self, *, kernel: str, log_prob_weight: kernels.LogProbWeight, num_transitions: int, beta: float
    ) -> None:
        self.kernel = kernel
        self.log_prob_weight: kernels.LogProbWeight = log_prob_weight
        self.passes_per_batch = num_transitions
        self.beta = beta

    def old_decay(self, num_updates: int) -> float:
        """There is no old policy."""
        return 0.0

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[TransitionBatch]:
        """Every transition of every rollout batch."""
        yield from transition_batches(rollouts, comparisons, step=step)

    def loss(self, policy: PolicyView, batch: TransitionBatch) -> tuple[Tensor, Metrics]:
        """The preference loss of one step of each pair; only the pairs' samples pass the network."""
        pairs = best_and_worst(batch.rollout.group, batch.comparison)
        batch = replace(batch, rows=pairs.sides())
        current = self._log_prob(policy, batch)
        with torch.no_grad(), policy.using("reference"):
            reference = self._log_prob(policy, batch)
        win, lose = (current - reference).chunk(2)  # [P] each
        return preference_loss(self.beta * (win - lose), pairs)

    def _log_prob(self, policy: PolicyView, batch: TransitionBatch) -> Tensor:
        return kernels.log_prob(gaussian(policy, batch, self.kernel), batch.next_latents, weight=self.log_prob_weight)
