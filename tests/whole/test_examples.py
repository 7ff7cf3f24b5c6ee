"""Every example runs, and shows what it says it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

ROOT = Path(str(files("flowsteer.rl"))).resolve().parent


def test_one_update_without_a_configuration() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "examples/minimal.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    values = {
        name: (float(before), float(after))
        for name, before, after in re.findall(r"(\w+): before (\S+), after (\S+)", done.stdout)
    }
    assert values.keys() == {"ratio", "kl", "loss"}
    assert values["ratio"][0] == 1.0  # the policy that drew the samples is the current one
    assert values["ratio"][1] != 1.0
    assert values["kl"][0] == 0.0  # a fresh adapter changes nothing
    assert values["kl"][1] > 0.0
    # one small step along the gradient lowers the loss on the samples that it was taken from
    assert values["loss"][1] < values["loss"][0]
    assert re.search(r"one update of 6 passes, gradient norm 0\.0*[1-9]", done.stdout)  # 2 batches, 3 stochastic steps


def test_the_example_needs_no_builder() -> None:
    source = (ROOT / "examples" / "minimal.py").read_text(encoding="utf-8")
    assert "rl.build" not in source
    assert "rl.config" not in source
    assert len(source.splitlines()) <= 150
