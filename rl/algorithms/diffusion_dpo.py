"""Diffusion-DPO: preferences between finished samples on the forward process (arXiv 2311.12908, equation 14), for flows too.

Of every group the best and the worst sample make a pair. Both are noised with the same noise to the same level; with the
matching error e of the policy and that of the reference, the loss is
-log sigmoid(-(beta / 2) ((e_w - e_ref_w) - (e_l - e_ref_l))).

The samples come from the reference, which is the start of training and stays (offline), or moves up to the current policy
after every ``refresh_every`` training steps (online).

Differences from Flow-GRPO's script for it: noise levels are the sampler's own instead of logit-normal ones; a tied group is no
pair (there it silently becomes one). Left out: pairs from a data set of pictures.

Letters: B samples, P groups of a batch, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.forward import (
    ForwardBatch,
    ForwardSettings,
    NoiseLevels,
    forward_batches,
    matching_loss,
    prediction_of,
)
from flowsteer.rl.pairs import best_and_worst, preference_loss
from flowsteer.rl.types import Comparison, Metrics, PolicyView, Requirements
from flowsteer.rollout.types import Rollout


class DiffusionDPOConfig(ForwardSettings):
    """Diffusion-DPO's hyper-parameters."""

    needs: ClassVar[Requirements] = Requirements(scores_only=True, transitions=False, groups_in_a_batch=True)

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: PositiveFloat = 2000.0
    """How sharply preferences are fitted, in units of the mean squared error of one latent dimension."""
    refresh_every: PositiveInt | None = None
    """Training steps after which the reference, and with it the samples, are the current policy's; null: never."""


class DiffusionDPO:
    """See the module's docstring.

    Args:
        levels: noise levels to train at.
        The others as in `DiffusionDPOConfig`.
    """

    acting = "old"
    variants = frozenset({"old"})

    def __init__(
        self,
        *,
        levels: NoiseLevels,
        beta: float,
        refresh_every: int | None,
        updates_per_rollout: int,
    ) -> None:
        self.levels = levels
        self.passes_per_batch = levels.count
        self.beta = beta
        self.refresh_updates = None if refresh_every is None else refresh_every * updates_per_rollout

    def old_decay(self, num_updates: int) -> float:
        """The old policy is the reference: it stays, or is replaced when due."""
        return 0.0 if self.refresh_updates and num_updates % self.refresh_updates == 0 else 1.0

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[ForwardBatch]:
        """Every rollout batch at the noise levels that are drawn for it."""
        indices = [self.levels.spread(step, int(rollout.sample[0])) for rollout in rollouts]
        yield from forward_batches(rollouts, comparisons, indices)

    def loss(self, policy: PolicyView, batch: ForwardBatch) -> tuple[Tensor, Metrics]:
        """The preference loss of one noise level of each pair; only the pairs' samples pass the network."""
        pairs = best_and_worst(batch.rollout.group, batch.comparison)
        chosen = batch.of_rows(pairs.sides(), noise_from=pairs.win.repeat(2))
        noised, target = chosen.noised()  # [2 P, *X]
        error = matching_loss(policy.velocity(noised, batch.index, chosen.conditioning), target)
        reference = matching_loss(prediction_of(policy, "old", noised, chosen), target)
        win, lose = (error - reference).chunk(2)  # [P] each
        return preference_loss(-self.beta / 2 * (win - lose), pairs)
