"""Configurations with an algorithm from outside: validated as strictly as those of the built-in ones."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field, create_model

from flowsteer.rl.algorithms import ALGORITHMS
from flowsteer.rl.config.schema import Config
from flowsteer.rl.config.section import by_name
from flowsteer.rl.plugins import find_algorithm, is_foreign
from flowsteer.rl.types import Algorithm


def config_for(data: Any) -> type[Config]:
    """The class that a mapping is to be validated with: one that knows the algorithm, if that is a plug-in.

    Raises ValueError if the plug-in is not there, cannot be imported, or is no algorithm.
    """
    section = by_name(data.get("algorithm")) if isinstance(data, dict) else None
    name = section.get("name") if isinstance(section, dict) else None
    return _with_algorithm(name, find_algorithm(name)) if isinstance(name, str) and is_foreign(name) else Config


@cache  # a configuration equals one that was saved and read again only if both have the same class
def _with_algorithm(name: str, algorithm: type[Algorithm]) -> type[Config]:
    """`Config`, whose algorithm may also be this one, under the name that the configuration gives it."""
    given: Any = Literal[name]
    named = create_model(
        algorithm.__name__,
        __base__=algorithm,
        __module__=algorithm.__module__,
        __doc__=algorithm.__doc__,
        name=(given, name),
    )
    section: Any = Annotated[Union[(*ALGORITHMS, named)], Field(discriminator="name"), BeforeValidator(by_name)]
    return create_model(
        "Config", __base__=Config, __module__=Config.__module__, __doc__=Config.__doc__, algorithm=(section, ...)
    )
