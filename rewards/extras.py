"""Packages that only some rewards need, installed with an extra of this project: ``pip install 'flowsteer[ocr]'``."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, *, extra: str, what: str) -> Any:
    """Import a module of an extra.

    Args:
        module: its name.
        extra: of ``pyproject.toml``, that brings it.
        what: what needs it, for the message.

    Raises:
        ValueError: it is not installed.
        ImportError: it is, and does not import.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and what is missing is something that it imports
        raise ValueError(
            f"{what} needs the package {error.name}, which is not installed; run: pip install 'flowsteer[{extra}]'"
        ) from error


__all__ = ["need"]
