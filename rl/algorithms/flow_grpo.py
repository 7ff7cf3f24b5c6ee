"""Flow-GRPO: a clipped policy gradient over stochastic denoising steps (arXiv 2505.05470, equations 4 and 5).

Every stored transition is an action whose Gaussian log density the policy can evaluate again; the ratio to the density under
the policy that drew it is weighted with the group's advantage and clipped as in PPO. The rollout's settings make this

- MixGRPO and its Flash (arXiv 2507.21802) with a window of stochastic steps, a ``tail_fraction`` and dpmpp_2m behind it;
- Flow-GRPO-Fast with a window and ``shared_noise``; FlowCPS (arXiv 2509.05952) with the cps kernel;
- DanceGRPO (arXiv 2505.07818) with the dance_sde kernel, ``shared_noise`` and ``transitions_per_sample``;
- DDPO (arXiv 2305.13301, its importance-sampled estimator) with the ddim kernel and an epsilon model;
- G2RPO (arXiv 2510.01982) with ``branching``: every step has rewards of its own, summed over granularities, and one network
  pass serves the whole group.

Differences from the published code: the KL is the true one of the two Gaussians, per dimension (the published one lacks the
step's length in its variance: its coefficient 0.04 is about 0.004 here at ten steps); samples without a comparison are masked
under a global normaliser, not dropped per process; both branches of guidance carry gradients; the last step is not
stochastic unless asked, which decodes the model's last prediction as DanceGRPO does; a batch shares its denoising steps
(DanceGRPO and DDPO shuffle them per sample); G2RPO clips each granularity's advantage before they are summed, not after.
Left out: KL in the reward.

Letters: B samples, K stored transitions, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from flowsteer.rl.algorithms.losses import Terms, clipped_objective, ratio_metrics
from flowsteer.rl.algorithms.transitions import TransitionAlgorithm, TransitionTerms
from flowsteer.rl.types import Facts, Setting


class FlowGRPO(TransitionAlgorithm):
    """Flow-GRPO's hyper-parameters; the defaults are the paper's for Stable Diffusion 3.5."""

    name: Literal["flow_grpo"] = "flow_grpo"
    clip_range: PositiveFloat = 1e-4
    """The ratio is clipped to 1 plus or minus this. Log densities are means over the latent's dimensions, so the values
    are small."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL divergence of each step to the reference's."""
    transitions_per_sample: PositiveInt | None = None
    """Train so many of each batch's transitions, drawn at random; null trains all of them."""
    updates_per_rollout: PositiveInt = 2

    @property
    def anchors(self) -> Mapping[str, float]:
        """The reference, when the KL asks for it."""
        return {"reference": self.kl_coef}

    def transitions_trained(self) -> int | None:
        """As set."""
        return self.transitions_per_sample

    def check(self, setting: Setting) -> Iterator[str]:
        """A pool has one step, which is not chosen among."""
        yield from super().check(setting)
        if setting.branching and self.transitions_per_sample is not None:
            yield "rollout.branching trains every pool, each of one step; leave algorithm.transitions_per_sample out"

    def bind(self, facts: Facts) -> Self:
        """Raises ValueError where more transitions are asked for than the plan stores."""
        if (each := self.transitions_per_sample) is not None and each > facts.num_transitions:
            raise ValueError(
                f"algorithm.transitions_per_sample={each}, but the plan stores {facts.num_transitions} transitions "
                "of each sample; take at most as many"
            )
        return super().bind(facts)

    def per_sample(self, step: TransitionTerms) -> Terms:
        """Equation 5, without its KL."""
        log_ratio = step.log_prob - step.old_log_prob  # [R]
        loss, _ = clipped_objective(log_ratio, step.advantage, self.clip_range)
        return Terms(loss=loss, metrics=ratio_metrics(log_ratio, self.clip_range))
