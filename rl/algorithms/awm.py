"""AWM: advantage-weighted matching, the policy gradient of a forward-process likelihood (arXiv 2509.25050).

The error l of the policy at a noised sample stands for its negative log-likelihood: lp = -phi(l, sigma). On-policy the
gradient is A grad phi; off-policy (``clip_range``) the old policy draws and the ratio exp(lp - lp_old) is clipped as in PPO. A
second anchor holds the prediction near the old policy's, one training step behind: a trust region.

As in the published code: phi is the generalised Huber function of l unless asked, with the noise level as its weight; the
advantage is divided by its clip; noise levels are drawn one from each of as many equal strata. Difference: levels are the
sampler's own. Left out: the logit-normal and uniform levels, levels summed before the ratio, the ELBO's weighting.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.algorithms.forward import ForwardAlgorithm, ForwardTerms, NoiseLevels, ramp, unclipped
from flowsteer.rl.algorithms.losses import Terms, clipped_objective, ratio_metrics
from flowsteer.rl.types import Setting, changed
from flowsteer.rollout.types import Rollout

Weighting = Literal["uniform", "sigma", "sigma_squared", "huber", "general_huber"]
HUBER_POWER = 0.25  # p of the published generalised Huber function


class AWM(ForwardAlgorithm):
    """AWM's hyper-parameters; the defaults are the published ones for Stable Diffusion 3.5."""

    name: Literal["awm"] = "awm"
    weighting: Weighting = "general_huber"
    """How the squared error of the prediction becomes a log likelihood, by the noise level sigma."""
    clip_range: PositiveFloat | None = None
    """The ratio to the old policy, which then draws the rollouts, is clipped to 1 plus or minus this; null is on-policy."""
    kl_coef: NonNegativeFloat = 1e-3
    """Weight of the squared distance of the prediction to the reference's."""
    old_coef: NonNegativeFloat = 1.0
    """Weight of the squared distance of the prediction to the old policy's."""
    old_decay_slope: NonNegativeFloat = 1e-3
    """See ``old_decay_max``."""
    old_decay_max: Annotated[float, Field(ge=0, le=1)] = 0.3
    """After n updates the old policy keeps min(slope * n, max) of itself and takes the rest from the current one."""
    noise_levels_per_sample: PositiveInt = 6

    def idle(self) -> Iterator[str]:
        """The old policy's schedule, where nothing asks for it."""
        if self.clip_range is None and not self.old_coef and changed(self) & {"old_decay_slope", "old_decay_max"}:
            yield "awm without clip_range and with old_coef=0 has no old policy; leave old_decay_* out"

    @property
    def acting(self) -> str:
        """The old policy draws where the ratio to it is clipped."""
        return "current" if self.clip_range is None else "old"

    @property
    def compares_with(self) -> frozenset[str]:
        """See `acting`."""
        return frozenset() if self.clip_range is None else frozenset({"old"})

    @property
    def anchors(self) -> Mapping[str, float]:
        """The reference and the old policy, as far as they have a weight."""
        return {"reference": self.kl_coef, "old": self.old_coef}

    def check(self, setting: Setting) -> Iterator[str]:
        """The clip scales advantages to [-1, 1]."""
        yield from super().check(setting)
        yield from unclipped(self.label, setting)

    def old_decay(self, num_updates: int) -> float:
        """The published schedule."""
        return ramp(num_updates, self.old_decay_slope, self.old_decay_max)

    def indices(self, levels: NoiseLevels, step: int, rollout: Rollout) -> list[int]:
        """One from each stratum."""
        return levels.stratified(step, int(rollout.sample[0]))

    def per_sample(self, terms: ForwardTerms) -> Terms:
        """The weighted likelihood, on-policy or as a clipped ratio."""
        clip = terms.facts.advantage_clip
        assert clip is not None, "the configuration is held to it"
        log_likelihood = -penalty(terms.error(), terms.sigma, self.weighting)  # [R]
        if self.clip_range is None:
            log_ratio = log_likelihood - log_likelihood.detach()  # on-policy: the ratio is 1, its gradient that of phi
            loss, _ = clipped_objective(log_ratio, terms.advantage / clip, 1.0)
            return Terms(loss=loss)
        log_ratio = log_likelihood + penalty(terms.error("old"), terms.sigma, self.weighting)
        loss, _ = clipped_objective(log_ratio, terms.advantage / clip, self.clip_range)
        return Terms(loss=loss, metrics=ratio_metrics(log_ratio, self.clip_range))


def penalty(error: Tensor, sigma: float, weighting: Weighting) -> Tensor:
    """Phi, which stands for a negative log-likelihood: of errors [B] at a noise level, [B]. The published constants."""
    if weighting == "uniform":
        return error
    if weighting == "sigma":
        return sigma * error
    if weighting == "sigma_squared":
        return sigma**2 * error
    power, scale = (0.5, sigma) if weighting == "huber" else (HUBER_POWER, sigma / HUBER_POWER)
    return scale * ((error + 1e-10) ** power - 1e-10**power)
