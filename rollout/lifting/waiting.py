"""Components that are elsewhere or of another type than the rest of their pipeline.

Text encoders and autoencoders may wait on the CPU, and be on the pipeline's device only while they work. An autoencoder may
have a type of its own: what it is given is cast to it, and what it encodes is cast back.

The lifted code gets a stand-in for each of them (`Waiting`). It answers what is asked about a component as if that were on the
device; the first call of one of its methods moves it there. `Places.visit` sends back what was moved.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import nn

KINDS = ("text_encoders", "vae")
"""What may wait."""


class Places:
    """Where the components of a pipeline are.

    Args:
        pipe: the pipeline.
        waiting: names of components that wait.
        device: of all others, and of these while they work.
        typed: names of autoencoders that have a type of their own.
    """

    def __init__(self, pipe: Any, waiting: Collection[str], device: torch.device, typed: Collection[str] = ()) -> None:
        self.typed = frozenset(typed)
        self.pipe, self.waiting, self.device = pipe, frozenset(waiting), device
        self.moves: list[tuple[str, str]] = []  # (component, type of the device that it was moved to)
        self._here: set[str] = set()
        self._visits = 0

    def settle(self) -> None:
        """Bring every component to the device, but for those that wait."""
        for name, component in vars(self.pipe).items():
            if isinstance(component, nn.Module):
                component.to("cpu" if name in self.waiting else self.device)

    def fetch(self, name: str) -> None:
        """Bring a component to the device, if it is not there."""
        if name in self.waiting and name not in self._here:
            self._here.add(name)
            self._move(name, self.device)

    def fetch_all(self, names: Collection[str] | None = None) -> None:
        """Bring all components that wait to the device, or those of them that are named."""
        for name in sorted(self.waiting if names is None else self.waiting.intersection(names)):
            self.fetch(name)

    def stand_ins(self) -> dict[str, Waiting]:
        """What stands for these components in lifted code, by name."""
        return {name: Waiting(self, name) for name in self.waiting | self.typed}

    @contextmanager
    def visit(self) -> Iterator[None]:
        """What is moved to the device inside the context goes back at its end, or at that of the outermost one."""
        self._visits += 1
        try:
            yield
        finally:
            self._visits -= 1
            if not self._visits:
                for name in sorted(self._here):
                    self._move(name, torch.device("cpu"))
                self._here.clear()

    def _move(self, name: str, device: torch.device) -> None:
        getattr(self.pipe, name).to(device)
        self.moves.append((name, device.type))


class Waiting:
    """Stands for a component that waits; see the module."""

    def __init__(self, places: Places, name: str) -> None:
        self._places, self._name = places, name

    @property
    def device(self) -> torch.device:
        """Where it will be when it works."""
        return self._places.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._places.fetch(self._name)
        return getattr(self._places.pipe, self._name)(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(getattr(self._places.pipe, self._name), attribute)
        # a layer of it, or a method such as encode
        works = callable(found) and (attribute == "forward" or not hasattr(nn.Module, attribute))
        if works or isinstance(found, torch.Tensor):
            self._places.fetch(self._name)
            found = getattr(getattr(self._places.pipe, self._name), attribute)
        if self._name in self._places.typed and attribute in ("encode", "decode"):
            return _casting(found, self.dtype, back=attribute == "encode")
        return found

    @property
    def __class__(self) -> type:  # for pipelines that look for networks among their components
        return type(getattr(self._places.pipe, self._name))


def _casting(method: Any, dtype: torch.dtype, *, back: bool) -> Any:
    """An autoencoder's method that takes any type. Its answer has the type of what was given if it is cast ``back``."""

    @functools.wraps(method)
    def cast(given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = method(given.to(dtype), *args, **kwargs)
        return _cast(answer, given.dtype) if back else answer

    return cast


def _cast(answer: Any, dtype: torch.dtype) -> Any:
    """What an autoencoder encodes, in another type: latents, or a distribution of them."""
    if isinstance(answer, torch.Tensor):
        return answer.to(dtype) if answer.is_floating_point() else answer
    if isinstance(answer, tuple):
        return tuple(_cast(own, dtype) for own in answer)
    if isinstance(answer, BaseOutput):
        for name in answer:
            answer[name] = _cast(answer[name], dtype)
        return answer
    for name, own in vars(answer).items() if hasattr(answer, "__dict__") else ():
        if isinstance(own, torch.Tensor):
            setattr(answer, name, _cast(own, dtype))
    return answer
