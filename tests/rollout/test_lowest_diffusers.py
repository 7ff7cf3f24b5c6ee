"""The lowest diffusers that pyproject admits draws what its pipelines draw, too: in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_zoo_holds_with_the_lowest_diffusers(tmp_path: Path) -> None:
    lowest = re.search(r'"diffusers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert lowest
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*install, f"diffusers=={lowest[1]}"], check=True, capture_output=True, text=True, timeout=600)
    places = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    ask = [sys.executable, "-c", "import diffusers; print(diffusers.__version__)"]
    version = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert version.startswith(lowest[1])
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/rollout/test_zoo.py"]
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
