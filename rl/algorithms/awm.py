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

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.forward import (
    ForwardBatch,
    ForwardSettings,
    NoiseLevels,
    forward_batches,
    matching_loss,
    prediction_of,
)
from flowsteer.rl.losses import clipped_objective, loss_metrics, ratio_metrics
from flowsteer.rl.types import Comparison, Metrics, PolicyView, Requirements, changed
from flowsteer.rollout.types import Rollout

Weighting = Literal["uniform", "sigma", "sigma_squared", "huber", "general_huber"]
HUBER_POWER = 0.25  # p of the published generalised Huber function


class AWMConfig(ForwardSettings):
    """AWM's hyper-parameters; the defaults are the published ones for Stable Diffusion 3.5."""

    needs: ClassVar[Requirements] = Requirements(transitions=False, clipped_advantage=True)

    name: Literal["awm"] = "awm"
    weighting: Weighting = "general_huber"
    clip_range: PositiveFloat | None = None
    """Of the ratio to the old policy, which then draws the rollouts; null is on-policy."""
    kl_coef: NonNegativeFloat = 1e-3
    """Weight of the squared distance of the prediction to the reference's."""
    old_coef: NonNegativeFloat = 1.0
    """Weight of the squared distance of the prediction to the old policy's."""
    old_decay_slope: NonNegativeFloat = 1e-3
    old_decay_max: Annotated[float, Field(ge=0, le=1)] = 0.3
    """After n updates the old policy keeps min(slope * n, max) of itself and takes the rest from the current one."""
    noise_levels_per_sample: PositiveInt = 6

    def idle(self) -> Iterator[str]:
        """The old policy's schedule, where nothing asks for it."""
        if self.clip_range is None and not self.old_coef and changed(self) & {"old_decay_slope", "old_decay_max"}:
            yield "awm without clip_range and with old_coef=0 has no old policy; leave old_decay_* out"


class AWM:
    """See the module's docstring.

    Args:
        levels: noise levels to train at.
        advantage_clip: the clip of the advantages, which scales them to [-1, 1].
        The others as in `AWMConfig`.
    """

    def __init__(
        self,
        *,
        levels: NoiseLevels,
        advantage_clip: float,
        weighting: Weighting,
        clip_range: float | None,
        kl_coef: float,
        old_coef: float,
        old_decay_slope: float,
        old_decay_max: float,
    ) -> None:
        self.levels = levels
        self.passes_per_batch = levels.count
        self.advantage_clip = advantage_clip
        self.weighting: Weighting = weighting
        self.clip_range = clip_range
        self.kl_coef = kl_coef
        self.old_coef = old_coef
        self.old_decay_slope = old_decay_slope
        self.old_decay_max = old_decay_max
        self.acting = "current" if clip_range is None else "old"

    @property
    def variants(self) -> frozenset[str]:
        """The anchors that have a weight, and the old policy where it draws."""
        old = self.old_coef or self.clip_range is not None
        return frozenset(({"old"} if old else set()) | ({"reference"} if self.kl_coef else set()))

    def old_decay(self, num_updates: int) -> float:
        """The published schedule."""
        return min(self.old_decay_slope * num_updates, self.old_decay_max)

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[ForwardBatch]:
        """Every rollout batch at noise levels from each stratum."""
        indices = [self.levels.stratified(step, int(rollout.sample[0])) for rollout in rollouts]
        yield from forward_batches(rollouts, comparisons, indices)

    def loss(self, policy: PolicyView, batch: ForwardBatch) -> tuple[Tensor, Metrics]:
        """The weighted likelihood of one noise level, and the distances to the anchors."""
        noised, target = batch.noised()
        prediction = policy.velocity(noised, batch.index, batch.conditioning).float()
        others = {name: prediction_of(policy, name, noised, batch) for name in sorted(self.variants)}
        sigma = float(batch.schedule.sigma[batch.index])
        log_likelihood = -penalty(matching_loss(prediction, target), sigma, self.weighting)  # [B]
        weight = batch.comparison.weight.to(prediction.device)
        advantage = batch.comparison.advantage.to(prediction.device) / self.advantage_clip
        if self.clip_range is None:
            log_ratio = log_likelihood - log_likelihood.detach()  # on-policy: the ratio is 1, its gradient that of phi
        else:
            log_ratio = log_likelihood + penalty(matching_loss(others["old"], target), sigma, self.weighting)
        per_sample, _ = clipped_objective(log_ratio, advantage, self.clip_range or 1.0)
        distances = {
            metric: matching_loss(prediction, others[name])
            for metric, name, wanted in (("kl", "reference", self.kl_coef), ("old_distance", "old", self.old_coef))
            if wanted
        }
        anchored = self.kl_coef * distances.get("kl", 0.0) + self.old_coef * distances.get("old_distance", 0.0)
        loss = ((per_sample + anchored) * weight).mean()
        ratios = {} if self.clip_range is None else ratio_metrics(log_ratio, weight, self.clip_range)
        return loss, loss_metrics(loss, weight, **distances) | ratios


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
