"""The losses of the algorithms against closed forms: what their papers derive must come out of what we compute."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import GROUP, ToyRun, comparison
from variants import NONE, POOLS, VARIANTS

from flowsteer.rl.algorithms.awm import penalty
from flowsteer.rl.algorithms.forward import NoiseLevels, matching_loss
from flowsteer.rl.algorithms.losses import Terms, weighted
from flowsteer.rl.algorithms.pairs import best_and_worst, preference_loss
from flowsteer.rl.algorithms.transitions import gaussian, transition_batches
from flowsteer.rl.algorithms.weighted_sft import sample_weights
from flowsteer.rl.build import build_algorithm
from flowsteer.rollout.steps import kernels

NAN = math.nan


def moved(overrides: dict[str, Any], by: float = 0.05) -> ToyRun:
    """A run whose current policy is away from all the others, after it has drawn."""
    run = ToyRun(overrides)
    run.drawn = run.rollouts()  # type: ignore[attr-defined]
    with torch.no_grad():
        run.toy.network.bias += by * torch.tensor([1.0, -0.5, 0.2, 0.7])
    return run


def first_loss(run: ToyRun, advantage: list[float]) -> tuple[Any, Tensor, dict[str, float]]:
    (batch, *_) = run.algorithm.batches(run.drawn, [comparison(advantage)] * len(run.drawn), 0)  # type: ignore[attr-defined]
    loss, metrics = run.algorithm.loss(run.policy, batch)
    return batch, loss, {name: float(total) / max(count, 1e-9) for name, (total, count) in metrics.items()}


SPREAD = torch.linspace(-1, 1, GROUP).tolist()

# --- pairs --------------------------------------------------------------------------------------------------------------


def test_best_and_worst_of_each_group() -> None:
    group = torch.tensor([5, 3, 5, 3, 5, 3])
    pairs = best_and_worst(group, comparison([0] * 6, score=[1.0, 0.2, 3.0, 0.9, -1.0, 0.5]))
    assert pairs.win.tolist() == [2, 3]
    assert pairs.lose.tolist() == [4, 1]
    assert pairs.weight.tolist() == [1, 1]
    assert pairs.sides().tolist() == [2, 3, 4, 1]


def test_a_tied_group_is_no_pair_and_a_missing_score_no_candidate() -> None:
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    score = [1.0, 1.0, 1.0, NAN, 4.0, 2.0, NAN, NAN, 1.0]
    weight = [2.0, 2.0, 2.0, 0.0, 2.0, 2.0, 0.0, 0.0, 0.0]
    pairs = best_and_worst(group, comparison([0] * 9, weight, score))
    assert pairs.weight.tolist() == [0, 2, 0]  # tied; a pair of what is known; a single score
    assert (pairs.win[1], pairs.lose[1]) == (4, 5)
    assert (pairs.win < 9).all()
    assert (pairs.lose < 9).all()


def test_only_samples_that_carry_a_comparison_make_a_pair() -> None:
    """Those that best-of-n left out have a score, and no weight."""
    pairs = best_and_worst(torch.zeros(4).long(), comparison([0] * 4, [0.0, 1.0, 1.0, 0.0], [9.0, 1.0, 0.0, -9.0]))
    assert (pairs.win.tolist(), pairs.lose.tolist(), pairs.weight.tolist()) == ([1], [2], [1])


def test_the_threshold_is_of_the_difference_of_probabilities() -> None:
    """softmax(1, 0) = (.731, .269): a difference of .462."""
    made = comparison([0, 0], score=[1.0, 0.0])
    assert best_and_worst(torch.zeros(2).long(), made, threshold=0.46).weight.tolist() == [1]
    assert best_and_worst(torch.zeros(2).long(), made, threshold=0.47).weight.tolist() == [0]


def test_preference_loss_by_hand() -> None:
    pairs = best_and_worst(torch.tensor([0, 0, 1, 1]), comparison([0] * 4, score=[1.0, 0.0, 5.0, 5.0]))
    loss, metrics = preference_loss(torch.tensor([0.7, 100.0]), pairs)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-0.7)) / 2)  # the tied group counts, with nothing
    assert metrics["margin"] == (pytest.approx(0.7), 1.0)
    assert metrics["accuracy"] == (1.0, 1.0)
    assert metrics["pairs"] == (1.0, 2.0)
    far, _ = preference_loss(torch.tensor([-300.0, 0.0]), pairs)
    assert float(far) == pytest.approx(150.0)  # no -inf: a softplus, not the logarithm of a sigmoid


# --- step-aware DPO -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["gaussian", "variance"])
def test_candidates_of_one_state_have_a_margin_that_is_linear_in_the_mean(weight: str) -> None:
    """The closed form against the four log densities that it replaces; their differences keep 5 digits of float32."""
    kernel = {"rollout.kernel": {"name": "flow_sde", "noise_level": 0.7, "log_prob_weight": weight}}
    run = moved(VARIANTS["step_dpo"] | kernel, by=0.5)
    batch, _, metrics = first_loss(run, SPREAD)
    current = gaussian(run.policy, batch, "flow_sde")
    with run.policy.using("reference"):
        reference = gaussian(run.policy, batch, "flow_sde")
    log_prob = [kernels.log_prob(step, batch.next_latents, weight=weight) for step in (current, reference)]  # type: ignore[arg-type]
    ratio = log_prob[0] - log_prob[1]
    expected = 10.0 * float((ratio[GROUP - 1] - ratio[0]).detach())  # beta; the best and the worst of the spread
    assert metrics["margin"] == pytest.approx(expected, rel=1e-3)
    assert abs(expected) > 1e-2


def test_one_pass_of_each_policy_serves_a_pool() -> None:
    run = moved(VARIANTS["step_dpo"])
    sizes = []
    forward = run.toy.begin
    run.toy.begin = lambda latents, *rest: (sizes.append(len(latents)), forward(latents, *rest))[1]  # type: ignore[method-assign]
    first_loss(run, SPREAD)
    assert sizes == [1, 1]  # one state, the current policy and the reference; not two candidates each


# --- GRPO-Guard ---------------------------------------------------------------------------------------------------------


def test_the_log_ratio_of_guard_is_noise_times_shift_and_has_mean_zero() -> None:
    """<z (mean - mean_old)>, without q; Flow-GRPO's own has the mean -<shift^2> / (2 q^2)."""
    run = ToyRun(VARIANTS["grpo_guard"] | {"rollout.prompts_per_step": 384, "rollout.batch_size": GROUP * 384})
    (rollout,) = run.rollouts()
    with torch.no_grad():
        run.toy.network.bias += 0.3
    made = comparison([1.0] * len(rollout))
    guarded, plain = [], []
    for batch in transition_batches([rollout], [made], step=0):
        trajectory, k = batch.trajectory, batch.transition
        assert trajectory.mean is not None
        with torch.no_grad():
            current = gaussian(run.policy, batch, "flow_sde")
        shift = current.mean - trajectory.mean[:, k]
        noise = (batch.next_latents - trajectory.mean[:, k]) / current.std
        log_ratio = kernels.log_prob(current, batch.next_latents) - batch.old_log_prob
        old = kernels.Gaussian(mean=trajectory.mean[:, k], std=current.std)
        normalised = current.std * (log_ratio + kernels.kl(current, old))
        torch.testing.assert_close(normalised, (noise * shift).mean(1), rtol=0, atol=1e-5)
        _loss, metrics = run.algorithm.loss(run.policy, batch)
        total, count = metrics["ratio_deviation"]
        assert float(total) / count == pytest.approx(float(normalised.abs().mean()), rel=1e-4)
        error = float(normalised.std()) / math.sqrt(len(rollout))
        guarded.append(float(normalised.mean()) / error)
        plain.append(float(log_ratio.mean()) / (float(log_ratio.std()) / math.sqrt(len(rollout))))
    assert max(map(abs, guarded)) < 4  # standard errors of the mean
    assert max(plain) < -4


def test_guard_divides_each_step_by_its_length_and_its_bias_has_a_gradient() -> None:
    run = ToyRun(VARIANTS["grpo_guard"] | {"algorithm": {"name": "grpo_guard", "clip_range": 10.0}})
    run.toy.power = 2.0  # steps of many lengths
    (rollout, *_) = run.rollouts()
    with torch.no_grad():
        run.toy.network.bias += 0.5
    sigma = rollout.conditioning.schedule.sigma
    lengths = []
    for batch in transition_batches([rollout], [comparison([1.0] * GROUP)], step=0):
        loss, metrics = run.algorithm.loss(run.policy, batch)
        total, count = metrics["ratio"]
        lengths.append(float(sigma[batch.index] - sigma[batch.index + 1]))
        assert loss.item() == pytest.approx(-float(total) / count / lengths[-1], rel=1e-5)
        # d ratio / d mean = ratio z / D, for log ratio = <z (mean - mean_old)>: nothing of the bias's own is left
        trajectory, k = batch.trajectory, batch.transition
        assert trajectory.mean is not None
        current = gaussian(run.policy, batch, "flow_sde")
        noise = (batch.next_latents - trajectory.mean[:, k]) / current.std
        ratio = torch.exp((noise * (current.mean - trajectory.mean[:, k])).mean(1))
        expected = torch.autograd.grad(-ratio.mean() / lengths[-1], run.toy.network.bias)[0]
        ours = torch.autograd.grad(loss, run.toy.network.bias)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    assert max(lengths) > 2 * min(lengths)


# --- DGPO ---------------------------------------------------------------------------------------------------------------


def true_dgpo_gradient(run: ToyRun, batch: Any, advantage: Tensor, beta: float) -> list[Tensor]:
    """Of -log sigmoid(-(beta / G) sum_j A_j (d_j - d_ref_j)), by autograd."""
    noised, target = batch.noised()
    error = matching_loss(run.policy.velocity(noised, batch.index, batch.conditioning), target)
    with torch.no_grad(), run.policy.using("reference"):
        reference = matching_loss(run.policy.velocity(noised, batch.index, batch.conditioning), target)
    logit = -beta / GROUP * (advantage * (error - reference)).sum()
    return list(torch.autograd.grad(-torch.nn.functional.logsigmoid(logit), list(run.policy.parameters().values())))


def dgpo(**settings: Any) -> dict[str, Any]:
    plain = {"name": "dgpo", "noise_levels_per_sample": 2, "beta": 7.0, "kl_coef": 0.0, "clip_range": None}
    return {"algorithm": plain | settings, **NONE}


def test_the_surrogate_of_dgpo_times_beta_has_the_true_gradient() -> None:
    run = moved(dgpo(), by=0.5)
    advantage = torch.linspace(-1, 1, GROUP)
    batch, loss, metrics = first_loss(run, SPREAD)
    surrogate = torch.autograd.grad(loss, list(run.policy.parameters().values()))
    for ours, true in zip(surrogate, true_dgpo_gradient(run, batch, advantage, 7.0)):
        torch.testing.assert_close(7.0 * ours, true, rtol=1e-4, atol=1e-6)
    assert abs(metrics["group_weight"] - 0.5) > 0.01


def test_beta_of_dgpo_only_shapes_the_weight_of_a_group() -> None:
    """At the reference every weight is 1/2, and what is left does not know beta."""
    runs = [moved(dgpo(beta=beta), by=0.0) for beta in (1.0, 100.0)]
    one, two = (torch.autograd.grad(first_loss(run, SPREAD)[1], run.toy.network.bias)[0] for run in runs)
    assert torch.equal(one, two)


def test_a_group_of_dgpo_may_lie_on_several_processes() -> None:
    """Two processes with half of a group each, at the same time: the mean of their gradients is the whole group's."""
    run = moved(dgpo(), by=0.5)
    batch, loss, _ = first_loss(run, SPREAD)
    whole = torch.autograd.grad(loss, run.toy.network.bias)[0]
    rollout, made = batch.rollout, batch.comparison
    halves = []
    for rows in ([0, 2, 4, 6], [1, 3, 5, 7]):
        part = replace(
            rollout,
            prompts=tuple(rollout.prompts[row] for row in rows),
            columns={},
            conditioning=rollout.conditioning.take(rows),
            **{name: getattr(rollout, name)[rows] for name in ("group", "sample", "seeds", "latents", "images")},
        )
        compared = replace(made, score=made.score[rows], advantage=made.advantage[rows], weight=made.weight[rows])
        halves.append(replace(batch, rollout=part, comparison=compared, noise_seeds=batch.noise_seeds[rows]))

    sent: list[list[Tensor]] = [[], []]  # what each process gives to its collectives, in order

    def loss_of(place: int, gather: Any) -> Tensor:
        algorithm = run.algorithm.bind(replace(run.algorithm.facts, gather=gather))
        return algorithm.loss(run.policy, halves[place])[0]

    for place in (0, 1):
        loss_of(place, lambda values, place=place: (sent[place].append(values), values)[1])
    gradients = []
    for place in (0, 1):
        waiting = [torch.cat(pair) for pair in zip(*sent)]
        loss = loss_of(place, lambda values, waiting=waiting: waiting.pop(0))
        gradients.append(torch.autograd.grad(loss, run.toy.network.bias)[0])
    torch.testing.assert_close(sum(gradients) / 2, whole, rtol=1e-5, atol=1e-7)


def test_samples_of_a_group_share_their_noise_and_groups_and_steps_do_not() -> None:
    run = ToyRun(dgpo())
    rollouts = run.rollouts()
    made = [comparison(SPREAD)] * len(rollouts)

    def noise(step: int) -> list[Tensor]:
        found = []
        for batch in run.algorithm.batches(rollouts, made, step):
            _noised, target = batch.noised()
            found.append(target + batch.rollout.latents)  # noise - clean + clean
        return found

    first, second, *_ = noise(0)
    torch.testing.assert_close(first, first[:1].expand_as(first), rtol=0, atol=1e-6)
    assert (first[0] - second[0]).abs().max() > 0.1  # another noise level
    assert (noise(0)[2][0] - first[0]).abs().max() > 0.1  # another group
    assert (noise(1)[0][0] - first[0]).abs().max() > 0.1  # another training step
    indices = [batch.index for batch in run.algorithm.batches(rollouts, made, 0)]
    assert indices == indices[:2] * len(rollouts)  # all batches, on all processes, at the same levels


def test_dgpo_stops_pushing_what_has_gone_far_enough() -> None:
    """By hand: d_old - d beyond log(1 + c) for good samples, below log(1 - c) for bad ones, gets no gradient."""
    run = moved(dgpo(clip_range=1e-3), by=0.5)
    batch, loss, metrics = first_loss(run, SPREAD)
    noised, target = batch.noised()
    error = matching_loss(run.policy.velocity(noised, batch.index, batch.conditioning), target)
    with torch.no_grad(), run.policy.using("old"):
        old = matching_loss(run.policy.velocity(noised, batch.index, batch.conditioning), target)
    ratio, advantage = torch.exp(old - error.detach()), torch.linspace(-1, 1, GROUP)
    gone = torch.where(advantage > 0, ratio > 1.001, ratio < 0.999)
    assert 0 < int(gone.sum()) < GROUP
    assert metrics["clip_fraction"] == pytest.approx(float(gone.float().mean()))
    expected = torch.autograd.grad((metrics["group_weight"] * advantage * error * ~gone).mean(), run.toy.network.bias)[
        0
    ]
    ours = torch.autograd.grad(loss, run.toy.network.bias)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["diffusion_nft", "dgpo", "dgpo old", "awm"])
def test_the_kl_is_to_the_reference_also_where_the_old_policy_is_another(name: str) -> None:
    """The distance that is reported, and the gradient that kl_coef adds, are those to the start of training."""
    gradients, distances = [], []
    for coefficient in (0.0, 0.7):
        overrides = VARIANTS[name] | {"algorithm": VARIANTS[name]["algorithm"] | {"kl_coef": coefficient}}
        run = moved(overrides, by=0.5)
        run.policy.follow_old(0.0)  # the old policy has left the reference
        with torch.no_grad():
            run.toy.network.bias += torch.tensor([0.1, 0.2, -0.3, 0.0])  # and the current one both
        batch, loss, metrics = first_loss(run, SPREAD)
        gradients.append(torch.autograd.grad(loss, run.toy.network.bias)[0])
        assert ("kl" in metrics) == bool(coefficient)
        if coefficient:
            noised, _ = batch.noised()
            prediction = run.policy.velocity(noised, batch.index, batch.conditioning)
            for other in ("reference", "old"):
                with torch.no_grad(), run.policy.using(other):
                    theirs = run.policy.velocity(noised, batch.index, batch.conditioning)
                distances.append(matching_loss(prediction, theirs).mean())
            assert metrics["kl"] == pytest.approx(float(distances[0]), rel=1e-5)
            pull = torch.autograd.grad(distances[0], run.toy.network.bias)[0]
            torch.testing.assert_close(gradients[1] - gradients[0], 0.7 * pull, rtol=1e-4, atol=1e-6)
    assert abs(distances[0] - distances[1]) > 0.05


# --- Diffusion-DPO ------------------------------------------------------------------------------------------------------


def test_diffusion_dpo_by_hand() -> None:
    run = moved(VARIANTS["diffusion_dpo"], by=0.5)
    batch, loss, metrics = first_loss(run, SPREAD)
    rollout, schedule = batch.rollout, batch.rollout.conditioning.schedule
    seeds = rollout.seeds[[GROUP - 1, GROUP - 1]]  # one noise for both, the winner's
    chosen = batch.of_rows(torch.tensor([GROUP - 1, 0]), noise_from=torch.tensor([GROUP - 1, GROUP - 1]))
    assert torch.equal(chosen.noise_seeds, seeds)
    noised, target = chosen.noised()
    clean = rollout.latents[[GROUP - 1, 0]]
    noise = target + clean
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-6)
    sigma = schedule.sigma[batch.index]
    torch.testing.assert_close(noised, (1 - sigma) * clean + sigma * noise)
    errors = []
    for name in ("current", "old"):
        with torch.no_grad(), run.policy.using(name):
            velocity = run.policy.velocity(noised, batch.index, rollout.conditioning.take([GROUP - 1, 0]))
        errors.append(((velocity - target) ** 2).mean(1))
    (win, lose), (win_ref, lose_ref) = errors
    logit = -20.0 / 2 * ((win - win_ref) - (lose - lose_ref))
    assert float(loss.detach()) == pytest.approx(float(torch.log1p(torch.exp(-logit))), rel=1e-5)
    assert metrics["margin"] == pytest.approx(float(logit), rel=1e-4)


def test_the_reference_of_online_dpo_moves_when_due_and_that_of_offline_dpo_never() -> None:
    def decays(refresh_every: int | None) -> list[float]:
        algorithm = {"name": "diffusion_dpo", "refresh_every": refresh_every, "updates_per_rollout": 3}
        run = ToyRun({"algorithm": algorithm, **NONE})
        return [run.algorithm.old_decay(updates) for updates in (3, 6, 9, 12)]

    assert decays(2) == [1, 0, 1, 0]
    assert decays(None) == [1, 1, 1, 1]


# --- AWM ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", 0.16),
        ("sigma", 0.08),
        ("sigma_squared", 0.04),
        ("huber", 0.5 * (0.4 - 1e-5)),
        ("general_huber", 0.5 / 0.25 * (0.16**0.25 - 1e-10**0.25)),
    ],
)
def test_penalties_by_hand(weighting: Any, expected: float) -> None:
    assert float(penalty(torch.tensor([0.16]), 0.5, weighting)) == pytest.approx(expected, rel=1e-5)


def awm(**settings: Any) -> dict[str, Any]:
    plain = {"name": "awm", "noise_levels_per_sample": 2, "kl_coef": 0.0, "old_coef": 0.0, "weighting": "sigma"}
    return {"algorithm": plain | settings, **NONE}


def test_on_policy_awm_has_the_gradient_of_the_weighted_likelihood() -> None:
    run = moved(awm())
    batch, loss, _ = first_loss(run, SPREAD)
    noised, target = batch.noised()
    error = matching_loss(run.policy.velocity(noised, batch.index, batch.conditioning), target)
    sigma = float(batch.schedule.sigma[batch.index])
    wanted = (torch.linspace(-1, 1, GROUP) / 2.0 * sigma * error).mean()  # the advantage's clip is 2
    ours, true = (torch.autograd.grad(value, run.toy.network.bias)[0] for value in (loss, wanted))
    torch.testing.assert_close(ours, true, rtol=1e-5, atol=1e-7)


def test_off_policy_awm_weights_with_the_ratio_to_the_old_policy() -> None:
    run = moved(awm(clip_range=100.0), by=0.5)
    assert run.algorithm.acting == "old"
    batch, _, metrics = first_loss(run, SPREAD)
    noised, target = batch.noised()
    errors = []
    for name in ("current", "old"):
        with torch.no_grad(), run.policy.using(name):
            errors.append(matching_loss(run.policy.velocity(noised, batch.index, batch.conditioning), target))
    sigma = float(batch.schedule.sigma[batch.index])
    assert metrics["ratio"] == pytest.approx(float(torch.exp(sigma * (errors[1] - errors[0])).mean()), rel=1e-4)


def test_the_anchor_of_awm_holds_it_near_the_old_policy() -> None:
    for name in ("old", "reference"):
        coefficients = {"old_coef": 3.0} if name == "old" else {"kl_coef": 3.0}
        run = moved(awm(**coefficients), by=0.5)
        batch, loss, _ = first_loss(run, [0.0] * GROUP)
        noised, _ = batch.noised()
        with torch.no_grad(), run.policy.using(name):
            anchor = run.policy.velocity(noised, batch.index, batch.conditioning)
        distance = matching_loss(run.policy.velocity(noised, batch.index, batch.conditioning), anchor).mean()
        assert loss.item() == pytest.approx(3.0 * distance.item(), rel=1e-5)
        ours, true = (torch.autograd.grad(value, run.toy.network.bias)[0] for value in (loss, 3.0 * distance))
        torch.testing.assert_close(ours, true)
        assert true.abs().max() > 0


def test_awm_trains_at_one_level_of_each_stratum() -> None:
    """Two of the levels 0 to 3: one below 2 and one from there on, in every batch and step."""
    run = moved(awm())
    made = [comparison([0.0] * GROUP)] * len(run.drawn)  # type: ignore[attr-defined]
    indices = [batch.index for step in range(20) for batch in run.algorithm.batches(run.drawn, made, step)]  # type: ignore[attr-defined]
    assert set(indices[::2]) == {0, 1}
    assert set(indices[1::2]) == {2, 3}


@pytest.mark.parametrize("name", ["awm", "dgpo"])
def test_the_old_policy_follows_more_slowly_as_training_goes_on(name: str) -> None:
    algorithm = ToyRun(VARIANTS[name]).algorithm
    assert [algorithm.old_decay(updates) for updates in (0, 100, 300, 5000)] == [0, 0.1, 0.3, 0.3]


# --- fine-tuning on better samples ----------------------------------------------------------------------------------------


def test_weights_of_samples_by_hand() -> None:
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    made = comparison([1.0, 1.0, -2.0, 0.0, 0.0, 0.0, 0.5, -0.5], weight=[1.0] * 7 + [0.0])
    assert sample_weights(group, made, "best", 1.0).tolist() == pytest.approx([1.5, 1.5, 0, 0, 0, 0, 1, 0])
    assert sample_weights(group, made, "positive", 1.0).tolist() == [1, 1, 0, 0, 0, 0, 0.5, 0]
    clipped = comparison([1.0, 1.0, -2.0, 0.0, 0.0, 0.0, 0.5, -0.5], weight=[1.0] * 7 + [0.0], score=[7, 9, *[0] * 6])
    assert sample_weights(group, clipped, "best", 1.0).tolist() == pytest.approx([0, 3, 0, 0, 0, 0, 1, 0])
    cold = sample_weights(group, made, "exponential", 1e-3)  # no overflow: the best share, as with `best`
    assert cold.tolist() == pytest.approx([1.5, 1.5, 0, 0, 0, 0, 1, 0])
    first = 3 * torch.softmax(torch.tensor([1.0, 1.0, -2.0]) / 2, 0)
    assert sample_weights(group, made, "exponential", 2.0).tolist() == pytest.approx([*first.tolist(), 0, 0, 0, 1, 0])


# --- noise levels --------------------------------------------------------------------------------------------------------


def test_strata_cover_the_range_and_hold_one_level_each() -> None:
    levels = NoiseLevels(14, count=4, first=1, end=13, seed=0)
    drawn = [levels.stratified(step) for step in range(200)]
    for place, allowed in enumerate(([1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12])):
        assert {indices[place] for indices in drawn} == set(allowed)
    assert levels.stratified(3) == drawn[3]


def test_common_levels_are_those_of_all_batches_of_a_step() -> None:
    """Several denoisers share the levels between them, and processes must ask the same one at the same time."""
    levels = NoiseLevels(10, count=3, seed=0, common=True)
    for draw in (levels.spread, levels.stratified):
        assert {tuple(draw(4, sample)) for sample in range(20)} == {tuple(draw(4))}
        assert len({tuple(draw(step, 0)) for step in range(20)}) > 5


def test_spread_levels_are_different_and_cover_the_range() -> None:
    levels = NoiseLevels(10, count=3, first=2, end=7, seed=0)
    drawn = [levels.spread(step, 5) for step in range(200)]
    assert {index for indices in drawn for index in indices} == {2, 3, 4, 5, 6}
    assert {len(set(indices)) for indices in drawn} == {3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 4, "first": 2, "end": 5}, "noise_levels_per_sample=4 is more than the 3"),
        ({"count": 1, "first": 5, "end": 5}, "noise levels 5 to 4 are not among the 10"),
        ({"count": 1, "first": 0, "end": 11}, "noise levels 0 to 10 are not among the 10"),
    ],
)
def test_noise_levels_that_are_not_there(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseLevels(10, seed=0, **options)


def test_a_distance_of_weight_0_is_neither_asked_for_nor_reported() -> None:
    """So an algorithm may then report a metric of that name itself."""
    terms = Terms(loss=torch.tensor([1.0, 3.0]), metrics={"kl": torch.tensor([0.5, 0.7])})
    loss, metrics = weighted(terms, torch.ones(2), {}, {"reference": 0.0, "nobody": 0.0})
    assert loss == 2.0
    total, count = metrics["kl"]
    assert float(total) / count == pytest.approx(0.6)


# --- what several of them share --------------------------------------------------------------------------------------------


def test_granularities_of_a_pool_are_trained_once_with_the_sum_of_their_advantages() -> None:
    run = ToyRun(VARIANTS["g2rpo"])
    rollouts = run.rollouts()
    made = [comparison([float(place)] * GROUP) for place in range(len(rollouts))]
    batches = list(run.algorithm.batches(rollouts, made, 0))
    assert len(rollouts) == 3 * 2 * 2
    assert len(batches) == 3 * 2 == 3 * run.algorithm.passes_per_batch
    assert [float(batch.comparison.advantage[0]) for batch in batches] == [1, 5, 9, 13, 17, 21]
    assert [batch.index for batch in batches] == [1, 2] * 3


def test_a_granularity_that_was_not_compared_is_left_out_of_the_sum() -> None:
    """Weight 0 there, as for a missing score: weight times advantage is that of the way that was compared, over both."""
    run = ToyRun(VARIANTS["g2rpo"])
    rollouts = run.rollouts()
    fine = comparison([1.0] * GROUP, weight=[2.0] * GROUP)
    coarse = comparison([-5.0] * GROUP, weight=[0.0] * (GROUP - 1) + [2.0])
    nowhere = comparison([7.0] * GROUP, weight=[0.0] * GROUP)
    made = [fine, coarse, nowhere, nowhere] * 3
    first, second, *_ = run.algorithm.batches(rollouts, made, 0)
    assert first.comparison.weight.tolist() == [1.0] * (GROUP - 1) + [2.0]
    assert (first.comparison.weight * first.comparison.advantage).tolist() == [2.0] * (GROUP - 1) + [-8.0]
    assert second.comparison.weight.tolist() == second.comparison.advantage.tolist() == [0.0] * GROUP


def test_transitions_are_drawn_anew_for_every_batch_and_step() -> None:
    run = ToyRun(VARIANTS["dance_grpo"])
    rollouts = run.rollouts()
    made = [comparison(SPREAD)] * len(rollouts)

    def chosen(step: int) -> list[int]:
        return [batch.transition for batch in run.algorithm.batches(rollouts, made, step)]

    assert len(chosen(0)) == 2 * len(rollouts)
    assert chosen(0) == chosen(0)
    assert len({tuple(chosen(step)) for step in range(10)}) > 5
    assert {place for step in range(20) for place in chosen(step)} == {0, 1, 2, 3}


def test_with_several_denoisers_all_batches_train_the_same_transitions() -> None:
    """Twin of the noise levels: processes must ask the same denoiser at the same time."""
    run = ToyRun(VARIANTS["dance_grpo"])
    algorithm = build_algorithm(run.config, run.plan, run.processes, common_indices=True)
    rollouts = run.rollouts()
    made = [comparison(SPREAD)] * len(rollouts)

    def chosen(step: int) -> list[tuple[int, ...]]:
        places = [batch.transition for batch in algorithm.batches(rollouts, made, step)]
        return list(zip(places[::2], places[1::2]))

    assert all(len(set(chosen(step))) == 1 for step in range(10))
    assert len({chosen(step)[0] for step in range(10)}) > 3


def test_pso_by_hand() -> None:
    """-log sigmoid of beta times the difference of mean log ratios, of the best and the worst sample, for every transition."""
    run = ToyRun(VARIANTS["pso"])
    rollout = run.rollouts()[0]
    with torch.no_grad():
        run.toy.network.bias += 0.05
    made = comparison(SPREAD)
    best, worst = int(made.score.argmax()), int(made.score.argmin())
    for batch in run.algorithm.batches([rollout], [made], 0):
        loss, _ = run.algorithm.loss(run.policy, batch)

        def log_prob(batch: Any) -> Tensor:
            step = gaussian(run.policy, batch, run.algorithm.facts.kernel)
            density = torch.distributions.Normal(step.mean.double(), step.std)
            return density.log_prob(batch.next_latents.double()).flatten(1).mean(1)

        with run.policy.using("reference"):
            reference = log_prob(batch)
        ratio = log_prob(batch) - reference
        wanted = -torch.nn.functional.logsigmoid(5.0 * (ratio[best] - ratio[worst]))
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        assert abs(loss.item() - math.log(2)) > 1e-4  # the policy has moved


def test_rows_of_a_batch_are_those_of_the_whole() -> None:
    """With states of their own, and with one for each of the two groups of a batch."""
    two_groups = {"rollout.prompts_per_step": 2, "rollout.batch_size": 2 * GROUP}
    for overrides in (VARIANTS["pso"] | two_groups, VARIANTS["g2rpo"] | two_groups):
        run = ToyRun(overrides)
        rollouts = run.rollouts()
        batch = next(iter(run.algorithm.batches(rollouts, [comparison(SPREAD)] * len(rollouts), 0)))
        rows = torch.tensor([GROUP + 5, 0])
        part = replace(batch, rows=rows)
        kernel = run.algorithm.facts.kernel
        torch.testing.assert_close(
            gaussian(run.policy, part, kernel).mean, gaussian(run.policy, batch, kernel).mean[rows]
        )
        assert torch.equal(part.next_latents, batch.next_latents[rows])
        assert torch.equal(part.old_log_prob, batch.old_log_prob[rows])


def test_more_transitions_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="transitions_per_sample=9, but the plan stores 4 transitions"):
        ToyRun({"algorithm": {"name": "flow_grpo", "transitions_per_sample": 9}})


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        pytest.param(
            VARIANTS["g2rpo"] | {"algorithm": {"name": "flow_grpo"}} | POOLS, [1] * 6, id="a pool's one state"
        ),
        pytest.param(VARIANTS["pso"], [2] * 24, id="a pair of both policies"),
    ],
)
def test_only_what_the_loss_needs_passes_the_network(overrides: dict[str, Any], sizes: list[int]) -> None:
    run = ToyRun(overrides)
    rollouts = run.rollouts()
    seen = []
    forward = run.toy.begin
    run.toy.begin = lambda latents, *rest: (seen.append(len(latents)), forward(latents, *rest))[1]  # type: ignore[method-assign]
    for batch in run.algorithm.batches(rollouts, [comparison(SPREAD)] * len(rollouts), 0):
        run.algorithm.loss(run.policy, batch)
    assert seen == sizes
