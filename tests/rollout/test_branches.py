"""Pools of candidates that leave the same state: what they share, how they are finished, and what a rollout says of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from flowsteer.rollout.branches import Branch, Branching, sample_branches
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.step import LiftedStep
from flowsteer.rollout.sample import sample
from flowsteer.rollout.steps import kernels
from flowsteer.rollout.steps.noise import initial_noise, stream_noise
from flowsteer.rollout.steps.plan import all_steps, fixed_steps
from flowsteer.rollout.worker import RolloutWorker

STEPS, LEVEL = 5, 0.7
GROUPS = [0, 0, 1, 1, 0]  # the rows of a group need not stand together
INITIAL = torch.tensor([7, 7, 9, 9, 7])
SEEDS = torch.tensor([1, 2, 3, 4, 5])
# A pass over two rows and one over five take other kernels: rounding of float32 over five steps on latents of size 5.
ROWS = 2e-5


class Counting:
    """The pipeline, noting the rows of each network call."""

    def __init__(self, pipeline: FlowPipeline) -> None:
        self.pipeline, self.calls = pipeline, list[tuple[int, int]]()

    def begin(self, latents: Tensor, index: int, conditioning: Any) -> LiftedStep:
        self.calls.append((index, len(latents)))
        return self.pipeline.begin(latents, index, conditioning)

    def velocity(self, latents: Tensor, index: int, conditioning: Any) -> Tensor:
        return self.begin(latents, index, conditioning).velocity

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)


@pytest.fixture(scope="module")
def pipeline() -> FlowPipeline:
    return zoo.shared("sd3")


def rows_of(pipeline: FlowPipeline) -> Any:
    return pipeline.prepare(["a red circle", "a cat"], num_inference_steps=STEPS, guidance_scale=1.0).take(GROUPS)


def branches(pipeline: Any, indices: list[int], branching: Branching, **options: Any) -> list[Branch]:
    levels = tuple(LEVEL if index in indices else 0.0 for index in range(STEPS))
    settings = {"seeds": SEEDS, "initial_seeds": INITIAL, "noise_levels": levels} | options
    return list(sample_branches(pipeline, rows_of(pipeline), branching, **settings))


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_every_pool_leaves_the_anchor_and_ends_where_sampling_with_that_one_step_ends(
    pipeline: FlowPipeline, solver: str
) -> None:
    """G2RPO's singular stochastic sampling: a pool is a group with shared noise and a single stochastic step."""
    found = branches(pipeline, [0, 2], Branching(), solver=solver)
    assert [branch.trajectory.indices for branch in found] == [(0,), (2,)]
    assert [branch.sigma for branch in found] == [0.0, 0.0]
    for branch, index in zip(found, (0, 2)):
        levels = [LEVEL if i == index else 0.0 for i in range(STEPS)]
        final, trajectory = sample(
            pipeline, rows_of(pipeline), seeds=SEEDS, initial_seeds=INITIAL, noise_levels=levels, solver=solver
        )
        assert trajectory is not None
        torch.testing.assert_close(branch.latents, final, rtol=0, atol=ROWS)
        torch.testing.assert_close(branch.trajectory.next_latents, trajectory.next_latents, rtol=0, atol=ROWS)
        # mean log densities of size 1, of latents that differ by ROWS / q
        torch.testing.assert_close(branch.trajectory.log_prob, trajectory.log_prob, rtol=0, atol=1e-4)


def test_one_pass_over_the_groups_serves_all_candidates(pipeline: FlowPipeline) -> None:
    counting = Counting(pipeline)
    branches(counting, [1, 3], Branching())
    trunk = [(index, 2) for index in range(STEPS)]
    finish = [(2, 5), (3, 5), (4, 5), (4, 5)]
    assert sorted(counting.calls) == sorted(trunk + finish)


def test_granularities_share_their_transition_and_skip_steps(pipeline: FlowPipeline) -> None:
    counting = Counting(pipeline)
    fine, coarse = branches(counting, [0], Branching(granularities=(1, 2)))
    assert fine.trajectory is coarse.trajectory
    finish = [call for call in counting.calls if call[1] == 5]
    assert finish == [(1, 5), (2, 5), (3, 5), (4, 5), (1, 5), (2, 5), (4, 5)]
    # the coarse end by hand: Euler from level 1 to 2 to 4 to the end
    rows = rows_of(pipeline)
    sigma, latents = rows.schedule.sigma, fine.trajectory.next_latents[:, 0]
    with torch.no_grad():
        for index, following in ((1, 2), (2, 4), (4, 5)):
            latents = latents + (sigma[following] - sigma[index]) * pipeline.velocity(latents, index, rows)
    torch.testing.assert_close(coarse.latents, latents, rtol=0, atol=ROWS)
    assert (coarse.latents - fine.latents).abs().max() > 1e-2


def test_a_resampled_trunk_goes_on_from_a_candidate_of_each_group(pipeline: FlowPipeline) -> None:
    first, second, third = branches(pipeline, [0, 1, 2], Branching(trunk="resampled"))
    for before, after in ((first, second), (second, third)):
        candidates, states = before.trajectory.next_latents[:, 0], after.trajectory.latents[:, 0]
        for group in (0, 1):
            own = [row for row, of in enumerate(GROUPS) if of == group]
            assert sum(torch.equal(states[group], candidates[row]) for row in own) == 1


def test_the_resampler_is_uniform_and_a_function_of_the_groups_seed(pipeline: FlowPipeline) -> None:
    """300 groups of 3: each place is drawn 100 times, with a deviation of sqrt(300 * 1/3 * 2/3) = 8; five of them."""
    from flowsteer.rollout.branches import _choices

    groups = torch.arange(300)
    state = torch.arange(300).repeat_interleave(3)
    chosen = _choices(groups, state, index=1)
    assert torch.equal(chosen // 3, groups)
    counts = torch.bincount(chosen % 3, minlength=3)
    assert (counts - 100).abs().max() < 40
    assert torch.equal(chosen, _choices(groups, state, index=1))
    assert not torch.equal(chosen, _choices(groups, state, index=2))


def test_candidates_can_be_judged_by_their_prediction_of_the_clean_image(pipeline: FlowPipeline) -> None:
    found = branches(pipeline, [1, 4], Branching(finish="denoised"), noise_levels=(0, LEVEL, 0, 0, LEVEL))
    rows = rows_of(pipeline)
    sigma = rows.schedule.sigma
    early, last = found
    assert early.sigma == pytest.approx(float(sigma[2]))
    candidates = early.trajectory.next_latents[:, 0]
    with torch.no_grad():
        predicted = kernels.denoised(pipeline.velocity(candidates, 2, rows), candidates, rows.schedule, 2)
    torch.testing.assert_close(early.latents, predicted, rtol=0, atol=ROWS)
    assert last.sigma == 0.0  # behind the last step there is nothing to predict
    assert torch.equal(last.latents, last.trajectory.next_latents[:, 0])


def test_steps_before_the_first_pool_are_drawn_once(pipeline: FlowPipeline) -> None:
    counting = Counting(pipeline)
    (only,) = branches(counting, [0, 1], Branching(first=1))
    assert only.trajectory.indices == (1,)
    rows = rows_of(pipeline).take([0, 2])
    groups = torch.tensor([7, 9])
    latents = initial_noise(groups, rows.latent_shape)
    with torch.no_grad():
        step = kernels.flow_sde(pipeline.velocity(latents, 0, rows), latents, rows.schedule, 0, LEVEL)
    state = step.mean + step.std * stream_noise(groups, 0, rows.latent_shape)
    torch.testing.assert_close(only.trajectory.latents[:, 0], state, rtol=0, atol=ROWS)


@pytest.mark.parametrize("granularities", [(), (0,), (1, 1)])
def test_granularities_that_are_none(granularities: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="granularities are different numbers of 1 or more"):
        Branching(granularities=granularities)


def test_predictions_have_no_granularity() -> None:
    with pytest.raises(ValueError, match="leave granularities out"):
        Branching(finish="denoised", granularities=(1, 2))


# --- the worker -----------------------------------------------------------------------------------------------------------


def worker(pipeline: FlowPipeline, **changes: Any) -> RolloutWorker:
    settings: dict[str, Any] = {
        "plan": fixed_steps(STEPS, LEVEL, [1, 2]),
        "kernel": "flow_sde",
        "log_prob_weight": "gaussian",
        "solver": "euler",
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        "prompts_per_step": 2,
        "group_size": 4,
        "batch_size": 4,
        "shared_noise": False,
        "updates_per_rollout": 1,
        "seed": 5,
        "num_processes": 1,
        "process_index": 0,
        "dtype": torch.float32,
        "device": "cpu",
        "branching": Branching(granularities=(1, 3)),
    }
    return RolloutWorker(pipeline, Prompts(texts=("a cat", "the sea")), **(settings | changes))


def test_a_batch_gives_a_rollout_for_every_pool_and_way_with_groups_of_their_own(pipeline: FlowPipeline) -> None:
    rollouts = worker(pipeline).sample(0)
    assert len(rollouts) == 2 * 2 * 2  # batches, steps, granularities
    groups = [rollout.group.tolist() for rollout in rollouts]
    assert groups == [[place] * 4 for place in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert sorted(torch.cat([rollout.sample for rollout in rollouts]).tolist()) == list(range(8 * 4))
    assert {rollout.columns["sigma"] for rollout in rollouts} == {(0.0,) * 4}
    assert [rollout.trajectory.indices for rollout in rollouts if rollout.trajectory] == [(1,), (1,), (2,), (2,)] * 2


def test_rewards_are_told_the_noise_level_of_a_prediction(pipeline: FlowPipeline) -> None:
    branching = Branching(finish="denoised", trunk="resampled")
    first, second, *_ = worker(pipeline, branching=branching).sample(0)
    sigma = first.conditioning.schedule.sigma
    assert first.columns["sigma"] == (sigma[2].item(),) * 4
    assert second.columns["sigma"] == (sigma[3].item(),) * 4


def test_a_compressed_tail_skips_network_calls_and_keeps_the_transitions(pipeline: FlowPipeline) -> None:
    counting = Counting(pipeline)
    options = {"branching": None, "plan": fixed_steps(STEPS, LEVEL, [0]), "solver": "dpmpp_2m", "batch_size": 8}
    (whole,) = worker(counting, **options).sample(0)  # type: ignore[arg-type]
    assert [index for index, _ in counting.calls] == [0, 1, 2, 3, 4]
    counting.calls.clear()
    (short,) = worker(counting, tail_fraction=0.5, **options).sample(0)  # type: ignore[arg-type]
    assert [index for index, _ in counting.calls] == [0, 1, 3]
    assert whole.trajectory
    assert short.trajectory
    assert torch.equal(whole.trajectory.next_latents, short.trajectory.next_latents)
    assert torch.equal(whole.trajectory.log_prob, short.trajectory.log_prob)
    assert 1e-3 < (whole.latents - short.latents).abs().max() < 5


def test_training_can_be_conditioned_without_the_guidance_of_sampling(pipeline: FlowPipeline) -> None:
    options = {"branching": None, "plan": all_steps(STEPS, LEVEL), "batch_size": 8, "guidance_scale": 4.0}
    (guided,) = worker(pipeline, **options).sample(0)
    (plain,) = worker(pipeline, train_guidance_scale=1.0, **options).sample(0)
    assert torch.equal(guided.latents, plain.latents)  # drawn with guidance, both
    alone = worker(pipeline, branching=None, batch_size=8).sample(0)[0].conditioning
    with torch.no_grad():
        velocities = [
            pipeline.velocity(guided.latents, 1, conditioning)
            for conditioning in (guided.conditioning, plain.conditioning, alone)
        ]
    assert (velocities[0] - velocities[1]).abs().max() > 1e-3
    assert torch.equal(velocities[1], velocities[2])
