"""Sampling: what a sample depends on, what its trajectory says, and that plain diffusers draws the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from flowsteer.rollout.branches import Branching
from flowsteer.rollout.data.batches import sample_seeds
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.pipeline import Conditioning, FlowPipeline
from flowsteer.rollout.lifting.step import LiftedStep
from flowsteer.rollout.sample import sample
from flowsteer.rollout.steps import kernels
from flowsteer.rollout.steps.noise import initial_noise, mix, stream_noise
from flowsteer.rollout.steps.plan import all_steps, compressed_path, fixed_steps, no_steps, window
from flowsteer.rollout.steps.solvers import SOLVERS, History, remember
from flowsteer.rollout.types import Schedule, Trajectory
from flowsteer.rollout.worker import RolloutWorker

STEPS, GUIDED = 4, 4.0
LEVELS = (0.0, 0.7, 0.7, 0.0)
# Matrix products round in another order at another number of rows: 6e-8 per operation, some hundred operations per step,
# four steps with guidance 4, on latents of size 5; 2e-6 was measured.
ROWS = 2e-5


@pytest.fixture(scope="module")
def pipeline() -> FlowPipeline:
    return zoo.shared("sd3")


def conditioning(pipeline: FlowPipeline, prompts: list[str], scale: float = GUIDED) -> Conditioning:
    return pipeline.prepare(prompts, num_inference_steps=STEPS, guidance_scale=scale)


def trajectory_of(drawn: tuple[Tensor, Trajectory | None]) -> Trajectory:
    assert drawn[1] is not None
    return drawn[1]


# --- what a sample depends on -------------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_its_batch(pipeline: FlowPipeline) -> None:
    texts = ["a red circle", "a cat", "the sea at night", "a green hill"]
    rows, seeds = conditioning(pipeline, texts), torch.tensor([11, 22, 33, 44])
    whole, trajectory = sample(pipeline, rows, seeds=seeds, noise_levels=LEVELS)
    again, _ = sample(pipeline, rows, seeds=seeds, noise_levels=LEVELS)
    assert torch.equal(whole, again)
    assert trajectory is not None
    for chosen in ([2], [3, 0], [1, 3, 2]):  # alone, elsewhere, with others
        part, own = sample(pipeline, rows.take(chosen), seeds=seeds[chosen], noise_levels=LEVELS)
        assert own is not None
        torch.testing.assert_close(part, whole[chosen], rtol=0, atol=ROWS)
        torch.testing.assert_close(own.log_prob, trajectory.log_prob[chosen], rtol=0, atol=ROWS)
    other_seed, _ = sample(pipeline, rows, seeds=torch.tensor([11, 22, 34, 44]), noise_levels=LEVELS)
    assert torch.equal(other_seed[[0, 1, 3]], whole[[0, 1, 3]])  # the same shapes: the same bits
    assert (other_seed[2] - whole[2]).abs().max() > 0.1


@pytest.mark.parametrize("scale", [1.0, GUIDED])
def test_deterministic_sampling_is_diffusers_bit_for_bit(pipeline: FlowPipeline, scale: float) -> None:
    prompt, seeds = "a red circle", [5, 6, 7]
    rows = conditioning(pipeline, [prompt], scale).take([0, 0, 0])
    latents, trajectory = sample(pipeline, rows, seeds=torch.tensor(seeds), noise_levels=[0.0] * STEPS)
    assert trajectory is None
    pipe = zoo.build("sd3")
    embeds = pipe.encode_prompt(prompt, None, None, max_sequence_length=32)  # one prompt at a time, as `prepare` does
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    images = pipe(
        **{name: value.repeat(3, *[1] * (value.dim() - 1)) for name, value in zip(names, embeds)},
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=STEPS,
        guidance_scale=scale,
        output_type="pt",
        **zoo.ZOO["sd3"].size,
    ).images
    assert torch.equal(pipeline.decode(latents, rows), images)


# --- shared noise -------------------------------------------------------------------------------------------------------


class Counting:
    """A pipeline that notes how many rows each network pass has."""

    def __init__(self, pipeline: FlowPipeline) -> None:
        self._pipeline, self.rows = pipeline, []  # type: ignore[var-annotated]

    def begin(self, latents: Tensor, index: int, conditioning: Any) -> LiftedStep:
        self.rows.append(len(latents))
        return self._pipeline.begin(latents, index, conditioning)


GROUPS = [0, 0, 1, 1, 0]  # prompt of each row; the rows of a group need not stand together
INITIAL = torch.tensor([7, 7, 9, 9, 7])
SEEDS = torch.tensor([1, 2, 3, 4, 5])


def unshared(pipeline: FlowPipeline, rows: Conditioning, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Final latents, and those after the deterministic beginning, with every row computed by itself."""
    latents = initial_noise(INITIAL, rows.latent_shape)
    parted = latents
    with torch.no_grad():
        for index, level in enumerate(levels):
            velocity = pipeline.velocity(latents, index, rows)
            if level:
                gaussian = kernels.flow_sde(velocity, latents, rows.schedule, index, level)
                latents = gaussian.mean + gaussian.std * stream_noise(SEEDS, index, rows.latent_shape)
            else:
                latents = latents + (rows.schedule.sigma[index + 1] - rows.schedule.sigma[index]) * velocity
            if not any(levels[: index + 1]):
                parted = latents
    return latents, parted


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_shared_beginning_is_computed_once_and_is_what_every_row_would_give(
    pipeline: FlowPipeline, start: int
) -> None:
    levels = tuple(0.7 if start <= index < 3 else 0.0 for index in range(STEPS))
    rows = conditioning(pipeline, ["a red circle", "a cat"]).take(GROUPS)
    counting = Counting(pipeline)
    drawn = sample(counting, rows, seeds=SEEDS, initial_seeds=INITIAL, noise_levels=levels)  # type: ignore[arg-type]
    assert counting.rows == [2] * start + [5] * (STEPS - start)

    first = trajectory_of(drawn).latents[:, 0]
    for group in ([0, 1, 4], [2, 3]):
        assert all(torch.equal(first[group[0]], first[row]) for row in group)  # not yet parted
        finals = drawn[0][group]
        assert all((finals[i] - finals[j]).abs().max() > 0.1 for i in range(len(group)) for j in range(i))
    assert (first[0] - first[2]).abs().max() > 0.1  # another prompt, another beginning

    final, parted = unshared(pipeline, rows, levels)
    torch.testing.assert_close(first, parted, rtol=0, atol=ROWS)
    torch.testing.assert_close(drawn[0], final, rtol=0, atol=ROWS)


def test_without_a_stochastic_step_a_group_with_shared_noise_is_one_sample(pipeline: FlowPipeline) -> None:
    rows = conditioning(pipeline, ["a red circle", "a cat"]).take(GROUPS)
    counting = Counting(pipeline)
    latents, _ = sample(counting, rows, seeds=SEEDS, initial_seeds=INITIAL, noise_levels=[0.0] * STEPS)  # type: ignore[arg-type]
    assert counting.rows == [2] * STEPS
    assert torch.equal(latents[[0, 2]][[0, 0, 1, 1, 0]], latents)


# --- trajectories -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trajectory_is_the_path_that_was_walked(pipeline: FlowPipeline, dtype: torch.dtype) -> None:
    rows = conditioning(pipeline, ["a red circle", "a cat"])
    seeds, levels = torch.tensor([1, 2]), (0.7, 0.5, 0.6, 0.0)
    latents, trajectory = sample(pipeline, rows, seeds=seeds, noise_levels=levels, dtype=dtype)
    assert trajectory is not None
    assert (trajectory.indices, trajectory.noise_levels) == ((0, 1, 2), (0.7, 0.5, 0.6))
    assert latents.dtype == trajectory.latents.dtype == trajectory.next_latents.dtype == dtype
    assert trajectory.log_prob.dtype == torch.float32
    assert torch.equal(trajectory.latents[:, 0], initial_noise(seeds, rows.latent_shape).to(dtype))
    assert torch.equal(
        trajectory.latents[:, 1:], trajectory.next_latents[:, :-1]
    )  # one step's end is the next one's start
    # the log density is torch.distributions', of the latents as they are stored
    with torch.no_grad():
        velocity = pipeline.velocity(trajectory.latents[:, 1], 1, rows)
    gaussian = kernels.flow_sde(velocity, trajectory.latents[:, 1], rows.schedule, 1, 0.5)
    law = torch.distributions.Normal(gaussian.mean.double(), gaussian.std)
    expected = law.log_prob(trajectory.next_latents[:, 1].double()).flatten(1).mean(1)
    torch.testing.assert_close(trajectory.log_prob[:, 1].double(), expected, rtol=1e-6, atol=1e-6)  # float32 against 64


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_only_stochastic_steps_are_stored(pipeline: FlowPipeline, solver: str) -> None:
    rows, seeds = conditioning(pipeline, ["a red circle"]), torch.tensor([1])
    levels = (0.0, 0.7, 0.0, 0.0)
    latents, trajectory = sample(pipeline, rows, seeds=seeds, noise_levels=levels, solver=solver)
    assert trajectory is not None
    assert trajectory.indices == (1,)
    # going on from the stored transition with what is left of the schedule leads to the same end
    current = trajectory.next_latents[:, 0]
    with torch.no_grad():
        left = trajectory.latents[:, 0]
        history: History | None = remember(pipeline.velocity(left, 1, rows), left, rows.schedule, 1)
        for index in (2, 3):
            velocity = pipeline.velocity(current, index, rows)
            current, history = SOLVERS[solver](velocity, current, rows.schedule, index, history)
    assert torch.equal(current, latents)


@pytest.mark.parametrize("start", range(5))
@pytest.mark.parametrize("fraction", [0.2, 0.4, 1.0])
def test_mixgrpo_flash_at_every_place_of_the_window(pipeline: FlowPipeline, start: int, fraction: float) -> None:
    """By hand, with the levels that are visited written out: to sigma 0, with the window's predictions as history."""
    steps, size = 7, 2
    rows = pipeline.prepare(["a red circle", "a cat"], num_inference_steps=steps, guidance_scale=1.0)
    levels = tuple(0.7 if start <= index < start + size else 0.0 for index in range(steps))
    last, seeds = start + size - 1, torch.tensor([1, 2])
    path = compressed_path(steps, last, fraction)
    drawn = sample(pipeline, rows, seeds=seeds, noise_levels=levels, path=path, solver="dpmpp_2m")

    sigma = [float(rows.schedule.sigma[index]) for index in path] + [0.0]
    walk = Schedule(sigma=torch.tensor(sigma), alpha=1 - torch.tensor(sigma), timesteps=torch.zeros(len(path)))
    x, history = initial_noise(seeds, rows.latent_shape), None
    with torch.no_grad():
        for place, index in enumerate(path):
            velocity = pipeline.velocity(x, index, rows)
            following, after = SOLVERS["dpmpp_2m"](velocity, x, walk, place, history)
            if levels[index]:
                step = kernels.flow_sde(velocity, x, rows.schedule, index, levels[index])
                following = step.mean + step.std * stream_noise(seeds, index, rows.latent_shape)
            x, history = following, after
    assert sigma[-1] == 0
    assert len(path) == steps or fraction < 1
    torch.testing.assert_close(drawn[0], x, rtol=0, atol=ROWS)
    assert trajectory_of(drawn).indices == (start, start + 1)


# --- noise --------------------------------------------------------------------------------------------------------------


def test_initial_noise_is_the_noise_of_diffusers() -> None:
    expected = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(42))
    assert torch.equal(initial_noise(torch.tensor([41, 42]), (4, 8, 8))[1:], expected)


def test_streams_are_independent() -> None:
    """Of n = 4096 independent pairs the correlation has deviation 1 / sqrt(n) = 0.016; five of them are allowed."""
    seeds = torch.tensor([0, 1, 2])
    fields = [initial_noise(seeds, (4096,)), *(stream_noise(seeds, stream, (4096,)) for stream in (0, 1, 2))]
    flat = torch.cat(fields)  # three seeds of four streams: neighbours in both
    correlation = torch.corrcoef(flat)
    assert (correlation - torch.eye(len(flat))).abs().max() < 5 / 4096**0.5
    assert (flat.mean(1).abs() < 5 / 4096**0.5).all()
    assert ((flat.std(1) - 1).abs() < 5 / 8192**0.5).all()


def test_streams_that_once_shared_their_noise_do_not() -> None:
    """The CPU generator of torch uses 32 bits of its seed: in a run with seed 0, two streams of two samples were one noise."""
    (one,) = sample_seeds([26], seed=0, step=6).tolist()
    (other,) = sample_seeds([1143], seed=0, step=7).tolist()
    assert mix(one, 6) != mix(other, 4)
    assert mix(one, 6) % 2**32 == mix(other, 4) % 2**32
    noise, noise_of_other = (
        stream_noise(torch.tensor([one]), 6, (4096,)),
        stream_noise(torch.tensor([other]), 4, (4096,)),
    )
    assert abs(float(torch.corrcoef(torch.cat([noise, noise_of_other]))[0, 1])) < 5 / 4096**0.5


@pytest.mark.parametrize("bit", [0, 31, 32, 47, 62])
def test_every_bit_of_seed_and_stream_counts(bit: int) -> None:
    seeds = torch.tensor([5, 5 ^ (1 << bit)])
    fields = [stream_noise(seeds, 3, (4096,)), stream_noise(seeds[:1], 3 ^ (1 << bit), (4096,))]
    correlation = torch.corrcoef(torch.cat(fields))
    assert (correlation - torch.eye(3)).abs().max() < 5 / 4096**0.5


def test_a_sample_has_its_noise_in_every_batch_and_shape_of_batch() -> None:
    together = stream_noise(torch.tensor([3, 1, 2]), 4, (2, 5))
    assert together.dtype == torch.float32
    for row, seed in enumerate((3, 1, 2)):
        assert torch.equal(stream_noise(torch.tensor([seed]), 4, (2, 5))[0], together[row])


def test_mix_spreads_its_arguments() -> None:
    numbers = {mix(a, b) for a in range(100) for b in range(100)}
    assert len(numbers) == 10_000  # of 2**63: a single collision has probability 5e-12
    assert all(0 <= number < 2**63 for number in numbers)
    assert mix(1, 2) != mix(2, 1)
    assert mix(1) != mix(1, 0) != mix(0, 1)
    # flipping one bit of an argument flips half of the 63 bits: mean 31.5, deviation sqrt(63) / 2 = 4 per pair
    flips = [bin(mix(seed, 7) ^ mix(seed ^ (1 << bit), 7)).count("1") for seed in range(50) for bit in range(63)]
    assert abs(sum(flips) / len(flips) - 31.5) < 5 * 4 / len(flips) ** 0.5
    assert min(flips) > 8  # nearly six deviations


# --- the worker ---------------------------------------------------------------------------------------------------------

PROMPTS = Prompts(texts=("a red circle", "a cat", "the sea at night"), columns={"answer": ("x", "y", "z")})


def worker(pipeline: FlowPipeline, **changes: Any) -> RolloutWorker:
    settings: dict[str, Any] = {
        "plan": window(STEPS, 0.7, size=2, strategy="random", seed=3),
        "kernel": "flow_sde",
        "log_prob_weight": "gaussian",
        "solver": "euler",
        "num_inference_steps": STEPS,
        "guidance_scale": 1.0,
        "prompts_per_step": 2,
        "group_size": 4,
        "batch_size": 2,
        "shared_noise": False,
        "updates_per_rollout": 1,
        "seed": 5,
        "num_processes": 1,
        "process_index": 0,
        "dtype": torch.float32,
        "device": "cpu",
    }
    settings |= changes
    return RolloutWorker(pipeline, settings.pop("prompts", PROMPTS), **settings)


def test_rollouts_carry_what_belongs_to_their_rows(pipeline: FlowPipeline) -> None:
    done: list[Any] = []
    rollouts = worker(pipeline).sample(3, policy_version=9, done=done.append)
    assert done == rollouts  # each one was handed over, in order
    assert torch.cat([rollout.sample for rollout in rollouts]).tolist() == list(range(8))
    assert torch.cat([rollout.group for rollout in rollouts]).tolist() == [0] * 4 + [1] * 4
    assert torch.equal(torch.cat([rollout.seeds for rollout in rollouts]), sample_seeds(range(8), seed=5, step=3))
    for rollout in rollouts:
        assert rollout.policy_version == 9
        assert rollout.columns["answer"] == tuple(
            PROMPTS.columns["answer"][PROMPTS.texts.index(text)] for text in rollout.prompts
        )
        assert rollout.trajectory is not None
        assert rollout.trajectory.indices == window(STEPS, 0.7, size=2, strategy="random", seed=3).indices(3)
        assert rollout.images.shape == (2, 3, 16, 16)
        pixels = pipeline.decode(rollout.latents, rollout.conditioning)
        assert torch.equal(rollout.images, (pixels * 255).round().to(torch.uint8))
        assert rollout.images.untyped_storage().nbytes() == 2 * 3 * 16 * 16, "a byte for each value"


def test_two_processes_draw_what_one_draws(pipeline: FlowPipeline) -> None:
    whole = {int(r.sample[0]): r for r in worker(pipeline).sample(1)}
    for index in (0, 1):
        for rollout in worker(pipeline, num_processes=2, process_index=index).sample(1):
            same = whole.pop(int(rollout.sample[0]))
            assert rollout.prompts == same.prompts
            assert torch.equal(rollout.latents, same.latents)
    assert not whole


def test_a_group_shares_its_noise_across_batches_and_only_within_a_step(pipeline: FlowPipeline) -> None:
    drawer = worker(pipeline, shared_noise=True, plan=all_steps(STEPS, 0.7))
    starts = [r.trajectory.latents[:, 0] for r in drawer.sample(0) if r.trajectory]
    group, other = torch.cat(starts[:2]), torch.cat(starts[2:])
    assert all(torch.equal(group[0], row) for row in group)  # four samples in two batches
    assert not torch.equal(group[0], other[0])
    (later, *_) = [r.trajectory.latents[:, 0] for r in drawer.sample(1) if r.trajectory]
    assert not torch.equal(group[0], later[0])


# the third row has no seed of its own, and two rows have the same
SEEDED = Prompts(texts=PROMPTS.texts, columns=PROMPTS.columns, inputs={"seed": (7, 7.0, None)})


@pytest.mark.parametrize("shared_noise", [False, True])
def test_a_row_with_a_seed_always_starts_from_it(pipeline: FlowPipeline, shared_noise: bool) -> None:
    settings = {"plan": fixed_steps(STEPS, 0.7, [1, 2]), "prompts_per_step": 3, "shared_noise": shared_noise}
    settings["batch_size"] = 12  # two groups with the same seed meet in it
    drawer = worker(pipeline, prompts=SEEDED, **settings)
    unseeded = worker(pipeline, **settings)
    for step in (0, 1):
        for rollout, plain in zip(drawer.sample(step), unseeded.sample(step), strict=True):
            assert torch.equal(rollout.seeds, plain.seeds)  # of the noise of stochastic steps
            for place, sample_place in enumerate(rollout.sample.tolist()):
                if rollout.columns["answer"][place] == "z":
                    assert torch.equal(rollout.latents[place], plain.latents[place])
                    continue
                assert not torch.equal(rollout.latents[place], plain.latents[place])
                seed = 7 if shared_noise else 7 + sample_place % 4
                expected, _ = sample(
                    pipeline,
                    conditioning(pipeline, [rollout.prompts[place]], 1.0),
                    seeds=rollout.seeds[[place]],
                    initial_seeds=torch.tensor([seed]),
                    noise_levels=(0.0, 0.7, 0.7, 0.0),
                )
                torch.testing.assert_close(rollout.latents[[place]], expected, rtol=0, atol=ROWS)


def test_branches_of_rows_with_the_same_seed_stay_their_own(pipeline: FlowPipeline) -> None:
    def drawn(*seeds: float | None) -> dict[str, Tensor]:
        prompts = Prompts(texts=PROMPTS.texts, columns=PROMPTS.columns, inputs={"seed": seeds})
        plan = fixed_steps(STEPS, 0.7, [1, 2])
        drawer = worker(
            pipeline, prompts=prompts, plan=plan, prompts_per_step=3, batch_size=12, branching=Branching()
        )  # all groups in one batch
        return {text: row for rollout in drawer.sample(0)[:1] for text, row in zip(rollout.prompts, rollout.latents)}

    together, first, second = drawn(7, 7, None), drawn(7, 8, None), drawn(8, 7, None)
    for text, alone in zip(PROMPTS.texts, (first, second, first)):
        torch.testing.assert_close(together[text], alone[text], rtol=0, atol=ROWS)
    assert not torch.allclose(first[PROMPTS.texts[1]], second[PROMPTS.texts[1]], atol=1e-3)


def test_the_trunk_of_a_row_with_a_seed_is_new_in_every_step(pipeline: FlowPipeline) -> None:
    prompts = Prompts(texts=PROMPTS.texts, columns=PROMPTS.columns, inputs={"seed": (7, 8, 9)})
    plan = fixed_steps(STEPS, 0.7, [0, 1, 2])  # two stochastic steps of the trunk, then a pool
    settings = {"plan": plan, "prompts_per_step": 3, "batch_size": 12, "branching": Branching(first=2)}
    states = []
    for step in (0, 1):
        (rollout,) = worker(pipeline, prompts=prompts, **settings).sample(step)
        assert rollout.trajectory is not None
        states.append(rollout.trajectory.latents[:, 0])
    assert all(not torch.allclose(one, other, atol=1e-2) for one in states[0] for other in states[1])


def test_a_rollout_without_stochastic_steps_has_no_trajectory(pipeline: FlowPipeline) -> None:
    assert all(rollout.trajectory is None for rollout in worker(pipeline, plan=no_steps(STEPS)).sample(0))
