"""Imports of packages with many thousands of objects, none of which is garbage."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage inside the context.

    Python looks for cycles after every so many new objects. While torch, diffusers and transformers are imported, it goes
    through all their modules, classes and functions again and again, which takes a fifth of the time of a start. Where torch
    is among what was imported, all that is there at the end is never looked through again.
    """
    was_enabled, is_new = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_new and "torch" in sys.modules:  # else there may be garbage, which would stay for good
            gc.freeze()
        if was_enabled:
            gc.enable()
