"""Finding a reward: by the name of an installed entry point, or by where a user's own function or class lives.

A package adds a reward with three lines of its ``pyproject.toml``::

    [project.entry-points."flowsteer.rewards"]
    my_reward = "my_package.my_module:MyReward"

The target is a class whose instances are a `flowsteer.rewards.types.Reward` (its constructor's arguments are the
options), such a function, or a reward function as TRL knows it (`flowsteer.rewards.functions`). Without packaging
anything, ``my_module:my_function`` names one in an installed package or in the current folder, and
``path/to/file.py:my_function`` one in a file.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from flowsteer.rewards.functions import FunctionReward, bind_options, parameters_of
from flowsteer.rewards.hosts.worker import what_hides
from flowsteer.rewards.types import Reward

GROUP = "flowsteer.rewards"


class RewardEntry(NamedTuple):
    """One line of the list of rewards."""

    name: str
    target: str  # package.module:attribute
    doc: str  # first line of its docstring, or why it cannot be imported
    distribution: str  # the installed package that brings it


def list_rewards() -> list[RewardEntry]:
    """All rewards that installed packages bring, by name. One that cannot be imported is listed with the reason."""
    entries = []
    for point in sorted(_points(), key=lambda point: (point.name, point.value)):
        try:
            doc = inspect.getdoc(point.load()) or ""
        except Exception as error:  # somebody else's package: listing the others must still work
            doc = f"cannot be imported: {type(error).__name__}: {error}"
        distribution = point.dist.name if point.dist is not None else ""
        entries.append(RewardEntry(point.name, point.value, (doc.splitlines() or [""])[0], distribution))
    return entries


def load_reward(name: str, **options: Any) -> Reward:
    """Make the reward of that name, or the one at ``package.module:attribute`` or ``path/to/file.py:attribute``.

    Args:
        name: an entry point of the group ``flowsteer.rewards``, ``package.module:attribute``, or
            ``path/to/file.py:attribute``.
        options: arguments of the reward's constructor; of a function, keyword arguments that it names.

    Raises:
        ValueError: no such reward, no such option, a required option is missing, or the target is not a reward.
        ImportError: the module that the name stands for cannot be imported.
    """
    target = find_target(name)
    if inspect.isclass(target):
        _check_options(name, target, options)
        reward = target(**options)
        if not callable(reward):
            raise ValueError(
                f"reward {name!r}: objects of the class {target.__name__} cannot be called; give it a method "
                "__call__(self, images, prompts, **columns)"
            )
    else:
        reward = bind_options(name, target, options)
    return _as_reward(name, reward)


def find_target(name: str) -> Callable[..., Any]:
    """The class or function that a reward's name stands for; its module is imported, nothing is made.

    Raises:
        ValueError: there is no such reward, or it is neither a class nor a function.
        ImportError: the module that the name stands for cannot be imported.
    """
    target = _import_target(name) if _is_place(name) else _entry_point(name).load()
    if not callable(target):
        raise ValueError(f"reward {name!r} is a {type(target).__name__}; it must be a class or a function")
    return target


def target_of(name: str) -> str:
    """``package.module:attribute`` (or ``path/to/file.py:attribute``) of a reward. Raises ValueError where there is none."""
    if not _is_place(name):
        return _entry_point(name).value
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        _check_file(name, Path(place), attribute)
    return name


def label_of(name: str) -> str:
    """The name that a reward's scores have: its own, without the folders of a file.

    Example: ``label_of("./mine/rewards.py:Red") == "rewards.py:Red"``; metrics keep "/" for the parts of a reward.
    """
    place, separator, attribute = name.rpartition(":")
    return f"{Path(place).name}:{attribute}" if separator and place.endswith(".py") else name


def _is_place(name: str) -> bool:
    """Whether a name says where the reward is written. Raises ValueError for a path that lacks something."""
    if name.endswith(".py"):
        _check_file(name, Path(name), "")
    if ":" not in name and "/" in name:
        raise ValueError(
            f"{name!r} is no place of a reward; write path/to/file.py:NAME, with the function's or class's name"
        )
    return ":" in name


def _check_file(name: str, file: Path, attribute: str) -> None:
    """Raise ValueError where there is no such file, or no attribute is named; the message lists what the file defines."""
    if not file.is_file():
        raise ValueError(f"reward {name!r}: there is no file {file.absolute()}")
    if not attribute:
        defined = ast.parse(file.read_bytes(), str(file)).body
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        names = [found.name for found in defined if isinstance(found, kinds) and not found.name.startswith("_")]
        given = name.removesuffix(":")
        raise ValueError(
            f"{name!r} does not say which function or class of the file is the reward; write "
            f"{' or '.join(f'{given}:{found}' for found in names) or f'{given}:NAME'}"
        )


def _import_file(name: str, file: Path, attribute: str) -> ModuleType:
    """The module of a file, imported once. It may import its neighbours, and hides no package of its own name."""
    _check_file(name, file, attribute)
    folder = str(file.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    module_name = f"reward_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file.absolute())
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _points() -> list[EntryPoint]:
    """The group's entry points, each once: a project installed from the current folder is seen twice."""
    return list({(point.name, point.value): point for point in entry_points(group=GROUP)}.values())


def _entry_point(name: str) -> EntryPoint:
    points = _points()
    found = [point for point in points if point.name == name]
    if len(found) > 1:
        targets = " and ".join(sorted(point.value for point in found))
        raise ValueError(
            f"several packages bring a reward {name!r}: {targets}; give the one you mean as package.module:attribute"
        )
    if not found:
        names = sorted({point.name for point in points})
        nearest = difflib.get_close_matches(name, names, n=len(names) or 1, cutoff=0.5)
        ordered = nearest + [other for other in names if other not in nearest]
        raise ValueError(
            f"there is no reward {name!r}; there are: {', '.join(ordered) or 'none'}. A new entry point is visible only "
            "after its project has been installed again (pip install -e .); a function or class of your own can also be "
            "given as package.module:attribute or path/to/file.py:attribute"
        )
    return found[0]


def _import_target(name: str) -> Any:
    """``path/to/file.py:attribute``, or ``package.module:attribute`` from the installed packages, then the current folder."""
    module_name, _, attribute = name.rpartition(":")
    if module_name.endswith(".py"):
        return _attribute(name, _import_file(name, Path(module_name), attribute), Path(module_name).name, attribute)
    if not module_name or not attribute:
        raise ValueError(
            f"{name!r} is no place of a reward; write package.module:attribute or path/to/file.py:attribute"
        )
    if "/" in module_name:
        raise ValueError(
            f"{name!r} is no place of a reward: a file's path ends in .py, as in {module_name}.py:{attribute}"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file here hides no installed package
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and what is missing is something that it imports
        if hidden := what_hides(module_name, error):
            raise ValueError(f"reward {name!r}: {hidden}") from error
        raise ValueError(
            f"reward {name!r}: there is no module {error.name!r} among the installed packages or in {os.getcwd()}"
        ) from error
    return _attribute(name, target, module_name, attribute)


def _attribute(name: str, target: Any, module_name: str, attribute: str) -> Any:
    """``attribute``, which may have dots, of a module. Raises ValueError, with the nearest, where there is none."""
    for part in attribute.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            public = [other for other in dir(target) if not other.startswith("_")]
            near = difflib.get_close_matches(part, public, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"reward {name!r}: {module_name} has no {part!r}{hint}") from error
    return target


def refuse_unknown(what: str, options: Mapping[str, Any], accepted: Sequence[str]) -> None:
    """Raise ValueError, with the nearest that is accepted, for the first option that is not."""
    for key in options:
        if key not in accepted:
            near = difflib.get_close_matches(key, accepted, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{what} has no option {key!r}{hint} It accepts: {', '.join(accepted) or 'none'}")


def _check_options(name: str, cls: type, options: Mapping[str, Any]) -> None:
    """The options against the constructor's signature, before anything heavy is imported."""
    parameters = parameters_of(cls)
    named = {
        key: parameter
        for key, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    accepted = ", ".join(named) or "none"
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        refuse_unknown(f"reward {name!r}", options, list(named))
    lacking = [key for key, parameter in named.items() if parameter.default is parameter.empty and key not in options]
    if lacking:
        raise ValueError(f"reward {name!r} needs the option {', '.join(map(repr, lacking))}. It accepts: {accepted}")


def _as_reward(name: str, reward: Callable[..., Any]) -> Reward:
    """A reward as it is; a function written for TRL in its adapter; anything else is refused."""
    parameters = parameters_of(reward)
    if "completions" in parameters:
        return FunctionReward(reward)
    takes_columns = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "images" in parameters and takes_columns:
        return reward
    lacking = "lacks **columns, under which the prompt file's other columns come" if "images" in parameters else ""
    raise ValueError(
        f"reward {name!r} takes ({', '.join(parameters)}){' and ' + lacking if lacking else ''}; a reward takes (images, "
        "prompts, **columns), and a reward function as TRL knows it (completions, **kwargs)"
    )
