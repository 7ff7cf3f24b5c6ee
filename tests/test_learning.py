"""The embedded pipeline learns composition: three training seeds, the interval over seeds above zero. Minutes each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["embedded_nft_composition", "num_steps=26", "rollout.prompts_per_step=32"],
        ["embedded_flow_grpo_cps_composition"],
        ["embedded_flow_grpo_sde_composition"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_learns_composition(arguments: list[str], tmp_path: Path) -> None:
    options = ["--seeds", "3", "--parallel", "2", "--root", str(tmp_path)]
    command = [sys.executable, "scripts/learn.py", *arguments, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
