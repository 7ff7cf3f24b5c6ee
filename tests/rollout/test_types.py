"""What passes between the stages: records like those in the docstrings can be made, and the types are those that are used."""

import dataclasses
import inspect
import typing

import pytest
import torch
from toy import ToyRows

from flowsteer.rewards import types as rewards
from flowsteer.rl import types as rl
from flowsteer.rl.algorithms import ALGORITHMS
from flowsteer.rl.algorithms.forward import ForwardBatch
from flowsteer.rl.algorithms.transitions import TransitionBatch
from flowsteer.rl.policy import Policy
from flowsteer.rollout import types as rollout
from flowsteer.rollout.lifting.conditioning import Conditioning, Rows
from flowsteer.rollout.types import ConditioningRows, Rollout, Schedule, SharedStates, Trajectory

SCHEDULE = Schedule(
    sigma=torch.tensor([1, 0.5, 0]), alpha=torch.tensor([0, 0.5, 1]), timesteps=torch.tensor([1000.0, 500.0])
)
PUBLIC = [
    cls
    for module in (rollout, rewards, rl)
    for cls in vars(module).values()
    if dataclasses.is_dataclass(cls) and isinstance(cls, type) and cls.__module__ == module.__name__
]


def prepared(size: int) -> Conditioning:
    return Conditioning(
        schedule=SCHEDULE,
        latent_shape=(16, 8, 8),
        latent_dtype=torch.float32,
        size=size,
        values={"embeds": torch.arange(float(size))},
        layout={"embeds": Rows(0, 1)},
        items=((0, 1000), (1, 500)),
    )


def test_what_crosses_a_door_shows_itself_with_numbers():
    assert len(PUBLIC) >= 8
    lacking = [cls.__name__ for cls in PUBLIC if "Example:" not in inspect.cleandoc(cls.__doc__ or "")]
    assert lacking == []


def test_shared_states_of_two_groups_of_three():
    shared = SharedStates(conditioning=prepared(2), state=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert torch.equal(shared.state.bincount(), torch.tensor([3, 3]))
    rows = shared.conditioning.take(shared.state)
    assert isinstance(rows, Conditioning)
    assert rows.values["embeds"].tolist() == [0, 0, 0, 1, 1, 1]


def trajectory(states: int, samples: int, steps: int) -> Trajectory:
    return Trajectory(
        indices=(1, 2)[:steps],
        noise_levels=(0.7, 0.7)[:steps],
        latents=torch.zeros(states, steps, 4, 8, 8),
        next_latents=torch.zeros(samples, steps, 4, 8, 8),
        log_prob=torch.zeros(samples, steps),
        shared=None
        if states == samples
        else SharedStates(conditioning=prepared(states), state=torch.arange(samples) % states),
    )


def test_trajectory_of_six_samples():
    assert trajectory(6, 6, 2).log_prob.shape == (6, 2)
    assert trajectory(2, 6, 1).latents.shape == (2, 1, 4, 8, 8)
    with pytest.raises(ValueError, match="a trajectory of 2 transitions needs latents"):
        dataclasses.replace(trajectory(6, 6, 2), latents=torch.zeros(2, 2, 4, 8, 8))  # states that nobody shares


def test_rollout_of_two_samples_each_of_two_prompts():
    drawn = Rollout(
        prompts=("a cat", "a cat", "two dogs", "two dogs"),
        columns={"count": (1, 1, 2, 2)},
        group=torch.tensor([0, 0, 1, 1]),
        sample=torch.tensor([0, 1, 2, 3]),
        seeds=torch.tensor([11, 12, 13, 14]),
        conditioning=prepared(4),
        latents=torch.zeros(4, 16, 8, 8),
        images=torch.zeros(4, 3, 64, 64),
        trajectory=None,
        policy_version=0,
    )
    assert len(drawn) == 4


def test_scores_of_which_one_is_missing():
    nan = float("nan")
    scores = rewards.Scores(
        total=torch.tensor([0.8, nan, 0.3]),
        parts={"ocr": torch.tensor([0.8, nan, 0.3])},
        failures={1: "reward 'ocr' gave no score (None)"},
    )
    assert scores.missing.tolist() == [False, True, False]


@pytest.mark.parametrize("rows", [prepared(3), ToyRows(SCHEDULE, torch.arange(3.0), (16, 8, 8))])
def test_rows_of_a_pipeline_and_of_an_adapter_are_taken_alike(rows: ConditioningRows):
    assert rows.schedule is SCHEDULE
    assert rows.latent_shape == (16, 8, 8)
    for index in ([2, 0, 2], torch.tensor([2, 0, 2])):
        taken = rows.take(index)
        assert type(taken) is type(rows)
        assert taken.schedule is SCHEDULE
        values = taken.values["embeds"] if isinstance(taken, Conditioning) else vars(taken)["values"]
        assert values.tolist() == [2, 0, 2]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda cls: cls.__name__)
def test_an_algorithm_says_what_it_trains_on(algorithm):
    """`batches` gives what `loss` takes, and neither is just anything."""
    batch = TransitionBatch if algorithm.learns_from == "transitions" else ForwardBatch
    assert rl.Algorithm[batch] in algorithm.__mro__
    assert typing.get_type_hints(algorithm.loss)["batch"] is batch
    assert typing.get_args(typing.get_type_hints(algorithm.batches)["return"]) == (batch,)


@pytest.mark.parametrize("holder", [Rollout, SharedStates, rl.PolicyView.velocity, Policy.velocity])
def test_what_is_stored_and_trained_on_is_asked_for_rows_only(holder):
    assert typing.get_type_hints(holder)["conditioning"] is ConditioningRows
