"""What a reward is certified on: images with prompts, from a folder or built in.

Letters: B images.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence

from flowsteer.rewards.columns import column_parameters
from flowsteer.rewards.pictures import Kind, pictures_of

SIDE = 64  # pixels of the built-in images
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_folder(folder: str | Path) -> tuple[np.ndarray, list[str], dict[str, list[Any]]]:
    """Images, prompts and columns of a folder, as ``certify`` takes them.

    The images are those of ``metadata.jsonl`` (a line each: ``file_name``, ``prompt``, and other columns), or, where there is
    none, all PNG, JPEG and WebP files by name, whose names are the prompts (``a_red_circle.png``). They are cropped to the
    size of the first.

    Raises:
        ValueError: no such folder, no images in it, or a line that lacks something.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} with images")
    rows: list[dict[str, Any]] = []
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{metadata}, line {number}: not JSON: {error}") from None
            if not isinstance(rows[-1], dict) or not {"file_name", "prompt"} <= rows[-1].keys() == rows[0].keys():
                raise ValueError(
                    f"{metadata}, line {number}: wants file_name, prompt and the columns of the first line"
                )
    else:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        rows = [{"file_name": file.name, "prompt": file.stem.replace("_", " ")} for file in files]
    if not rows:
        raise ValueError(f"there are no images in {folder}: give PNG, JPEG or WebP files, or a metadata.jsonl")
    images: list[Image.Image] = []
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for name in columns.pop("file_name"):
        try:
            image = Image.open(folder / name)
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"{folder / name} is a video or an animation; give pictures, such as its frames")
            image = image.convert("RGB")
        except OSError as error:
            raise ValueError(f"cannot read an image of {folder}: {error}") from None
        images.append(ImageOps.fit(image, images[0].size) if images else image)
    return np.stack([np.asarray(image) for image in images]), columns.pop("prompt"), columns


def built_in_inputs() -> tuple[np.ndarray, list[str]]:
    """16 images, uint8 [16, 64, 64, 3], with prompts: shapes of ``flowsteer.rewards.scorers.world``, words, patterns.

    Some show what their prompt says and some something near it, so that rewards give them different scores. Always the same
    pixels: words come from Pillow's bitmap font, without FreeType.
    """
    from flowsteer.rewards.scorers.world import SIZE, draw, parse_caption

    rng = np.random.default_rng(0)
    shown: list[tuple[np.ndarray, str]] = []
    for caption, prompt in (
        ("a red circle on black", "a red circle on black"),
        ("a red circle on black", "a blue square on white"),
        ("a circle left of a blue square on white", "a circle left of a yellow square on white"),
        ("three green triangles on gray", "four green triangles on gray"),
        ("a red circle and a blue square on black", "a red square and a blue circle on black"),
        ("two purple squares on white", "three purple circles on white"),
    ):
        picture = draw(parse_caption(caption), rng)
        shown.append((picture.repeat(SIDE // SIZE, axis=0).repeat(SIDE // SIZE, axis=1), prompt))
    for text, wanted in (("OPEN", "OPEN"), ("SALE", "SALT"), ("STOP", "SHOP"), ("42", "47"), ("EXIT", "TAXI")):
        shown.append((_draw_word(text), f'a sign that says "{wanted}"'))
    x, y = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
    patterns = {
        "a sunset over the sea": (x, 0.6 * y, 1 - y),
        "a chessboard seen from above": ((8 * x).astype(int) + (8 * y).astype(int)) % 2,
        "television noise": tuple(rng.random((3, SIDE, SIDE))),
        "a zebra in the rain": 0.5 + 0.5 * np.sin(40 * x + 6 * np.sin(5 * y)),
        "a green planet": (0.1 * x, np.clip(1.2 - 2.4 * np.hypot(x - 0.5, y - 0.5), 0, 1), 0.3 * y),
    }
    for prompt, levels in patterns.items():
        channels = levels if isinstance(levels, tuple) else (levels,) * 3
        shown.append((np.rint(255 * np.stack(channels, axis=-1)).astype(np.uint8), prompt))
    return np.stack([image for image, _ in shown]), [prompt for _, prompt in shown]


def with_trial_columns(
    name: str, reward: Callable[..., Any], images: np.ndarray, columns: Mapping[str, Sequence[Any]], folder: Path | None
) -> dict[str, list[Any]]:
    """The columns with pixels where the reward wants pictures: those of the files that they name, or made of the images.

    A reward that names ``frame_rate`` gets one if there is none.

    Args:
        name: of the reward, for messages.
        reward: whose columns they are.
        images: uint8 [B, H, W, 3].
        columns: B values each.
        folder: what paths in the columns are relative to.

    Raises:
        ValueError: a file that is no picture.
    """
    whole = {column: list(values) for column, values in columns.items()}
    for column, kind in pictures_of(name, reward).items():
        if column not in whole:
            whole[column] = trial_pictures(kind, images)
        whole[column] = [
            _read_picture((folder or Path()) / value, kind) if isinstance(value, str) else value
            for value in whole[column]
        ]
    if "frame_rate" in column_parameters(reward):
        whole.setdefault("frame_rate", [(8.0, 24.0, 25.0, 30.0)[row % 4] for row in range(len(images))])
    return whole


def trial_pictures(kind: Kind, images: np.ndarray) -> list[Any]:
    """A picture for each of B images, related to it: mixed with the next one, some of them of another size.

    Masks are nothing, a half, a quarter and a frame by turns; a video is the picture and two shifted ones.
    """
    height, width = images.shape[1:3]
    if kind == "mask":
        masks = np.zeros((4, height, width), np.uint8)
        masks[1, :, : width // 2] = masks[2, : height // 2, : width // 2] = masks[3] = 255
        masks[3, height // 4 : -(height // 4), width // 4 : -(width // 4)] = 0
        return [masks[row % 4].copy() for row in range(len(images))]
    mixed = (3 * images.astype(np.uint16) + np.roll(images, -1, axis=0)) // 4
    pictures = [
        np.asarray(Image.fromarray(one).resize(_sizes(row, height, width)))
        for row, one in enumerate(mixed.astype(np.uint8))
    ]
    if kind == "image":
        return pictures
    return [np.stack([np.roll(one, place, axis=1) for place in range(3)]) for one in pictures]


def _sizes(row: int, height: int, width: int) -> tuple[int, int]:
    """Width and height of a trial picture: of every other one as they are."""
    return (width, height) if row % 2 == 0 else (width + width // 4, height - height // 4)


def _read_picture(file: Path, kind: Kind) -> np.ndarray:
    try:
        with Image.open(file) as opened:
            if kind == "video":
                return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)])
            return np.asarray(ImageOps.exif_transpose(opened).convert("L" if kind == "mask" else "RGB"))
    except OSError as error:
        raise ValueError(f"{file} is no {kind} that can be read: {error}") from None


def _draw_word(text: str) -> np.ndarray:
    """uint8 [64, 64, 3], black on white."""
    small = Image.new("L", (SIDE // 2, SIDE // 2), 255)
    ImageDraw.Draw(small).text((2, 10), text, fill=0, font=ImageFont.load_default_imagefont())
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.NEAREST).convert("RGB"))


def check_inputs(images: np.ndarray, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError where images, prompts and columns are not what ``certify`` takes."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) < 4:
        raise ValueError(f"images must be uint8 [B, H, W, 3] with B at least 4, got {images.dtype} {images.shape}")
    for name, values in {"prompts": prompts, **columns}.items():
        if len(values) != len(images):
            raise ValueError(f"{len(images)} images need {len(images)} {name}, got {len(values)}")


__all__ = ["built_in_inputs", "check_inputs", "read_folder", "trial_pictures", "with_trial_columns"]
