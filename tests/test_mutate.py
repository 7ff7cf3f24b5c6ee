"""Known faults of this field, planted one at a time: the list fits the source, and the tests catch every one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mutate
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("fault", mutate.FAULTS, ids=lambda fault: fault.name)
def test_the_fault_can_be_planted(fault: mutate.Fault) -> None:
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.right) == 1
    compile(text.replace(fault.right, fault.wrong), fault.file, "exec")
    for word in fault.tests.split(" -k ")[0].split():
        assert (ROOT / word).is_file()


@pytest.mark.slow
def test_every_fault_is_caught() -> None:
    done = subprocess.run([sys.executable, "scripts/mutate.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
