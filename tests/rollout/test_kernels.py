"""Stochastic steps against closed forms, published numbers, diffusers and torch.distributions.

The Gaussian world: data N(m, S^2) under a rectified flow has x_s ~ N((1-s) m, (1-s)^2 S^2 + s^2) and a velocity that is
affine in x. So is every kernel's mean, and a sampler's law follows exactly from the mean and variance that each step hands
on: convergence is measured in float64 without drawing a single sample.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from flowsteer.rollout.steps.kernels import (
    KERNELS,
    Gaussian,
    budget_factor,
    check_kernel,
    ddim,
    denoised,
    draw,
    kl,
    log_prob,
)
from flowsteer.rollout.steps.plan import all_steps, decay
from flowsteer.rollout.steps.solvers import euler
from flowsteer.rollout.types import Schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "reference_numbers.json").read_text())
GOLDEN_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # the reference computes in float32
FLOW_KERNELS = ("flow_sde", "dance_sde", "cps")
M, S = 0.7, 0.5  # the data's mean and deviation in the Gaussian world


def flow_schedule(sigma: Tensor) -> Schedule:
    return Schedule(sigma=sigma, alpha=1 - sigma, timesteps=sigma[:-1] * 1000)


def uniform(num_steps: int, start: float = 1.0, end: float = 0.0) -> Schedule:
    return flow_schedule(torch.linspace(start, end, num_steps + 1, dtype=torch.float64))


def gaussian_velocity(x: Tensor, sigma: float) -> Tensor:
    """E[noise - data | x_sigma = x]."""
    variance = (1 - sigma) ** 2 * S**2 + sigma**2
    return -M + (sigma - (1 - sigma) * S**2) / variance * (x - (1 - sigma) * M)


def deviation_at(sigma: float) -> float:
    return math.sqrt((1 - sigma) ** 2 * S**2 + sigma**2)


def law_error(name: str, noise_level: float, schedule: Schedule) -> tuple[float, float]:
    """Errors of mean and deviation at the end of the schedule, starting from the exact law at its first sigma."""
    sigma = schedule.sigma.tolist()
    mean, variance = (1 - sigma[0]) * M, deviation_at(sigma[0]) ** 2
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)  # two points determine an affine map
    for index in range(schedule.num_steps):
        step = KERNELS[name](gaussian_velocity(x, sigma[index]), x, schedule, index, noise_level)
        offset = step.mean[0].item()
        slope = step.mean[1].item() - offset
        mean, variance = slope * mean + offset, slope**2 * variance + step.std**2
    return mean - (1 - sigma[-1]) * M, math.sqrt(variance) - deviation_at(sigma[-1])


def batch(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    velocity, latents, noise = torch.randn(3, *shape, generator=generator)
    return velocity, latents, noise


def stable_diffusion(num_steps: int, **options: object) -> tuple[DDIMScheduler, Schedule]:
    """Stable Diffusion 1.5's noise schedule, with the step before 0 clamped to the first training timestep."""
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    scheduler = DDIMScheduler(**{**config, "set_alpha_to_one": False, "steps_offset": 1, **options})
    scheduler.set_timesteps(num_steps)
    kept = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])
    schedule = Schedule(
        sigma=(1 - kept) ** 0.5,
        alpha=kept**0.5,
        timesteps=scheduler.timesteps,
        prediction=scheduler.config.prediction_type,
    )
    return scheduler, schedule


# --- convergence to the data's law -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "noise_level"), [("dance_sde", 0.3), ("dance_sde", 1.0), ("flow_sde", 0.0), ("flow_sde", 1.5)]
)
def test_sdes_converge_to_the_data_with_weak_order_one(name: str, noise_level: float) -> None:
    errors = [law_error(name, noise_level, uniform(steps))[1] for steps in (400, 800)]
    assert abs(errors[1]) < 2e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.05)


def test_flow_sde_below_one_converges_with_order_eta_squared() -> None:
    """What the first steps do wrong is forgotten like T^-(eta^2); 2 e(2T) - e(T) removes the usual T^-1 beside it."""
    eta = 0.7
    e400, e800, e1600 = (law_error("flow_sde", eta, uniform(steps))[1] for steps in (400, 800, 1600))
    assert abs(e1600) < 1e-3
    slow, slower = 2 * e800 - e400, 2 * e1600 - e800
    assert math.log2(slow / slower) == pytest.approx(eta**2, abs=0.02)


def test_flow_sde_has_weak_order_one_away_from_sigma_one() -> None:
    errors = [law_error("flow_sde", 0.7, uniform(steps, start=0.9))[1] for steps in (400, 800)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", FLOW_KERNELS)
def test_the_mean_of_the_data_is_exact(name: str) -> None:
    """The mean moves on a straight line, which every step follows without error; 1e-12 is float64 rounding."""
    assert abs(law_error(name, 0.8, uniform(50))[0]) < 1e-12


@pytest.mark.parametrize("noise_level", [0.4, 0.8, 1.0])
def test_cps_on_every_step_has_its_own_limit(noise_level: float) -> None:
    """The limit's deviation is cos(eta pi/4) of the data's, at order 2/3; more steps do not bring the data back.

    With c = cos(eta pi/2), a step at fixed s contracts by 1 - k, k = (1-c) s^2 / V for the true variance V, and adds
    s^2 (1-c^2): its balance is V (1+c) / (2-k). It is kept while k T s >> 1, that is down to s of about T^(-1/3), where
    k is of order T^(-2/3), so what is left is V (1+c)/2 = V cos^2(eta pi/4).
    """
    limit = math.cos(noise_level * math.pi / 4)
    gaps = [1 + law_error("cps", noise_level, uniform(steps))[1] / S - limit for steps in (1600, 6400)]
    assert abs(gaps[1]) < 3e-3
    assert math.log(gaps[0] / gaps[1], 4) == pytest.approx(2 / 3, abs=0.05)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.8, 1.0])
def test_cps_preserves_the_coefficients(noise_level: float) -> None:
    """With a perfect prediction: data keeps the coefficient 1 - s', and predicted plus fresh noise is s' in variance."""
    schedule = uniform(10)
    data = torch.tensor([[1.0], [0.0]], dtype=torch.float64)  # row 0 follows the data alone, row 1 the noise alone
    noise = 1 - data
    for index in range(10):
        sigma, sigma_next = schedule.sigma[index].item(), schedule.sigma[index + 1].item()
        latents = (1 - sigma) * data + sigma * noise
        step = KERNELS["cps"](noise - data, latents, schedule, index, noise_level)
        of_data, of_noise = step.mean.flatten().tolist()
        assert of_data == pytest.approx(1 - sigma_next, abs=1e-14)
        assert of_noise**2 + step.std**2 == pytest.approx(sigma_next**2, abs=1e-14)


# --- identities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOW_KERNELS)
@pytest.mark.parametrize("index", [0, 1, 5, 9])
def test_zero_noise_is_euler(name: str, index: int) -> None:
    """Same formula in another order of operations: a few units in the last place of numbers around 1."""
    velocity, latents, _ = batch(3, 4, 5, 5)
    schedule = flow_schedule(torch.tensor(GOLDEN["flow_steps"][0]["sigmas"]))
    step = KERNELS[name](velocity, latents, schedule, index, 0.0)
    assert step.std == 0
    torch.testing.assert_close(step.mean, euler(velocity, latents, schedule, index)[0], rtol=1e-6, atol=1e-6)


def test_dance_is_flow_with_a_constant_coefficient() -> None:
    velocity, latents, _ = batch(2, 4, 3)
    schedule = uniform(10)
    for index in range(1, 10):
        sigma = schedule.sigma[index].item()
        flow = KERNELS["flow_sde"](velocity, latents, schedule, index, 0.6)
        dance = KERNELS["dance_sde"](velocity, latents, schedule, index, 0.6 * math.sqrt(sigma / (1 - sigma)))
        assert dance.std == pytest.approx(flow.std, rel=1e-14)
        torch.testing.assert_close(dance.mean, flow.mean, rtol=1e-6, atol=1e-6)


def test_dance_sde_as_its_authors_write_it() -> None:
    """Mean = x + dt v + dt/2 eta^2 (x - (1-s) x0) / s^2, with dt = s' - s."""
    velocity, latents, _ = (x.double() for x in batch(2, 4, 3))
    schedule = uniform(8)
    for index in range(8):
        sigma, dt = schedule.sigma[index], schedule.sigma[index + 1] - schedule.sigma[index]
        score_term = (latents - (1 - sigma) * (latents - sigma * velocity)) / sigma**2
        expected = latents + dt * velocity + dt / 2 * 0.3**2 * score_term
        step = KERNELS["dance_sde"](velocity, latents, schedule, index, 0.3)
        torch.testing.assert_close(step.mean, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigmas", [[1, 0.9, 0.4, 0], [1, 0.5, 0], GOLDEN["flow_steps"][0]["sigmas"]])
def test_the_first_deviation_of_flow_sde_is_eta(sigmas: list[float]) -> None:
    velocity, latents, _ = batch(1, 2)
    step = KERNELS["flow_sde"](velocity, latents, flow_schedule(torch.tensor(sigmas)), 0, 0.7)
    assert step.std == pytest.approx(0.7, rel=1e-6)  # float32 sigmas: 1 - s_1 and s_0 - s_1 are one number


@pytest.mark.parametrize("first", [0.9997, 0.999])
def test_a_schedule_that_starts_just_below_one_does_not_explode(first: float) -> None:
    """A clamp that tests `sigma == 1` gives deviations of 8.0 and 4.4 here."""
    velocity, latents, _ = batch(1, 2)
    step = KERNELS["flow_sde"](velocity, latents, flow_schedule(torch.tensor([first, 0.9639, 0.5, 0])), 0, 0.7)
    assert step.std == pytest.approx(0.7, rel=0.02)


SD35_TABLE = [  # index, q of flow_sde (eta .7), of cps (.8), of dance_sde (.3): SD3.5, T = 10, shift 3
    (0, 0.7000, 0.9131, 0.0599),
    (1, 0.7430, 0.8686, 0.0649),
    (2, 0.5362, 0.8157, 0.0708),
    (3, 0.4459, 0.7517, 0.0778),
    (4, 0.3918, 0.6727, 0.0865),
    (5, 0.3528, 0.5727, 0.0973),
    (6, 0.3191, 0.4421, 0.1112),
    (7, 0.2820, 0.2644, 0.1297),
    (8, 0.2254, 0.0085, 0.1556),
    (9, 0.0063, 0.0000, 0.0283),
]


@pytest.mark.parametrize(("index", "flow", "cps", "dance"), SD35_TABLE)
def test_deviations_of_stable_diffusion_3_5(index: int, flow: float, cps: float, dance: float) -> None:
    schedule = flow_schedule(torch.tensor(GOLDEN["flow_steps"][0]["sigmas"]))
    zero = torch.zeros(1, 1)
    found = [
        KERNELS[name](zero, zero, schedule, index, eta).std
        for name, eta in (("flow_sde", 0.7), ("cps", 0.8), ("dance_sde", 0.3))
    ]
    assert found == pytest.approx([flow, cps, dance], abs=5.1e-5)  # the table has four decimals


# --- published implementations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["flow_steps"], ids=lambda case: f"index{case['index']}")
def test_flow_steps_of_the_published_codes(case: dict) -> None:
    schedule = flow_schedule(torch.tensor(case["sigmas"]))
    velocity, latents, after = (torch.tensor(case[key]) for key in ("velocity", "latents", "next_latents"))
    index = case["index"]

    flow = KERNELS["flow_sde"](velocity, latents, schedule, index, case["flow_sde"]["noise_level"])
    torch.testing.assert_close(flow.mean, torch.tensor(case["flow_sde"]["mean"]), **GOLDEN_TOLERANCE)
    assert flow.std == pytest.approx(case["flow_sde"]["std"], rel=1e-4)
    torch.testing.assert_close(log_prob(flow, after), torch.tensor(case["flow_sde"]["log_prob"]), **GOLDEN_TOLERANCE)

    cps = KERNELS["cps"](velocity, latents, schedule, index, case["cps"]["noise_level"])
    torch.testing.assert_close(cps.mean, torch.tensor(case["cps"]["mean"]), **GOLDEN_TOLERANCE)
    assert cps.std == pytest.approx(case["cps"]["std"], rel=1e-4)
    found = log_prob(cps, after, weight="variance")
    torch.testing.assert_close(found, torch.tensor(case["cps"]["log_prob"]), **GOLDEN_TOLERANCE)

    dance = KERNELS["dance_sde"](velocity, latents, schedule, index, case["dance_sde"]["noise_level"])
    assert dance.std == pytest.approx(case["dance_sde"]["std"], rel=1e-4)
    without_normaliser = log_prob(dance, after) + math.log(dance.std) + 0.5 * math.log(2 * math.pi)
    expected = torch.tensor(case["dance_sde"]["log_prob_without_normaliser"])
    torch.testing.assert_close(without_normaliser, expected, **GOLDEN_TOLERANCE)
    expected = torch.tensor(case["dance_sde"]["denoised"])
    torch.testing.assert_close(denoised(velocity, latents, schedule, index), expected, **GOLDEN_TOLERANCE)


@pytest.mark.parametrize("case", GOLDEN["ddim_steps"], ids=lambda case: f"index{case['index']}")
def test_ddim_steps_of_ddpo(case: dict) -> None:
    scheduler, schedule = stable_diffusion(case["num_steps"], **case["scheduler"])
    assert scheduler.timesteps[case["index"]] == case["timestep"]
    epsilon, latents, after = (torch.tensor(case[key]) for key in ("epsilon", "latents", "next_latents"))
    step = ddim(epsilon, latents, schedule, case["index"], case["eta"])
    torch.testing.assert_close(log_prob(step, after), torch.tensor(case["log_prob"]), **GOLDEN_TOLERANCE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_is_diffusers(prediction: str, eta: float) -> None:
    """The tolerance is for diffusers' coefficients, which are float32."""
    scheduler, schedule = stable_diffusion(20, prediction_type=prediction)
    velocity, latents, noise = batch(2, 4, 8, 8)
    for index, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(velocity, int(timestep), latents, eta=eta, variance_noise=noise, return_dict=False)[0]
        found = draw(ddim(velocity, latents, schedule, index, eta), noise, torch.float32)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-6)


def test_ddim_ends_at_the_data_without_noise() -> None:
    """With sigma_next = 0 the mean is the denoised prediction and the deviation 0."""
    _, schedule = stable_diffusion(20, set_alpha_to_one=True)
    velocity, latents, _ = batch(2, 4)
    step = ddim(velocity, latents, schedule, 19, 1.0)
    assert step.std == 0
    torch.testing.assert_close(step.mean, denoised(velocity, latents, schedule, 19))


# --- densities ----------------------------------------------------------------------------------------------------------


def test_log_prob_is_the_normal_density() -> None:
    mean, x, _ = batch(3, 4, 5, 6)
    expected = torch.distributions.Normal(mean, 0.37).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(log_prob(Gaussian(mean=mean, std=0.37), x), expected)


def test_variance_weight_is_the_gaussian_one_times_twice_the_variance() -> None:
    mean, x, _ = batch(3, 4, 5)
    step = Gaussian(mean=mean, std=0.37)
    constant = -math.log(0.37) - 0.5 * math.log(2 * math.pi)
    expected = 2 * 0.37**2 * (log_prob(step, x) - constant)
    torch.testing.assert_close(log_prob(step, x, weight="variance"), expected)


def test_kl_is_the_divergence_per_dimension() -> None:
    mean, other, _ = batch(3, 4, 5)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, 0.37), normal(other, 0.37)).flatten(1).mean(1)
    torch.testing.assert_close(kl(Gaussian(mean=mean, std=0.37), Gaussian(mean=other, std=0.37)), expected)


def test_kl_is_zero_only_for_equal_steps_and_has_a_gradient() -> None:
    mean, other, _ = batch(3, 4)
    mean.requires_grad_()
    assert kl(Gaussian(mean=mean, std=0.2), Gaussian(mean=mean.detach(), std=0.2)).abs().max() == 0
    kl(Gaussian(mean=mean, std=0.2), Gaussian(mean=other, std=0.2)).sum().backward()
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad, (mean - other).detach() / 0.2**2 / 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_stored_is_what_is_scored(dtype: torch.dtype) -> None:
    """`draw` rounds, and scoring the rounded latents again gives the same bits."""
    velocity, latents, noise = batch(2, 4, 8, 8)
    schedule = uniform(10)
    stored = draw(KERNELS["flow_sde"](velocity, latents.to(dtype), schedule, 3, 0.7), noise, dtype)
    assert stored.dtype == dtype
    first, second = (
        log_prob(KERNELS["flow_sde"](velocity, latents.to(dtype), schedule, 3, 0.7), stored) for _ in range(2)
    )
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


def test_half_precision_inputs_are_widened_before_any_arithmetic() -> None:
    velocity, latents, _ = (x.half() for x in batch(2, 4, 8))
    for name in FLOW_KERNELS:
        step = KERNELS[name](velocity, latents, uniform(10), 4, 0.5)
        exact = KERNELS[name](velocity.double(), latents.double(), uniform(10), 4, 0.5)
        assert step.mean.dtype == torch.float32
        torch.testing.assert_close(step.mean, exact.mean.float(), rtol=1e-6, atol=1e-6)


# --- the gradient that learning uses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "noise_level"), [("flow_sde", 0.7), ("cps", 0.8), ("dance_sde", 0.5)])
def test_score_function_is_the_derivative_of_the_expected_reward(name: str, noise_level: float) -> None:
    """A parameter shifts the velocity; E[reward * d/dparameter sum_k log p] must be d/dparameter E[reward].

    The reward is x^2 of the last latents, whose law is Gaussian: its derivative 2 mean dmean/dparameter follows from the
    affine steps. The latent has one dimension, so the mean log density is the joint one.
    """
    schedule, samples = uniform(6), 400_000
    sigma = schedule.sigma.tolist()
    steps = range(schedule.num_steps - 1)  # the last one would have no noise under cps

    mean = torch.zeros(1, 1, dtype=torch.float64)
    shift = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    for index in steps:
        velocity = gaussian_velocity(mean, sigma[index]) + shift
        mean = KERNELS[name](velocity, mean, schedule, index, noise_level).mean
    exact = torch.autograd.grad((mean**2).sum(), shift)[0].item()
    assert abs(exact) > 0.1  # the test would say little about a derivative near 0

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 1, generator=generator)
    shift = torch.zeros(samples, 1, requires_grad=True)  # one copy for each sample: per-sample scores in one backward
    joint = torch.zeros(samples)
    for index in steps:
        step = KERNELS[name](gaussian_velocity(x, sigma[index]) + shift, x, schedule, index, noise_level)
        noise = torch.randn(samples, 1, generator=generator)
        x = draw(Gaussian(mean=step.mean.detach(), std=step.std), noise, torch.float32)
        joint = joint + log_prob(step, x)
    scores = torch.autograd.grad(joint.sum(), shift)[0].squeeze(1)
    reward = x.squeeze(1) ** 2
    terms = (reward - reward.mean()) * scores
    standard_error = terms.std().item() / math.sqrt(samples)
    assert standard_error < 0.03 * abs(exact)
    assert terms.mean().item() == pytest.approx(exact, abs=4 * standard_error)


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_a_deterministic_step_has_no_density() -> None:
    step = Gaussian(mean=torch.zeros(1, 2), std=0.0)
    for weight in ("gaussian", "variance"):
        with pytest.raises(ValueError, match="deterministic"):
            log_prob(step, torch.zeros(1, 2), weight=weight)
    with pytest.raises(ValueError, match="deterministic"):
        kl(step, step)


def test_kl_refuses_unequal_deviations() -> None:
    mean = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"equal deviation, got 0\.1 and 0\.2"):
        kl(Gaussian(mean=mean, std=0.1), Gaussian(mean=mean, std=0.2))


def test_unknown_weight() -> None:
    with pytest.raises(ValueError, match="use 'gaussian' or 'variance'"):
        log_prob(Gaussian(mean=torch.zeros(1, 2), std=1.0), torch.zeros(1, 2), weight="sum")  # pyright: ignore


def test_index_outside_of_the_schedule() -> None:
    zero = torch.zeros(1, 1)
    for index in (-1, 4):
        with pytest.raises(ValueError, match="outside of a schedule of 4 steps"):
            KERNELS["cps"](zero, zero, uniform(4), index, 0.5)


@pytest.mark.parametrize(
    ("name", "levels", "message"),
    [
        ("sde", (), "use one of flow_sde, dance_sde, cps, ddim"),
        ("ddim", (), "predicts velocity; use flow_sde or dance_sde or cps"),
        ("cps", (1.2, 0, 0, 0), "noise level 1.2 at step 0 .* between 0 and 1"),
        ("flow_sde", (0, -0.1, 0, 0), "must be 0 or more"),
        ("flow_sde", (0.7, 0.7), "2 noise levels for a schedule of 4 steps"),
        ("cps", (0.8, 0.8, 0.8, 0.8), "no noise at step 3 of 4"),
    ],
)
def test_check_kernel_for_a_flow(name: str, levels: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_kernel(name, uniform(4), levels)


@pytest.mark.parametrize("name", FLOW_KERNELS)
def test_check_kernel_for_an_epsilon_model(name: str) -> None:
    with pytest.raises(ValueError, match="predicts epsilon; use ddim"):
        check_kernel(name, stable_diffusion(4)[1])


def test_check_kernel_accepts_what_works() -> None:
    for name in FLOW_KERNELS:
        check_kernel(name, uniform(4), all_steps(4, 0.7).covered_levels)
    check_kernel("flow_sde", uniform(4), all_steps(4, 1.2, include_last=True).covered_levels)
    check_kernel("ddim", stable_diffusion(4)[1], all_steps(4, 1.0, include_last=True).covered_levels)


# --- a budget of noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", FLOW_KERNELS)
@pytest.mark.parametrize("shape", ["linear", "power", "cosine", "exponential"])
def test_a_falling_noise_level_can_keep_the_budget_of_a_constant_one(kernel: str, shape: str) -> None:
    schedule = uniform(10)
    constant = 0.3
    levels = decay(constant, 10, shape=shape, rate=0.5)  # pyright: ignore
    covered = (*levels[:9], 0.0)
    factor = budget_factor(kernel, schedule, covered, constant)
    probe = torch.zeros(1, 1)

    def budget(of_steps: list[float]) -> float:
        return sum(KERNELS[kernel](probe, probe, schedule, i, level).std ** 2 for i, level in enumerate(of_steps))

    assert budget([factor * level for level in levels[:9]]) == pytest.approx(budget([constant] * 9), rel=1e-9)
    assert factor > 1


def test_a_budget_that_no_noise_level_can_have() -> None:
    levels = decay(0.9, 10, shape="exponential", rate=2.0)
    with pytest.raises(ValueError, match=r"keep_budget: with kernel 'cps' a noise level of at most 1 .* constant 0.9"):
        budget_factor("cps", uniform(10), levels, 0.9)
