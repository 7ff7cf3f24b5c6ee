"""Deterministic steps against diffusers' own schedulers, a published sampler, and the exact flow of a Gaussian world."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowsteer.rollout.steps.kernels import draw, flow_sde, log_prob
from flowsteer.rollout.steps.solvers import SOLVERS, History, dpmpp_2m, euler, remember
from flowsteer.rollout.types import Schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "reference_numbers.json").read_text())
M, S = 0.7, 0.5  # the data's mean and deviation


def flow_schedule(sigma: Tensor) -> Schedule:
    return Schedule(sigma=sigma, alpha=1 - sigma, timesteps=sigma[:-1] * 1000)


def toy_velocity(x: Tensor) -> Tensor:
    return torch.sin(3 * x) + 0.2 * x


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- diffusers, bit for bit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_euler_is_diffusers_bit_for_bit(dtype: torch.dtype) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    schedule = flow_schedule(scheduler.sigmas)
    theirs = ours = latents(2, 4, 8, 8).to(dtype)
    for index, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(toy_velocity(theirs), timestep, theirs, return_dict=False)[0]
        ours = euler(toy_velocity(ours), ours, schedule, index)[0]
        assert ours.dtype == torch.float32
        ours = ours.to(dtype)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_ddim_is_diffusers_bit_for_bit(prediction: str, set_alpha_to_one: bool, solver: str) -> None:
    """Also under the name `euler`, which means the first-order deterministic step of whatever the model predicts."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1,
        prediction_type=prediction,
    )
    scheduler.set_timesteps(20)
    kept = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])
    schedule = Schedule(sigma=(1 - kept) ** 0.5, alpha=kept**0.5, timesteps=scheduler.timesteps, prediction=prediction)
    theirs = ours = latents(2, 4, 8, 8)
    for index, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(toy_velocity(theirs), int(timestep), theirs, return_dict=False)[0]
        ours = SOLVERS[solver](toy_velocity(ours), ours, schedule, index, None)[0]
        assert torch.equal(ours, theirs), f"step {index}"


@pytest.mark.parametrize("num_steps", [6, 10, 20])
def test_dpmpp_2m_is_diffusers(num_steps: int) -> None:
    """On the schedule that DGPO and DiffusionNFT use; 1e-5 covers two orders of float32 operations over 20 steps."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(num_steps)
    schedule = flow_schedule(scheduler.sigmas)
    theirs = ours = latents(2, 4, 8)
    history: History | None = None
    for index, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(toy_velocity(theirs), timestep, theirs, return_dict=False)[0]
        ours, history = dpmpp_2m(toy_velocity(ours), ours, schedule, index, history)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- a published sampler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["mixgrpo_flash"], ids=lambda case: f"window{case['window_start']}")
def test_mixgrpo_flash(case: dict) -> None:
    """ODE before the window, SDE inside, DPM-Solver++ on a compressed schedule behind it, with the window's history."""
    steps, start, size = case["num_steps"], case["window_start"], case["window_size"]

    def schedule(raw: list[float]) -> Schedule:
        return flow_schedule(torch.tensor([case["shift"] * t / (1 + (case["shift"] - 1) * t) for t in raw]))

    raw = [1 - index / steps for index in range(steps + 1)]
    full, last = schedule(raw), start + size - 1
    x = torch.tensor(case["initial_latents"])
    history = None
    for index in range(last + 1):
        velocity = toy_velocity(x)
        history = remember(velocity, x, full, index)
        if index < start:
            x, _ = euler(velocity, x, full, index)
            continue
        step = flow_sde(velocity, x, full, index, case["noise_level"])
        x = draw(step, torch.tensor(case["noise_at_step"][str(index)]), torch.float32)
        expected = torch.tensor(case["log_probs_in_window"][str(index)])
        torch.testing.assert_close(log_prob(step, x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x, torch.tensor(case["latents_after_window"]), rtol=1e-4, atol=1e-5)

    points = int((steps - last) * case["compress_ratio"])
    tail = schedule([raw[last + 1] * (1 - point / (points - 1)) for point in range(points)])
    for index in range(tail.num_steps):
        x, history = dpmpp_2m(toy_velocity(x), x, tail, index, history)
    assert last + 1 + tail.num_steps == case["calls"]
    torch.testing.assert_close(x, torch.tensor(case["final_latents"]), rtol=1e-4, atol=1e-5)


# --- the exact flow of data N(M, S^2) -----------------------------------------------------------------------------------


def deviation_at(sigma: float) -> float:
    return math.sqrt((1 - sigma) ** 2 * S**2 + sigma**2)


def flow_error(name: str, sigma: Tensor) -> float:
    """Error of the deviation after the whole schedule; the exact flow maps quantiles to quantiles."""
    schedule, x, history = flow_schedule(sigma), torch.tensor([[0.0], [1.0]], dtype=torch.float64), None
    for index in range(schedule.num_steps):
        s = sigma[index].item()
        velocity = -M + (s - (1 - s) * S**2) / deviation_at(s) ** 2 * (x - (1 - s) * M)
        x, history = SOLVERS[name](velocity, x, schedule, index, history)
    slope = (x[1] - x[0]).item()
    return slope - deviation_at(sigma[-1].item()) / deviation_at(sigma[0].item())


def uniform_in_log_snr(num_steps: int) -> Tensor:
    log_snr = torch.linspace(math.log(0.1 / 0.9), math.log(0.95 / 0.05), num_steps + 1, dtype=torch.float64)
    return torch.sigmoid(-log_snr)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """Between sigma .9 and .05, where nothing is singular."""
    coarse, fine = (flow_error(name, uniform_in_log_snr(steps)) for steps in (160, 320))
    assert abs(fine) < 1e-2
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.06)


@pytest.mark.parametrize(("name", "lowest", "error"), [("euler", 0.97, 3e-3), ("dpmpp_2m", 1.7, 3e-4)])
def test_convergence_from_noise_to_data(name: str, lowest: float, error: float) -> None:
    """From sigma 1 to 0, where log_snr is infinite; dpmpp_2m then errs like log(T) / T^2 (1.8 at these T)."""
    coarse, fine = (flow_error(name, torch.linspace(1, 0, steps + 1, dtype=torch.float64)) for steps in (160, 320))
    assert abs(fine) < error
    assert lowest < math.log2(coarse / fine) < 2.1


def test_dpmpp_2m_is_right_at_both_ends() -> None:
    """First step from sigma 1: the closed form of first order. Last step: the denoised sample. Both finite."""
    schedule = flow_schedule(torch.tensor([1.0, 0.6, 0.3, 0.0]))
    x, velocity = latents(2, 4), latents(2, 4, seed=1)
    first, history = dpmpp_2m(velocity, x, schedule, 0, None)
    torch.testing.assert_close(first, euler(velocity, x, schedule, 0)[0])
    assert history.log_snr == -math.inf
    second, history = dpmpp_2m(velocity, x, schedule, 1, history)  # sigma 1 in the history adds nothing
    torch.testing.assert_close(second, euler(velocity, x, schedule, 1)[0])
    last, _ = dpmpp_2m(velocity, x, schedule, 2, history)
    torch.testing.assert_close(last, x - 0.3 * velocity)


def test_branches_share_a_prefix() -> None:
    """A history is a value: going on from it twice gives the same twice."""
    schedule = flow_schedule(torch.linspace(1, 0, 6))
    x, history = latents(2, 4), None
    for index in range(3):
        x, history = dpmpp_2m(toy_velocity(x), x, schedule, index, history)
    ends = []
    for _ in range(2):
        y, branch = x, history
        for index in range(3, 5):
            y, branch = dpmpp_2m(toy_velocity(y), y, schedule, index, branch)
        ends.append(y)
    assert torch.equal(*ends)


def test_ddim_of_a_flow_is_euler() -> None:
    schedule = flow_schedule(torch.linspace(1, 0, 6))
    x, velocity = latents(2, 4), latents(2, 4, seed=1)
    for index in range(5):
        ddim, _ = SOLVERS["ddim"](velocity, x, schedule, index, None)
        torch.testing.assert_close(ddim, euler(velocity, x, schedule, index)[0], rtol=1e-5, atol=1e-6)
