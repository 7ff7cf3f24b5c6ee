"""A process that is forked from the tests' server in the place of a new interpreter does what that one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import launch
import pytest

PROGRAM = """
import importlib.metadata, os, sys
print(__name__, sys.argv[1:], os.getcwd(), os.environ["MINE"], "PRIVATE" in os.environ, sys.path[0], sys.path[1])
print([point.value for point in importlib.metadata.entry_points(group="a.group")])
print("to stderr", file=sys.stderr)
import neighbour
sys.exit(neighbour.CODE)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A script, a module beside it, the same as a package, and an installed package in another folder."""
    (tmp_path / "here" / "package").mkdir(parents=True)
    for place in ("script.py", "package/__main__.py"):
        (tmp_path / "here" / place).write_text(PROGRAM)
    (tmp_path / "here" / "neighbour.py").write_text("CODE = 3\n")
    (tmp_path / "site" / "their-1.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "their-1.dist-info" / "METADATA").write_text("Name: their\nVersion: 1\n")
    (tmp_path / "site" / "their-1.dist-info" / "entry_points.txt").write_text("[a.group]\nname = module:function\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["script.py", "a", "-b"], 3),
        (["-m", "package", "a"], 3),
        (["-c", PROGRAM, "a"], 3),
        (["-c", "print('fine')"], 0),
        (["-c", "raise ValueError('theirs')"], 1),
        (["-c", "import sys; sys.exit('a message')"], 1),
        (["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], -9),
    ],
)
def test_it_is_as_a_new_interpreter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int
) -> None:
    monkeypatch.setenv("PRIVATE", "this process's")
    environment = {name: value for name, value in os.environ.items() if name != "PRIVATE"}
    environment |= {"PYTHONPATH": str(folder / "site"), "MINE": "1"}
    new = subprocess.run(
        [sys.executable, *arguments], cwd=folder / "here", env=environment, capture_output=True, text=True, check=False
    )
    forked = launch.python(*arguments, cwd=folder / "here", environment=environment)
    assert new.returncode == forked.returncode == code
    assert new.stdout == forked.stdout
    assert new.stderr.splitlines()[-1:] == forked.stderr.splitlines()[-1:]  # tracebacks begin in other files


def test_one_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        launch.python("-c", "import time; time.sleep(60)", cwd=tmp_path, timeout=0.5)
