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

from typing import ClassVar, Literal

from pydantic import PositiveFloat
from torch import Tensor

from flowsteer.rl.algorithms.transitions import TransitionAlgorithm, TransitionTerms


class PSO(TransitionAlgorithm):
    """PSO's hyper-parameters; the defaults are the published ones for SDXL-Turbo."""

    on_pairs: ClassVar[bool] = True

    name: Literal["pso"] = "pso"
    beta: PositiveFloat = 50.0
    """How sharply preferences are fitted, in units of the mean log ratio; of one latent dimension, not of all."""

    @property
    def compares_with(self) -> frozenset[str]:
        """The ratios are to the reference."""
        return frozenset({"reference"})

    def logits(self, step: TransitionTerms) -> Tensor:
        """Beta (log r_w - log r_l), [P]."""
        win, lose = (step.log_prob - step.reference_log_prob).chunk(2)  # [P] each
        return self.beta * (win - lose)
