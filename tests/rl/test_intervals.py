"""Intervals by hand: Wilson's for shares, with the effective number of observations, and none beyond what can be."""

from __future__ import annotations

import json
import math

import pytest
import torch

from flowsteer.rewards.combine import Normalise, RewardSet
from flowsteer.rewards.scorers.composition import CompositionReward
from flowsteer.rl.evaluate import Evaluation
from flowsteer.rl.intervals import Estimate, estimate, wilson


def by_formula(share: float, n: float) -> tuple[float, float]:
    """The two solutions q of (q - p)^2 = z^2 q (1 - q) / n, which is how Wilson's interval is defined."""
    a, b, c = 1 + 1.96**2 / n, -(2 * share + 1.96**2 / n), share**2
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize(
    ("rows", "share", "n"),
    [
        ([[1]] + [[0]] * 3, 0.25, 4),  # a seed each: n = P
        ([[1, 1]] + [[0, 0]] * 3, 0.25, 4),  # seeds that agree tell nothing new
        ([[1, 0], [0, 1], [1, 0], [0, 1]], 0.5, 8),  # prompts that do not differ: all scores count
        ([[1, 1], [1, 0], [1, 0], [0, 0]], 0.5, 8),  # 4 * 0.25 / 0.125
        ([[1, 1], [0, 0], [1, math.nan], [math.nan, math.nan]], 2 / 3, 3),  # a prompt without scores does not count
    ],
)
def test_wilson_by_hand(rows, share, n):
    found = estimate(torch.tensor(rows, dtype=torch.float32))
    assert found.mean == pytest.approx(share)
    assert (found.low, found.high) == pytest.approx(by_formula(share, n), abs=1e-12)
    assert 0 <= found.low < share < found.high <= 1


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_share_that_never_varied_keeps_an_interval(score):
    """None of 10 prompts: up to z^2 / (n + z^2) = 0.278. Before: 0 to 0."""
    values = torch.full((10, 4), score)
    found = estimate(values, (0.0, 1.0))
    assert found.high - found.low == pytest.approx(1.96**2 / (10 + 1.96**2))
    assert found == wilson(values)
    assert estimate(values) == Estimate(score, score, score), "the range is not known: perhaps a constant"


def test_an_interval_ends_where_scores_end():
    values = torch.tensor([[0.0], [0.25], [1.0]])
    assert estimate(values).low < 0
    assert estimate(values).high > 0.9
    assert estimate(values, (0.0, 1.0)).low == 0
    assert estimate(values, (0.0, 1.0)).high == pytest.approx(min(1.0, estimate(values).high))
    assert estimate(values, (0.0, 0.5)) == estimate(values), "a range that does not hold is not believed"
    one = estimate(torch.tensor([[0.5]]), (0.0, 1.0))
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high), "one prompt has no deviation"
    assert all(math.isnan(number) for number in estimate(torch.full((2, 2), math.nan), (0.0, 1.0)))


def test_ranges_follow_weights_and_constants():
    rewards = RewardSet(
        [
            ("shapes", CompositionReward(), -2.0),
            ("same", CompositionReward(), 1.0),
            ("other", CompositionReward(), 0.0),
        ],
        normalise={"same": Normalise(scale=-3.0, offset=1.0)},
    )
    assert rewards.range_of("shapes") == (0.0, 1.0)
    assert rewards.range_of("same") == (0.0, 3.0)  # (0 - 1) * -3 and (1 - 1) * -3
    assert rewards.range_of("same/strict") == (0.0, 1.0), "parts are not normalised"
    assert rewards.range_of("total") == (-2.0, 3.0)
    free = RewardSet([("a", CompositionReward(), 1.0), ("b", lambda images, prompts, **columns: [], 1.0)])
    assert free.range_of("b") is None
    assert free.range_of("total") is None


def test_the_table_holds_every_score_and_is_json():
    scores = torch.tensor([[1.0, 0.0], [math.nan, 1.0]])
    own = Evaluation(prompts=("a", "b"), parts={"total": scores}, images=torch.zeros(2, 3, 4, 4))
    table = json.loads(json.dumps(own.table(), allow_nan=False))
    assert table["prompts"] == ["a", "b"]
    assert table["scores"] == {"total": [[1.0, 0.0], [None, 1.0]]}
    summary = table["summary"]["total"]
    assert summary["mean"] == 0.75
    assert summary["interval"] == pytest.approx((summary["high"] - summary["low"]) / 2)
    assert 0 < summary["low"] < 0.75 < summary["high"] <= 1
