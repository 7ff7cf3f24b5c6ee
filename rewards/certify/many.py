"""The check of a certificate that shows a reward thousands of tiny pictures: quotas that run out, memory that grows."""

from __future__ import annotations

import os
import time
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
    began = time.monotonic()
    _show(trial, size, seed=0)
    expected = (time.monotonic() - began) * COUNT / size
    if expected > BUDGET_S:
        raise NotApplicable(
            f"{COUNT} pictures would take {expected:.0f} s; it is asked those within {BUDGET_S:.0f} s only"
        )
    memory = [_resident()]
    for window in range(WINDOWS):
        for call in range(COUNT // size // WINDOWS):
            try:
                _show(trial, size, seed=1 + call + window * COUNT)
            except Exception as error:
                shown = (window * (COUNT // size // WINDOWS) + call) * size
                raise Refused(f"after {shown} tiny pictures it fails: {error_text(error)}") from error
        memory.append(_resident())
    before, after = trial.own, _own(trial)
    if not trial.same(before, after):
        raise Refused(f"after {COUNT} further pictures it gives other scores: {largest_difference(before, after)}")
    growth = np.diff(memory)[1:]
    kept = KEPT * COUNT // WINDOWS * SIDE * SIDE * 3
    if np.all(growth > kept):
        raise Suspected(
            f"memory grows by {growth.mean() / (COUNT / WINDOWS) / 1000:.0f} kB a picture, {growth.sum() / 1e6:.0f} MB in "
            f"{COUNT * (WINDOWS - 1) // WINDOWS} pictures of {SIDE}x{SIDE}: it may keep what it is given"
        )
    watched = f"memory grows by {max(0.0, growth.sum() / 1e6):.0f} MB" if memory[0] else "memory is not watched here"
    return f"the same scores after {COUNT} pictures of {SIDE}x{SIDE}; {watched}"


def _show(trial: Trial, size: int, *, seed: int) -> None:
    """One call with pictures that it has never seen: those of the trial, tiny, with noise in their lowest bits."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(trial.rows), size=size).tolist()
    images, prompts, columns = trial.arguments([trial.rows[row] for row in rows])
    tiny = np.stack([np.asarray(Image.fromarray(image).resize((SIDE, SIDE))) for image in images])
    trial.ask(tiny ^ rng.integers(0, 8, tiny.shape, dtype=np.uint8), prompts, columns)


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
