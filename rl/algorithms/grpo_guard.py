"""GRPO-Guard: Flow-GRPO with ratios whose mean is 1 and whose spread is the same at every step (arXiv 2510.22319).

The mean log ratio of a Gaussian step is biased below 0 by b = <(mean - mean_old)^2> / (2 q^2), and its spread goes like 1 / q,
so that one clip range means another thing at each step. Guard's log ratio is q (log_prob - log_prob_old + b), which is
<z (mean - mean_old)> for the noise z that was drawn: of mean 0 and without q. The loss of each step is divided by its length,
because a change of the velocity moves the mean by that times as much.

As in the published code b carries a gradient. Differences: the division by the step's length, which Flow-Factory leaves out,
and any kernel of a flow may be used. Left out: the variance convention of the log density, which has no q to remove.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from flowsteer.rl.algorithms.losses import Terms, clipped_objective, ratio_metrics
from flowsteer.rl.algorithms.transitions import TransitionAlgorithm, TransitionTerms
from flowsteer.rl.types import Setting


class GRPOGuard(TransitionAlgorithm):
    """GRPO-Guard's hyper-parameters."""

    keeps_means: ClassVar[bool] = True

    name: Literal["grpo_guard"] = "grpo_guard"
    clip_range: PositiveFloat = 2e-6
    """The normalised ratio is clipped to 1 plus or minus this. Its logarithm is the mean over the latent of noise times
    shift of the mean."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL divergence of each step to the reference's."""
    updates_per_rollout: PositiveInt = 2

    @property
    def anchors(self) -> Mapping[str, float]:
        """The reference, when the KL asks for it."""
        return {"reference": self.kl_coef}

    def check(self, setting: Setting) -> Iterator[str]:
        """The Gaussian log density of a flow's step."""
        yield from super().check(setting)
        name = f"algorithm.name={self.label}"
        if setting.log_prob_weight != "gaussian":
            yield f"{name} normalises Gaussian log densities; set rollout.kernel.log_prob_weight=gaussian"
        if setting.kernel == "ddim":
            yield f"{name} divides by the step length of a flow, which rollout.kernel.name=ddim has not; use flow_grpo"

    def per_sample(self, step: TransitionTerms) -> Terms:
        """The clipped objective of the normalised ratio, over the step's length."""
        log_ratio = step.current.std * (step.log_prob - step.old_log_prob + step.kl_to_old)  # [R]
        loss, _ = clipped_objective(log_ratio, step.advantage, self.clip_range)
        return Terms(loss=loss / step.length, metrics=ratio_metrics(log_ratio, self.clip_range))
