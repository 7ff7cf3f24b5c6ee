"""The lifted parts of one pipeline, each run on a private view of it.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flowsteer.rollout.lifting.conditioning import Attribute, Conditioning
from flowsteer.rollout.lifting.lift import Lifted
from flowsteer.rollout.lifting.step import Body, split_state
from flowsteer.rollout.lifting.waiting import Places

Call = Callable[..., Any]
GUIDES = ("controlnet", "adapter")  # beginnings of the names of components that are never trained


class _Denoiser:
    """Stands for a network in the lifted code: calls go to the route, everything else to the network itself."""

    def __init__(self, owner: Loop, name: str) -> None:
        self._owner, self._name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner.call(self._name, *args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(self._owner.pipe, self._name), attribute)

    @property
    def __class__(self) -> type:  # for pipelines that ask isinstance(self.controlnet, ...)
        return type(getattr(self._owner.pipe, self._name))


class _Guide(_Denoiser):
    """Stands for a network that feeds a denoiser and is never trained: no gradient goes through it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return getattr(self._owner.pipe, self._name)(*args, **kwargs)


class Loop:
    """Where lifted code runs.

    Args:
        pipe: the pipeline.
        lifted: its parts.
        unchecked: attributes that the pipeline has otherwise while it samples here, such as no safety checker.

    ``places`` may be set to what keeps some components on the CPU while they do not work.
    """

    def __init__(self, pipe: Any, lifted: Lifted, unchecked: Mapping[str, Any]) -> None:
        self.pipe, self.lifted, self.unchecked = pipe, lifted, unchecked
        # What an earlier call of the pipeline left on it (pipe._guidance_scale) must not move under prepared rows.
        self._private = {name: value for name, value in vars(pipe).items() if name.startswith("_")}
        self.call: Call = self._call_inner
        self.places = Places(pipe, (), torch.device("cpu"))

    def _call_inner(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.pipe, name)(*args, **kwargs)

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The networks that the denoising loop calls, by component name: ``{"transformer": ...}``.

        ControlNets and adapters that feed a denoiser are not among them: they stay as they are.
        """
        return {
            name: component
            for name, component in vars(self.pipe).items()
            if name in self.lifted.attributes and isinstance(component, nn.Module) and not self._is_guide(name)
        }

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The networks that make embeddings of prompts and pictures, by component name."""
        return {
            name: own
            for name, own in vars(self.pipe).items()
            if isinstance(own, PreTrainedModel) and self._only_prepares(name)
        }

    @property
    def autoencoders(self) -> dict[str, nn.Module]:
        """The networks that encode and decode, by component name."""
        return {name: own for name, own in vars(self.pipe).items() if is_autoencoder(own)}

    def _only_prepares(self, name: str) -> bool:
        return name not in self.denoisers and not name.startswith((*GUIDES, "safety_checker"))

    def _is_guide(self, name: str) -> bool:
        return name.startswith(GUIDES) and isinstance(getattr(self.pipe, name), nn.Module)

    @property
    def device(self) -> torch.device:
        """Where the first denoiser is."""
        return next(parameter.device for denoiser in self.denoisers.values() for parameter in denoiser.parameters())

    @property
    def rows_wait(self) -> bool:
        """Whether prepared rows are kept on the CPU: they are, as the networks that made them."""
        return not self.places.waiting.isdisjoint(self.encoders)

    def kept(self, row: Conditioning) -> Conditioning:
        """A prepared row where it is kept; from pinned memory it comes back to an accelerator faster."""
        if not self.rows_wait:
            return row
        return row.pinned() if self.places.device.type == "cuda" else row.to("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first denoiser's first weight."""
        return next(parameter.dtype for denoiser in self.denoisers.values() for parameter in denoiser.parameters())

    def view(self, attributes: Mapping[str, Any]) -> Any:
        """A shallow private copy of the pipeline, whose networks answer through the route."""
        view = object.__new__(type(self.pipe))
        public = {name: value for name, value in vars(self.pipe).items() if not name.startswith("_")}
        proxies = {name: _Denoiser(self, name) for name in self.denoisers}
        proxies |= {name: _Guide(self, name) for name in public if self._is_guide(name)}
        proxies |= self.places.stand_ins()
        view.__dict__.update({**self._private, **public, **proxies, **self.unchecked, **attributes})
        return view

    def bind(self, conditioning: Conditioning, names: frozenset[str]) -> dict[str, Any]:
        """``self`` and the locals ``names``, as the lifted functions want them."""
        attributes = {key.name: value for key, value in conditioning.values.items() if isinstance(key, Attribute)}
        local = {name: conditioning.values[name] for name in names if name in conditioning.values}
        return {"self": self.view(attributes), **local}

    def enter(
        self, latents: Tensor, index: int, conditioning: Conditioning, instead: Mapping[str, Any] | None = None
    ) -> Body:
        """One pass of the lifted body, not yet begun, on fresh locals; ``instead`` replaces some of them."""
        shape = (conditioning.size, *conditioning.latent_shape)
        if latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; this conditioning needs {shape}")
        if not 0 <= index < len(conditioning.items):
            raise ValueError(f"denoising index {index}; allowed are 0 to {len(conditioning.items) - 1}")
        bound = self.bind(conditioning, self.lifted.body_reads)
        bound |= self.states(latents, conditioning)
        bound |= instead or {}
        for name in self.lifted.written_in_place & bound.keys():
            bound[name] = bound[name].clone() if isinstance(bound[name], Tensor) else copy.copy(bound[name])
        scheduler = bound["self"].scheduler
        if hasattr(scheduler, "_step_index"):  # which code after the step may ask; this copy has never stepped
            scheduler = bound["self"].scheduler = copy.copy(scheduler)
            scheduler._step_index = (scheduler.begin_index or 0) + index
        return _counting(self.lifted.body(conditioning.items[index], **bound), scheduler)

    def states(self, latents: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
        """The pipeline's own locals that the latents are, or are a part of."""
        state = latents.to(conditioning.latent_dtype)
        if conditioning.stepped is not None and conditioning.rest is not None:
            whole = conditioning.rest.to(state).flatten(1)
            whole = whole.index_copy(1, conditioning.stepped.to(whole.device), state.flatten(1))
            state = whole.reshape(conditioning.rest.shape)
        return dict(zip(self.lifted.states, split_state(state, conditioning.shapes)))


def _counting(body: Body, scheduler: Any) -> Body:
    """The body, with a scheduler that counts its steps as if it took them."""
    try:
        handed = next(body)
        while True:
            answer = yield handed
            if hasattr(scheduler, "_step_index"):
                scheduler._step_index += 1
            handed = body.send(answer)
    except StopIteration as stop:
        return stop.value


def is_autoencoder(component: Any) -> bool:
    """Whether it is a network that encodes and decodes."""
    both = all(callable(getattr(type(component), name, None)) for name in ("encode", "decode"))
    return isinstance(component, nn.Module) and both


@contextmanager
def fixed_randomness(device: torch.device) -> Iterator[None]:
    """Some prologues draw from the global generator (the latents of a control image): the same every time, and outside
    nothing has been drawn.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
