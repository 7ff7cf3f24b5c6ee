"""Algorithms by name: those of this package, of installed packages, and of a user's own files.

A package adds an algorithm with two lines of its ``pyproject.toml``::

    [project.entry-points."flowsteer.algorithms"]
    my_algorithm = "my_package.my_module:MyAlgorithm"

A configuration names it as ``algorithm: {name: my_algorithm, ...}``. Without an entry point ``package.module:MyAlgorithm``
and ``path/to/file.py:MyAlgorithm`` do. The class subclasses `TransitionAlgorithm` or `ForwardAlgorithm`: its fields are its
settings, and `per_sample`, or for algorithms on pairs `logits`, is its loss. It needs no ``name``: that is what the
configuration calls it.
"""

from __future__ import annotations

import inspect
import sys
from typing import NamedTuple

from flowsteer.rewards.doors import Door, nearest_of
from flowsteer.rl.algorithms import ALGORITHMS
from flowsteer.rl.algorithms.forward import ForwardAlgorithm
from flowsteer.rl.algorithms.transitions import TransitionAlgorithm
from flowsteer.rl.types import Algorithm

DOOR = Door(group="flowsteer.algorithms", noun="algorithm", article="an", kinds=("class",))
BUILT_IN: dict[str, type[Algorithm]] = {own.model_fields["name"].default: own for own in ALGORITHMS}
_FAMILIES = (TransitionAlgorithm, ForwardAlgorithm)


class AlgorithmEntry(NamedTuple):
    """One line of the list of algorithms."""

    name: str
    target: str  # package.module:attribute
    about: str  # the first line of its module's docstring, with the paper; or why it cannot be used
    distribution: str  # the installed package that brings it


def find_algorithm(name: str) -> type[Algorithm]:
    """The class that a name in a configuration stands for.

    Raises ValueError if there is no such algorithm, it cannot be imported, or it is none.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not is_foreign(name):
        names = [*BUILT_IN, *installed_names()]
        raise ValueError(f"there is no algorithm {name!r}; {nearest_of(name, names)}. {DOOR.advice()}")
    return check_class(name, DOOR.load(name))


def is_foreign(name: object) -> bool:
    """Whether a name says where a plug-in is, or is that of an installed one. Raises ValueError for an incomplete path."""
    if not isinstance(name, str) or name in BUILT_IN:
        return False
    return DOOR.is_place(name) or name in installed_names()


def installed_names() -> list[str]:
    """The names of the algorithms that other packages bring."""
    return sorted({point.name for point in DOOR.points()} - BUILT_IN.keys())


def list_algorithms() -> list[AlgorithmEntry]:
    """The built-in algorithms, then those of installed packages by name. One that cannot be used is listed with the reason."""
    entries = [AlgorithmEntry(name, _target(own), about(own), "flowsteer") for name, own in BUILT_IN.items()]
    for point in sorted(DOOR.points(), key=lambda point: (point.name, point.value)):
        distribution = point.dist.name if point.dist is not None else ""
        if point.name in BUILT_IN:
            text = f"hidden by the built-in {point.name}: name it {point.value}"
        else:
            try:
                text = about(check_class(point.name, point.load()))
            except Exception as error:  # somebody else's package: listing the others must still work
                text = f"cannot be used: {type(error).__name__}: {error}"
        entries.append(AlgorithmEntry(point.name, point.value, text, distribution))
    return entries


def check_class(name: str, target: object) -> type[Algorithm]:
    """The target, if it is an algorithm. Raises ValueError that says what it lacks."""
    bases = (
        "flowsteer.rl.algorithms.transitions.TransitionAlgorithm or flowsteer.rl.algorithms.forward.ForwardAlgorithm"
    )
    if not inspect.isclass(target):
        raise ValueError(f"algorithm {name!r} is a {type(target).__name__}; it must be a class, a subclass of {bases}")
    if target in _FAMILIES or not issubclass(target, _FAMILIES):
        what = "the base of a family" if target in _FAMILIES else "no algorithm"
        raise ValueError(
            f"algorithm {name!r}: the class {target.__name__} is {what}; an algorithm is a subclass of {bases}"
        )
    family = next(base for base in _FAMILIES if issubclass(target, base))
    method = "logits" if target.on_pairs else "per_sample"
    if getattr(target, method) is getattr(family, method):
        why = "compares pairs (on_pairs = True)" if target.on_pairs else "learns from single samples"
        raise ValueError(
            f"algorithm {name!r}: the class {target.__name__} {why} and needs a method {method}(self, terms)"
        )
    return target


def about(algorithm: type[Algorithm]) -> str:
    """The first line of the docstring of its module, which says the paper; of the class itself if that has none."""
    text = inspect.cleandoc(sys.modules[algorithm.__module__].__doc__ or algorithm.__doc__ or "")
    return (text.splitlines() or [""])[0]


def _target(algorithm: type[Algorithm]) -> str:
    return f"{algorithm.__module__}:{algorithm.__name__}"
