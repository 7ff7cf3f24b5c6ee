"""Tensors by the hash of what they were made from: in memory up to a size, and on disk where a folder is given."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

_NAME = "encoded"


class Kept:
    """What was computed once.

    Args:
        limit_bytes: of memory; what was not asked for the longest goes first.
        folder: a file for each tensor, which other runs and processes find, too. A damaged one is made again.
    """

    def __init__(self, *, limit_bytes: int = 2**30, folder: Path | None = None) -> None:
        self.limit_bytes, self.folder = limit_bytes, folder
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, digest: str, make: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """The tensor of a hash, on the CPU; made if it is not kept, or kept in another shape."""
        if (known := self._kept.get(digest)) is not None:
            self._kept.move_to_end(digest)
            return known
        value = self._read(digest, shape)
        if value is None:
            value = make().detach().cpu().contiguous()
            self._write(digest, value)
        self._remember(digest, value)
        return value

    def _remember(self, digest: str, value: Tensor) -> None:
        self._kept[digest] = value
        self._bytes += value.nbytes
        while self._bytes > self.limit_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes

    def _read(self, digest: str, shape: tuple[int, ...]) -> Tensor | None:
        if self.folder is None or not (place := self._place(self.folder, digest)).is_file():
            return None
        try:
            value = load_file(place)[_NAME]
        except (SafetensorError, KeyError, OSError) as error:
            logger.warning("%s cannot be read (%s); it is made again", place, error)
            return None
        return value if tuple(value.shape) == shape else None

    def _write(self, digest: str, value: Tensor) -> None:
        """Under a temporary name first: another process may read at any moment. A full disk only costs time later."""
        if self.folder is None:
            return
        place = self._place(self.folder, digest)
        temporary = place.with_name(f".{digest}.{os.getpid()}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            save_file({_NAME: value}, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be written (%s)", place, error)
            temporary.unlink(missing_ok=True)

    @staticmethod
    def _place(folder: Path, digest: str) -> Path:
        return folder / digest[:2] / f"{digest}.safetensors"
