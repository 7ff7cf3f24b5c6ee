"""One known fault, for `scripts/mutate.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, where it is planted, and the tests that are asked."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str
