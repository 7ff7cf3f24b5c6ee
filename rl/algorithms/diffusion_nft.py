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

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from flowsteer.rl.forward import (
    ForwardBatch,
    ForwardSettings,
    NoiseLevels,
    forward_batches,
    matching_loss,
    prediction_of,
)
from flowsteer.rl.losses import loss_metrics
from flowsteer.rl.types import Comparison, Metrics, PolicyView, Requirements
from flowsteer.rollout.kernels import denoised
from flowsteer.rollout.types import Rollout, flat_mean


class DiffusionNFTConfig(ForwardSettings):
    """DiffusionNFT's hyper-parameters; the defaults are the published ones for Stable Diffusion 3.5."""

    needs: ClassVar[Requirements] = Requirements(transitions=False, clipped_advantage=True)

    name: Literal["diffusion_nft"] = "diffusion_nft"
    beta: PositiveFloat = 1.0
    """b, how far the implicit policies reach: small values take long steps."""
    noise_levels_per_sample: PositiveInt = 9
    kl_coef: NonNegativeFloat = 1e-4
    """Weight of the squared distance of the prediction to the reference's."""
    old_decay_slope: NonNegativeFloat = 1e-3
    old_decay_max: Annotated[float, Field(ge=0, le=1)] = 0.5
    old_decay_start: NonNegativeInt = 0
    """After n updates the old policy keeps min(slope * (n - start), max) of itself, nothing before ``start``, and takes the
    rest from the current one. Published: slope 0.001 and max 0.5; for text rendering 0.0075, 0.999 and start 75."""


class DiffusionNFT:
    """See the module's docstring.

    Args:
        levels: noise levels to train at.
        advantage_clip: the clip of the advantages, which maps them to [0, 1].
        The others as in `DiffusionNFTConfig`.
    """

    acting = "old"

    def __init__(
        self,
        *,
        levels: NoiseLevels,
        advantage_clip: float,
        beta: float,
        kl_coef: float,
        old_decay_slope: float,
        old_decay_max: float,
        old_decay_start: int = 0,
    ) -> None:
        self.levels = levels
        self.passes_per_batch = levels.count
        self.advantage_clip = advantage_clip
        self.beta = beta
        self.kl_coef = kl_coef
        self.old_decay_slope = old_decay_slope
        self.old_decay_max = old_decay_max
        self.old_decay_start = old_decay_start

    @property
    def variants(self) -> frozenset[str]:
        """The old policy always, the reference when the KL asks for it."""
        return frozenset({"old", "reference"} if self.kl_coef else {"old"})

    def old_decay(self, num_updates: int) -> float:
        """The published schedule: nearly on-policy at first, slower later."""
        return min(self.old_decay_slope * max(num_updates - self.old_decay_start, 0), self.old_decay_max)

    def batches(
        self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison], step: int
    ) -> Iterator[ForwardBatch]:
        """Every rollout batch at the noise levels that are drawn for it."""
        indices = [self.levels.spread(step, int(rollout.sample[0])) for rollout in rollouts]
        yield from forward_batches(rollouts, comparisons, indices)

    def loss(self, policy: PolicyView, batch: ForwardBatch) -> tuple[Tensor, Metrics]:
        """The contrast of the two implicit policies at one noise level, and the distance to the reference."""
        noised, _ = batch.noised()
        velocity = policy.velocity(noised, batch.index, batch.conditioning).float()
        old = prediction_of(policy, "old", noised, batch)
        weight = batch.comparison.weight.to(velocity.device)
        optimality = (batch.comparison.advantage.to(velocity.device) / (2 * self.advantage_clip) + 0.5).clamp(0, 1)

        def denoise(output: Tensor) -> Tensor:
            return denoised(output, noised, batch.schedule, batch.index)

        contrast = nft_loss(velocity, old, batch.rollout.latents, denoise, optimality, self.beta)  # [B]
        distance = torch.zeros_like(contrast)
        if self.kl_coef:
            distance = matching_loss(velocity, prediction_of(policy, "reference", noised, batch))
        loss = ((self.advantage_clip * contrast + self.kl_coef * distance) * weight).mean()
        kl = {"kl": distance} if self.kl_coef else {}
        return loss, loss_metrics(loss, weight, old_distance=matching_loss(velocity, old), **kl)


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
