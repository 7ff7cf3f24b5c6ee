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

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowsteer.rewards.doors import Door, blaming
from flowsteer.rewards.functions import FunctionReward, bind_options, parameters_of
from flowsteer.rewards.types import Reward

GROUP = "flowsteer.rewards"
DOOR = Door(group=GROUP, noun="reward", article="a", kinds=("function", "class"))


class RewardEntry(NamedTuple):
    """One line of the list of rewards."""

    name: str
    target: str  # package.module:attribute
    doc: str  # first line of its docstring, or why it cannot be imported
    distribution: str  # the installed package that brings it


def list_rewards() -> list[RewardEntry]:
    """All rewards that installed packages bring, by name. One that cannot be imported is listed with the reason."""
    entries = []
    for point in sorted(DOOR.points(), key=lambda point: (point.name, point.value)):
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
        ValueError: no such reward, no such option, a required option is missing, the target is not a reward, or its code
            raises an exception while it is imported or made.
    """
    target = find_target(name)
    if inspect.isclass(target):
        _check_options(name, target, options)
        with blaming(f"reward {name!r} cannot be made"):
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

    Raises ValueError if there is no such reward, it cannot be imported, or it is neither a class nor a function.
    """
    target = DOOR.load(name)
    if not callable(target):
        raise ValueError(f"reward {name!r} is a {type(target).__name__}; it must be a class or a function")
    return target


def target_of(name: str) -> str:
    """``package.module:attribute`` (or ``path/to/file.py:attribute``) of a reward. Raises ValueError where there is none."""
    return DOOR.target_of(name)


def label_of(name: str) -> str:
    """The name that a reward's scores have: its own, without the folders of a file.

    Example: ``label_of("./mine/rewards.py:Red") == "rewards.py:Red"``; metrics keep "/" for the parts of a reward.
    """
    place, separator, attribute = name.rpartition(":")
    return f"{Path(place).name}:{attribute}" if separator and place.endswith(".py") else name


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
