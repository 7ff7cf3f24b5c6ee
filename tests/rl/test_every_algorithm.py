"""What holds for every algorithm, whatever its loss: `flowsteer.rl.check.checks` over all `variants.VARIANTS`."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest
from torch import Tensor
from variants import VARIANTS

from flowsteer.rewards.types import Scores
from flowsteer.rl.algorithms import ALGORITHMS, AnyAlgorithm
from flowsteer.rl.check.checks import CHECKS, NotApplicable, Trial, equal_scores_teach_nothing, pulls_back
from flowsteer.rl.types import Algorithm
from flowsteer.rollout.types import flat_mean

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


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("check", [name for name in CHECKS if name != "distances"])
def test_it_passes_the_check(check: str, name: str) -> None:
    trial = Trial(overrides=VARIANTS[name])
    if (check, name) == ("start", "weighted_sft exponential"):  # plain fine-tuning without a KL measures no distance
        with pytest.raises(NotApplicable, match="it reports none of ratio, "):
            CHECKS[check](trial)
    else:
        CHECKS[check](trial)


@pytest.mark.parametrize(("name", "coefficient", "anchor"), ANCHORS)
def test_a_distance_pulls_back(name: str, coefficient: str, anchor: str) -> None:
    pulls_back(Trial(overrides=VARIANTS[name]), coefficient, anchor)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_weights_of_distances_are_found(name: str) -> None:
    """By what they do to `anchors`, whatever they are called."""
    known = {(coefficient, anchor) for own, coefficient, anchor in ANCHORS if own == name}
    assert set(Trial(overrides=VARIANTS[name]).coefficients()) == known


@pytest.mark.parametrize("name", VARIANTS)
def test_passes_of_other_policies_come_before_the_trained_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward they throw away what ZeRO-3 has learned of the order of the layers."""
    run, rollouts = Trial(overrides=VARIANTS[name]).moved()
    comparisons, _ = run.compare(rollouts, [Scores(total=flat_mean(r.images)) for r in rollouts])
    passes: list[str] = []
    velocity = run.policy.velocity

    def noted(*arguments: Any) -> Tensor:
        passes.append(run.policy.active)
        return velocity(*arguments)

    monkeypatch.setattr(run.policy, "velocity", noted)
    run.algorithm.loss(run.policy, next(iter(run.algorithm.batches(rollouts, comparisons, 0))))
    assert passes[-1] == "current"
    assert set(passes) == {"current"} | run.algorithm.compares_with | {n for n, w in run.algorithm.anchors.items() if w}


@pytest.mark.parametrize("name", VARIANTS)
def test_only_nft_stays_near_its_old_policy_by_its_loss(name: str) -> None:
    """The exception of its paper's making; all others are asked at a policy that has moved."""
    seen = equal_scores_teach_nothing(Trial(overrides=VARIANTS[name]))
    assert ("at the old policy" in seen) == (name == "diffusion_nft")
