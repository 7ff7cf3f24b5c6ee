"""Rewards of images on videos, frame by frame, and rewards of videos, which get their frame rate."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch
from worker_tools import scorer

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.frames import Frames
from flowsteer.rewards.hosts.child import WorkerReward
from flowsteer.rl.build_rewards import frames_of
from flowsteer.rl.config import parse_config

LEVELS = torch.tensor([[10, 20, 60, 70, 90], [0, 255, 0, 255, 0]])  # [R, T]
VIDEOS = (LEVELS / 255)[:, :, None, None, None].expand(-1, -1, 3, 4, 6).contiguous()


def level(images, prompts, **columns):
    """The mean of the pixels, and a part; every image knows its prompt and columns."""
    assert images.ndim == 4
    assert len(images) == len(prompts) == len(columns["row"])
    assert [{"a": 0, "b": 1}[prompt] for prompt in prompts] == list(columns["row"])
    means = [float(image.mean()) for image in images]
    return {"score": means, "double": [2 * mean for mean in means]}


def ask(reward, frames=None, **more):
    rewards = RewardSet([("own", reward, 1.0)], frames={} if frames is None else {"own": frames})
    return rewards.score(VIDEOS, ["a", "b"], {"row": [0, 1]}, **more)


@pytest.mark.parametrize(
    ("frames", "places"),
    [
        (None, [0, 1, 2, 3, 4]),
        (Frames(), [0, 1, 2, 3, 4]),
        (Frames(limit=1), [0]),
        (Frames(every=2), [0, 2, 4]),
        (Frames(every=4), [0, 4]),
        (Frames(every=9), [0]),
    ],
)
def test_the_score_is_the_mean_of_the_frames(frames, places):
    scores = ask(level, frames)
    expected = LEVELS[:, places].float().mean(1)
    torch.testing.assert_close(scores.total, expected)
    torch.testing.assert_close(scores.parts["own/double"], 2 * expected)


def test_a_frame_without_a_score_makes_the_video_missing_and_says_which():
    def picky(images, prompts, **columns):
        return [None if image.mean() == 60 else 1.0 for image in images]

    scores = ask(picky, Frames(every=2))
    assert scores.missing.tolist() == [True, False]
    assert scores.failures == {0: "reward 'own' gave no score (None) (frame 2)"}

    def fragile(images, prompts, **columns):
        if (images.reshape(len(images), -1).mean(1) == 70).any():
            raise RuntimeError("cannot see")
        return [1.0] * len(images)

    assert ask(fragile).failures == {0: "reward 'own' raised RuntimeError: cannot see (frame 3)"}
    assert not ask(fragile, Frames(every=2)).failures


def test_groups_are_compared_at_each_time():
    class Ranks:
        groupwise = True

        def __call__(self, images, prompts, **columns):
            means = [float(image.mean()) for image in images]
            assert len(means) == 2
            return [float(mean == max(means)) for mean in means]

    rewards = RewardSet([("ranks", Ranks(), 1.0)])
    scores = rewards.score(VIDEOS, ["a", "a"], {}, [3, 3])
    assert scores.total.tolist() == pytest.approx([3 / 5, 2 / 5])  # 10 > 0, 20 < 255, 60 > 0, 70 < 255, 90 > 0


def test_a_worker_is_shown_frames_as_this_process_is():
    with WorkerReward(scorer("digests"), python=sys.executable, start_timeout_s=30) as far:
        scores = RewardSet([("far", far, 1e-6)], frames={"far": Frames(every=2)}).score(VIDEOS, ["a", "b"])
    assert scores.parts["far/frames"].tolist() == [0, 0]  # images
    assert len(set(scores.total.tolist())) == 2


class Timed:
    """A reward of videos that wants to know how fast they are."""

    video = True

    def __call__(self, images, prompts, *, frame_rate, **columns):
        self.seen = images.shape, frame_rate
        return [0.0 if rate is None else float(rate) for rate in frame_rate]


class TestVideos:
    @pytest.mark.parametrize("rate", [None, 24.0])
    def test_they_get_the_rate_of_the_pipeline(self, rate):
        reward = Timed()
        rewards = RewardSet([("timed", reward, 1.0)])
        rewards.frame_rate = rate
        rewards.score(VIDEOS, ["a", "b"])
        assert reward.seen == ((2, 5, 4, 6, 3), [rate, rate])

    def test_the_prompt_file_has_the_last_word(self):
        reward = Timed()
        rewards = RewardSet([("timed", reward, 1.0)], columns={"timed": {"frame_rate": "speed"}})
        rewards.frame_rate = 24.0
        rewards.score(VIDEOS, ["a", "b"], {"speed": [8, 12]})
        assert reward.seen[1] == [8, 12]

    def test_images_have_none(self):
        def watch(images, prompts, **columns):
            assert "frame_rate" not in columns
            return [1.0] * len(images)

        watch.video = True
        rewards = RewardSet([("watch", watch, 1.0)])
        rewards.frame_rate = 24.0
        assert not rewards.score(VIDEOS[:, 0], ["a", "b"]).missing.any()


class TestSettings:
    def test_frames_are_not_for_rewards_of_videos(self):
        with pytest.raises(ValueError, match=r"rewards\.timed\.frames=\{every: 2\}: this reward takes videos itself"):
            RewardSet([("timed", Timed(), 1.0)], frames={"timed": Frames(every=2)})

    def test_frames_without_videos_are_told_once(self, caplog):
        rewards = RewardSet([("level", level, 1.0)], frames={"level": Frames(limit=1)})
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                rewards.score(VIDEOS[:, 0], ["a", "b"], {"row": [0, 1]})
        assert caplog.text.count("rewards.level.frames=first does nothing: there are no videos") == 1

    @pytest.mark.parametrize(
        ("given", "frames"),
        [("mean", Frames()), ("first", Frames(limit=1)), ({"every": 3}, Frames(every=3))],
    )
    def test_how_they_are_written(self, given, frames):
        config = parse_config({"num_steps": 1, "algorithm": "diffusion_nft", "rewards": {"ocr": {"frames": given}}})
        assert frames_of(config.rewards["ocr"]) == frames

    @pytest.mark.parametrize("given", ["last", {"every": 0}, {"every": True}, {"evry": 2}, 3, {}])
    def test_what_they_cannot_be(self, given):
        with pytest.raises(ValueError, match=r"rewards\.ocr\.frames: give mean, first, or \{every: NUMBER\}"):
            parse_config({"num_steps": 1, "algorithm": "diffusion_nft", "rewards": {"ocr": {"frames": given}}})

    def test_numbers_that_cannot_be(self):
        with pytest.raises(ValueError, match="frames are counted from 1, got every=0"):
            Frames(every=0)


def test_numpy_sees_the_chosen_frames_in_order():
    seen = []

    def watch(images, prompts, **columns):
        seen.append(images[:, 0, 0, 0].tolist())
        return np.ones(len(images))

    ask(watch, Frames(every=3))
    assert seen == [[10, 70, 0, 255]]
