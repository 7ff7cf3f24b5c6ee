"""Imports of packages with many thousands of objects, none of which is garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage inside the context, and never again among what is there at its end.

    Python looks for cycles after every so many new objects. While torch, diffusers and transformers are imported, it goes
    through all their modules, classes and functions again and again, which takes a fifth of the time of a start.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
