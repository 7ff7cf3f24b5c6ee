"""What holds for every algorithm, whatever its loss: generated from `variants.VARIANTS`, so that none can be forgotten."""

from __future__ import annotations

import inspect
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from toy import GROUP, ToyRun, comparison
from variants import VARIANTS

from flowsteer.rewards.types import Scores
from flowsteer.rl.algorithms import ALGORITHMS, AnyAlgorithm
from flowsteer.rl.algorithms.transitions import gaussian, kl_to_reference
from flowsteer.rl.engine.optimizer import NotFinite
from flowsteer.rl.types import Algorithm, Comparison
from flowsteer.rollout.types import Rollout

BY_NAME = {config.model_fields["name"].default: config for config in ALGORITHMS}
ANCHORS = [  # every weight of a distance to another policy
    (name, coefficient, anchor)
    for name, overrides in VARIANTS.items()
    for coefficient, anchor in (("kl_coef", "reference"), ("old_coef", "old"))
    if coefficient in BY_NAME[overrides["algorithm"]["name"]].model_fields
]


def test_every_algorithm_is_here() -> None:
    configured = {config.model_fields["name"].default for config in get_args(get_args(AnyAlgorithm)[0])}
    assert {overrides["algorithm"]["name"] for overrides in VARIANTS.values()} == configured
    assert {config.model_fields["name"].default for config in ALGORITHMS} == configured


def test_a_hyper_parameter_is_declared_once() -> None:
    """In the settings of an algorithm or of its family; a published default of its own is the only reason to repeat it."""
    for algorithm in ALGORITHMS:
        lineage = [cls for cls in algorithm.__mro__ if issubclass(cls, Algorithm)]
        for name in algorithm.model_fields:
            declared = [cls for cls in lineage if name in inspect.get_annotations(cls)]
            assert 1 <= len(declared) <= 2, (algorithm, name)
            if len(declared) == 2:
                own, family = (inspect.get_annotations(cls)[name] for cls in declared)
                assert own == family, f"{algorithm.__name__}.{name} changes more than the default"
                assert declared[0].model_fields[name].default != declared[1].model_fields[name].default
        assert algorithm.__init__ is Algorithm.__init__, f"{algorithm.__name__} names its settings a second time"


def learner(name: str, **settings: Any) -> ToyRun:
    overrides = VARIANTS[name]
    return ToyRun(overrides | {"algorithm": overrides["algorithm"] | settings})


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns(name: str) -> None:
    """Final latents have a deviation of about 1, and `value` is a mean over 192 samples of 4: a rise by 0.5 is no accident.

    The distances to anchors are left out, which is what holds an algorithm back on purpose.
    """
    free = {key: 0.0 for key in ("kl_coef", "old_coef") if key in learner(name).config.algorithm.model_dump()}
    run = learner(name, **free)
    before = run.value()
    for step in range(80):
        run.learn(step)
    assert run.value() - before > 0.5


@pytest.mark.parametrize(("name", "coefficient", "anchor"), ANCHORS)
def test_a_distance_pulls_back(name: str, coefficient: str, anchor: str) -> None:
    """Where nothing else teaches, a step along the gradient of a displaced policy brings it nearer to the anchor.

    The velocity is displaced alike everywhere, by d: an algorithm of the forward process has the distance <d^2>, a mean over
    four dimensions, whose gradient is d / 2; one of transitions has that of `kl_to_reference`, which has proofs of its own.
    """
    settings = BY_NAME[VARIANTS[name]["algorithm"]["name"]]
    others = {key: 0.0 for key in ("kl_coef", "old_coef") if key in settings.model_fields}
    gradients_of = {}
    for weight in (0.0, 10.0):
        run = learner(name, **others | {coefficient: weight})
        rollouts = run.rollouts()
        displacement = torch.tensor([0.3, -0.2, 0.1, 0.4])
        with torch.no_grad():
            run.toy.network.bias += displacement
        assert anchor in run.policy.names or weight == 0
        nothing = [comparison([0.0] * GROUP)] * len(rollouts)
        gradients_of[weight] = run.gradient(rollouts, nothing)[1]
    pull = gradients_of[10.0] - gradients_of[0.0]
    expected = displacement / 2
    if settings.learns_from == "transitions":
        batches, kernel = run.algorithm.batches(rollouts, nothing, 0), run.config.rollout.kernel.name
        distances = [kl_to_reference(run.policy, b, kernel, gaussian(run.policy, b, kernel)) for b in batches]
        (expected,) = torch.autograd.grad(torch.cat(distances).mean(), run.toy.network.bias)
    torch.testing.assert_close(pull, 10 * expected, rtol=1e-3, atol=1e-5)
    assert (pull * displacement).sum() > 1e-3 * displacement.norm() ** 2
    cosine = torch.nn.functional.cosine_similarity(pull, displacement, dim=0)
    assert cosine > 0.99  # the distance is quadratic in the displacement of the velocity


@pytest.mark.parametrize("name", VARIANTS)
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_change(name: str) -> None:
    run = learner(name)
    run.learn(0)
    before = {key: value.detach().clone() for key, value in run.policy.parameters().items()}
    handle = next(iter(run.policy.parameters().values())).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NotFinite, match="the gradient of update 2 is not finite"):
        run.learn(1)
    handle.remove()
    assert all(torch.equal(value, before[key]) for key, value in run.policy.parameters().items())
    assert run.engine.num_updates == 1


def moved(name: str) -> tuple[ToyRun, list[Rollout]]:
    """A policy away from the one that drew, from the old one and from the reference."""
    run = learner(name)
    rollouts = run.rollouts()
    with torch.no_grad():
        run.toy.network.bias += torch.tensor([0.05, -0.02, 0.01, 0.03])
    return run, rollouts


def gradients(run: ToyRun, rollouts: list[Rollout], made: Comparison) -> list[Tensor]:
    return run.gradient(rollouts, [made] * len(rollouts))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sample_without_weight_contributes_nothing(name: str) -> None:
    """Whatever its advantage is, and though it goes through the network: every process makes equally many passes."""
    run, rollouts = moved(name)
    weight = [2.0] * (GROUP // 2) + [0.0] * (GROUP // 2)
    nan = [math.nan] * (GROUP // 2)
    plain, wild = [1.0, -1.0] * (GROUP // 2), [1.0, -1.0] * (GROUP // 4) + [-9.0, 7.0] * (GROUP // 4)
    one = gradients(run, rollouts, comparison(plain, weight, [1.0, -1.0] * (GROUP // 4) + nan))
    two = gradients(run, rollouts, comparison(wild, weight, [1.0, -1.0] * (GROUP // 4) + nan))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    none = gradients(run, rollouts, comparison(plain, [0.0] * GROUP, [math.nan] * GROUP))
    assert all((gradient == 0).all() for gradient in none)
    assert max(float(gradient.abs().max()) for gradient in one) > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_scores_teach_nothing(name: str) -> None:
    """A tied group is no pair, has no best sample and no advantage; only distances to other policies remain.

    DiffusionNFT is the exception of the paper's making: where nothing is better, it stays near its old policy.
    """
    free = {key: 0.0 for key in ("kl_coef", "old_coef") if key in learner(name).config.algorithm.model_dump()}
    run = learner(name, **free)
    rollouts = run.rollouts()
    tied = [Scores(total=torch.full((len(rollout),), float(place))) for place, rollout in enumerate(rollouts)]
    comparisons, _ = run.compare(rollouts, tied)
    if name != "diffusion_nft":
        with torch.no_grad():
            run.toy.network.bias += 0.05
    for gradient in run.gradient(rollouts, comparisons):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6 if "nft" in name else 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_first_update_raises_the_reward_to_first_order(name: str) -> None:
    """The swapped sign, which a long enough run can hide: a small step along the gradient does what the scores ask for."""
    free = {key: 0.0 for key in ("kl_coef", "old_coef") if key in learner(name).config.algorithm.model_dump()}
    run = learner(name, **free)
    rollouts = [rollout for step in range(20) for rollout in run.rollouts(step)]
    scores = [Scores(total=rollout.images.flatten(1).mean(1)) for rollout in rollouts]
    compared = [run.compare([rollout], [score])[0][0] for rollout, score in zip(rollouts, scores)]
    gradient = run.gradient(rollouts, compared)
    before = run.value()
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
    with torch.no_grad():
        for parameter, g in zip(run.policy.parameters().values(), gradient):
            parameter -= 0.05 * g / norm
    assert run.value() > before + 0.01
