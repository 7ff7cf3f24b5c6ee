"""Environments of their own for rewards whose packages cannot live with ours.

Each is built from a recipe (`flowsteer.rewards.envs.recipe`) with ``python -m venv`` and pip, in a folder of its own below
``$FLOWSTEER_CACHE`` (or the user's cache folder): ``reward-envs/NAME-KEY``, with a hash of the recipe, the python and the
platform as the key. It is built under another name and renamed when its smoke import has run, so what has the right name
is whole. Nothing is ever installed into the environment that this runs in.

A scorer in it is run by the worker (`flowsteer.rewards.hosts.child`) with `locate`'s python and file.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flowsteer.rewards.caches import cache_folder
from flowsteer.rewards.envs.pythons import Interpreter, find_python, python_in, run_python
from flowsteer.rewards.envs.recipe import Asset, Install, Recipe, load_recipe, recipe_names

RECORD = "environment.json"  # what was built; written last
PIP_ADVICE = (
    "A package that is not found: look where your pip does (pip config list), and whether there is a file for this python and "
    "platform. A hash that does not match: what is there is not the file that the recipe was written for"
)
Progress = Callable[[str], None]

_ASK_FOLDER = "import sysconfig; print(sysconfig.get_path('purelib'))"
_ASK_PACKAGES = (
    "import importlib.metadata as m, json; "
    "print(json.dumps({d.metadata['Name']: d.version for d in m.distributions()}))"
)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A recipe, and what has been built of it."""

    name: str
    about: str = ""
    tried: str | None = None  # when and where the recipe was built and used; None: never
    scorers: tuple[str, ...] = ()
    path: Path | None = None  # None: not built
    python: str = ""  # its version
    size: int = 0  # bytes
    packages: dict[str, str] = field(default_factory=dict)  # name -> version
    current: bool | None = None  # of the recipe as it is now; None: of a recipe that is not shipped, or not built

    @property
    def built(self) -> bool:
        """Whether it is there."""
        return self.path is not None


def environments_folder() -> Path:
    """Where environments are kept: ``$FLOWSTEER_CACHE/reward-envs``, or in the platform's cache folder."""
    return cache_folder("reward-envs")


def create(name: str, *, root: Path | None = None, python: str | None = None, progress: Progress = print) -> Path:
    """Build an environment, unless it is there already.

    Args:
        name: a shipped recipe, or the path of a ``.toml`` file.
        root: the folder of all environments; None: `environments_folder`.
        python: the interpreter to build it with; None: this one, or else the newest ``python3.N`` on the PATH that will do.
        progress: is told each step in a line.

    Returns:
        Its folder.

    Raises:
        ValueError: there is no such recipe, or no python that it takes.
        RuntimeError: a step failed; the message ends with the end of its output. Nothing is left of the attempt.
    """
    recipe = load_recipe(name)
    found = find_python(recipe, python)
    root = environments_folder() if root is None else root
    root.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{recipe.digest} {found.version} {found.platform}".encode()).hexdigest()[:12]
    target = root / f"{recipe.name}-{key}"
    with _lock(target, progress):
        if (target / RECORD).is_file() and python_in(target).exists():
            progress(f"{recipe.name} is already built: {target}")
            return target
        for old in root.glob(f".{target.name}-*"):  # of a build that was killed; its pip may still be writing there
            shutil.rmtree(old, ignore_errors=True)
        if target.exists():  # its python has been removed from the machine
            shutil.rmtree(target)
        building = _hidden(target)
        try:
            _build(recipe, found, building, progress)
            building.rename(target)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    progress(f"{recipe.name} is built: {target}")
    return target


def list_environments(*, root: Path | None = None) -> list[Environment]:
    """Every shipped recipe with what is built of it, then what is built of other recipes."""
    root = environments_folder() if root is None else root
    records = [(path, json.loads((path / RECORD).read_text("utf-8"))) for path in _built(root)]
    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        said = {"name": name, "about": recipe.about, "tried": recipe.tried, "scorers": tuple(recipe.scorers)}
        own = [(path, record) for path, record in records if record["name"] == name]
        rows += [Environment(**said, **_facts(path, record, recipe)) for path, record in own] or [Environment(**said)]
    others = [(path, record) for path, record in records if record["name"] not in recipe_names()]
    return rows + [Environment(name=record["name"], **_facts(path, record, None)) for path, record in others]


def find(name: str, *, root: Path | None = None) -> Path:
    """The folder of the environment that was built last of this recipe as it is now.

    Raises:
        ValueError: there is no such recipe, or nothing is built of it.
    """
    recipe = load_recipe(name)
    root = environments_folder() if root is None else root
    built = {path: json.loads((path / RECORD).read_text("utf-8")) for path in _built(root)}
    own = {path: record for path, record in built.items() if record["name"] == recipe.name}
    current = [path for path, record in own.items() if record["recipe"] == recipe.digest]
    if not current:
        older = " for this version of its recipe" if own else ""
        raise ValueError(
            f"the environment {recipe.name!r} is not built{older} in {root}; build it: flowsteer rewards env create {name}"
        )
    return max(current, key=lambda path: own[path]["created"])


def locate(name: str, scorer: str, *, root: Path | None = None) -> tuple[Path, str]:
    """The python of an environment, and ``path/to/file.py:Class`` of one of its scorers: what a worker is started with.

    Raises:
        ValueError: no such recipe, no such scorer, or the environment is not built.
    """
    recipe = load_recipe(name)
    if scorer not in recipe.scorers:
        raise ValueError(f"the recipe {name!r} has no scorer {scorer!r}; it has: {', '.join(recipe.scorers) or 'none'}")
    return python_in(find(name, root=root)), str(recipe.folder / recipe.scorers[scorer])


def check(name: str, *, root: Path | None = None, progress: Progress = print) -> None:
    """Whether a built environment still is what it was: its packages, its smoke import, its golden numbers.

    Raises:
        ValueError: there is no such recipe, or nothing is built of it.
        RuntimeError: something has changed; the message says what.
    """
    recipe = load_recipe(name)
    path = find(name, root=root)
    rebuild = f"build it again: flowsteer rewards env remove {name}, then create {name}"
    then = json.loads((path / RECORD).read_text("utf-8"))["packages"]
    now = _packages(path)
    changed = [
        f"{package} was {then.get(package, 'not there')} and is {now.get(package, 'not there')}"
        for package in sorted(then.keys() | now.keys())
        if then.get(package) != now.get(package)
    ]
    if changed:
        raise RuntimeError(f"the packages of {path} have changed: {'; '.join(changed)}; {rebuild}")
    progress(f"{len(now)} packages, as they were installed")
    _smoke(recipe, path)
    progress(f"it runs: {recipe.smoke}")
    if recipe.golden is None:
        progress("the recipe names no golden numbers")
        return
    script = recipe.folder / recipe.golden.script
    answer = json.loads(run_python(python_in(path), [str(script)], f"the golden script {script}").splitlines()[-1])
    for number, stored in recipe.golden.numbers.items():
        given = answer.get(number)
        if given is None or not abs(given - stored) <= recipe.golden.tolerance:
            raise RuntimeError(
                f"{recipe.name}: {number} is {given}, and was {stored} when the recipe was written (tolerance "
                f"{recipe.golden.tolerance:g}); scores of this environment are not comparable"
            )
        progress(f"{number}: {given:.7f}, stored {stored:.7f}, difference {abs(given - stored):.1e}")


def remove(name: str, *, root: Path | None = None, progress: Progress = print) -> list[Path]:
    """Delete all environments of this name, also those of older versions of its recipe; returns their folders."""
    root = environments_folder() if root is None else root
    stem = Path(name).stem if name.endswith(".toml") else name
    paths = [path for path in _built(root) if json.loads((path / RECORD).read_text("utf-8"))["name"] == stem]
    for path in paths:
        with _lock(path, progress):
            if path.exists():  # else somebody else has removed it meanwhile
                shutil.rmtree(path.rename(_hidden(path)))  # gone at once; deleting takes a while
        progress(f"removed {path}")
    if not paths:
        progress(f"nothing is built of {stem!r} in {root}")
    return paths


def _build(recipe: Recipe, python: Interpreter, folder: Path, progress: Progress) -> None:
    started = datetime.now(UTC)
    progress(f"{recipe.name}: an empty environment of python {python.version}")
    run_python(python.command, ["-m", "venv", str(folder)], "python -m venv")
    for step in recipe.install:
        progress(f"{recipe.name}: pip install -r {step.requirements}")
        _pip(recipe, step, folder)
    packages = Path(run_python(python_in(folder), ["-c", _ASK_FOLDER], "the new python").strip())
    for asset in recipe.asset:
        progress(f"{recipe.name}: {asset.target} from {asset.source}")
        _copy(asset, packages)
    for file, text in recipe.files.items():
        (packages / file).write_text(text, "utf-8")
    progress(f"{recipe.name}: {recipe.smoke}")
    _smoke(recipe, folder)
    record = {
        "name": recipe.name,
        "recipe": recipe.digest,
        "python": python.version,
        "platform": platform.platform(),
        "created": started.isoformat(timespec="microseconds"),
        "size": sum(file.lstat().st_size for file in folder.rglob("*")),
        "packages": _packages(folder),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1), "utf-8")


def _pip(recipe: Recipe, step: Install, folder: Path) -> None:
    options = ["--disable-pip-version-check", "--no-input", "--no-warn-script-location"]
    options += ["--require-hashes"] if step.hashes else []
    options += [] if step.dependencies else ["--no-deps"]
    options += [] if step.build_isolation else ["--no-build-isolation"]
    arguments = ["-m", "pip", "install", *options, "-r", str(recipe.folder / step.requirements)]
    run_python(python_in(folder), arguments, f"pip install -r {step.requirements}", advice=PIP_ADVICE)


def _copy(asset: Asset, packages: Path) -> None:
    content = (packages / asset.source).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != asset.sha256:
        raise RuntimeError(f"{asset.source} has the sha256 {found}; the recipe wants {asset.sha256}")
    (packages / asset.target).write_bytes(content)


def _smoke(recipe: Recipe, folder: Path) -> None:
    run_python(python_in(folder), ["-c", recipe.smoke], f"the smoke import ({recipe.smoke})")


def _packages(folder: Path) -> dict[str, str]:
    return json.loads(run_python(python_in(folder), ["-c", _ASK_PACKAGES], "reading the installed packages"))


def _built(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob(f"[!.]*/{RECORD}"))


def _facts(path: Path, record: dict[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    """What the record says, as fields of `Environment`."""
    facts = {key: record[key] for key in ("python", "size", "packages")}
    return {"path": path, "current": recipe and record["recipe"] == recipe.digest, **facts}


@contextmanager
def _lock(target: Path, progress: Progress) -> Iterator[None]:
    """Held while an environment is made or removed; it ends with its process, however that ends."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"another process is building or removing {target.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _hidden(target: Path) -> Path:
    """A new name beside the target, which nobody takes for a whole environment."""
    return target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")


__all__ = ["Environment", "check", "create", "environments_folder", "find", "list_environments", "locate", "remove"]
