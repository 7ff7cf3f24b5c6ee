"""Which columns of the prompt file a reward requires, read from its signature before anything is loaded.

A reward that cannot do without a column names it as an argument: ``def __call__(self, images, prompts, *, count, **columns)``
requires ``count``. One that takes it from ``columns.get`` requires nothing that could be seen from outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flowsteer.rewards.functions import RESERVED, FunctionReward, parameters_of
from flowsteer.rewards.registry import find_target


def required_columns(reward: Callable[..., Any]) -> tuple[str, ...]:
    """The columns that a reward's signature names without a default value.

    Args:
        reward: an object that is called with images and prompts, a function (one written for TRL as well), or a class
            whose objects are called.

    Example:
        ``def f(images, prompts, count, unit="cm", **columns)`` requires ``("count",)``.
    """
    return tuple(name for name, parameter in column_parameters(reward).items() if parameter.default is parameter.empty)


def column_parameters(reward: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a reward that are columns by name, with or without a default value."""
    if isinstance(reward, FunctionReward):
        reward = reward.function
    parameters = dict(parameters_of(reward.__call__ if inspect.isclass(reward) else reward))
    if inspect.isclass(reward):
        parameters.pop(next(iter(parameters), ""), None)  # self
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in RESERVED
    }


def check_columns(
    rewards: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Collection[str]],
    names: Mapping[str, Mapping[str, str]] | None = None,
    media: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Refuse a prompt file that lacks a column which a reward requires. Nothing but the reward's module is loaded.

    Args:
        rewards: name of each reward in this process -> its options.
        files: the setting that names a prompt file, and the file -> the columns that the reward gets with it.
        names: name of a reward -> what it calls a column -> what the file calls it, where that is something else.
        media: a file as in ``files`` -> its columns that hold pictures themselves, as in data sets. A reward gets those that it
            declares as its ``pictures``.

    Raises:
        ValueError: a column is missing, or there is no such reward.

    Example:
        ``check_columns({"my_rewards:Count": {}}, {"prompts.train=own.txt": []})`` raises where ``Count`` requires ``count``.
    """
    for name, options in rewards.items():
        for file, columns in files.items():
            own = (names or {}).get(name, {})
            shown = getattr(find_target(name), "pictures", None) or {}
            timed = ["frame_rate"] if getattr(find_target(name), "video", False) is True else []
            known = [*columns, *timed, *(argument for argument, column in own.items() if column in columns)]
            known += [argument for argument in shown if own.get(argument, argument) in (media or {}).get(file, ())]
            if missing := lacking(name, options, known):
                raise ValueError(
                    f"the reward {name!r} requires the column {', '.join(map(repr, missing))}, which {file} lacks (its "
                    f"columns: {', '.join(columns) or 'none'}). Give prompts as a .jsonl file, each line with it: "
                    f"{example_line('prompt', missing)}; or say which of its columns it is, in the reward's "
                    f"section: {{columns: {{{missing[0]}: COLUMN}}}}; or give the argument a default value"
                )


def lacking(name: str, options: Collection[str], columns: Collection[str]) -> list[str]:
    """The columns that a reward with these options requires, and that are not among those that are given."""
    target = find_target(name)
    bound = () if inspect.isclass(target) else options  # a function's options are arguments that are given already
    return [column for column in required_columns(target) if column not in bound and column not in columns]


def example_line(first: str, missing: Collection[str]) -> str:
    """A line of JSON that has what was missing: ``{"prompt": ..., "count": ...}``."""
    return "{" + ", ".join(f'"{name}": ...' for name in (first, *missing)) + "}"
