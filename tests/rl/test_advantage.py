"""Comparing samples with their group: published numbers, closed forms, and everything that must count for nothing."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowsteer.rl.advantage import combined_advantage, extremes, group_advantage, reward_statistics, usable

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "reference_numbers.json").read_text())["advantages"]
NAN = math.nan


def groups(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def random_case(seed: int, size: int = 60) -> tuple[Tensor, Tensor]:
    """Uneven groups with ids in no order, a few missing scores, one group of equal scores."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 7, (size,), generator=generator) * 2**33 + 5  # ids that floats would merge
    total = torch.randn(size, generator=generator)
    total[torch.rand(size, generator=generator) < 0.1] = NAN
    total[group == 5] = 0.1
    return total, group


@pytest.mark.parametrize(("deviation", "key"), [("group", "group_std"), ("global", "global_std")])
def test_advantages_of_the_published_codes(deviation: str, key: str) -> None:
    ids = {prompt: number for number, prompt in enumerate(GOLDEN["prompts"])}
    group = groups(*(ids[prompt] for prompt in GOLDEN["prompts"]))
    found = group_advantage(torch.tensor(GOLDEN["rewards"]), group, deviation=deviation, clip=None)  # pyright: ignore
    torch.testing.assert_close(found, torch.tensor(GOLDEN[key]), rtol=1e-4, atol=1e-5)


def test_by_hand() -> None:
    """Scores 1, 2, 6 of one group: mean 3, variance 14/3 (ddof 0) or 7 (ddof 1). Scores 0, 4 of the other: mean 2."""
    total, group = torch.tensor([1.0, 0.0, 2.0, 4.0, 6.0]), groups(9, -1, 9, -1, 9)

    def found(**options: object) -> list[float]:
        return group_advantage(total, group, epsilon=0, **options).tolist()  # pyright: ignore

    assert found(deviation="none") == [-2, -2, -1, 2, 3]
    std = math.sqrt(14 / 3)
    assert found() == pytest.approx([-2 / std, -1, -1 / std, 1, 3 / std])
    assert found(ddof=1) == pytest.approx([-2 / 7**0.5, -2 / 8**0.5, -1 / 7**0.5, 2 / 8**0.5, 3 / 7**0.5])
    overall = math.sqrt(sum((x - 2.6) ** 2 for x in total.tolist()) / 5)  # about the mean of all five, 13/5
    assert found(deviation="global") == pytest.approx([x / overall for x in (-2, -2, -1, 2, 3)])


def test_epsilon_is_added_to_the_deviation() -> None:
    found = group_advantage(torch.tensor([0.0, 2.0]), groups(0, 0), epsilon=1.0)
    assert found.tolist() == [-0.5, 0.5]


def test_clip() -> None:
    """One outlier among n has the advantage sqrt(n - 1)."""
    total, group = torch.zeros(101), torch.zeros(101, dtype=torch.int64)
    total[3] = 1
    assert group_advantage(total, group, epsilon=0, clip=None)[3].item() == pytest.approx(10)
    assert group_advantage(total, group)[3].item() == 5
    assert group_advantage(-total, group, clip=2.0)[3].item() == -2


@pytest.mark.parametrize("deviation", ["group", "global", "none"])
def test_missing_scores_change_nothing_for_the_others(deviation: str) -> None:
    total, group = torch.tensor([1.0, NAN, 3.0, 0.0, 7.0, NAN]), groups(0, 0, 0, 1, 1, 1)
    found = group_advantage(total, group, deviation=deviation)  # pyright: ignore
    there = ~total.isnan()
    expected = group_advantage(total[there], group[there], deviation=deviation)  # pyright: ignore
    assert torch.equal(found[there], expected)
    assert found[~there].tolist() == [0, 0]
    assert usable(total, group).tolist() == there.tolist()


@pytest.mark.parametrize("deviation", ["group", "global", "none"])
@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
def test_groups_that_say_nothing_give_exactly_zero(deviation: str, epsilon: float) -> None:
    """Equal scores (0.1 three times has a rounded mean), a single score, a group that is missing altogether."""
    total = torch.tensor([0.1, 0.1, 0.1, 5.0, NAN, NAN, NAN, 1.0, 2.0], dtype=torch.float64)
    group = groups(0, 0, 0, 1, 1, 2, 2, 3, 3)
    found = group_advantage(total, group, deviation=deviation, epsilon=epsilon)  # pyright: ignore
    assert found[:7].tolist() == [0] * 7
    assert found[7] < 0 < found[8]
    # Equal scores are a comparison, whose outcome is that nobody is better.
    assert usable(total, group).tolist() == [True] * 3 + [False] * 4 + [True] * 2


def test_infinite_scores_count_as_missing() -> None:
    found = group_advantage(torch.tensor([1.0, 2.0, math.inf, -math.inf]), groups(0, 0, 0, 0), epsilon=0)
    assert found.tolist() == [-1, 1, 0, 0]


@pytest.mark.parametrize("deviation", ["group", "global", "none"])
def test_the_order_of_the_samples_is_of_no_account(deviation: str) -> None:
    """Bit for bit: with other processes the scores are gathered in another order."""
    for seed in range(20):
        total, group = random_case(seed)
        order = torch.randperm(len(total), generator=torch.Generator().manual_seed(seed + 100))
        found = group_advantage(total, group, deviation=deviation)  # pyright: ignore
        assert torch.equal(group_advantage(total[order], group[order], deviation=deviation), found[order])  # pyright: ignore
        assert found.isfinite().all()
        assert (found[group == 5] == 0).all()


def test_sums_do_not_depend_on_the_order_even_where_they_round() -> None:
    """Float64 numbers around 1e16 are 2 apart: added up in another order, these four scores have another mean."""
    scores = [1e16, 1.0, -1e16, 3.0]
    found = set()
    for order in itertools.permutations(range(4)):
        total = torch.tensor([scores[row] for row in order], dtype=torch.float64)
        advantage = group_advantage(total, groups(0, 0, 0, 0), deviation="none", clip=None)
        found.add(tuple(advantage[order.index(row)].item() for row in range(4)))
    assert len(found) == 1


def test_advantages_of_a_group_sum_to_zero_and_ignore_the_scale() -> None:
    total, group = random_case(1)
    found = group_advantage(total, group, clip=None, epsilon=0)
    for one in group.unique():
        assert found[group == one].sum().abs() < 1e-5  # float32 of float64 numbers around 1
    again = group_advantage(3 * total.double() - 20, group, clip=None, epsilon=0)
    torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-6)


def test_large_offsets_do_not_drown_the_differences() -> None:
    """Float32 sums of scores around 1e6 would lose differences of 1."""
    total = torch.tensor([1e6, 1e6 + 1, 1e6 + 2])
    found = group_advantage(total, groups(0, 0, 0), epsilon=0)
    assert found.tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])


def test_no_samples() -> None:
    none = torch.zeros(0)
    assert group_advantage(none, none.long()).shape == (0,)
    assert reward_statistics(none, none.long()) == {"reward_missing": 0, "incomparable_groups": 0}


def test_combined_advantages_are_a_weighted_sum_then_clipped() -> None:
    group = groups(0, 0, 1, 1)
    parts = {"a": torch.tensor([0.0, 1.0, 2.0, 4.0]), "b": torch.tensor([300.0, 100.0, NAN, 5.0])}
    found = combined_advantage(parts, {"a": 1.0, "b": 0.5}, group, epsilon=0)
    assert found.tolist() == pytest.approx([-0.5, 0.5, -1, 1])  # where b says nothing, a still does
    assert combined_advantage(parts, {"a": 9.0}, group, epsilon=0).tolist() == [-5, 5, -5, 5]
    outlier = torch.zeros(101)
    outlier[3] = 1  # its advantage is 10, so 10 - 8 for the two together; clipped one by one they would give 5 - 4
    both = combined_advantage({"a": outlier, "b": outlier}, {"a": 1.0, "b": -0.8}, torch.zeros(101).long(), epsilon=0)
    assert both[3].item() == pytest.approx(2)
    with pytest.raises(ValueError, match=r"given for \['c'\]; rewards with scores are \['a', 'b'\]"):
        combined_advantage(parts, {"c": 1.0}, group)
    with pytest.raises(ValueError, match="weights are given for"):
        combined_advantage(parts, {}, group)


def test_gdpo_normalises_the_sum_of_advantages_over_the_step() -> None:
    """By hand: z-scores 1 and -1 of either reward in every group; their sums, of which the missing sample is no part."""
    group = groups(0, 0, 1, 1, 2, 2)
    parts = {
        "a": torch.tensor([0.0, 1.0, 5.0, 9.0, NAN, 1.0]),
        "b": torch.tensor([7.0, 3.0, 100.0, 300.0, NAN, 2.0]),
    }
    sums = torch.tensor([-1 + 0.5, 1 - 0.5, -1 - 0.5, 1 + 0.5])
    found = combined_advantage(parts, {"a": 1.0, "b": 0.5}, group, epsilon=0, over_step=True)
    assert found[:4].tolist() == pytest.approx((sums / sums.std(correction=0)).tolist())
    assert found[4:].tolist() == [0, 0]
    assert float(found[:4].mean()) == pytest.approx(0, abs=1e-6)
    many = {f"r{number}": parts["a"] for number in range(10)}  # the size of an update does not grow with their number
    ten = combined_advantage(many, dict.fromkeys(many, 1.0), group, epsilon=0, over_step=True)
    assert float(ten[:4].std(correction=0)) == pytest.approx(1)


def test_gdpo_tells_apart_what_the_sum_of_rewards_confuses() -> None:
    """Two rewards of very different scales: in their sum the small one vanishes, here both count."""
    group = torch.zeros(4).long()
    parts = {"large": torch.tensor([0.0, 1000.0, 0.0, 1000.0]), "small": torch.tensor([0.0, 0.0, 1.0, 1.0])}
    summed = group_advantage(parts["large"] + parts["small"], group)
    apart = combined_advantage(parts, {"large": 1.0, "small": 1.0}, group, over_step=True)
    assert abs(float(summed[1] - summed[3])) < 0.01
    assert apart.tolist() == pytest.approx([-math.sqrt(2), 0, 0, math.sqrt(2)], abs=1e-3)


def test_extremes_of_each_group() -> None:
    group = groups(0, 1, 0, 1, 0, 1, 0, 1, 0)
    advantage = torch.tensor([0.3, 5.0, -0.2, 4.0, 0.1, 3.0, 0.9, NAN, -0.7])
    counts = ~advantage.isnan()
    chosen = extremes(advantage.nan_to_num(), counts, group, 2)
    assert torch.nonzero(chosen).flatten().tolist() == [1, 5, 6, 8]
    assert extremes(advantage.nan_to_num(), counts, group, 4).sum() == 4 + 3  # a group of three keeps all
    for number in (0, 1, 3):
        with pytest.raises(ValueError, match=f"best_and_worst={number} takes half from either end"):
            extremes(advantage, counts, group, number)


def test_statistics() -> None:
    total = torch.tensor([1.0, 3.0, NAN, 2.0, 2.0, 7.0, NAN])
    found = reward_statistics(total, groups(0, 0, 0, 1, 1, 2, 3))
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 7.0])
    assert found == pytest.approx(
        {
            "reward_missing": 2,
            "incomparable_groups": 2,
            "reward_mean": 3.0,
            "reward_std": scores.std(correction=0).item(),
            "reward_group_std": 0.5,  # of the deviations 1 and 0
            "zero_deviation_fraction": 0.5,
        }
    )


@pytest.mark.parametrize(
    ("total", "group", "options", "message"),
    [
        (torch.zeros(3), groups(0, 0), {}, r"one number per sample, got \(3,\) and \(2,\)"),
        (torch.zeros(2, 1), torch.zeros(2, 1).long(), {}, "one number per sample"),
        (torch.zeros(2), torch.zeros(2), {}, "int64"),
        (torch.zeros(2), groups(0, 0), {"deviation": "batch"}, "use 'group', 'global' or 'none'"),
        (torch.zeros(2), groups(0, 0), {"ddof": 2}, "ddof is 0 or 1"),
        (torch.zeros(2), groups(0, 0), {"clip": 0.0}, "clip above 0 or None"),
        (torch.zeros(2), groups(0, 0), {"epsilon": -1.0}, "epsilon 0 or more"),
    ],
)
def test_what_is_refused(total: Tensor, group: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantage(total, group, **options)
