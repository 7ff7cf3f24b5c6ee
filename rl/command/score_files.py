"""Image files and their scores: what `flowsteer score` does.

Letters: B images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowsteer.rewards.columns import lacking
from flowsteer.rewards.combine import RewardSet
from flowsteer.rollout.data.inputs import read_pictures
from flowsteer.rollout.data.prompts import read_prompts


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images that are to be scored.

    Example: ``Pictures(files=(Path("a.png"),), prompts=("three cats",), columns={"count": (3,)})``.
    """

    files: tuple[Path, ...]  # B
    prompts: tuple[str, ...]  # B
    columns: Mapping[str, tuple[Any, ...]]  # name -> B values
    folder: Path = Path()  # what paths in the columns are relative to


@dataclass(frozen=True, kw_only=True)
class FileScores:
    """The scores of B images: by reward (and ``reward/part``), NaN where missing, and why some are."""

    parts: dict[str, list[float]]  # name -> B
    failures: dict[int, str]  # place -> reason


def from_metadata(file: Path) -> Pictures:
    """The images of a ``metadata.jsonl``: a line each with ``file_name`` (beside the file), ``prompt``, and columns.

    Raises:
        ValueError: as `read_prompts`; no ``file_name``.
    """
    rows = read_prompts(file, warn=False)
    if "file_name" not in rows.columns:
        raise ValueError(f'{file}: each line needs the image as "file_name", relative to the folder of this file')
    names = rows.columns["file_name"]
    columns = {name: values for name, values in rows.columns.items() if name != "file_name"}
    return Pictures(
        files=tuple(file.parent / str(name) for name in names), prompts=rows.texts, columns=columns, folder=file.parent
    )


def check_columns_of_pictures(rewards: Mapping[str, Mapping[str, Any]], pictures: Pictures) -> None:
    """Raise ValueError if a reward requires a column that the pictures lack. ``rewards``: name -> its options."""
    for name, options in rewards.items():
        missing = lacking(name, options, pictures.columns)
        if missing:
            given = ", ".join(pictures.columns) or "none"
            raise ValueError(
                f"the reward {name!r} requires the column {', '.join(map(repr, missing))}; give it as --column "
                f"{missing[0]}=VALUE, or in the lines of --metadata (given: {given})"
            )


def score_files(pictures: Pictures, rewards: RewardSet) -> FileScores:
    """Score image files: one by one, or all together where a reward compares the images of a prompt.

    Raises:
        ValueError: a file that is no image, images of several sizes for a reward that compares them, or a reward that
            breaks its contract.
    """
    images = [_read(file) for file in pictures.files]
    count = len(images)
    shown = {
        column: read_pictures(
            pictures.columns[column],
            kind,
            f"column {column!r}",
            where=list(map(str, pictures.files)),
            folder=pictures.folder,
        )
        for column, kind in rewards.pictures.items()
        if column in pictures.columns
    }
    if not rewards.groupwise:
        batches = [[place] for place in range(count)]
    elif len(sizes := {tuple(image.shape[1:]) for image in images}) > 1:
        named = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise ValueError(
            f"the reward {rewards.groupwise[0]!r} compares images, which must have one size; these have {named}"
        )
    else:
        batches = [list(range(count))]
    parts: dict[str, list[float]] = {}
    failures: dict[int, str] = {}
    for places in batches:
        scores = rewards.score(
            torch.stack([images[place] for place in places]),
            [pictures.prompts[place] for place in places],
            {name: [values[place] for place in places] for name, values in pictures.columns.items()},
            pictures={name: [values[place] for place in places] for name, values in shown.items()},
        )
        for name, values in scores.parts.items():
            column = parts.setdefault(name, [math.nan] * count)
            for place, value in zip(places, values.tolist(), strict=True):
                column[place] = value
        failures |= {places[row]: reason for row, reason in scores.failures.items()}
    return FileScores(parts=parts, failures=failures)


def _read(file: Path) -> Tensor:
    """[3, H, W] float32 in [0, 1]. Raises ValueError for what is no image."""
    try:
        with Image.open(file) as opened:
            if getattr(opened, "n_frames", 1) > 1:
                raise ValueError(
                    f"{file} is a video or an animation, of which only pictures are scored here; give its frames"
                )
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{file} is not an image that can be read: {error}") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def options_by_reward(names: Sequence[str], given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options for each of the rewards, from ``KEY=VALUE`` for a single one, or ``REWARD.KEY=VALUE``.

    Example: ``options_by_reward(["ocr"], ["mode=recognize"]) == {"ocr": {"mode": "recognize"}}``.

    Raises:
        ValueError: an option that names none of several rewards, or is not of this form.
    """
    from flowsteer.rl.config import parse_overrides

    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option in given:
        named = [name for name in names if option.startswith(f"{name}.")]
        if not named and len(names) > 1:
            raise ValueError(
                f"{option!r} does not say of which reward it is an option; write {names[0]}.{option} or one of the others: "
                f"{', '.join(names[1:])}"
            )
        name = max(named, key=len, default=names[0])
        parse_overrides([option.removeprefix(f"{name}.")], options[name])
    return options
