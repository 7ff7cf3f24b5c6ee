"""Which steps are stochastic when: purity, coverage, agreement with the published windows, and what is refused."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from flowsteer.rollout.steps.plan import (
    Plan,
    all_steps,
    compressed_path,
    decay,
    fixed_steps,
    no_steps,
    strided_path,
    window,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "reference_numbers.json").read_text())["mixgrpo_windows"]


def starts(plan: Plan, count: int) -> list[int]:
    return [plan.indices(step)[0] for step in range(count)]


def test_all_steps_leave_the_last_one_out() -> None:
    plan = all_steps(4, 0.7)
    assert plan.num_transitions == 3
    assert plan.noise_levels(0) == plan.noise_levels(123) == (0.7, 0.7, 0.7, 0.0)
    assert all_steps(4, 0.7, include_last=True).noise_levels(0) == (0.7,) * 4


def test_no_steps() -> None:
    plan = no_steps(3)
    assert plan.num_transitions == 0
    assert plan.indices(5) == ()
    assert plan.noise_levels(5) == plan.covered_levels == (0.0, 0.0, 0.0)


def test_fixed_steps_are_kept_in_order() -> None:
    plan = fixed_steps(6, 0.5, [3, 1])
    assert plan.indices(0) == plan.indices(9) == (1, 3)
    assert plan.noise_levels(2) == (0, 0.5, 0, 0.5, 0, 0)
    assert fixed_steps(6, 0.5, [5]).noise_levels(0)[5] == 0.5  # the last one too, when it is asked for by name


def test_fixed_window() -> None:
    plan = window(8, 0.5, size=3, strategy="fixed", low=2)
    assert {plan.indices(step) for step in range(20)} == {(2, 3, 4)}


# --- progressive --------------------------------------------------------------------------------------------------------


def test_progressive_windows_of_mixgrpo() -> None:
    """Equal up to the last whole window, where the reference walks on with windows cut short, to an empty one."""
    case = GOLDEN[0]
    config, theirs = case["config"], case["left_edge_by_iteration"]
    num_steps = config["max_timesteps"] + 2  # the reference counts T - 2
    size, iterations = config["group_size"], config["iters_per_group"]
    plan = window(num_steps, 0.7, size=size, strategy="progressive", iterations=iterations)
    last_whole = num_steps - 1 - size
    count = theirs.index(last_whole + 1)
    assert starts(plan, count) == theirs[:count]
    assert plan.indices(count - 1) == tuple(range(last_whole, num_steps - 1))  # all but the last step had its turn
    assert range(theirs[44], min(theirs[44] + size, config["max_timesteps"])) == range(14, 14)  # the empty window
    assert starts(plan, 2 * count)[count:] == theirs[:count]  # roll back


def test_exponentially_decaying_iterations_of_mixgrpo() -> None:
    case = GOLDEN[1]
    config, theirs = case["config"], case["left_edge_by_iteration"]
    num_steps, size = config["max_timesteps"] + 2, config["group_size"]
    plan = window(
        num_steps,
        0.7,
        size=size,
        strategy="exponential_decay",
        iterations=config["iters_per_group"],
        decay_start=config["exp_decay_thre_timestep"],
        decay_rate=config["exp_decay_k"],
    )
    last_whole = num_steps - 1 - size
    count = theirs.index(last_whole + 1)
    assert starts(plan, count) == theirs[:count]
    assert starts(plan, 2 * count)[count:] == theirs[:count]  # roll back


def test_linearly_decaying_iterations() -> None:
    plan = window(7, 0.7, size=2, strategy="linear_decay", iterations=9, min_iterations=1)
    assert plan.durations == (9, 7, 5, 3, 1)
    assert Counter(starts(plan, 25)) == {0: 9, 1: 7, 2: 5, 3: 3, 4: 1}
    assert starts(plan, 26)[25] == 0


def test_windows_without_overlap_or_roll_back() -> None:
    """The reference's third place is 8, then 12 with two steps, then an empty window for ever; ours end on 11..14."""
    case = GOLDEN[2]
    size = case["config"]["group_size"]
    options = {"size": size, "stride": size, "iterations": case["config"]["iters_per_group"]}
    plan = window(16, 0.7, strategy="progressive", roll_back=False, **options)
    assert starts(plan, 6) == case["left_edge_by_iteration"][:6] == [0, 0, 4, 4, 8, 8]
    assert starts(plan, 100)[6:] == [11] * 94


@pytest.mark.parametrize("strategy", ["progressive", "random"])
@pytest.mark.parametrize(
    ("num_steps", "size", "low", "high", "stride"),
    [(10, 3, 0, None, 2), (16, 4, 2, 11, 4), (5, 4, 0, None, 1), (2, 1, 0, 2, 1)],
)
def test_every_step_gets_its_turn_and_no_other(
    strategy: str, num_steps: int, size: int, low: int, high: int | None, stride: int
) -> None:
    plan = window(num_steps, 0.7, size=size, strategy=strategy, low=low, high=high, stride=stride, iterations=2, seed=3)  # pyright: ignore
    seen = [plan.indices(step) for step in range(400)]
    end = num_steps - 1 if high is None else high
    assert {index for indices in seen for index in indices} == set(range(low, end)) == set(plan.covered)
    assert {len(indices) for indices in seen} == {size} == {plan.num_transitions}
    for step in (0, 1, 399):
        levels = plan.noise_levels(step)
        assert len(levels) == num_steps
        assert tuple(index for index, level in enumerate(levels) if level > 0) == seen[step]


# --- random -------------------------------------------------------------------------------------------------------------


def test_random_window_is_a_pure_function_of_seed_and_step() -> None:
    """Asked in any order, by any process, after any restart: the same; the listed numbers hold it to that for ever."""
    plan, again = (window(10, 0.8, size=2, seed=7) for _ in range(2))
    forwards = [plan.indices(step) for step in range(50)]
    assert [again.indices(step) for step in reversed(range(50))] == forwards[::-1]
    assert starts(plan, 10) == EXPECTED_STARTS
    assert starts(window(10, 0.8, size=2, seed=8), 50) != [indices[0] for indices in forwards]


EXPECTED_STARTS = [5, 1, 3, 0, 3, 7, 1, 2, 4, 4]


def test_random_window_is_uniform_over_its_starts() -> None:
    """8 starts, 8000 draws: 1000 each, deviation sqrt(8000 * 1/8 * 7/8) = 30; five of them."""
    counts = Counter(starts(window(10, 0.8, size=2, seed=1), 8000))
    assert set(counts) == set(range(8))
    assert all(abs(count - 1000) < 150 for count in counts.values())


# --- noise levels -------------------------------------------------------------------------------------------------------


def test_noise_levels_by_step() -> None:
    levels = decay(0.9, 4, shape="linear")
    assert levels == pytest.approx((0.9, 0.6, 0.3, 0.0))
    assert all_steps(4, levels).noise_levels(0) == levels
    plan = window(4, levels, size=1, strategy="progressive", iterations=1)
    assert plan.noise_levels(1) == (0, levels[1], 0, 0)
    assert plan.covered_levels == levels


@pytest.mark.parametrize(
    ("shape", "rate", "expected"),
    [
        ("constant", 1.0, (0.8, 0.8, 0.8)),
        ("linear", 1.0, (0.8, 0.4, 0.0)),
        ("power", 3.0, (0.8, 0.1, 0.0)),
        ("cosine", 1.0, (0.8, 0.4, 0.0)),
        ("exponential", math.log(2), (0.8, 0.4, 0.2)),
    ],
)
def test_decays_by_hand(shape: str, rate: float, expected: tuple[float, ...]) -> None:
    assert decay(0.8, 3, shape=shape, rate=rate) == pytest.approx(expected)  # pyright: ignore


def test_a_cosine_falls_slowly_at_both_ends() -> None:
    levels = decay(1.0, 5, shape="cosine")
    assert levels == pytest.approx((1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0))


# --- what is visited after the last stochastic step ------------------------------------------------------------------------


@pytest.mark.parametrize("last", range(25))
@pytest.mark.parametrize("fraction", [0.2, 0.4, 1.0])
def test_a_compressed_path_ends_well_wherever_the_window_is(last: int, fraction: float) -> None:
    path = compressed_path(25, last, fraction)
    assert path[: last + 1] == tuple(range(last + 1))  # every step up to the last stochastic one
    rest = path[last + 1 :]
    assert (
        len(rest) == min(max(int(fraction * (25 - last)), 1), 24 - last) if fraction < 1 else path == tuple(range(25))
    )
    if last < 24:
        assert rest[0] == last + 1
        gaps = [after - before for before, after in zip(rest, [*rest[1:], 25])]
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1  # evenly spaced


def test_network_calls_of_mixgrpo_flash() -> None:
    """T = 25, window 4: Flash* (0.2, window at 0) takes the paper's 8 calls, Flash (0.4) 16.6 on average (16 there)."""
    calls = [len(compressed_path(25, start + 3, 0.4)) for start in range(15)]
    assert (calls[0], calls[5], calls[10], calls[14]) == (12, 15, 18, 21)
    assert sum(calls) / len(calls) == pytest.approx(16.6)
    assert len(compressed_path(25, 3, 0.2)) == 8


def test_strided_path() -> None:
    assert strided_path(8, 2, 1) == tuple(range(8))
    assert strided_path(8, 2, 2) == (0, 1, 2, 3, 4, 6)
    assert strided_path(8, 2, 3) == (0, 1, 2, 3, 4, 7)
    assert strided_path(8, 6, 2) == tuple(range(8))
    assert strided_path(8, 7, 2) == tuple(range(8))


def test_plans_are_values() -> None:
    assert window(10, 0.8, size=2) == window(10, 0.8, size=2)
    assert hash(all_steps(4, 0.7)) == hash(all_steps(4, 0.7))


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "steps 0..8 has a size from 1 to 9, got 0"),
        ({"size": 10}, "size from 1 to 9, got 10"),
        ({"size": 4, "low": 2, "high": 5}, "steps 2..4 has a size from 1 to 3, got 4"),
        ({"size": 1, "low": -1}, "within 0..10, got low=-1 and high=9"),
        ({"size": 1, "high": 11}, "got low=0 and high=11"),
        ({"size": 1, "low": 5, "high": 5}, "got low=5 and high=5"),
        ({"size": 2, "strategy": "progressive", "stride": 3}, "stride from 1 to 2 to skip no step, got 3"),
        ({"size": 2, "strategy": "progressive", "iterations": 0}, "1 or more training steps at each place"),
        ({"size": 2, "strategy": "linear_decay", "iterations": 3, "min_iterations": 4}, "min_iterations=4"),
        ({"size": 2, "strategy": "exponential_decay", "decay_rate": 0.0}, "decay_rate=0.0"),
        ({"size": 2, "strategy": "decay"}, "use fixed, random, progressive, linear_decay or exponential_decay"),
    ],
)
def test_bad_windows(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        window(10, 0.7, **options)


def test_bad_steps_and_levels() -> None:
    for steps in ([], [1, 1], [4], [-1]):
        with pytest.raises(ValueError, match="different indices between 0 and 3"):
            fixed_steps(4, 0.7, steps)
    with pytest.raises(ValueError, match="1 or more denoising steps, got 0"):
        no_steps(0)
    with pytest.raises(ValueError, match="no step before its last"):
        all_steps(1, 0.7)
    with pytest.raises(ValueError, match="got 2 noise levels for 4"):
        all_steps(4, [0.7, 0.7])
    for level in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="stochastic step 0 has the noise level"):
            all_steps(4, level)
    with pytest.raises(ValueError, match="count from 0, got -1"):
        all_steps(4, 0.7).noise_levels(-1)
