"""Moving previews of videos as animated WebP, which browsers and notebooks play, and what trackers are shown.

Letters: P videos, T frames.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image
from torch import Tensor

from flowsteer.rewards.pixels import to_uint8
from flowsteer.rl.evaluate import image_grid
from flowsteer.rl.sounds import envelopes
from flowsteer.rl.thumbnails import RATE, preview

logger = logging.getLogger(__name__)

TRACKED = 8  # of an evaluation's pictures
LONGEST = 16383  # pixels of a WebP's side


def webp(frames: Sequence[Image.Image], durations: Sequence[int], *, lossless: bool = False) -> bytes:
    """An animation that repeats; each frame stays for so many milliseconds. Lossless, or of quality 80."""
    file = io.BytesIO()
    frames[0].save(
        file,
        format="WEBP",
        save_all=True,
        append_images=list(frames[1:]),
        duration=list(durations),
        loop=0,
        lossless=lossless,
        quality=80,
        method=0 if lossless else 4,
    )
    return file.getvalue()


def save_film_grid(videos: Tensor, path: Path, *, frame_rate: float | None, columns: int = 12) -> bool:
    """Write a sheet of videos [P, T, 3, H, W] in [0, 1] or uint8, all of which play, as `evaluate.save_grid` lays it out.

    Warns and writes none where a side would be longer than a WebP may have; says whether it was written.
    """
    shown, step = preview(videos)
    scale = max(1, 128 // shown.shape[-1])
    lines = -(-len(shown) // min(columns, len(shown)))
    longest = scale * max((shown.shape[-2] + 2) * lines, (shown.shape[-1] + 2) * min(columns, len(shown)))
    if longest > LONGEST:
        logger.warning("%s is not written: it would be %d pixels long, and %d are possible", path, longest, LONGEST)
        return False
    sheets = [image_grid([shown[:, time]], scale=scale, columns=columns) for time in range(shown.shape[1])]
    path.write_bytes(webp(sheets, [_milliseconds(frame_rate, step)] * len(sheets), lossless=True))
    return True


def save_films(videos: Tensor, prompts: Sequence[str], folder: Path, *, frame_rate: float | None) -> None:
    """Write each video as a lossless animation, and a ``metadata.jsonl``, into a new folder.

    Equal frames that follow each other become one that is shown longer.
    """
    folder.mkdir()
    lines = []
    for number, (video, prompt) in enumerate(zip(to_uint8(videos), prompts)):
        name = f"{number:04d}.webp"
        durations = [_milliseconds(frame_rate)] * len(video)
        (folder / name).write_bytes(webp([Image.fromarray(frame) for frame in video], durations, lossless=True))
        lines.append(json.dumps({"file_name": name, "prompt": prompt}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def show(
    trackers: Sequence[TensorBoardTracker | WandBTracker], step: int, images: Tensor, *, frame_rate: float | None
) -> None:
    """Give trackers the first pictures of an evaluation, [P, 3, H, W] or [P, T, 3, H, W] in [0, 1] or uint8, or sound.

    TensorBoard plays videos, as GIF; others are given their first frames.
    """
    if images.dim() == 3:
        images = envelopes(images)
    videos, first = images.dim() == 5, to_uint8((images[:, 0] if images.dim() == 5 else images)[:TRACKED])
    for tracker in trackers:
        if not isinstance(tracker, TensorBoardTracker):
            tracker.log_images({"evaluation": list(first)}, step=step)
        elif videos:
            shown, skipped = preview(images[:TRACKED])
            for place, video in enumerate(to_uint8(shown)):
                _add_gif(tracker.writer, f"evaluation/{place}", video, _milliseconds(frame_rate, skipped), step)
        else:
            for place, picture in enumerate(first):
                tracker.writer.add_image(f"evaluation/{place}", picture, step, dataformats="HWC")


def _add_gif(writer: Any, tag: str, video: np.ndarray, milliseconds: int, step: int) -> None:
    """A video [T, H, W, 3] into TensorBoard, whose own method for it wants a further package (moviepy)."""
    from tensorboard.compat.proto import summary_pb2

    proto: Any = summary_pb2  # made while it is imported
    frames, file = [Image.fromarray(frame) for frame in video], io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    image = proto.Summary.Image(
        height=video.shape[1], width=video.shape[2], colorspace=3, encoded_image_string=file.getvalue()
    )
    writer.file_writer.add_summary(proto.Summary(value=[proto.Summary.Value(tag=tag, image=image)]), step)


def _milliseconds(frame_rate: float | None, step: int = 1) -> int:
    return max(1, round(1000 * step / (frame_rate or RATE)))


__all__ = ["save_film_grid", "save_films", "show", "webp"]
