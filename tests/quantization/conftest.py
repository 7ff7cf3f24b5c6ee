"""These tests need the packages of the extra ``quantization``.

diffusers imports them wherever it finds them, which costs each process a second. So `scripts/test.sh` keeps them apart from
all other tests, and runs this folder by itself, with them.
"""

from __future__ import annotations

import importlib.util

if any(importlib.util.find_spec(package) is None for package in ("bitsandbytes", "torchao")):
    collect_ignore_glob = ["test_*.py"]
