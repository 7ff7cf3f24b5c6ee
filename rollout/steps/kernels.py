"""One stochastic denoising step as a Gaussian: where its mean lies and how wide it is.

Every kernel is a pure function of tensors and of a denoising *index*; nothing is decided by comparing sigmas as floats.
Coefficients are Python floats (float64) and latents are at least float32, because a mean log-probability is compared
with its old value at 1e-4 to 1e-5.

Left out: the early Wan2.1 variant of Flow-SDE (a = s_T + (s_1 - s_T) s), and the x0 clipping and thresholding of DDIM.

Letters: B samples, T denoising steps, X latent shape of one sample. In formulas s = sigma, s' = sigma_next, D = s - s',
v = velocity, x = latents, a = diffusion coefficient, q = std = a sqrt(D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from flowsteer.rollout.types import Schedule, flat_mean

LogProbWeight = Literal["gaussian", "variance"]


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """The law of ``next_latents`` given ``latents``: independent dimensions of one deviation."""

    mean: Tensor  # [B, *X], float32 at least
    std: float  # full deviation of the step, square root of dt included, the same for the whole batch


Kernel = Callable[[Tensor, Tensor, Schedule, int, float], Gaussian]
"""(velocity [B, *X], latents [B, *X], schedule, index, noise_level) -> Gaussian"""


def flow_sde(velocity: Tensor, latents: Tensor, schedule: Schedule, index: int, noise_level: float) -> Gaussian:
    """Flow-GRPO's reverse SDE of a rectified flow (arXiv 2505.05470): a = eta sqrt(s / (1 - s)).

    At index 0 the denominator takes ``sigma[1]``: 1 - s is 0 there, or nearly so (a schedule that starts at .9997 would
    get a deviation of 8). With sigma[0] = 1 this makes the first deviation equal eta, whatever the schedule. The step
    leaves noise on the sample when sigma_next is 0, so plans leave the last step out.

    It converges to the data's law with weak order min(1, eta^2): step i has q^2 of about eta^2 / (i + 1) however fine
    the schedule is, and what the first steps do wrong is only forgotten like T^-(eta^2).
    """
    sigma = schedule.sigma[index].item()
    clamped = schedule.sigma[max(index, 1)].item()
    return _reverse_sde(velocity, latents, schedule, index, noise_level * math.sqrt(sigma / (1 - clamped)))


def dance_sde(velocity: Tensor, latents: Tensor, schedule: Schedule, index: int, noise_level: float) -> Gaussian:
    """DanceGRPO's reverse SDE of a rectified flow (arXiv 2505.07818): `flow_sde` with a constant a = eta."""
    return _reverse_sde(velocity, latents, schedule, index, noise_level)


def _reverse_sde(velocity: Tensor, latents: Tensor, schedule: Schedule, index: int, diffusion: float) -> Gaussian:
    """Euler-Maruyama of dx = (v + a^2/(2s) (x + (1-s) v)) ds + a dw; x + (1-s) v = noise prediction = -s score."""
    sigma, sigma_next = _pair(schedule.sigma, index)
    dt = sigma - sigma_next
    correction = diffusion**2 / (2 * sigma)
    return _affine(
        latents,
        velocity,
        1 - correction * dt,
        -(1 + correction * (1 - sigma)) * dt,
        std=diffusion * math.sqrt(dt),
    )


def cps(velocity: Tensor, latents: Tensor, schedule: Schedule, index: int, noise_level: float) -> Gaussian:
    """Coefficients-Preserving Sampling (FlowCPS, arXiv 2509.05952): q = s' sin(eta pi/2).

    mean = (1-s') denoised + sqrt(s'^2 - q^2) noise: the coefficient of the data and the total noise are the schedule's
    at every step, by construction. Eta 0 is the Euler step, eta 1 draws all of the noise anew. The last step has q = 0.
    It does not keep the data's law when it is used on every step, because fresh noise replaces predicted noise: on
    Gaussian data the limit of many steps has cos(eta pi/4) of the data's deviation (.85 at eta .7, .81 at .8).
    """
    sigma, sigma_next = _pair(schedule.sigma, index)
    kept = sigma_next * math.cos(noise_level * math.pi / 2)
    return _affine(
        latents,
        velocity,
        1 - sigma_next + kept,
        -sigma * (1 - sigma_next) + kept * (1 - sigma),
        std=sigma_next * math.sin(noise_level * math.pi / 2),
    )


def ddim(velocity: Tensor, latents: Tensor, schedule: Schedule, index: int, noise_level: float) -> Gaussian:
    """DDIM with eta (arXiv 2010.02502, eq. 12 and 16) for epsilon and v-prediction models, as DDPO uses it.

    q = eta sqrt((1-A')/(1-A) (1-A/A')) with A = alpha^2 = alphas_cumprod; ``velocity`` is what the network predicts.
    """
    alpha, alpha_next = _pair(schedule.alpha, index)
    sigma, sigma_next = _pair(schedule.sigma, index)
    std = noise_level * sigma_next / sigma * math.sqrt(1 - (alpha / alpha_next) ** 2)
    kept = math.sqrt(max(sigma_next**2 - std**2, 0.0))
    noise = predicted_noise(velocity, latents, schedule, index)
    return Gaussian(mean=alpha_next * denoised(velocity, latents, schedule, index) + kept * noise, std=std)


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps, "ddim": ddim}
)


def denoised(velocity: Tensor, latents: Tensor, schedule: Schedule, index: int) -> Tensor:
    """The model's prediction of the data, [B, *X], float32 at least; ``velocity`` is the model's output of any kind."""
    velocity, latents = _widen(velocity), _widen(latents)
    sigma, alpha = schedule.sigma[index], schedule.alpha[index]
    if schedule.prediction == "velocity":
        return latents - sigma * velocity
    if schedule.prediction == "epsilon":
        return (latents - sigma * velocity) / alpha
    return alpha * latents - sigma * velocity


def predicted_noise(velocity: Tensor, latents: Tensor, schedule: Schedule, index: int) -> Tensor:
    """The model's prediction of the noise, [B, *X], float32 at least: latents = alpha denoised + sigma noise."""
    velocity, latents = _widen(velocity), _widen(latents)
    sigma, alpha = schedule.sigma[index], schedule.alpha[index]
    if schedule.prediction == "velocity":
        return latents + (1 - sigma) * velocity
    if schedule.prediction == "epsilon":
        return velocity
    return alpha * velocity + sigma * latents


def draw(gaussian: Gaussian, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """The next latents [B, *X], rounded to the storage ``dtype``: what is stored is what `log_prob` must then score.

    ``noise`` is standard normal [B, *X].
    """
    return (gaussian.mean + gaussian.std * noise.to(gaussian.mean.dtype)).to(dtype)


def log_prob(gaussian: Gaussian, next_latents: Tensor, *, weight: LogProbWeight = "gaussian") -> Tensor:
    """Log density of ``next_latents`` [B, *X] -> [B], as the *mean* over the latent's dimensions.

    The joint log density is this times the number of dimensions; the mean is the field's convention, and every
    published clip range belongs to it. ``weight="variance"`` is FlowCPS's convention -<(x' - mean)^2>: the Gaussian one
    times 2 std^2 up to a constant, so that steps count by their variance; its clip range is smaller (1e-5, not 1e-4).

    Raises:
        ValueError: for a deterministic step, which has no density; for an unknown weight.
    """
    _require_noise(gaussian.std)
    squared = flat_mean((_widen(next_latents) - gaussian.mean) ** 2)
    if weight == "variance":
        return -squared
    if weight == "gaussian":
        return -squared / (2 * gaussian.std**2) - math.log(gaussian.std) - 0.5 * math.log(2 * math.pi)
    raise ValueError(f"log_prob weight {weight!r} is unknown; use 'gaussian' or 'variance'")


def kl(gaussian: Gaussian, reference: Gaussian) -> Tensor:
    """KL divergence of two Gaussians of equal deviation, [B], per dimension: <(mean - mean_ref)^2> / (2 std^2).

    Times the number of dimensions it is the exact divergence of the step. Flow-GRPO's published coefficients belong to
    a divergence without dt in the variance, D times this one (about a tenth at T = 10).

    Raises:
        ValueError: for a deterministic step, or deviations that differ.
    """
    _require_noise(gaussian.std)
    if gaussian.std != reference.std:
        raise ValueError(f"kl compares steps of equal deviation, got {gaussian.std} and {reference.std}")
    return flat_mean((gaussian.mean - reference.mean) ** 2) / (2 * gaussian.std**2)


def check_kernel(name: str, schedule: Schedule, noise_levels: Sequence[float] = ()) -> None:
    """Say at start-up what would fail in the middle of a run.

    ``noise_levels``: T of them, 0 where the step is deterministic; of a plan, its ``covered_levels``.

    Raises:
        ValueError: for an unknown kernel, one that does not fit the model's prediction, a noise level out of range,
            or a stochastic step whose deviation is 0.
    """
    if name not in KERNELS:
        raise ValueError(f"kernel {name!r} is unknown; use one of {', '.join(KERNELS)}")
    fitting = [known for known in KERNELS if (known == "ddim") != (schedule.prediction == "velocity")]
    if name not in fitting:
        raise ValueError(
            f"kernel {name!r} does not fit a model that predicts {schedule.prediction}; use {' or '.join(fitting)}"
        )
    if len(noise_levels) not in (0, schedule.num_steps):
        raise ValueError(
            f"got {len(noise_levels)} noise levels for a schedule of {schedule.num_steps} steps; give one for each step"
        )
    for index, level in enumerate(noise_levels):
        if level < 0 or not math.isfinite(level) or (name in ("cps", "ddim") and level > 1):
            allowed = "between 0 and 1" if name in ("cps", "ddim") else "0 or more"
            raise ValueError(f"noise level {level} at step {index} does not fit kernel {name!r}; it must be {allowed}")
        probe = torch.zeros(1, 1)
        if level > 0 and not KERNELS[name](probe, probe, schedule, index, level).std > 0:
            raise ValueError(
                f"kernel {name!r} has no noise at step {index} of {schedule.num_steps} (sigma_next "
                f"{schedule.sigma[index + 1].item():.4g}), so that step has no log_prob; leave it out of the plan"
            )


def budget_factor(name: str, schedule: Schedule, levels: Sequence[float], constant: float) -> float:
    """How much to scale noise levels that fall, so that their steps' variances add up to those of a constant one.

    ``levels``: T of them, 0 where the step is deterministic; only the others count, on either side.

    Raises:
        ValueError: the kernel's noise levels, which may not exceed 1, cannot add up to that much.
    """
    probe = torch.zeros(1, 1)
    steps = [index for index, level in enumerate(levels) if level > 0]

    def budget(of_steps: Sequence[float]) -> float:
        return sum(KERNELS[name](probe, probe, schedule, i, level).std ** 2 for i, level in zip(steps, of_steps))

    falling = [levels[index] for index in steps]
    wanted = budget([constant] * len(steps))
    low, high = 0.0, (1.0 if name in ("cps", "ddim") else 1e3 * constant) / max(falling)
    if budget([high * level for level in falling]) < wanted:
        raise ValueError(
            f"rollout.kernel.keep_budget: with kernel {name!r} a noise level of at most 1 that falls so fast cannot have the "
            f"noise of a constant {constant}; lower noise_level, or take a slower decay"
        )
    for _ in range(60):  # a bisection: the variance grows with the noise level
        middle = (low + high) / 2
        low, high = (middle, high) if budget([middle * level for level in falling]) < wanted else (low, middle)
    return high


def _require_noise(std: float) -> None:
    if not std > 0:
        raise ValueError(
            f"a step of deviation {std} is deterministic and has no density; score only the plan's stochastic steps"
        )


def _pair(values: Tensor, index: int) -> tuple[float, float]:
    """The schedule's numbers before and after step ``index``."""
    if not 0 <= index < len(values) - 1:
        raise ValueError(f"denoising index {index} is outside of a schedule of {len(values) - 1} steps")
    return values[index].item(), values[index + 1].item()


def _affine(latents: Tensor, velocity: Tensor, of_latents: float, of_velocity: float, *, std: float) -> Gaussian:
    """Every kernel of a rectified flow has a mean that is linear in the latents and the velocity."""
    return Gaussian(mean=of_latents * _widen(latents) + of_velocity * _widen(velocity), std=std)


def _widen(x: Tensor) -> Tensor:
    """At least float32: half precision can overflow in the squares and drowns a log ratio of 1e-4."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
