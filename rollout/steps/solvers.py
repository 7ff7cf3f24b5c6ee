"""Deterministic denoising steps: Euler, DDIM without noise, DPM-Solver++(2M).

A solver is a function of values. What a multistep method remembers is passed in and handed back, so that branches can
share a prefix and a step can be taken on any schedule. The first-order steps repeat diffusers' operations in diffusers'
order: in float32 they equal its schedulers bit for bit.

Left out: singlestep and third-order DPM-Solver, correctors, x0 thresholding.

Letters: B samples, T denoising steps, X latent shape of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from flowsteer.rollout.steps.kernels import denoised, predicted_noise
from flowsteer.rollout.types import Schedule


@dataclass(frozen=True, kw_only=True)
class History:
    """What a multistep solver remembers of the step before: where it was, and what it predicted there."""

    log_snr: float  # log(alpha / sigma); -inf at sigma 1
    denoised: Tensor  # [B, *X], float32 at least


Solver = Callable[[Tensor, Tensor, Schedule, int, History | None], tuple[Tensor, History | None]]
"""(velocity [B, *X], latents [B, *X], schedule, index, history) -> (next_latents [B, *X], float32 at least; history)"""


def euler(
    velocity: Tensor, latents: Tensor, schedule: Schedule, index: int, history: History | None = None
) -> tuple[Tensor, None]:
    """The first-order deterministic step of the model: Euler of a rectified flow, DDIM with eta 0 of any other.

    As in diffusers' FlowMatchEulerDiscreteScheduler, a half-precision velocity is scaled in its own precision: the
    picture is the one that the user's pipeline draws.
    """
    if schedule.prediction != "velocity":
        return ddim(velocity, latents, schedule, index)
    dt = schedule.sigma[index + 1] - schedule.sigma[index]
    return latents.to(torch.promote_types(latents.dtype, torch.float32)) + dt * velocity, None


def ddim(
    velocity: Tensor, latents: Tensor, schedule: Schedule, index: int, history: History | None = None
) -> tuple[Tensor, None]:
    """DDIM with eta 0 (arXiv 2010.02502, eq. 12), for every kind of prediction.

    next = alpha' denoised + sigma' noise. On a rectified flow this is Euler's step, but not to the last bit.
    """
    direction = schedule.sigma[index + 1] * predicted_noise(velocity, latents, schedule, index)
    return schedule.alpha[index + 1] * denoised(velocity, latents, schedule, index) + direction, None


def dpmpp_2m(
    velocity: Tensor, latents: Tensor, schedule: Schedule, index: int, history: History | None = None
) -> tuple[Tensor, History]:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095, algorithm 2): second order with one network call per step.

    With gain = -alpha' (e^-h - 1) = alpha' - alpha sigma'/sigma, the first-order part is (sigma'/sigma) x + gain D0 and
    the second-order part gain/2 (D0 - D_before) / r, r = (log_snr - log_snr_before) / h. Written without h, the former
    is right where log_snr is infinite, at sigma 1 (first step) and at sigma_next 0 (last step: the denoised sample);
    those two steps are of first order, and so is the one that has sigma 1 in its history. So few cost no order.
    """
    sigma, sigma_next = schedule.sigma[index].item(), schedule.sigma[index + 1].item()
    alpha, alpha_next = schedule.alpha[index].item(), schedule.alpha[index + 1].item()
    now = remember(velocity, latents, schedule, index)
    gain = alpha_next - alpha * sigma_next / sigma
    target = now.denoised
    if history is not None and math.isfinite(history.log_snr) and sigma_next > 0:
        h = math.log(alpha_next / sigma_next) - now.log_snr
        target = target + h / (2 * (now.log_snr - history.log_snr)) * (now.denoised - history.denoised)
    return (sigma_next / sigma) * latents.to(target.dtype) + gain * target, now


def remember(velocity: Tensor, latents: Tensor, schedule: Schedule, index: int) -> History:
    """What `dpmpp_2m` would remember of this step; lets a solver go on behind a step that a kernel took."""
    alpha, sigma = schedule.alpha[index].item(), schedule.sigma[index].item()
    log_snr = math.log(alpha / sigma) if alpha > 0 else -math.inf
    return History(log_snr=log_snr, denoised=denoised(velocity, latents, schedule, index))


SOLVERS: Mapping[str, Solver] = MappingProxyType({"euler": euler, "ddim": ddim, "dpmpp_2m": dpmpp_2m})
