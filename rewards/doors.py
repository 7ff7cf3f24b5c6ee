"""The doors for plug-ins: what a name in a configuration stands for, whoever wrote it.

A door is a group of entry points. A package adds to it with three lines of its ``pyproject.toml``::

    [project.entry-points."flowsteer.rewards"]
    my_reward = "my_package.my_module:MyReward"

Without packaging anything, ``package.module:attribute`` names something in an installed package or in the current folder,
and ``path/to/file.py:attribute`` something in a file.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from flowsteer.rewards.hosts.worker import what_hides

_NODES: dict[str, tuple[type[ast.stmt], ...]] = {
    "function": (ast.FunctionDef, ast.AsyncFunctionDef),
    "class": (ast.ClassDef,),
}


@dataclass(frozen=True, kw_only=True)
class Door:
    """One kind of plug-in.

    Example: ``Door(group="flowsteer.rewards", noun="reward", article="a", kinds=("function", "class"))``.
    """

    group: str  # of the entry points
    noun: str
    article: str  # "a" or "an"
    kinds: tuple[str, ...]  # what a plug-in may be: "function", "class"

    def load(self, name: str) -> Any:
        """The object that a name stands for; its module is imported.

        Raises ValueError if there is no such entry point, module, file or attribute, or if its module cannot be imported.
        """
        if self.is_place(name):
            return self._import_target(name, name)
        point = self.entry_point(name)
        return self._import_target(name, f"{point.module}:{point.attr}")

    def target_of(self, name: str) -> str:
        """``package.module:attribute``, or ``path/to/file.py:attribute``. Raises ValueError if there is none."""
        if not self.is_place(name):
            return self.entry_point(name).value
        place, _, attribute = name.rpartition(":")
        if place.endswith(".py"):
            self._check_file(name, Path(place), attribute)
        return name

    def points(self) -> list[EntryPoint]:
        """The group's entry points, each once: a project installed from the current folder is seen twice."""
        return list({(point.name, point.value): point for point in entry_points(group=self.group)}.values())

    def entry_point(self, name: str) -> EntryPoint:
        """The entry point of that name. Raises ValueError, with the nearest names first, if there is none or several."""
        points = self.points()
        found = [point for point in points if point.name == name]
        if len(found) > 1:
            targets = " and ".join(sorted(point.value for point in found))
            raise ValueError(
                f"several packages bring {self.article} {self.noun} {name!r}: {targets}; give the one you mean as "
                "package.module:attribute"
            )
        if not found:
            names = sorted({point.name for point in points})
            raise ValueError(f"there is no {self.noun} {name!r}; {nearest_of(name, names)}. {self.advice()}")
        return found[0]

    def advice(self) -> str:
        """One sentence about plug-ins that are not listed."""
        return (
            "A new entry point is visible only after its project has been installed again (pip install -e .); "
            f"a {' or '.join(self.kinds)} of your own can also be given as package.module:attribute or "
            "path/to/file.py:attribute"
        )

    def is_place(self, name: str) -> bool:
        """Whether a name says where the code is. Raises ValueError for a path that lacks something."""
        if name.endswith(".py"):
            self._check_file(name, Path(name), "")
        if ":" not in name and "/" in name:
            kinds = " or ".join(f"{kind}'s" for kind in self.kinds)
            raise ValueError(
                f"{name!r} is no place of {self.article} {self.noun}; write path/to/file.py:NAME, with the {kinds} name"
            )
        return ":" in name

    def _check_file(self, name: str, file: Path, attribute: str) -> None:
        """Raise ValueError if the file is missing, or no attribute is named; the message lists what the file defines."""
        if not file.is_file():
            raise ValueError(f"{self.noun} {name!r}: there is no file {file.absolute()}")
        if not attribute:
            nodes = tuple(node for kind in self.kinds for node in _NODES[kind])
            names = [
                found.name  # type: ignore[attr-defined]
                for found in ast.parse(file.read_bytes(), str(file)).body
                if isinstance(found, nodes) and not found.name.startswith("_")  # type: ignore[attr-defined]
            ]
            given = name.removesuffix(":")
            raise ValueError(
                f"{name!r} does not say which {' or '.join(self.kinds)} of the file is the {self.noun}; write "
                f"{' or '.join(f'{given}:{found}' for found in names) or f'{given}:NAME'}"
            )

    def _import_file(self, name: str, file: Path, attribute: str) -> ModuleType:
        """The module of a file, imported once. It may import its neighbours, and hides no package of its own name."""
        self._check_file(name, file, attribute)
        folder = str(file.absolute().parent)
        if folder not in sys.path:
            sys.path.append(folder)
        key = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
        module_name = f"{self.noun.replace(' ', '_')}_{file.stem}_{key}"
        if module_name in sys.modules:
            return sys.modules[module_name]
        spec = importlib.util.spec_from_file_location(module_name, file.absolute())
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        try:
            with blaming(f"{self.noun} {name!r} cannot be imported"):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
        return module

    def _import_target(self, name: str, place: str) -> Any:
        """``path/to/file.py:attribute``, or ``package.module:attribute``: installed packages first, then this folder."""
        module_name, _, attribute = place.rpartition(":")
        if module_name.endswith(".py"):
            file = Path(module_name)
            return self._attribute(name, self._import_file(name, file, attribute), file.name, attribute)
        what = f"{name!r} is no place of {self.article} {self.noun}"
        if not module_name or not attribute:
            raise ValueError(f"{what}; write package.module:attribute or path/to/file.py:attribute")
        if "/" in module_name:
            raise ValueError(f"{what}: a file's path ends in .py, as in {module_name}.py:{attribute}")
        try:
            with blaming(f"{self.noun} {name!r} cannot be imported", but=lambda error: _is_absent(module_name, error)):
                target: Any = _import_module(module_name)
        except ModuleNotFoundError as error:
            if hidden := what_hides(module_name, error):
                raise ValueError(f"{self.noun} {name!r}: {hidden}") from error
            raise ValueError(
                f"{self.noun} {name!r}: there is no module {error.name!r} among the installed packages or in "
                f"{os.getcwd()}"
            ) from error
        return self._attribute(name, target, module_name, attribute)

    def _attribute(self, name: str, target: Any, module_name: str, attribute: str) -> Any:
        """``attribute``, which may have dots, of a module. Raises ValueError, with the nearest, if there is none."""
        for part in attribute.split("."):
            try:
                target = getattr(target, part)
            except AttributeError as error:
                public = [other for other in dir(target) if not other.startswith("_")]
                near = difflib.get_close_matches(part, public, n=3, cutoff=0.5)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                if getattr(target, "__file__", "") is None:  # a folder without __init__.py
                    hint = (
                        f": it is the folder {next(iter(target.__path__))} here, not an installed package; run from another "
                        "folder, or set PYTHONSAFEPATH=1"
                    )
                raise ValueError(f"{self.noun} {name!r}: {module_name} has no {part!r}{hint}") from error
        return target


def nearest_of(name: str, names: Sequence[str]) -> str:
    """What to say of an unknown name: the nearest one, and all.

    Example: ``nearest_of("orc", ["clip", "ocr"]) == "did you mean 'ocr'? There are: clip, ocr"``.
    """
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"{f'did you mean {near[0]!r}? There' if near else 'there'} are: {', '.join(names) or 'none'}"


def _import_module(module_name: str) -> ModuleType:
    """An installed module, or else one in the current folder: a folder here must not hide a package of the same name."""
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not _is_absent(module_name, error) or os.getcwd() in sys.path or "" in sys.path:
            raise
    sys.path.append(os.getcwd())
    return importlib.import_module(module_name)


@contextmanager
def blaming(what: str, *, but: Callable[[Exception], bool] = lambda error: False) -> Iterator[None]:
    """Say whose fault an exception in the code of a plug-in is, and where: a ValueError that begins with ``what``.

    Messages that were written for users pass as they are, and so does what ``but`` is true of.
    """
    try:
        yield
    except Exception as error:
        if is_for_users(error) or but(error):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        text, place = str(error), f"{last.filename}, line {last.lineno}"
        if isinstance(error, SyntaxError):
            text, place = error.msg, f"{error.filename}, line {error.lineno}"
        raise ValueError(
            f"{what}: {type(error).__name__}: {text} ({place}); FLOWSTEER_TRACEBACK=1 shows the traceback"
        ) from error


def is_for_users(error: BaseException) -> bool:
    """Whether a message was written for a user: by our own code, or by the system about a file."""
    if isinstance(error, OSError):
        return error.filename is not None
    frames = list(traceback.walk_tb(error.__traceback__))
    return isinstance(error, ValueError) and str(frames[-1][0].f_globals.get("__name__")).startswith("flowsteer.")


def _is_absent(module_name: str, error: Exception) -> bool:
    """Whether the module itself is not there, or a package that it is in; else something that it imports is missing."""
    return (
        isinstance(error, ModuleNotFoundError)
        and error.name is not None
        and f"{module_name}.".startswith(f"{error.name}.")
    )
