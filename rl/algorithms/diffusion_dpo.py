"""Diffusion-DPO: preferences between finished samples on the forward process (arXiv 2311.12908, equation 14), for flows too.

Of every group the best and the worst sample make a pair. Both are noised with the same noise to the same level; with the
matching error e of the policy and that of the reference, the loss is
-log sigmoid(-(beta / 2) ((e_w - e_ref_w) - (e_l - e_ref_l))).

The samples come from the reference, which is the start of training and stays (offline), or moves up to the current policy
after every ``refresh_every`` training steps (online).

Differences from Flow-GRPO's script for it: noise levels are the sampler's own instead of logit-normal ones; a tied group is no
pair (there it silently becomes one). Pairs may also come from a file of pictures (``prompts.pictures``).

Letters: B samples, P groups of a batch, X latent shape of one sample.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.algorithms.forward import ForwardAlgorithm, ForwardTerms, renewed


class DiffusionDPO(ForwardAlgorithm):
    """Diffusion-DPO's hyper-parameters."""

    on_pairs: ClassVar[bool] = True

    name: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: PositiveFloat = 2000.0
    """How sharply preferences are fitted, in units of the mean squared error of one latent dimension."""
    refresh_every: PositiveInt | None = None
    """Training steps after which the reference, and with it the samples, are the current policy's; null: never."""

    @property
    def acting(self) -> str:
        """The old policy is the reference, and draws."""
        return "old"

    @property
    def compares_with(self) -> frozenset[str]:
        """See `acting`."""
        return frozenset({"old"})

    def old_decay(self, num_updates: int) -> float:
        """It stays, or is replaced when due."""
        return renewed(self.refresh_every, self.updates_per_rollout, num_updates)

    def logits(self, terms: ForwardTerms) -> Tensor:
        """Equation 14: -(beta / 2) of the errors over the reference's, the winner's less the loser's, [P]."""
        win, lose = (terms.error() - terms.error("old")).chunk(2)  # [P] each
        return -self.beta / 2 * (win - lose)
