"""DiffusionNFT: learning on the forward process by contrast of good and bad (arXiv 2509.16117, equations 5 and 6).

The old policy draws; the final latents are noised again. From the old prediction o and the new one v two implicit policies
are made, v+ = (1-b) o + b v and v- = (1+b) o - b v. Good samples pull v+ towards themselves, bad ones v-: a step of guidance
towards the good and away from the bad that needs no likelihood, so any ODE solver may draw the rollouts.

As in the published code (and unlike the paper's equation): errors are measured in the predicted clean latents and each is
divided by its own mean magnitude, the optimality probability is r = clip(A / (2 clip) + 1/2, 0, 1), the loss is scaled by the
advantage's clip. Difference from the published code: a rollout batch shares its noise levels (drawn without replacement from
the sampler's own) and samples without a comparison are masked. Left out: the one-sided and binary advantage modes.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.algorithms.forward import ForwardAlgorithm, ForwardTerms, matching_loss, ramp, unclipped
from flowsteer.rl.algorithms.losses import Terms
from flowsteer.rl.types import Setting
from flowsteer.rollout.types import flat_mean


class DiffusionNFT(ForwardAlgorithm):
    """DiffusionNFT's hyper-parameters; the defaults are the published ones for Stable Diffusion 3.5."""

    name: Literal["diffusion_nft"] = "diffusion_nft"
    beta: PositiveFloat = 1.0
    """b, how far the implicit policies reach: small values take long steps."""
    noise_levels_per_sample: PositiveInt = 9
    kl_coef: NonNegativeFloat = 1e-4
    """Weight of the squared distance of the prediction to the reference's."""
    old_decay_slope: NonNegativeFloat = 1e-3
    """See ``old_decay_start``."""
    old_decay_max: Annotated[float, Field(ge=0, le=1)] = 0.5
    """See ``old_decay_start``."""
    old_decay_start: NonNegativeInt = 0
    """After n updates the old policy keeps min(slope * (n - start), max) of itself, nothing before ``start``, and takes the
    rest from the current one. Published: slope 0.001 and max 0.5; for text rendering 0.0075, 0.999 and start 75."""

    @property
    def acting(self) -> str:
        """The old policy draws."""
        return "old"

    @property
    def compares_with(self) -> frozenset[str]:
        """The implicit policies are made of the old one."""
        return frozenset({"old"})

    @property
    def anchors(self) -> Mapping[str, float]:
        """The reference, when the KL asks for it."""
        return {"reference": self.kl_coef}

    def check(self, setting: Setting) -> Iterator[str]:
        """The clip maps advantages to [0, 1]."""
        yield from super().check(setting)
        yield from unclipped(self.label, setting)

    def old_decay(self, num_updates: int) -> float:
        """The published schedule: nearly on-policy at first, slower later."""
        return ramp(num_updates - self.old_decay_start, self.old_decay_slope, self.old_decay_max)

    def per_sample(self, terms: ForwardTerms) -> Terms:
        """Equation 5, scaled by the advantage's clip."""
        clip = terms.facts.advantage_clip
        assert clip is not None, "the configuration is held to it"
        optimality = (terms.advantage / (2 * clip) + 0.5).clamp(0, 1)  # [R]
        old = terms.others["old"]
        contrast = nft_loss(terms.prediction, old, terms.clean, terms.denoise, optimality, self.beta)  # [R]
        return Terms(loss=clip * contrast, metrics={"old_distance": matching_loss(terms.prediction, old)})


def nft_loss(
    velocity: Tensor,  # [B, *X]
    old: Tensor,  # [B, *X]
    clean: Tensor,  # [B, *X]
    denoise: Callable[[Tensor], Tensor],
    optimality: Tensor,  # [B] in [0, 1]
    beta: float,
) -> Tensor:
    """Equation 5's contrast per sample [B], each error divided by its own mean magnitude as in the published code.

    ``denoise`` turns a prediction of the model, of a velocity or of noise, into the clean latents that it implies.
    """
    positive = _clean_error(denoise(beta * velocity + (1 - beta) * old), clean)
    negative = _clean_error(denoise((1 + beta) * old - beta * velocity), clean)
    return optimality * positive / beta + (1 - optimality) * negative / beta


def _clean_error(prediction: Tensor, clean: Tensor) -> Tensor:
    error = prediction - clean.float()
    magnitude = flat_mean(error.detach().double().abs()).clamp(min=1e-5)  # [B]
    return flat_mean(error**2) / magnitude.float()
