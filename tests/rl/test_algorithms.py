"""Flow-GRPO's and DiffusionNFT's losses against hand numbers and closed forms, comparisons, and the agreement of gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import GROUP, STEPS, ToyRun, comparison

from flowsteer.rewards.types import Scores
from flowsteer.rl.advantage import combined_advantage, group_advantage
from flowsteer.rl.algorithms.diffusion_nft import nft_loss
from flowsteer.rl.algorithms.losses import clipped_objective
from flowsteer.rl.compare import TooFewScores, compare, missing_bias
from flowsteer.rl.engine.agreement import GradientAgreement
from flowsteer.rollout.steps.kernels import denoised
from flowsteer.rollout.types import Rollout, Schedule


def flow_grpo(**settings: Any) -> dict[str, Any]:
    return {"algorithm": {"name": "flow_grpo", "clip_range": 0.2, "updates_per_rollout": 1, **settings}}


def diffusion_nft(**settings: Any) -> dict[str, Any]:
    algorithm = {"name": "diffusion_nft", "noise_levels_per_sample": STEPS - 1, "kl_coef": 0.0, "old_decay_slope": 0.0}
    return {"algorithm": algorithm | settings, "rollout.plan": {"name": "none"}}


# --- Flow-GRPO's objective ----------------------------------------------------------------------------------------------


def test_clipped_objective_by_hand() -> None:
    """PPO's table: the loss is -A times the ratio, unless clipping makes it larger."""
    ratio = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5, 1.1, 0.9])
    advantage = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0, -1.0, 1.0])
    #         on policy; too far up, good; too far up, bad; too far down, good; too far down, bad; inside; inside
    expected = torch.tensor([-2.0, -2.4, 3.0, -1.0, 1.6, 1.1, -0.9])
    loss, given = clipped_objective(ratio.log(), advantage, 0.2)
    torch.testing.assert_close(given, ratio)  # exp(log(x)) in float32
    torch.testing.assert_close(loss, expected)


def test_a_ratio_that_has_gone_far_enough_gets_no_gradient() -> None:
    log_prob = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.0]).log().requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    loss, ratio = clipped_objective(log_prob, advantage, 0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), log_prob)
    assert gradient[[0, 3]].tolist() == [0, 0]  # up and good, down and bad: it has had its step
    # d(-A ratio) / d log_prob = -A ratio; what went the wrong way is brought back
    torch.testing.assert_close(gradient[[1, 2, 4, 5]], (-advantage * ratio)[[1, 2, 4, 5]].detach())


def test_the_gradient_of_the_first_update_is_the_policy_gradient() -> None:
    """At ratio 1 it is minus the mean of advantage times the score function of the transition's law."""
    run = ToyRun(flow_grpo(clip_range=1e-4))
    rollout, *_ = run.rollouts()
    advantage = torch.linspace(-1, 1, GROUP)
    (weight, bias) = run.gradient([rollout], [comparison(advantage.tolist())])
    trajectory, schedule = rollout.trajectory, rollout.conditioning.schedule
    assert trajectory is not None
    expected = torch.zeros_like(bias, dtype=torch.float64)
    for k, index in enumerate(trajectory.indices):
        s, s_next = schedule.sigma[index].double(), schedule.sigma[index + 1].double()
        dt = s - s_next
        a = 0.7 * torch.sqrt(s / (1 - schedule.sigma[max(index, 1)].double()))
        x, z = trajectory.latents[:, k].double(), trajectory.next_latents[:, k].double()
        with torch.no_grad():
            v = run.policy.velocity(trajectory.latents[:, k], index, rollout.conditioning).double()
        mean = x - dt * (v + a**2 / (2 * s) * (x + (1 - s) * v))
        # d mean / d v = -dt (1 + a^2 (1 - s) / (2 s)); d v / d bias = 1; log_prob is the mean over 4 dimensions
        score = (z - mean) / (a**2 * dt) / 4 * -dt * (1 + a**2 * (1 - s) / (2 * s))
        expected -= (advantage[:, None] * score).mean(0) / len(trajectory.indices)
    torch.testing.assert_close(bias.double(), expected, rtol=1e-4, atol=1e-6)  # z - mean cancels some digits of float32
    assert weight.abs().max() > 0


def test_the_kl_has_a_gradient_and_is_that_of_two_gaussians() -> None:
    run = ToyRun(flow_grpo(kl_coef=3.0))
    rollout, *_ = run.rollouts()
    nothing = [comparison([0.0] * GROUP)]
    assert all(gradient.abs().max() == 0 for gradient in run.gradient([rollout], nothing))  # at its minimum
    with torch.no_grad():
        run.toy.network.bias += 0.1
    batch = next(iter(run.algorithm.batches([rollout], nothing, 0)))
    loss, metrics = run.algorithm.loss(run.policy, batch)
    trajectory = rollout.trajectory
    assert trajectory is not None
    # at index 0: s = 1, the clamped denominator makes a = eta / sqrt(dt), std = eta; d mean / d v = -dt = -0.2
    expected = (0.2 * 0.1) ** 2 / (2 * 0.7**2)
    total, count = metrics["kl"]
    assert float(total) / count == pytest.approx(
        expected, rel=1e-4
    )  # 0.02 as a difference of float32 numbers of size 3
    assert loss.item() == pytest.approx(3 * expected, rel=1e-4)
    gradient = torch.autograd.grad(loss, run.toy.network.bias)[0]
    # d / d bias of 3 <(0.2 bias)^2> / (2 std^2), a mean over four dimensions
    torch.testing.assert_close(gradient, torch.full((4,), 3 * 0.2**2 * 0.1 / 0.7**2 / 4), rtol=1e-3, atol=0)


# --- DiffusionNFT's contrast --------------------------------------------------------------------------------------------


def contrast(velocity: Tensor, old: Tensor, target: Tensor, optimality: float, beta: float) -> Tensor:
    """nft_loss at clean = 0, sigma = 1, noised = target: the clean error of a velocity is target - velocity."""
    zeros = torch.zeros_like(target)
    return nft_loss(velocity, old, zeros, lambda v: target - v, torch.full((len(target),), optimality), beta)


def test_nft_at_the_old_policy_by_hand() -> None:
    """Both implicit policies are the old one: (r + 1 - r) <e^2> / <|e|> / b, with errors 3 and -1: 5 / 2 / b."""
    old, target = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, -1.0]])
    for optimality in (0.0, 0.3, 1.0):
        torch.testing.assert_close(contrast(old, old, target, optimality, 0.5), torch.tensor([5 / 2 / 0.5]))


@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "v_prediction"])
def test_nft_has_nothing_to_say_to_a_model_that_knows_the_answer(prediction: str) -> None:
    """A perfect prediction, of whatever kind, implies the clean latents: no error, whatever the scores."""
    alpha, sigma = (0.7, 0.3) if prediction == "velocity" else (0.8, 0.6)
    schedule = Schedule(
        sigma=torch.tensor([sigma, 0.0]),
        alpha=torch.tensor([alpha, 1.0]),
        timesteps=torch.ones(1),
        prediction=prediction,
    )
    clean, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    noised = alpha * clean + sigma * noise
    perfect = {"velocity": noise - clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean}[prediction]
    loss = nft_loss(perfect, perfect, clean, lambda v: denoised(v, noised, schedule, 0), torch.full((3,), 0.3), 0.5)
    assert loss.abs().max() < 1e-6


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("optimality", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_nft_pulls_towards_good_samples_and_pushes_away_from_bad_ones(optimality: float, beta: float) -> None:
    """At v = o, with a = o - u: gradient 2 (2r - 1) a / (D <|a|>), whatever beta is.

    r / b times d <(o + b (v - o) - u)^2> / dv / <|a|> is 2 r a / (D <|a|>), and the negative one has the other sign.
    """
    old = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    target = torch.tensor([[1.5, -2.0, 1.0, 1.0]])  # |o - u| = 1 everywhere
    velocity = old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(contrast(velocity, old, target, optimality, beta).sum(), velocity)
    expected = 2 * (2 * optimality - 1) * (old - target) / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    if optimality == 0.5:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)  # r / b (x - x)
    elif optimality > 0.5:
        assert ((target - old) * -gradient > 0).all()  # a descent step goes from the old prediction to the sample's
    else:
        assert ((target - old) * -gradient < 0).all()


@pytest.mark.parametrize("optimality", [0.25, 0.5, 0.75])
def test_nft_closed_form_where_both_errors_have_equal_magnitude(optimality: float) -> None:
    """Without the self-normalisation L b = |a|^2 + b^2 |d|^2 + 2 b (2r - 1) a.d with a = o - u, d = v - o.

    The magnitudes <|a + b d|> and <|a - b d|> are equal by choice of d: signs that cancel, |b d| < |a| = 1.
    """
    beta, target = 0.5, torch.zeros(1, 4)
    old = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    step = torch.tensor([[0.4, -0.4, 0.2, -0.2]])
    velocity = old + step
    a2, d2, ad = (old**2).mean(), (step**2).mean(), (old * step).mean()
    assert ad == 0
    assert (old + beta * step).abs().mean() == (old - beta * step).abs().mean() == 1
    expected = (a2 + beta**2 * d2 + 2 * beta * (2 * optimality - 1) * ad) / beta
    torch.testing.assert_close(contrast(velocity, old, target, optimality, beta), expected.view(1))


def test_nft_normalises_each_error_by_its_own_magnitude_without_a_gradient() -> None:
    """Twice the error: twice the loss (not four times), the same gradient."""
    old, target = torch.tensor([[0.2, -0.4]]), torch.zeros(1, 2)
    results = []
    for scale in (1.0, 2.0):
        velocity = (scale * old).requires_grad_()
        loss = contrast(velocity, scale * old, target, 1.0, 1.0)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), velocity)[0]))
    torch.testing.assert_close(results[1][0], 2 * results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1])


def test_nft_maps_advantages_to_probabilities() -> None:
    """-clip and below is 0, 0 is 1/2, clip and above is 1: seen in the gradients, which are linear in 2r - 1."""
    run = ToyRun(diffusion_nft())
    rollout, *_ = run.rollouts()
    gradients = {}
    for advantage in (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0):
        gradients[advantage] = run.gradient([rollout], [comparison([advantage] * GROUP)])[1]
    full = gradients[2.0]
    assert full.abs().max() > 1e-3
    for advantage, gradient in gradients.items():
        slope = max(-1.0, min(1.0, advantage / 2))
        torch.testing.assert_close(gradient, slope * full, rtol=1e-4, atol=1e-5)  # (r - (1 - r)) in float32


def test_the_loss_of_nft_is_the_contrast_times_the_clip_and_the_distance_to_the_reference() -> None:
    run = ToyRun(diffusion_nft(kl_coef=3.0, beta=0.5))
    rollout, *_ = run.rollouts()
    with torch.no_grad():
        run.toy.network.bias += torch.tensor([0.3, -0.1, 0.2, 0.4])
    advantage = torch.linspace(-1, 1, GROUP)
    batch, *_ = run.algorithm.batches([rollout], [comparison(advantage.tolist())], 0)
    noised, _ = batch.noised()
    with torch.no_grad():
        loss, _ = run.algorithm.loss(run.policy, batch)
        velocity = run.policy.velocity(noised, batch.index, batch.conditioning)
        with run.policy.using("old"):
            old = run.policy.velocity(noised, batch.index, batch.conditioning)
    optimality = advantage / 4 + 0.5  # the clip is 2
    pair = nft_loss(
        velocity, old, rollout.latents, lambda v: denoised(v, noised, batch.schedule, batch.index), optimality, 0.5
    )
    distance = torch.tensor([0.3, -0.1, 0.2, 0.4]).square().mean()
    assert float(loss) == pytest.approx(2 * float(pair.mean()) + 3 * float(distance), rel=1e-4)


def test_nft_noise_levels_and_noise_come_from_seed_step_and_sample() -> None:
    run = ToyRun(diffusion_nft(noise_levels_per_sample=2))
    few = run.algorithm
    rollouts = run.rollouts()
    nothing = [comparison([0.0] * GROUP)] * len(rollouts)
    first = [batch.index for batch in few.batches(rollouts, nothing, 0)]
    assert first == [batch.index for batch in few.batches(rollouts, nothing, 0)]
    assert len(first) == 2 * len(rollouts)
    assert all(a != b for a, b in zip(first[::2], first[1::2]))  # without replacement
    seen = {b.index for step in range(20) for b in few.batches(rollouts, nothing, step)}
    assert seen == set(range(STEPS - 1))  # all but the last
    # a sample's noise does not depend on its batch
    with torch.no_grad():
        run.toy.network.weight += 0.1
    (batch, *_) = few.batches(rollouts, nothing, 0)
    only = comparison([0.0] * GROUP, [float(row in (1, 5)) for row in range(GROUP)])
    half = replace(
        batch,
        rollout=take(batch.rollout, [1, 5]),
        comparison=comparison([0.0, 0.0]),
        noise_seeds=batch.noise_seeds[[1, 5]],
    )
    whole, part = (few.loss(run.policy, b)[1]["old_distance"] for b in (replace(batch, comparison=only), half))
    assert float(whole[0]) == pytest.approx(float(part[0]), rel=1e-5)  # other shapes, other roundings
    assert whole[1] == part[1] == 2


def take(rollout: Rollout, rows: list[int]) -> Rollout:
    """Some samples of a rollout without a trajectory."""
    return replace(
        rollout,
        prompts=tuple(rollout.prompts[row] for row in rows),
        columns={},
        conditioning=rollout.conditioning.take(rows),
        **{name: getattr(rollout, name)[rows] for name in ("group", "sample", "seeds", "latents", "images")},
    )


def test_nft_refuses_more_noise_levels_than_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"noise_levels_per_sample=5 is more than the 4 that can be trained \(indices 0 to 3 of 5\)"
    ):
        ToyRun(diffusion_nft(noise_levels_per_sample=5))


def test_nft_old_policy_follows_more_slowly_as_training_goes_on() -> None:
    algorithm = ToyRun(diffusion_nft(old_decay_slope=0.001)).algorithm
    assert [algorithm.old_decay(updates) for updates in (0, 100, 500, 5000)] == [0, 0.1, 0.5, 0.5]
    later = ToyRun(diffusion_nft(old_decay_slope=0.0075, old_decay_max=0.999, old_decay_start=75)).algorithm
    assert [later.old_decay(updates) for updates in (0, 75, 115, 5000)] == [0, 0, 0.3, 0.999]


# --- what is left out ---------------------------------------------------------------------------------------------------


def test_equal_scores_contribute_exactly_nothing_to_flow_grpo() -> None:
    run = ToyRun(flow_grpo())
    rollouts = run.rollouts()
    with torch.no_grad():
        run.toy.network.bias += 0.05
    scores = [Scores(total=torch.full((GROUP,), value)) for value in (0.1, 0.7, -3.0)]
    comparisons, _ = compare(rollouts, scores, lambda x: x, deviation="group", clip=5.0, min_scored=1.0, weights={})
    assert all((gradient == 0).all() for gradient in run.gradient(rollouts, comparisons))


# --- comparing ----------------------------------------------------------------------------------------------------------

NAN = float("nan")


def scored(*totals: Sequence[float], parts: bool = False) -> list[Scores]:
    made = [torch.tensor(list(total)) for total in totals]
    return [Scores(total=total, parts={"theirs": 2 * total} if parts else {}) for total in made]


def test_missing_scores_have_no_weight_and_the_mean_weight_is_one() -> None:
    rollouts = ToyRun(flow_grpo()).rollouts()
    first = [1.0, 3.0, NAN, NAN, NAN, NAN, NAN, NAN]
    second = [NAN] * 7 + [4.0]  # alone: it compares with nothing
    third = [float(value) for value in range(8)]
    comparisons, statistics = compare(
        rollouts,
        scored(first, second, third, parts=True),
        lambda x: x,
        deviation="none",
        clip=None,
        min_scored=0.2,
        weights={},
    )
    weight = torch.cat([c.weight for c in comparisons])
    assert weight.mean() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(weight > 0, torch.tensor([True] * 2 + [False] * 6 + [False] * 8 + [True] * 8))
    assert weight[weight > 0].unique().tolist() == pytest.approx([24 / 10])
    assert comparisons[0].advantage.tolist() == [-1, 1, 0, 0, 0, 0, 0, 0]
    assert comparisons[1].advantage.tolist() == [0] * 8
    assert comparisons[2].advantage.tolist() == [value - 3.5 for value in range(8)]
    assert statistics["reward/theirs"] == pytest.approx(2 * statistics["reward_mean"])


def test_failure_that_goes_together_with_quality_is_measured() -> None:
    """Missing: 1, 1, 3, 3 of the other reward; scored: 5, 5, 7, 7. Mean 2 against 6, deviation sqrt(5) about 4."""
    total = torch.tensor([NAN] * 4 + [0.0] * 4 + [NAN])
    part = torch.tensor([1.0, 1, 3, 3, 5, 5, 7, 7, NAN])
    assert missing_bias(total, part) == pytest.approx(-4 / 5**0.5)
    assert missing_bias(total[1:], part[1:]) is None  # three of one kind are too few
    assert missing_bias(total, torch.ones(9)) is None


def test_the_step_reports_it(caplog: pytest.LogCaptureFixture) -> None:
    rollouts = ToyRun(flow_grpo()).rollouts()
    totals = [[NAN] * 4 + [float(value) for value in range(4)]] * len(rollouts)
    parts = {"theirs": torch.tensor([0.0] * 4 + [1.0] * 4)}
    scores = [Scores(total=torch.tensor(total), parts=parts) for total in totals]
    _, statistics = compare(rollouts, scores, lambda x: x, deviation="none", clip=None, min_scored=0.2, weights={})
    assert statistics["missing_bias"] == pytest.approx(-2.0)
    assert "their theirs is -2.0 deviations from the rest" in caplog.text


def test_comparisons_come_back_in_the_order_of_the_batches() -> None:
    """Processes hold other batches than the whole step's order says; places are found by the sample's number."""
    rollouts = ToyRun(flow_grpo()).rollouts()
    totals = [[float(value) for value in range(8)], [0.0] * 8, [-1.0] * 4 + [1.0] * 4]
    settings: dict[str, Any] = {"deviation": "none", "clip": None, "min_scored": 1.0, "weights": {}}
    straight, _ = compare(rollouts, scored(*totals), lambda x: x, **settings)
    turned, _ = compare(rollouts[::-1], scored(*totals[::-1]), lambda x: x, **settings)
    assert all(torch.equal(a.advantage, b.advantage) for a, b in zip(straight, turned[::-1]))
    assert straight[2].advantage.tolist() == totals[2]


def two_rewards() -> tuple[list[Rollout], list[Scores]]:
    """Three groups: both rewards speak, of very different scales; one group is tied in both."""
    rollouts = ToyRun(flow_grpo()).rollouts()
    parts = [
        {"large": 1000.0 * torch.arange(8.0), "small": -(torch.arange(8.0) ** 2)},
        {"large": torch.full((8,), 3.0), "small": torch.full((8,), 0.3)},
        {"large": torch.arange(8.0).flip(0), "small": torch.ones(8)},
    ]
    return rollouts, [Scores(total=p["large"] + 2 * p["small"], parts=p) for p in parts]


@pytest.mark.parametrize("combine", ["rewards", "advantages", "gdpo"])
def test_several_rewards_are_compared_as_the_configuration_says(combine: Any) -> None:
    rollouts, scores = two_rewards()
    weights = {"large": 1.0, "small": 2.0, "only reported": 0.0}
    settings: dict[str, Any] = {"deviation": "group", "ddof": 1, "epsilon": 1e-8, "clip": None, "min_scored": 1.0}
    found, _ = compare(rollouts, scores, lambda x: x, weights=weights, combine=combine, **settings)
    group = torch.cat([rollout.group for rollout in rollouts])
    columns = {name: torch.cat([score.parts[name] for score in scores]) for name in ("large", "small")}
    divided = {"ddof": 1, "epsilon": 1e-8}
    if combine == "rewards":
        expected = group_advantage(columns["large"] + 2 * columns["small"], group, clip=None, **divided)
    else:
        pair = {"large": 1.0, "small": 2.0}
        expected = combined_advantage(columns, pair, group, clip=None, over_step=combine == "gdpo", **divided)
    assert torch.equal(torch.cat([comparison.advantage for comparison in found]), expected)
    assert found[1].advantage.tolist() == [0.0] * 8  # tied in both: exactly nothing, also after GDPO's second step
    assert torch.equal(found[0].score, scores[0].total)


def test_only_the_best_and_the_worst_count_when_asked() -> None:
    rollouts, scores = two_rewards()
    settings: dict[str, Any] = {"deviation": "group", "clip": None, "min_scored": 1.0, "weights": {}}
    (first, *_), _ = compare(rollouts, scores, lambda x: x, best_and_worst=4, **settings)
    (whole, *_), _ = compare(rollouts, scores, lambda x: x, **settings)
    order = scores[0].total.argsort()
    assert torch.equal(torch.nonzero(first.weight).flatten(), order[[0, 1, -2, -1]].sort().values)
    assert torch.equal(first.advantage, whole.advantage)  # computed on all
    assert float(first.weight.max()) == pytest.approx(2.0)  # half of all samples count: twice as much


def test_samples_of_tied_groups_are_dropped_when_asked() -> None:
    """The first group of each batch is tied: kept, it has the weight 1 and no advantage; dropped, the others have more."""
    rollouts = ToyRun(flow_grpo()).rollouts()
    totals = [[0.5] * GROUP, *([float(row) for row in range(GROUP)] for _ in rollouts[1:])]
    settings: dict[str, Any] = {"deviation": "global", "clip": 5.0, "min_scored": 1.0, "weights": {}}
    kept, _ = compare(rollouts, scored(*totals), lambda x: x, **settings)
    dropped, _ = compare(rollouts, scored(*totals), lambda x: x, tied="drop", **settings)
    assert kept[0].weight.tolist() == [1.0] * GROUP
    assert dropped[0].weight.tolist() == kept[0].advantage.tolist() == [0.0] * GROUP
    assert dropped[1].weight.tolist() == pytest.approx([len(rollouts) / (len(rollouts) - 1)] * GROUP)
    for one, other in zip(kept, dropped):
        assert torch.equal(one.advantage, other.advantage)
    nothing, _ = compare(rollouts, scored(*[[0.5] * GROUP] * len(rollouts)), lambda x: x, tied="drop", **settings)
    assert all(float(one.weight.sum()) == 0 for one in nothing)


def test_too_few_scores_say_how_many_and_why() -> None:
    rollouts = ToyRun(flow_grpo()).rollouts()
    totals = scored([1.0] * 8, [NAN] * 8, [1.0] * 6 + [NAN] * 2)
    totals[1] = replace(totals[1], failures={row: "reward 'theirs' raised TimeoutError: 30 s" for row in range(8)})
    totals[2] = replace(totals[2], failures={6: "another reason", 7: "another reason"})
    settings: dict[str, Any] = {"deviation": "group", "clip": 5.0, "weights": {}}
    with pytest.raises(TooFewScores) as error:
        compare(rollouts, totals, lambda x: x, min_scored=0.9, **settings)
    assert str(error.value) == (
        "only 58.3% of the samples have a score, advantage.min_scored asks for 90.0%; "
        "the most frequent reason: reward 'theirs' raised TimeoutError: 30 s"
    )
    compare(rollouts, totals, lambda x: x, min_scored=14 / 24, **settings)  # just enough


# --- can it learn -------------------------------------------------------------------------------------------------------


def agreement_of(gradients: Sequence[Tensor], *, passes_per_batch: int = 1) -> float:
    """What is reported of an update whose passes have these gradients."""
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(len(gradients[0]) - 3))]
    batches = len(gradients) // passes_per_batch
    meter = GradientAgreement(parameters, batches=batches, passes_per_batch=passes_per_batch)
    results = []
    for _ in range(2):  # and again, after it has been emptied
        for gradient in gradients:
            meter.next_pass()
            (gradient * torch.cat(parameters)).sum().backward()
        results.append(float(meter.finish()))
    assert results[0] == results[1] or all(math.isnan(result) for result in results)
    return results[0]


def test_agreement_of_equal_opposite_and_orthogonal_halves() -> None:
    g, h = torch.tensor([1.0, 2.0, -3.0, 0.5, 4.0]), torch.tensor([0.0, 0.0, 0.0, 4.0, -0.5])
    assert agreement_of([g, g]) == pytest.approx(1.0, abs=1e-6)
    assert agreement_of([g, 3 * g]) == pytest.approx(1.0, abs=1e-6)  # of directions
    assert agreement_of([g, -g]) == pytest.approx(-1.0, abs=1e-6)
    assert agreement_of([g, h]) == pytest.approx(0.0, abs=1e-6)
    assert agreement_of([g, -g, g + h, 2 * g]) == pytest.approx(0.0, abs=1e-6)  # the first half cancels


def test_agreement_of_three_passes_counts_the_middle_one_to_the_second_half() -> None:
    g, h = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert agreement_of([g, g, h]) == pytest.approx(0.5**0.5, abs=1e-6)


def test_agreement_compares_batches_and_never_two_passes_of_one() -> None:
    """Two passes of a batch share its samples and their scores: they would agree on pure noise."""
    g, h = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert agreement_of([g, g, h, h], passes_per_batch=2) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(agreement_of([g, g], passes_per_batch=2))


def test_of_a_large_model_every_parameter_is_watched() -> None:
    """A LoRA's tensors alternate: every second tensor would be lora_A, whose gradient is 0 at the first update."""
    down, up = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))
    meter = GradientAgreement([down, up], batches=2, passes_per_batch=1, most=5)  # every third element
    for ups in ([1.0, 9.0, 9.0, 2.0, 9.0, 9.0], [2.0, -9.0, 9.0, 4.0, -9.0, 9.0]):
        meter.next_pass()
        (0.0 * down + torch.tensor(ups) * up).sum().backward()
    assert float(meter.finish()) == pytest.approx(1.0, abs=1e-6)  # of elements 0 and 3
    for downs in ([1.0, 9.0, 9.0, 0.0, 9.0, 9.0], [0.0, 9.0, 9.0, 1.0, 9.0, 9.0]):
        meter.next_pass()
        (torch.tensor(downs) * down + torch.tensor(downs) * up).sum().backward()
    assert float(meter.finish()) == pytest.approx(0.0, abs=1e-6)


def test_agreement_of_noise_is_about_zero_and_of_signal_what_theory_says() -> None:
    """Halves of n samples with signal |m|^2 = s D and unit noise: n s / (1 + n s), here 8 * 0.25 / 3 = 2/3.

    The cosine of independent vectors of D = 4000 dimensions has deviation 1 / sqrt(D) = 0.016.
    """
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(4000, generator=generator) for _ in range(16)]
    assert abs(agreement_of(noise)) < 5 / 4000**0.5
    signal = 0.5 * torch.randn(4000, generator=generator)
    assert agreement_of([signal + n for n in noise]) == pytest.approx(2 / 3, abs=5 / 4000**0.5)


def test_agreement_of_a_single_pass_is_unknown() -> None:
    assert math.isnan(agreement_of([torch.ones(5)]))
