"""Reward functions as TRL knows them, unmodified: ``f(prompts=, completions=, **columns) -> list[float | None]``.

What such a function is given follows `GRPOTrainer._calculate_rewards` of TRL 1.16:

=================  ==================================================================================================
``prompts``        list of B strings
``completions``    list of B ``PIL.Image`` in RGB (TRL: texts); of a video, a list of frames each
columns            every other column of the prompt file, a list of B values each; those that the function declares as
                   ``pictures`` as ``PIL.Image``, a mask in grey, a video as a list of frames
``log_extra``      ``log_extra(column, values)``: B numbers become a part of the scores under that name; columns that
                   are not numbers have nowhere to go here, which is said once
``log_metric``     ``log_metric(name, value)``: a part with that value for every sample (neither may be called ``score``)
=================  ==================================================================================================

Not passed, since images have no tokens and a score may not depend on when it is asked for: ``completion_ids``,
``trainer_state``, ``environments``. A function that cannot do without one of them is refused when it is loaded. TRL
passes everything to everybody; a function without ``**kwargs`` gets here only what it names. Asynchronous functions run
on an event loop in a thread of its own, as with TRL, but one after another.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flowsteer.rewards.types import Values

logger = logging.getLogger(__name__)

NOT_PASSED = ("completion_ids", "trainer_state", "environments")
# what a reward may declare of itself, as attributes: of a class, or of a function (`flowsteer.rewards.types.Reward`)
DECLARED = ("groupwise", "video", "sound", "pictures", "uses_prompt", "score_range", "fingerprint", "unscorable")
RESERVED = ("prompts", "completions", "images", "log_extra", "log_metric", *NOT_PASSED)


class FunctionReward:
    """A reward function written for TRL, as a `flowsteer.rewards.types.Reward`.

    Args:
        function: ``f(prompts=, completions=, **columns) -> list[float | None]``, a function or an object, ``async`` or not.

    Raises:
        ValueError: the function requires an argument that images do not have.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = name_of(function)
        declare(self, function)
        self._asynchronous = _is_async(function)
        self._told: set[str] = set()
        parameters = parameters_of(function)
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._named = frozenset(parameters)
        for name in NOT_PASSED:
            if name in parameters and parameters[name].default is inspect.Parameter.empty:
                raise ValueError(
                    f"reward function {self.name!r} requires {name!r}, which scoring images does not have; give it a "
                    "default value, or take it from **kwargs with kwargs.get"
                )

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]
    ) -> Values | Mapping[str, Values]:
        """Score uint8 [B, H, W, 3] or [B, T, H, W, 3]; see the module's text for what the function is given."""
        logged: dict[str, list[float | None]] = {}

        def log_extra(column: str, values: list[Any]) -> None:
            if all(isinstance(value, int | float | np.number) for value in values):
                logged[column] = [_finite(value) for value in values]
            elif column not in self._told:
                self._told.add(column)
                logger.warning("reward %r logs the column %r, which is not numbers and is not kept", self.name, column)

        def log_metric(name: str, value: float) -> None:
            logged[name] = [_finite(value)] * len(prompts)

        arguments: dict[str, Any] = {name: list(values) for name, values in columns.items()}
        wanted = getattr(self, "pictures", {})
        arguments |= {
            name: [None if own is None else _as_pil(own, wanted[name]) for own in arguments[name]]
            for name in wanted
            if name in arguments
        }
        arguments |= {"prompts": list(prompts), "completions": to_pil(images)}
        arguments |= {"log_extra": log_extra, "log_metric": log_metric}
        if not self._takes_all:
            arguments = {name: value for name, value in arguments.items() if name in self._named}
        values = self.function(**arguments)
        if self._asynchronous:
            values = asyncio.run_coroutine_threadsafe(values, _event_loop()).result()
        return {**logged, "score": values} if logged else values


def to_pil(images: np.ndarray) -> list[Any]:
    """uint8 [B, H, W, 3] to B images; [B, T, H, W, 3] to B lists of T frames."""
    return [Image.fromarray(image) if image.ndim == 3 else to_pil(image) for image in images]


def _as_pil(pixels: np.ndarray, kind: str) -> Any:
    return to_pil(pixels) if kind == "video" else Image.fromarray(pixels)


def bind_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The function with options bound, each of which it must name as an argument.

    Raises:
        ValueError: an option that the function does not name, or one that scoring itself passes.
    """
    accepted = [
        key
        for key, parameter in parameters_of(function).items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and key not in RESERVED
    ]
    for key in options:
        if key not in accepted:
            raise ValueError(f"reward {name!r} has no option {key!r}. It accepts: {', '.join(accepted) or 'none'}")
    if not options:
        return function
    bound = functools.partial(function, **options)
    declare(bound, function)
    return bound


def declare(wrapper: Any, function: Callable[..., Any]) -> None:
    """Give a wrapper what the function in it declares: a function says ``uses_prompt = False`` as an attribute."""
    while isinstance(function, functools.partial) and not vars(function):
        function = function.func
    for name in DECLARED:
        value = getattr(function, name, None)
        if value is not None:
            setattr(wrapper, name, value)


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A callable's parameters by name; of a class, those of its constructor. None where Python does not know them."""
    try:
        return inspect.signature(function).parameters
    except ValueError:  # some built-ins
        return {}


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function, of what a partial wraps, or of an object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _finite(value: float) -> float | None:
    """A number that is only reported may be NaN (a mean over nothing); it is then missing."""
    return float(value) if math.isfinite(value) else None


def _is_async(function: Callable[..., Any]) -> bool:
    """As `trl.trainer.utils.is_async_callable`: functions, partials of them, and objects with an async ``__call__``."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the process, so that what a function keeps open on it (a session) lives from call to call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="flowsteer-reward-loop", daemon=True).start()
    return loop
