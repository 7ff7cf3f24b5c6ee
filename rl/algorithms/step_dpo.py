"""Step-aware DPO, SPO: preferences between candidates that leave the same state (arXiv 2406.04314), also for flows.

At each step a pool of candidates is drawn from one state and judged (rollout/branches.py): by a step-aware preference model
(rewards/scorers/step_preference.py), or by any reward after they were led to the end. The best and the worst candidate make
a pair, if the judge prefers the one to the other clearly enough. Because both are Gaussian around the same mean, the
difference of their log ratios to the reference is linear in that mean,

    log r_w - log r_l = <(x_w - x_l) (mean - mean_ref)> / q^2,

so one pass of the policy and one of the reference serve each pair. The loss is -log sigmoid(beta (log r_w - log r_l)).

Differences from the published code: it passes both candidates through both policies, clamps each ratio to 1 +- 0.1, which
binds hardly ever and then ends the gradient, and takes the logarithm of a sigmoid that half precision rounds to 0; it drops
pairs below the threshold per process, here they are masked. Left out: SDXL's candidates that walk on by themselves for some
steps before they are judged.

Letters: B samples, P pools, S = P states, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from flowsteer.rl.algorithms.transitions import TransitionAlgorithm, TransitionTerms
from flowsteer.rl.types import Setting
from flowsteer.rollout.types import flat_mean


class StepDPO(TransitionAlgorithm):
    """Step-aware DPO's hyper-parameters; the defaults are the published ones for Stable Diffusion 1.5."""

    on_pairs: ClassVar[bool] = True

    name: Literal["step_dpo"] = "step_dpo"
    beta: PositiveFloat = 10.0
    """How sharply preferences are fitted, in units of the mean log ratio; of one latent dimension, not of all."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Pairs count whose probability of preference, softmax of both scores, differs by more than this."""

    @property
    def compares_with(self) -> frozenset[str]:
        """The ratios are to the reference."""
        return frozenset({"reference"})

    def threshold_of_pairs(self) -> float:
        """As set."""
        return self.threshold

    def check(self, setting: Setting) -> Iterator[str]:
        """Pools: candidates that leave the same state."""
        yield from super().check(setting)
        if not setting.branching:
            yield (
                f"algorithm.name={self.label} compares candidates that leave the same state; set rollout.branching, e.g. "
                "'rollout.branching={}'"
            )

    def logits(self, step: TransitionTerms) -> Tensor:
        """Beta <(x_w - x_l) (mean - mean_ref)> / q^2, [P]; the two candidates of a pair have one mean."""
        assert step.reference is not None, "the algorithm compares with the reference"
        shift = (step.current.mean - step.reference.mean).chunk(2)[0]  # [P, *X]
        win, lose = step.next_latents.chunk(2)
        scale = 2.0 if step.log_prob_weight == "variance" else 1 / step.current.std**2
        return self.beta * (scale * flat_mean((win - lose).float() * shift))
