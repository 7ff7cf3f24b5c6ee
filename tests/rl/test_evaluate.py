"""An evaluation is fixed prompts and seeds: batches and processes do not matter, plain diffusers draws the same pictures."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor

from flowsteer.rewards.combine import RewardSet
from flowsteer.rl.evaluate import Evaluation, evaluate, image_grid, mean_and_interval, save_grid
from flowsteer.rl.thumbnails import thumbnails
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
    assert at_once.images.dtype == torch.uint8
    assert torch.allclose((at_once.images.float() / 255).mean((1, 2, 3)), at_once.parts["bright"][:, 0], atol=1e-6), (
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


def close(one: Tensor, other: Tensor) -> bool:
    """Pictures in 8 bits that differ by one level at most."""
    return one.shape == other.shape and int((one.int() - other.int()).abs().max()) <= 1


def levels(picture: Tensor) -> Tensor:
    """Of a picture in [0, 1]."""
    return (picture * 255).round().to(torch.uint8)


def same(one: Evaluation, other: Evaluation) -> None:
    """Kernels for other batch sizes round differently, by 1e-6 of a picture; a grey level may then fall to either side."""
    assert one.prompts == other.prompts
    assert one.parts.keys() == other.parts.keys()
    assert close(one.images, other.images)
    for name, values in one.parts.items():
        assert torch.allclose(values, other.parts[name], atol=1e-4)
        assert values.std() > 1e-3, "seeds and prompts differ by more than that, or this would compare nothing"


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_batches_do_not_matter(at_once, batch_size):
    done = []
    same(run(batch_size=batch_size, progress=done.append), at_once)
    whole = max(batch_size // 3, 1) * 3  # prompts with all their seeds, as many as fit
    assert done == list(range(whole, 19, whole))


class Threads:
    """Threads that play the processes of an evaluation, and what they gathered."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.gathered: list[list[Tensor]] = [[] for _ in range(count)]  # what each sent to all
        self.to_main: list[list[Tensor]] = [[] for _ in range(count)]  # what each sent to the first
        self._barrier = threading.Barrier(count, timeout=60)
        self._tables: list[Tensor | None] = [None] * count

    def _together(self, index: int, values: Tensor) -> Tensor:
        self._tables[index] = values
        self._barrier.wait()
        whole = [table for table in self._tables if table is not None]
        assert all(table.shape == values.shape for table in whole), "what torch.distributed would ask for"
        gathered = torch.cat(whole)
        self._barrier.wait()
        return gathered

    def evaluate(self, evaluate_one: Callable[..., Evaluation]) -> list[Evaluation]:
        """The results of ``evaluate_one(index, **settings)`` on each of them."""
        results: list[Evaluation | None] = [None] * self.count

        def process(index: int) -> None:
            def gather(values: Tensor) -> Tensor:
                self.gathered[index].append(values)
                return self._together(index, values)

            def to_main(values: Tensor) -> Tensor | None:
                self.to_main[index].append(values)
                whole = self._together(index, values)
                return whole if index == 0 else None

            settings = {"process_index": index, "num_processes": self.count, "gather": gather, "to_main": to_main}
            try:
                results[index] = evaluate_one(index, **settings)
            finally:
                if results[index] is None:
                    self._barrier.abort()  # the others shall not wait

        threads = [threading.Thread(target=process, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [result for result in results if result is not None]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_do_not_matter(at_once, processes):
    """18 jobs on 4 processes: two of them draw one again, so that all gather as much.

    Scores go to all, pictures as bytes to the main process only, a batch at a time.
    """
    pipelines, group = [zoo.lifted("sd3") for _ in range(processes)], Threads(processes)
    results = group.evaluate(lambda index, **settings: run(pipelines[index], batch_size=4, **settings))
    assert len(results) == processes
    same(results[0], at_once)
    for result in results[1:]:
        assert result.images.shape == (0, 3, 16, 16)
        same(replace(result, images=at_once.images), at_once)
    prompts_each = math.ceil(6 / processes)
    for sent_to_all, sent_to_main in zip(group.gathered, group.to_main):
        assert [own.nbytes for own in sent_to_main] == [3 * 16 * 16] * prompts_each, "the first seed of each prompt"
        assert sum(own.nbytes for own in sent_to_all) < 1000, "no pictures"


def test_prompts_that_one_process_cannot_batch_are_drawn_one_by_one_on_all():
    """Or a process would make more network passes than another one, which ZeRO-3 cannot bear."""
    texts = (
        "a cat",
        "a cat",
        "two blue boats",
        "a dog",
        "a cat",
    )  # of unlike length on the first of two processes only
    rewards = RewardSet([("mean", lambda i, p: [0.0] * len(p), 1.0)])
    pipelines, passes = [zoo.lifted("qwen") for _ in range(2)], [0, 0]
    for index, pipeline in enumerate(pipelines):

        def count(*_: Any, index: int = index) -> None:
            passes[index] += 1

        pipeline.pipe.transformer.register_forward_pre_hook(count)

    def one(index: int, **more: Any) -> Evaluation:
        settings = {**SETTINGS, "num_inference_steps": 2, "num_prompts": 5, "num_seeds": 1, "batch_size": 4}
        return evaluate(pipelines[index], Prompts(texts=texts), rewards, **settings, **more)

    both = Threads(2).evaluate(one)
    assert passes == [6, 6], "three prompts of two steps on each; the second process has one of the first's once more"
    passes[:] = [0, 0]
    assert close(both[0].images, one(0).images)


def test_a_thumbnail_is_as_small_as_what_shows_it():
    """Wide pictures have 512 pixels, videos 256 and 32 frames; what is small stays as it is, rounded once."""
    wide, step = thumbnails(torch.rand(2, 3, 60, 1024))
    assert (wide.shape, wide.dtype, step) == ((2, 3, 30, 512), torch.uint8, 1)
    film, step = thumbnails(torch.rand(1, 81, 3, 26, 832))
    assert (film.shape, film.dtype, step) == ((1, 27, 3, 8, 256), torch.uint8, 3)
    small = torch.rand(2, 3, 8, 8)
    assert torch.equal(thumbnails(small)[0], levels(small))
    sound, _ = thumbnails(torch.rand(2, 1, 4000) * 2 - 1)
    assert (sound.shape, sound.dtype) == ((2, 3, 64, 192), torch.uint8)
    small[0, 0, 0, 0] = math.nan
    assert thumbnails(small)[0].dtype == torch.uint8, "the same type on all processes, or they could not gather"


def test_plain_diffusers_draws_the_same(at_once):
    """Seed s of prompt p is num_seeds * p + s."""
    pipeline = zoo.shared("sd3")
    for place in (0, 4):
        arguments = pipeline.call_arguments([TEXTS[place]], num_inference_steps=3, guidance_scale=1.0)
        arguments["generator"] = torch.Generator().manual_seed(3 * place)
        picture = pipeline.pipe(**arguments)[0]
        assert close(levels(picture[0]), at_once.images[place])
        assert not close(levels(picture[0]), at_once.images[1])


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
                assert close(levels(picture[0]), result.images[place])


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
    assert close(several.images, alone.images)  # kernels differ with the batch size
    assert not close(several.images[0], several.images[1])
