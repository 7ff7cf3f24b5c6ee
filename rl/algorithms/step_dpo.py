"""Step-aware DPO, SPO: preferences between candidates that leave the same state (arXiv 2406.04314), also for flows.

At each step a pool of candidates is drawn from one state and judged (rollout/branches.py): by a step-aware preference model
(rewards/step_preference.py), or by any reward after they were led to the end. The best and the worst candidate make a pair,
if the judge prefers the one to the other clearly enough. Because both are Gaussian around the same mean, the difference of
their log ratios to the reference is linear in that mean,

    log r_w - log r_l = <(x_w - x_l) (mean - mean_ref)> / q^2,

so one pass of the policy and one of the reference serve each pair. The loss is -log sigmoid(beta (log r_w - log r_l)).

Differences from the published code: it passes both candidates through both policies, clamps each ratio to 1 +- 0.1, which
binds hardly ever and then ends the gradient, and takes the logarithm of a sigmoid that half precision rounds to 0; it drops
pairs below the threshold per process, here they are masked. Left out: SDXL's candidates that walk on by themselves for some
steps before they are judged.

Letters: B samples, P pools, S = P states, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from flowsteer.rl.pairs import best_and_worst, preference_loss
from flowsteer.rl.transitions import TransitionBatch, state_gaussian, transition_batches
from flowsteer.rl.types import AlgorithmSettings, Comparison, Metrics, PolicyView, Requirements
from flowsteer.rollout.kernels import LogProbWeight
from flowsteer.rollout.types import Rollout, flat_mean


class StepDPOConfig(AlgorithmSettings):
    """Step-aware DPO's hyper-parameters; the defaults are the published ones for Stable Diffusion 1.5."""

    needs: ClassVar[Requirements] = Requirements(scores_only=True, transitions=True, pools=True, groups_in_a_batch=True)

    name: Literal["step_dpo"] = "step_dpo"
    beta: PositiveFloat = 10.0
    """How sharply preferences are fitted, in units of the mean log ratio; of one latent dimension, not of all."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Pairs count whose probability of preference, softmax of both scores, differs by more than this."""


class StepDPO:
    """See the module's docstring.

    Args:
        kernel: name of the kernel that drew the rollouts.
        log_prob_weight: ``variance`` weights each step's log ratio with 2 q^2.
        num_transitions: K, pools of each group.
        beta, threshold: as in `StepDPOConfig`.
    """

    acting = "current"
    variants = frozenset({"reference"})

    def __init__(
        self, *, kernel: str, log_prob_weight: LogProbWeight, num_transitions: int, beta: float, threshold: float
    ) -> None:
        self.kernel = kernel
        self.log_prob_weight = log_prob_weight
        self.passes_per_batch = num_transitions
        self.beta = beta
        self.threshold = threshold

    def old_decay(self, num_updates: int) -> float:
        """There is no old policy."""
        return 0.0

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[TransitionBatch]:
        """Every pool of every rollout batch."""
        yield from transition_batches(rollouts, comparisons, step=step)

    def loss(self, policy: PolicyView, batch: TransitionBatch) -> tuple[Tensor, Metrics]:
        """The preference loss of one pool per group."""
        shared = batch.trajectory.shared
        assert shared is not None, "the configuration guarantees pools"
        pairs = best_and_worst(batch.rollout.group, batch.comparison, threshold=self.threshold)
        current = state_gaussian(policy, batch, self.kernel)
        with torch.no_grad(), policy.using("reference"):
            reference = state_gaussian(policy, batch, self.kernel)
        shift = (current.mean - reference.mean)[shared.state[pairs.win]]  # [P, *X]
        candidates = batch.next_latents
        scale = 2.0 if self.log_prob_weight == "variance" else 1 / current.std**2
        margin = scale * flat_mean((candidates[pairs.win] - candidates[pairs.lose]).float() * shift)  # [P]
        return preference_loss(self.beta * margin, pairs)
