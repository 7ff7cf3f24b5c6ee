"""What a prompt file gives a pipeline besides prompts: pictures, masks, videos, sound, arrays, numbers and texts for each row.

A configuration maps columns of the file to arguments of the pipeline's own ``__call__``. Files are opened and checked when
the prompt file is read, and loaded when a row is prepared.
"""

from __future__ import annotations

import hashlib
import io
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError

Kind = Literal["image", "images", "rgba", "mask", "video", "audio", "tensor", "tensors", "number", "text"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # ends of names
_FILMS = (".mp4", ".mov", ".webm", ".mkv", ".avi")


@dataclass(frozen=True, kw_only=True)
class Input:
    """Which column an argument of the pipeline is taken from, and what it is.

    Example: ``Input(column="source", kind="image")`` under the name ``image``.
    """

    column: str
    kind: Kind

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"{self.kind!r} is no kind of input; one of {', '.join(get_args(Kind))}")


@dataclass(frozen=True)
class Media:
    """A picture, a mask, some pictures, a video, sound or an array of one row: where it is, and a hash of what it is.

    Two of the same content and kind are equal.
    """

    kind: Kind
    digest: str  # of the files' bytes
    parts: tuple[Path | bytes, ...] = field(compare=False, repr=False)  # one, or one for each picture or frame

    def load(self) -> Any:
        """The value for the pipeline.

        A picture is a PIL image in RGB (``rgba``: with an alpha channel), a mask one in grey; some pictures and the frames of a
        video are a list of them; sound is a float32 tensor [channels, samples] in [-1, 1]; ``tensor`` is a numpy array, as
        the pipeline takes it for one prompt, and ``tensors`` a list of them.
        """
        if self.kind in ("tensor", "tensors"):
            arrays = [_array(part) for part in self.parts]
            return arrays if self.kind == "tensors" else arrays[0]
        if self.kind == "audio":
            return _sound(self.parts[0])
        if self.kind == "video" and len(self.parts) == 1:
            return _frames(self.parts[0])
        mode = {"mask": "L", "rgba": "RGBA"}.get(self.kind, "RGB")
        pictures = [_picture(part, mode) for part in self.parts]
        return pictures if self.kind in ("images", "video") else pictures[0]

    def pixels(self) -> np.ndarray:
        """What a reward is shown of an image, a mask or a video: uint8 [H, W, 3], [H, W] or [T, H, W, 3]."""
        loaded = self.load()
        if self.kind not in ("image", "mask", "video"):
            raise ValueError(f"rewards are shown images, masks and videos; this is {self}")
        return np.array(loaded) if self.kind != "video" else np.stack([np.asarray(frame) for frame in loaded])

    def __str__(self) -> str:
        return f"{self.kind} {self.digest}"


Value = Media | int | float | str | None


def kind_of(argument: str) -> Kind:
    """The kind that an argument of a pipeline takes by its name; an image in doubt.

    Example: ``control_video`` takes a video, ``mask_image`` a mask, ``image_embeds`` an array, ``height`` a number,
    ``negative_prompt`` a text.
    """
    if argument.endswith("_embeds") or argument == "hint":
        return "tensor"
    if (
        argument in ("height", "width", "strength", "seed")
        or argument.startswith("num_")
        or argument.endswith(("_scale", "_rate"))
    ):
        return "number"
    if "prompt" in argument:
        return "text"
    if "mask" in argument:
        return "mask"
    last = argument.rsplit("_", 1)[-1]
    kinds: dict[str, Kind] = {"video": "video", "frames": "video", "audio": "audio", "waveforms": "audio"}
    return "images" if last.endswith("images") else kinds.get(last, "image")


def read_inputs(
    inputs: Mapping[str, Input], columns: Mapping[str, Sequence[Any]], *, where: Sequence[str], folder: Path
) -> dict[str, tuple[Value, ...]]:
    """The inputs of every row, by argument.

    Args:
        inputs: what each argument is taken from.
        columns: the file's columns, N values each.
        where: the place of each row, for messages: ``prompts.jsonl, line 3``.
        folder: what relative paths are relative to.

    Raises:
        ValueError: no such column; a value of another kind, or a file that is not there or cannot be read, with its row.
    """
    found: dict[str, tuple[Value, ...]] = {}
    for argument, own in inputs.items():
        if own.column not in columns:
            raise ValueError(
                f"inputs.{argument}.column={own.column}: {where[0].partition(',')[0]} has no such column; it has "
                f"{', '.join(columns) or 'none besides the prompt'}"
            )
        column = f"column {own.column!r} (inputs.{argument})"
        found[argument] = read_values(columns[own.column], own.kind, column, where=where, folder=folder)
    return found


def read_values(
    values: Sequence[Any], kind: Kind, column: str, *, where: Sequence[str], folder: Path
) -> tuple[Value, ...]:
    """The values of one column, as `read_inputs` reads them; ``column`` names it in messages."""
    found = []
    for value, place in zip(values, where):
        try:
            found.append(read_value(value, kind, folder))
        except (ValueError, OSError, TypeError) as error:
            raise ValueError(f"{place}, {column}: {error}") from error
    return tuple(found)


def read_pictures(
    values: Sequence[Any], kind: Kind, column: str, *, where: Sequence[str], folder: Path
) -> tuple[Media | None, ...]:
    """As `read_values`, of a kind whose pixels rewards are shown. The frames of a video must have one size."""
    read = read_values(values, kind, column, where=where, folder=folder)
    for value, place in zip(read, where):
        if isinstance(value, Media) and len(value.parts) > 1 and len({frame.size for frame in value.load()}) > 1:
            raise ValueError(f"{place}, {column}: the frames of this video have several sizes; give them one")
    return tuple(value if isinstance(value, Media) else None for value in read)


def load(value: Value) -> Any:
    """A value as the pipeline takes it for one row."""
    return value.load() if isinstance(value, Media) else value


def read_value(value: Any, kind: Kind, folder: Path) -> Value:
    """One row's value, its files opened once. Raises ValueError or OSError, without the row, for one of another kind."""
    if value is None or value == "":
        return None
    if kind == "number":
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"a number is needed, got {value!r}")
        return value
    if kind == "text":
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f"a text is needed, got {value!r}")
        return str(value)
    several = kind in ("images", "video", "tensors")
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("an empty list; give at least one file")
        if not several:
            raise ValueError(f"one {kind} is needed, got a list of {len(value)}")
        parts = tuple(_part(one, folder) for one in value)
    else:
        parts = (_part(value, folder),)
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.read_bytes()
        digest.update(hashlib.sha256(data).digest())
    media = Media(kind, digest.hexdigest()[:16], parts)
    if kind in ("audio", "tensor", "tensors") or (kind == "video" and len(parts) == 1):
        media.load()
        return media
    for part in parts:
        try:
            with Image.open(io.BytesIO(part) if isinstance(part, bytes) else part) as opened:
                opened.load()  # all of it: half a file is found here, and not in the middle of a run
                if opened.mode.startswith("I"):
                    raise ValueError(f"{_named(part)} has more than 8 bits a colour; save it with 8")
        except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError) as error:
            raise ValueError(f"{_named(part)} is no picture that can be read ({error})") from error
    return media


def _part(value: Any, folder: Path) -> Path | bytes:
    """A path, or a picture or its bytes as the `datasets` library keeps them."""
    if isinstance(value, Image.Image):
        kept = io.BytesIO()
        value.save(kept, "PNG")
        return kept.getvalue()
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return value["bytes"]
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        value = value["path"]
    if not isinstance(value, str):
        raise ValueError(f"a path is needed, got a {type(value).__name__}")
    path = Path(value)
    path = path if path.is_absolute() else folder / path
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def _named(part: Path | bytes) -> str:
    return f"a value of {len(part)} bytes" if isinstance(part, bytes) else str(part)


def _picture(part: Path | bytes, mode: str) -> Image.Image:
    with Image.open(io.BytesIO(part) if isinstance(part, bytes) else part) as opened:
        return ImageOps.exif_transpose(opened).convert(mode)


def _frames(part: Path | bytes) -> list[Image.Image]:
    """The frames of an animated GIF, PNG or WebP, or of a film where OpenCV is installed."""
    if isinstance(part, Path) and part.suffix.lower() in _FILMS:
        return _film(part)
    try:
        with Image.open(io.BytesIO(part) if isinstance(part, bytes) else part) as opened:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
    except UnidentifiedImageError as error:
        raise ValueError(f"{_named(part)} is no video that can be read ({error})") from error


def _film(path: Path) -> list[Image.Image]:
    try:
        import cv2
    except ImportError as error:
        raise ValueError(f"{path}: films are read with OpenCV; pip install opencv-python-headless") from error
    film, frames = cv2.VideoCapture(str(path)), []
    while (read := film.read())[0]:
        frames.append(Image.fromarray(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB)))
    film.release()
    if not frames:
        raise ValueError(f"{path} is no video that can be read")
    return frames


def _array(part: Path | bytes) -> np.ndarray:
    """The array of a .npy file of numbers."""
    try:
        found = np.load(io.BytesIO(part) if isinstance(part, bytes) else part, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{_named(part)} is no .npy file of numbers ({error})") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiub" or found.ndim == 0:
        raise ValueError(f"{_named(part)} is no .npy file with one array of numbers")
    return found


def _sound(part: Path | bytes) -> torch.Tensor:
    """Sound of a WAV file with whole numbers of 16 or 32 bits, [channels, samples]."""
    try:
        with wave.open(io.BytesIO(part) if isinstance(part, bytes) else str(part)) as opened:
            width, channels = opened.getsampwidth(), opened.getnchannels()
            data = opened.readframes(opened.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{_named(part)} is no WAV file of 16 or 32 bits ({error})") from error
    if width not in (2, 4):
        raise ValueError(f"{_named(part)} has {8 * width} bits a sample; 16 or 32 are read")
    samples = np.frombuffer(data, dtype=np.int16 if width == 2 else np.int32).reshape(-1, channels).T
    return torch.from_numpy(samples.astype(np.float32) / 2 ** (8 * width - 1))
