"""Pythons that are not this one: finding one of the right version, and running one without the user's settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flowsteer.rewards.envs.recipe import Recipe, version_numbers

LAST_LINES = 15  # of a command's output in an error

# What would lead pip or python out of the environment, or to other versions. Where the user's pip looks for packages stays
# as it is configured.
_LEADS_AWAY = (
    "PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON", "PIP_CONSTRAINT", "PIP_REQUIRE_HASHES",
)  # fmt: skip
_ASK = (
    "import json, platform, sysconfig\n"
    "print(json.dumps({'version': platform.python_version(), 'platform': sysconfig.get_platform()}))"
)


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A python that runs."""

    command: str
    version: str  # 3.11: a patch release changes nothing
    platform: str  # such as linux-x86_64


def find_python(recipe: Recipe, given: str | None = None) -> Interpreter:
    """``given``; or the python that runs this, or else the newest ``python3.N`` on the PATH that the recipe takes.

    Raises:
        ValueError: none of them is in the recipe's range.
    """
    oldest, newest = (version_numbers(version)[1] for version in recipe.python)
    on_path = [f"python3.{minor}" for minor in range(newest, oldest - 1, -1)]
    seen = []
    for name in [given] if given else [sys.executable, *on_path]:
        command = shutil.which(name)
        if command is None:
            seen.append(f"{name}: not there")
            continue
        done = subprocess.run([command, "-I", "-c", _ASK], capture_output=True, text=True, env=_environ())
        if done.returncode:  # such as pyenv's stand-in for a version that is not switched on
            seen.append(f"{name}: does not run")
            continue
        facts = json.loads(done.stdout)
        if recipe.takes(facts["version"]):
            version = ".".join(map(str, version_numbers(facts["version"])))
            return Interpreter(command=command, version=version, platform=facts["platform"])
        seen.append(f"{name}: {facts['version']}")
    raise ValueError(
        f"{recipe.name} needs a python from {recipe.python[0]} to {recipe.python[1]}, and there is none "
        f"({'; '.join(seen)}); install one and give it: python=PATH (--python PATH)"
    )


def python_in(folder: Path) -> Path:
    """The python of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def run_python(python: Path | str, arguments: Sequence[str], what: str, *, advice: str = "") -> str:
    """Run a python isolated from the user's settings and from the current folder; returns what it printed.

    Raises:
        RuntimeError: it failed. The message says at what, and ends with the end of its output and the advice.
    """
    done = subprocess.run(
        [str(python), "-I", *arguments],
        env=_environ(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-LAST_LINES:])
        raise RuntimeError(f"{what} failed with the exit code {done.returncode}:\n{last}\n{advice}".rstrip())
    return done.stdout


def _environ() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _LEADS_AWAY}
    return kept | {"PIP_USER": "0", "PYTHONNOUSERSITE": "1"}


__all__ = ["Interpreter", "find_python", "python_in", "run_python"]
