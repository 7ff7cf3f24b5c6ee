"""A reward of images on videos: which frames it is shown, and how their scores become one.

Letters: R samples of a batch, T frames of a video, F that are shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flowsteer.rewards.contract import SCORE, Answer, Shown


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Which frames of a video are scored as images; the video's score is the mean of theirs.

    Example: ``Frames()`` takes all, ``Frames(limit=1)`` the first, ``Frames(every=4)`` the frames 0, 4, 8 and so on.
    """

    every: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"frames are counted from 1, got every={self.every} and limit={self.limit}")

    @property
    def text(self) -> str:
        """As in a configuration."""
        return "first" if self.limit == 1 else "mean" if self.every == 1 else f"{{every: {self.every}}}"

    def chosen(self, count: int) -> list[int]:
        """Of a video of T frames those that are scored, F."""
        return list(range(0, count, self.every))[: self.limit]


def is_video(batch: Shown) -> bool:
    """Whether the samples are videos [T, H, W, 3]."""
    return batch.pixels.ndim == 5


def as_images(batch: Shown, frames: Sequence[int]) -> Shown:
    """These frames of R videos as R times F images, video by video. Those at the same time in a group are a group."""
    count = len(frames)

    def repeated(values: list) -> list:
        return [value for value in values for _ in range(count)]

    pixels = batch.pixels[:, list(frames)]
    return replace(
        batch,
        size=len(batch) * count,
        rows=list(range(len(batch) * count)),
        pixels=pixels.reshape(-1, *pixels.shape[2:]),
        prompts=repeated(batch.prompts),
        columns={name: repeated(values) for name, values in batch.columns.items()},
        group=[own * count + place for own in batch.group for place in range(count)],
        pictures={name: repeated(pictures) for name, pictures in batch.pictures.items()},
    )


def as_videos(answer: Answer, frames: Sequence[int]) -> Answer:
    """The answer for F images of each of R videos as one for the videos: means. Where a frame has none, the video has none."""
    count = len(frames)
    size = len(answer.parts[SCORE]) // count
    parts = {
        name: [sum(values[count * row : count * (row + 1)]) / count for row in range(size)]
        for name, values in answer.parts.items()
    }
    failures: dict[int, str] = {}
    for place, reason in sorted(answer.failures.items()):
        failures.setdefault(place // count, f"{reason} (frame {frames[place % count]})")
    assert all(row in failures for row, value in enumerate(parts[SCORE]) if math.isnan(value))
    return Answer(parts=parts, failures=failures)


__all__ = ["Frames", "as_images", "as_videos", "is_video"]
