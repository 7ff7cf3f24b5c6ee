"""An evaluation is fixed prompts and seeds: batches and processes do not matter, plain diffusers draws the same pictures."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor

from flowsteer.rewards.combine import RewardSet
from flowsteer.rl.evaluate import Evaluation, evaluate, image_grid, mean_and_interval, save_grid
from flowsteer.rollout.data.prompts import Prompts

TEXTS = tuple(f"{number} {thing}" for number in ("one", "two", "three") for thing in ("cats", "boats"))
PROMPTS = Prompts(texts=TEXTS, columns={"place": tuple(range(6))})
SETTINGS = {"num_inference_steps": 3, "guidance_scale": 1.0, "dtype": torch.float32, "device": "cpu"}


def bright(images, prompts, **columns):
    """The mean grey level, with red as a part; it sees the prompt file's other column."""
    assert [TEXTS[place] for place in columns["place"]] == list(prompts)
    return {"score": [image.mean() / 255 for image in images], "red": [image[..., 0].mean() / 255 for image in images]}


REWARDS = RewardSet([("bright", bright, 2.0)])


def run(pipeline=None, rewards=REWARDS, **changes) -> Evaluation:
    settings = {"num_prompts": 6, "num_seeds": 3, "batch_size": 18, **SETTINGS, **changes}
    return evaluate(pipeline or zoo.shared("sd3"), PROMPTS, rewards, **settings)


@pytest.fixture(scope="module")
def at_once() -> Evaluation:
    """All 18 pictures in one batch."""
    return run()


# --- the numbers


def test_mean_and_interval_by_hand():
    """Prompts' means 1, 2 and 6: their mean is 3, their sample deviation sqrt((4 + 1 + 9) / 2) = sqrt(7)."""
    values = torch.tensor([[0.0, 2.0], [2.0, 2.0], [5.0, 7.0]])
    mean, half = mean_and_interval(values)
    assert mean == 3.0
    assert half == pytest.approx(1.96 * math.sqrt(7 / 3))


class Above:
    """Groupwise: how much brighter an image is than the mean of its group."""

    groupwise = True

    def __call__(self, images, prompts, **columns):
        assert len(set(prompts)) == 1
        assert len(images) == 3, "all seeds of a prompt"
        levels = images.reshape(len(images), -1).mean(1)
        return (levels - levels.mean()).tolist()


def test_scores_that_are_missing_are_told_and_waited_for_once(caplog):
    """Six batches of a reward that answers none of them take one limit, not six."""
    release = threading.Event()

    def stuck(images, prompts, **columns):
        release.wait(30)
        return [0.0] * len(images)

    began = time.monotonic()
    table = run(rewards=RewardSet([("stuck", stuck, 1.0)]), batch_size=3, timeout_s=0.5)
    release.set()
    assert table.parts["total"].isnan().all()
    assert "18 of 18 pictures have no score" in caplog.text
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("batch_size", [2, 7, 18])
def test_a_reward_that_compares_sees_all_seeds_of_a_prompt(at_once, batch_size):
    table = run(rewards=RewardSet([("above", Above(), 1.0)]), batch_size=batch_size).parts["above"]
    levels = 255 * at_once.parts["bright"]
    torch.testing.assert_close(table, levels - levels.mean(1, keepdim=True), rtol=0, atol=1e-2)
    assert table.abs().max() > 1


def test_missing_scores_are_left_out():
    """A prompt counts by the seeds that it has; one without any does not count."""
    nan = math.nan
    mean, half = mean_and_interval(torch.tensor([[nan, 2.0], [4.0, 4.0], [nan, nan]]))
    assert mean == 3.0
    assert half == pytest.approx(1.96 * math.sqrt(2) / math.sqrt(2))
    mean, half = mean_and_interval(torch.tensor([[1.0, 2.0]]))
    assert mean == 1.5
    assert math.isnan(half), "one prompt has no deviation"
    assert all(math.isnan(number) for number in mean_and_interval(torch.full((2, 2), nan)))


def test_the_table(at_once):
    assert at_once.prompts == TEXTS
    assert {name: values.shape for name, values in at_once.parts.items()} == dict.fromkeys(
        ["bright", "bright/red", "total"], (6, 3)
    )
    assert torch.equal(at_once.parts["total"], 2 * at_once.parts["bright"])
    assert at_once.images.shape == (6, 3, 16, 16)
    pixels = (at_once.images * 255).round().byte().float() / 255
    assert torch.allclose(pixels.mean((1, 2, 3)), at_once.parts["bright"][:, 0], atol=1e-6), (
        "pictures of the first seed"
    )
    own = at_once.summary()["bright"]
    mean, half = mean_and_interval(at_once.parts["bright"])
    assert (own.mean, own.low, own.high) == (mean, mean - half, mean + half)
    assert 0 < half < mean


def test_fewer_prompts_are_spread_over_the_file():
    result = run(num_prompts=3, num_seeds=1)
    assert result.prompts == (TEXTS[0], TEXTS[2], TEXTS[4])
    assert run(num_prompts=100, num_seeds=1).prompts == TEXTS


# --- the same pictures


def same(one: Evaluation, other: Evaluation) -> None:
    """Kernels for other batch sizes round differently, by 1e-6 of a picture; a grey level may then fall to either side."""
    assert one.prompts == other.prompts
    assert one.parts.keys() == other.parts.keys()
    assert torch.allclose(one.images, other.images, atol=1e-5)
    for name, values in one.parts.items():
        assert torch.allclose(values, other.parts[name], atol=1e-4)
        assert values.std() > 1e-3, "seeds and prompts differ by more than that, or this would compare nothing"


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_batches_do_not_matter(at_once, batch_size):
    done = []
    same(run(batch_size=batch_size, progress=done.append), at_once)
    whole = max(batch_size // 3, 1) * 3  # prompts with all their seeds, as many as fit
    assert done == list(range(whole, 19, whole))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_do_not_matter(at_once, processes):
    """18 jobs on 4 processes: two of them draw one again, so that all gather as much. Threads play the processes."""
    barrier = threading.Barrier(processes, timeout=60)
    pipelines = [zoo.lifted("sd3") for _ in range(processes)]
    tables: list[Tensor | None] = [None] * processes
    results: list[Evaluation | None] = [None] * processes

    def process(index: int) -> None:
        def gather(values: Tensor) -> Tensor:
            tables[index] = values
            barrier.wait()
            whole = [table for table in tables if table is not None]
            assert all(table.shape == values.shape for table in whole), "what torch.distributed would ask for"
            gathered = torch.cat(whole)
            barrier.wait()
            return gathered

        try:
            results[index] = run(
                pipelines[index], process_index=index, num_processes=processes, gather=gather, batch_size=4
            )
        finally:
            if results[index] is None:
                barrier.abort()  # the others shall not wait

    threads = [threading.Thread(target=process, args=(index,)) for index in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert result is not None
        same(result, at_once)


def test_plain_diffusers_draws_the_same(at_once):
    """Seed s of prompt p is num_seeds * p + s."""
    pipeline = zoo.shared("sd3")
    for place in (0, 4):
        arguments = pipeline.call_arguments([TEXTS[place]], num_inference_steps=3, guidance_scale=1.0)
        arguments["generator"] = torch.Generator().manual_seed(3 * place)
        picture = pipeline.pipe(**arguments)[0]
        assert torch.allclose(picture[0], at_once.images[place], atol=1e-5)
        assert not torch.allclose(picture[0], at_once.images[1], atol=1e-2)


def test_a_row_with_a_seed_is_drawn_with_it_and_the_next_ones():
    pipeline = zoo.shared("sd3")
    prompts = Prompts(texts=TEXTS, columns=PROMPTS.columns, inputs={"seed": (None, 40, 40, None, None, None)})
    result = evaluate(pipeline, prompts, REWARDS, num_prompts=6, num_seeds=2, batch_size=12, **SETTINGS)
    for place, seed in enumerate([0, 40, 40, 6, 8, 10]):
        arguments = pipeline.call_arguments([TEXTS[place]], num_inference_steps=3, guidance_scale=1.0)
        for own in (0, 1):
            picture = pipeline.pipe(**arguments | {"generator": torch.Generator().manual_seed(seed + own)})[0]
            assert result.parts["bright"][place, own].item() == pytest.approx(picture[0].mean().item(), abs=3e-3)
            if own == 0:
                assert torch.allclose(picture[0], result.images[place], atol=1e-5)


# --- rewards that fail


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_reward_that_fails_on_whole_batches(at_once, batch_size):
    """Its parts are not even named there; the other pictures are scored all the same."""

    def afraid_of_boats(images, prompts, **columns):
        if any("boats" in prompt for prompt in prompts):
            raise ConnectionError("no connection")
        return bright(images, prompts, **columns)

    result = run(rewards=RewardSet([("bright", afraid_of_boats, 2.0)]), batch_size=batch_size, num_seeds=1)
    missing = result.parts["bright"].isnan()[:, 0]
    expected = [True] * 6 if batch_size == 4 else ["boats" in text for text in TEXTS]
    assert missing.tolist() == expected
    if batch_size == 1:
        assert result.parts["bright/red"].isnan()[:, 0].tolist() == expected
        assert result.summary()["total"][0] == pytest.approx(2 * float(result.parts["bright"][~missing].mean()))


# --- sheets of pictures


def plain(*greys: float) -> Tensor:
    """[P, 3, 2, 4], each picture in one grey."""
    return torch.tensor(greys).view(-1, 1, 1, 1).expand(-1, 3, 2, 4)


def test_image_grid_lays_out_by_lines():
    """Three pictures in lines of two: a white frame of 2 to the right and below, white where there is none."""
    sheet = np.asarray(image_grid([plain(0.0, 0.2, 0.4)], columns=2))
    assert sheet.shape == (2 * (2 + 2), 2 * (4 + 2), 3)
    expected = np.full((8, 12), 255)
    expected[0:2, 0:4], expected[0:2, 6:10], expected[4:6, 0:4] = 0, 51, 102
    assert np.array_equal(sheet[..., 0], expected)
    assert np.array_equal(sheet[..., 0], sheet[..., 2])


def test_image_grid_puts_before_above_after():
    sheet = np.asarray(image_grid([plain(0.0, 0.2, 0.4), plain(0.6, 0.8, 0.9)], columns=2))[..., 0]
    assert sheet.shape == (4 * 4, 12)
    assert [int(sheet[top, left]) for top in (0, 4, 8, 12) for left in (0, 6)] == [0, 51, 153, 204, 102, 255, 230, 255]


def test_image_grid_enlarges_and_clips():
    sheet = np.asarray(image_grid([plain(-0.5, 1.5)], scale=3))
    assert sheet.shape == (4 * 3, 2 * 6 * 3, 3), "no more columns than pictures"
    assert sheet[0, 0, 0] == 0
    assert sheet[5, 11, 0] == 0, "the last pixel of the first picture"
    assert sheet[0, 18, 0] == 255


def test_save_grid_takes_the_first_frame_of_a_video(tmp_path):
    from PIL import Image

    video = torch.stack([plain(0.0, 0.2), plain(0.4, 0.6)], dim=1)  # [P, T, 3, H, W]
    save_grid(video, tmp_path / "sheet.png")
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "sheet.png")), np.asarray(image_grid([plain(0.0, 0.2)], scale=32))
    )


def test_prompts_that_cannot_share_a_batch_are_drawn_one_by_one():
    """Qwen-Image does not pad: prompts of different length have batches of their own, and the same pictures."""
    pipeline, settings = zoo.shared("qwen"), {**SETTINGS, "num_inference_steps": 2}
    prompts, rewards = (
        Prompts(texts=("a cat", "two blue boats")),
        RewardSet([("mean", lambda i, p: [0.0] * len(p), 1.0)]),
    )
    several, alone = (
        evaluate(pipeline, prompts, rewards, num_prompts=2, num_seeds=2, batch_size=size, **settings) for size in (4, 1)
    )
    torch.testing.assert_close(several.images, alone.images, rtol=0, atol=1e-4)  # kernels differ with the batch size
    assert (several.images[0] - several.images[1]).abs().max() > 1e-2
