"""The check of a certificate that shows a reward thousands of tiny pictures: quotas that run out, memory that grows."""

from __future__ import annotations

import gc
import os
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from flowsteer.rewards.certify.trial import NotApplicable, Refused, Suspected, Trial, error_text, largest_difference

COUNT = 4096  # pictures
SIDE = 64  # pixels
BATCH, GROUP = 64, 16  # pictures a call
BUDGET_S = 5.0  # a reward that would take longer is not asked
WINDOWS = 4  # of which the first is for what grows once: caches of the libraries, the allocator's own
KEPT = 1 / 3  # of the pictures' bytes; by so much memory grows where pictures, or copies of them, are kept


def many_pictures(trial: Trial) -> str:
    """After thousands of pictures the scores are as before, and the memory is, too. Only for a reward that is fast."""
    size = GROUP if trial.groupwise else BATCH
    tiny = np.stack([np.asarray(Image.fromarray(trial.images[row]).resize((SIDE, SIDE))) for row, _ in trial.rows])
    began = time.monotonic()
    _show(trial, tiny, size, seed=0)
    expected = (time.monotonic() - began) * COUNT / size
    if expected > BUDGET_S:
        raise NotApplicable(
            f"{COUNT} pictures would take {expected:.0f} s; it is asked those within {BUDGET_S:.0f} s only"
        )
    with _traced():
        memory = _watched_windows(trial, tiny, size)
    before, after = trial.own, _own(trial)
    if not trial.same(before, after):
        raise Refused(f"after {COUNT} further pictures it gives other scores: {largest_difference(before, after)}")
    growth = np.diff(memory, axis=0)[1:]  # [windows, 2]
    kept = KEPT * COUNT // WINDOWS * SIDE * SIDE * 3
    grows = np.all(
        growth > kept, axis=0
    )  # [2]: what Python allocates tells of arrays, the process's memory of the rest
    if grows.any():
        most = growth[:, grows].sum(0).max()
        raise Suspected(
            f"memory grows by {most / len(growth) / (COUNT / WINDOWS) / 1000:.0f} kB a picture, {most / 1e6:.0f} MB in "
            f"{COUNT * (WINDOWS - 1) // WINDOWS} pictures of {SIDE}x{SIDE}: it may keep what it is given"
        )
    grown = max(0.0, growth.sum(0).max() / 1e6)
    return f"the same scores after {COUNT} pictures of {SIDE}x{SIDE}; memory grows by {grown:.0f} MB"


def _watched_windows(trial: Trial, tiny: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Show all pictures; the memory before and after each window, as `_memory` gives it."""
    memory = [_memory()]
    for window in range(WINDOWS):
        for call in range(COUNT // size // WINDOWS):
            try:
                _show(trial, tiny, size, seed=1 + call + window * COUNT)
            except Exception as error:
                shown = (window * (COUNT // size // WINDOWS) + call) * size
                raise Refused(f"after {shown} tiny pictures it fails: {error_text(error)}") from error
        memory.append(_memory())
    return memory


@contextmanager
def _traced() -> Iterator[None]:
    """Python's own allocations are counted inside the context, and what was there before is not searched for garbage.

    That search takes a third of a second where all of torch and transformers is imported, five times. A process that has
    frozen objects of its own keeps them frozen, and is searched as a whole.
    """
    running, frozen = tracemalloc.is_tracing(), gc.get_freeze_count() > 0
    gc.collect()
    if not frozen:
        gc.freeze()
    if not running:
        tracemalloc.start(1)
    try:
        yield
    finally:
        if not running:
            tracemalloc.stop()
        if not frozen:
            gc.unfreeze()


def _memory() -> tuple[int, int]:
    """Bytes that Python and NumPy have allocated, and bytes that this process has (0 where the system does not tell)."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0], _resident()


def _show(trial: Trial, tiny: np.ndarray, size: int, *, seed: int) -> None:
    """One call with pictures that it has never seen: tiny [B, SIDE, SIDE, 3], with noise in their lowest bits."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(trial.rows), size=size).tolist()
    _, prompts, columns = trial.arguments([trial.rows[row] for row in rows])
    images = tiny[rows]
    trial.ask(images ^ rng.integers(0, 8, images.shape, dtype=np.uint8), prompts, columns)


def _own(trial: Trial) -> np.ndarray:
    """The trial's scores, asked again in the way of `Trial.own`."""
    return trial.score(trial.rows) if trial.groupwise else np.array([trial.score([pair])[0] for pair in trial.rows])


def _resident() -> int:
    """Bytes of memory that this process has; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


__all__ = ["many_pictures"]
