"""Where this package keeps what it can make again: environments of rewards, verdicts of self-checks."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder ``name`` below ``$FLOWSTEER_CACHE``, or in ``flowsteer`` of the platform's cache folder. Not made."""
    if os.environ.get("FLOWSTEER_CACHE"):
        return Path(os.environ["FLOWSTEER_CACHE"]).expanduser() / name
    if sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "flowsteer" / name
