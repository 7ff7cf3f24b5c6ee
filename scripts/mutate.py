"""Would the tests notice? Plants known faults of this field one at a time, each in a copy, and runs the tests that should fail.

    python scripts/mutate.py                # all of them, a quarter of an hour
    python scripts/mutate.py --only "swapped sign"

Ends with exit code 1 when a fault survives. A fault is a replacement of source text that occurs exactly once; which tests are
asked is only to save time: the whole suite would notice, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import faults
import faults_of_data
import typer
from fault import Fault
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pyproject.toml", "rl", "rewards", "rollout", "configs", "scripts", "tests")
FAULTS = faults.FAULTS + faults_of_data.FAULTS

console = Console()


def plant(fault: Fault, folder: Path) -> None:
    """Copy the project into ``folder`` and change one place. Raises ValueError where the right text does not stand once."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    file = folder / fault.file
    text = file.read_text(encoding="utf-8")
    if text.count(fault.right) != 1:
        raise ValueError(f"{fault.name}: the text to replace stands {text.count(fault.right)} times in {fault.file}")
    file.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    (folder / ".import-root").mkdir()
    (folder / ".import-root" / "flowsteer").symlink_to("..")


def caught(fault: Fault, planted: bool = True) -> tuple[bool, str]:
    """Whether a test fails with the fault, and which one (or how the tests ended). Not ``planted``: without the fault."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plant(fault if planted else replace(fault, wrong=fault.right), folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / ".import-root")}
        selection, _, keyword = fault.tests.partition(" -k ")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *selection.split()]
        command += ["-k", keyword] if keyword else []
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return done.returncode == 1 and bool(failures), (failures or done.stdout.splitlines()[-1:] or ["no output"])[0]


def main(
    only: Annotated[str | None, typer.Option(help="Plant only the faults whose name holds this.")] = None,
) -> None:
    """Plant each fault and say which test caught it."""
    chosen = [fault for fault in FAULTS if only is None or only in fault.name]
    if not chosen:
        console.print(f"no fault's name holds {only!r}; they are: {', '.join(fault.name for fault in FAULTS)}")
        raise typer.Exit(2)
    table = Table("fault", "in", "caught by")
    survived = 0
    for tests in dict.fromkeys(fault.tests for fault in chosen):
        with console.status(f"without a fault: {tests}"):
            failed, how = caught(next(fault for fault in chosen if fault.tests == tests), planted=False)
        if failed:
            console.print(f"{tests} fails without any fault: {how}")
            raise typer.Exit(2)
    for fault in chosen:
        with console.status(fault.name):
            noticed, how = caught(fault)
        survived += not noticed
        console.print(f"{'caught  ' if noticed else 'SURVIVED'}  {fault.name}", highlight=False)
        table.add_row(fault.name, fault.file, how.removeprefix("FAILED ").split(" - ")[0] if noticed else "nothing")
    console.print(table)
    if survived:
        console.print(f"{survived} of {len(chosen)} faults survived the tests")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
