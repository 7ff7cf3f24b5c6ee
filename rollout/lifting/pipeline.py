"""A diffusers pipeline as three questions: prepare a prompt, the velocity at a step, decode the latents.

``FlowPipeline`` runs the pipeline's own code, cut at its denoising loop by ``lift``. It knows nothing about any model:
guidance, packing, timestep maps and the choice between transformers are the pipeline's. Where a pipeline cannot be lifted,
a hand-written adapter follows the protocol that this class follows, ``Pipeline``.

Letters: B samples, T denoising steps, X latent shape of one sample.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from flowsteer.rollout.lifting.arguments import CallArguments, Settings
from flowsteer.rollout.lifting.beginning import Beginning, Draws, Prologue, find_beginning
from flowsteer.rollout.lifting.conditioning import (
    Attribute,
    Conditioning,
    Key,
    Layout,
    UnlikeConditioning,
    find_layout,
)
from flowsteer.rollout.lifting.lift import ADAPTER_ADVICE, LiftError, lift
from flowsteer.rollout.lifting.loading import EMBEDDED, load_diffusers
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.schedules import read_schedule, steppable
from flowsteer.rollout.lifting.step import Body, LiftedStep, finish, join_states, run_to_step, split_state

logger = logging.getLogger(__name__)

EMBEDDED_LENGTH = 12  # tokens of a prompt
_NEUTRAL_PROMPT = "a photo"

Call = Callable[..., Any]


class _Denoiser:
    """Stands for a network in the lifted code: calls go to the route, everything else to the network itself."""

    def __init__(self, owner: FlowPipeline, name: str) -> None:
        self._owner, self._name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner._call(self._name, *args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(self._owner.pipe, self._name), attribute)

    @property
    def __class__(self) -> type:  # for pipelines that ask isinstance(self.controlnet, ...)
        return type(getattr(self._owner.pipe, self._name))


class _SilentBar:
    def update(self, count: int = 1) -> None:
        """A progress bar that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run of the prologue left."""

    conditioning: Conditioning
    state: Tensor  # [B, *X]
    drawn: tuple[Tensor, ...]  # its normal draws, in order

    def prologue(self) -> Prologue:
        return Prologue(
            state=self.state, values=self.conditioning.values, schedule=self.conditioning.schedule, drawn=self.drawn
        )


@dataclass(frozen=True, kw_only=True)
class _Probed:
    """What is known of a pipeline under one setting."""

    layout: dict[Key, Layout]  # which values carry rows
    from_loop: dict[str, Any]  # what the epilogue wants from the loop besides latents
    beginning: Beginning  # how the start follows from noise


class FlowPipeline:
    """A diffusers pipeline, lifted.

    A safety checker that blackens pictures (Stable Diffusion 1) is off while sampling here: most rewards score a black
    picture, so a policy would learn to be caught. The pipeline itself keeps its checker.

    Args:
        pipe: the pipeline. An epsilon or v_prediction pipeline gets a DDIM scheduler in place of its own.
        height, width: pixels, None for the pipeline's default.
        call_kwargs: further arguments of the pipeline's ``__call__``, which win over what is derived here.
        cache_size: how many prepared prompts are kept.

    Raises:
        LiftError: the pipeline's loop cannot be lifted (a ValueError).
        ValueError: an argument that the pipeline does not have.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        call_kwargs: Mapping[str, Any] | None = None,
        cache_size: int = 256,
    ) -> None:
        self.pipe: Any = pipe
        self.lifted = lift(type(pipe))
        if not self.denoisers:
            raise LiftError(f"the denoising loop of {type(pipe).__name__} calls no network of the pipeline itself")
        for name, denoiser in self.denoisers.items():
            if any("_hf_hook" in vars(module) for module in denoiser.modules()):
                raise ValueError(f"{name} carries offloading hooks; load the pipeline without offloading it")
        scheduler = steppable(self.pipe.scheduler)
        if scheduler is not self.pipe.scheduler:
            self.pipe.scheduler = scheduler
        # What an earlier call of the pipeline left on it (pipe._guidance_scale) must not move under prepared rows.
        self._private = {name: value for name, value in vars(pipe).items() if name.startswith("_")}
        # Cosmos has a safety checker without this method, and refuses to run without it: that one stays.
        checked = hasattr(pipe, "run_safety_checker") and getattr(pipe, "safety_checker", None) is not None
        self.unchecked: dict[str, Any] = {"safety_checker": None} if checked else {}
        if checked:
            logger.warning(
                "the safety checker of %s is off in training: its black pictures would be scored", type(pipe).__name__
            )
        at_one = self._view({"_guidance_scale": 1.0})
        self._arguments = CallArguments(
            type(pipe),
            size={name: value for name, value in (("height", height), ("width", width)) if value is not None},
            call_kwargs=call_kwargs or {},
            counts_from_zero=bool(getattr(at_one, "do_classifier_free_guidance", False)),
            has_guider="guider" in vars(pipe),
        )
        self._call: Call = self._call_inner
        self._cache_size = cache_size
        self._prepared: OrderedDict[tuple[str, Settings], Conditioning] = OrderedDict()
        self._probed: dict[Settings, _Probed] = {}

    @classmethod
    def load(
        cls, path: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **arguments: Any
    ) -> FlowPipeline:
        """From a folder, a hub id, or "embedded"; further arguments are the constructor's. See ``load_diffusers``.

        The embedded pipeline has no T5; what stands for its tokens is as short as its prompts unless ``call_kwargs`` says
        otherwise: diffusers' 256 zeros would make each pass six times slower.
        """
        if path == EMBEDDED:
            arguments["call_kwargs"] = {"max_sequence_length": EMBEDDED_LENGTH, **(arguments.get("call_kwargs") or {})}
        return cls(load_diffusers(path, dtype=dtype, device=device), **arguments)

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The networks that the denoising loop calls, by component name: ``{"transformer": ...}``."""
        return {
            name: component
            for name, component in vars(self.pipe).items()
            if name in self.lifted.attributes and isinstance(component, nn.Module)
        }

    @property
    def device(self) -> torch.device:
        """Where the first denoiser is."""
        return next(parameter.device for denoiser in self.denoisers.values() for parameter in denoiser.parameters())

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The signature of the pipeline's ``__call__``."""
        return self._arguments.parameters

    def route(self, call: Call) -> None:
        """Send the loop's network calls to ``call(name, *args, **kwargs)``, such as a trainer's wrapped network.

        Attributes (``self.transformer.config``) are still read from the pipeline's own network.
        """
        self._call = call

    def _call_inner(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.pipe, name)(*args, **kwargs)

    # --- prepare ---

    def prepare(
        self, prompts: list[str], *, num_inference_steps: int, guidance_scale: float, negative_prompt: str | None = None
    ) -> Conditioning:
        """One row per prompt, by the pipeline's prologue at batch 1; what was prepared before comes from memory.

        ``guidance_scale`` goes to the argument that switches guidance in this pipeline, in the pipeline's own unit; 1
        is off. Raises UnlikeConditioning (a ValueError) where prompts cannot stand in one batch, as with pipelines
        that do not pad: sample such prompts in batches of their own.
        """
        if not prompts:
            raise ValueError("there is no prompt to prepare; give at least one")
        settings = _settings(num_inference_steps, guidance_scale, negative_prompt)
        place = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        try:
            joined = Conditioning.join([self._prepare_one(prompt, settings) for prompt in place])
        except UnlikeConditioning as error:
            raise UnlikeConditioning(f"{error} (prompts: {dict(enumerate(place))})") from None
        return joined if len(place) == len(prompts) else joined.take([place[prompt] for prompt in prompts])

    def call_arguments(
        self, prompts: list[str], *, num_inference_steps: int, guidance_scale: float, negative_prompt: str | None = None
    ) -> dict[str, Any]:
        """The arguments with which ``pipe(**arguments, latents=latents)`` draws what this class draws."""
        return self._arguments.build(prompts, _settings(num_inference_steps, guidance_scale, negative_prompt))

    def forget(self) -> None:
        """Drop every prepared prompt: the next `prepare` asks the pipeline's prologue again."""
        self._prepared.clear()

    def _prepare_one(self, prompt: str, settings: Settings) -> Conditioning:
        key = (prompt, settings)
        if key not in self._prepared:
            if settings not in self._probed:
                self._probed[settings] = self._probe(prompt, settings)
            probed = self._probed[settings]
            beginning = probed.beginning
            one = self._run_prologue([prompt], settings, frozenset() if beginning.plain else beginning.draws)
            self._prepared[key] = replace(
                one.conditioning,
                layout=probed.layout,
                values={**probed.from_loop, **one.conditioning.values},
                base=None if beginning.plain else one.state,
                gain=beginning.gain,
                noise_names=beginning.noise_names,
            )
        self._prepared.move_to_end(key)
        while len(self._prepared) > self._cache_size:
            self._prepared.popitem(last=False)
        return self._prepared[key]

    def own_start(self, prompt: str, **settings: Any) -> tuple[Tensor, Conditioning]:
        """The latents [1, *X] with which the pipeline itself would start from its argument ``generator``, and that row."""
        row = self.prepare([prompt], **settings)
        own = self._run_prologue([prompt], _settings(**settings))
        return own.state, replace(row, values={**row.values, **own.conditioning.values}, layout=row.layout)

    def _probe(self, prompt: str, settings: Settings) -> _Probed:
        """Which values carry rows, how the start follows from noise, and what the epilogue wants from the loop."""
        try:
            two, three = (self._run_prologue([_NEUTRAL_PROMPT] * size, settings).conditioning for size in (2, 3))
        except LiftError:
            raise
        except Exception as error:
            raise ValueError(
                f"{type(self.pipe).__name__} prepares one prompt, but not two or three at once ({type(error).__name__}: "
                f"{error}), so how it lays out a batch is unknown; {ADAPTER_ADVICE}"
            ) from error
        some_only = sorted(map(str, two.values.keys() ^ three.values.keys()))
        if some_only:
            raise ValueError(f"{type(self.pipe).__name__} has {', '.join(some_only)} for some batch sizes only")
        found = {key: find_layout(two.values[key], three.values[key], str(key)) for key in two.values}
        missing = (self.lifted.epilogue_reads & self.lifted.writes) - two.values.keys() - {*self.lifted.states}

        def run(draws: frozenset[int], value: float) -> Prologue:
            return self._run_prologue([prompt], settings, draws, value).prologue()

        return _Probed(
            layout={name: rows for name, rows in found.items() if rows is not None},
            from_loop=self._left_by_the_loop(two, missing) if missing else {},
            beginning=find_beginning(run, type(self.pipe).__name__),
        )

    def _left_by_the_loop(self, conditioning: Conditioning, names: frozenset[str]) -> dict[str, Any]:
        """Plain values, such as a dtype, that an iteration leaves for the epilogue."""
        shape = (conditioning.size, *conditioning.latent_shape)
        latents = torch.zeros(shape, dtype=conditioning.latent_dtype, device=self.device)
        with torch.no_grad():
            generator = self.enter(latents, 0, conditioning)
            next(generator)
            left = finish(generator, latents)
        plain = (torch.dtype, torch.device, int, float, str)
        return {name: value for name, value in left.items() if name in names and isinstance(value, plain)}

    def _run_prologue(
        self, prompts: list[str], settings: Settings, draws: frozenset[int] = frozenset(), value: float = 0.0
    ) -> _Run:
        """The prologue for ``prompts``, on a private view of the pipeline; which values carry rows is not known yet.

        Its normal draws numbered in ``draws`` are replaced by ``value``.
        """
        lifted = self.lifted
        own: dict[str, Any] = {"scheduler": copy.deepcopy(self.pipe.scheduler)}
        if "guider" in vars(self.pipe):  # may keep momentum
            own["guider"] = copy.deepcopy(self.pipe.guider)
            own["guider"].guidance_scale = settings.guidance_scale
        view = self._view({**own, "_progress_bar_config": {"disable": True}})
        before = dict(vars(view))
        recorded = Draws(draws, value)
        with torch.no_grad(), fixed_randomness(self.device), recorded:
            local, iterable, around = lifted.prologue(view, **self._arguments.build(prompts, settings))
        for line, outer in zip(lifted.outer, around):
            if (passes := len(list(outer))) != 1:
                raise LiftError(
                    f"{type(self.pipe).__name__} denoises {passes} times in a loop around its denoising loop ({line}), one "
                    f"after the other; call it so that one pass is enough, or {ADAPTER_ADVICE}"
                )
        states = [local[name] for name in lifted.states if isinstance(local.get(name), Tensor)]
        if len(states) < len(lifted.states):
            raise LiftError(
                f"{type(self.pipe).__name__} gives {', '.join(map(repr, lifted.states))} to scheduler.step, not all of "
                f"which are tensors before the loop: the loop's state is more than the step's latents; {ADAPTER_ADVICE}"
            )
        items = tuple(iterable)
        read = ((lifted.body_reads | lifted.epilogue_reads) & local.keys()) - {*lifted.states}
        values: dict[str, Any] = {name: local[name] for name in sorted(read)}
        values |= dict.fromkeys(lifted.bars & values.keys(), _SilentBar())
        set_by_prologue = {name: value for name, value in vars(view).items() if before.get(name, view) is not value}
        attributes = {Attribute(name): value for name, value in {**own, **set_by_prologue}.items()}
        state = join_states(states)
        conditioning = Conditioning(
            schedule=read_schedule(view.scheduler, len(items)),
            latent_shape=tuple(state.shape[1:]),
            latent_dtype=state.dtype,
            size=len(prompts),
            values={**values, **attributes},
            layout={},
            items=items,
            shapes=tuple(tuple(own.shape[1:]) for own in states) if len(states) > 1 else (),
        )
        return _Run(conditioning=conditioning, state=state, drawn=tuple(recorded.drawn))

    # --- the loop ---

    def _view(self, attributes: Mapping[str, Any]) -> Any:
        """A shallow private copy of the pipeline, whose networks answer through the route."""
        view = object.__new__(type(self.pipe))
        public = {name: value for name, value in vars(self.pipe).items() if not name.startswith("_")}
        proxies = {name: _Denoiser(self, name) for name in self.denoisers}
        view.__dict__.update({**self._private, **public, **proxies, **self.unchecked, **attributes})
        return view

    def _bind(self, conditioning: Conditioning, names: frozenset[str]) -> dict[str, Any]:
        """``self`` and the locals ``names``, as the lifted functions want them."""
        attributes = {key.name: value for key, value in conditioning.values.items() if isinstance(key, Attribute)}
        local = {name: conditioning.values[name] for name in names if name in conditioning.values}
        return {"self": self._view(attributes), **local}

    def enter(
        self, latents: Tensor, index: int, conditioning: Conditioning, instead: Mapping[str, Any] | None = None
    ) -> Body:
        """One pass of the lifted body, not yet begun, on fresh locals; ``instead`` replaces some of them."""
        shape = (conditioning.size, *conditioning.latent_shape)
        if latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; this conditioning needs {shape}")
        if not 0 <= index < len(conditioning.items):
            raise ValueError(f"denoising index {index}; allowed are 0 to {len(conditioning.items) - 1}")
        bound = self._bind(conditioning, self.lifted.body_reads)
        bound |= self._states(latents, conditioning)
        bound |= instead or {}
        for name in self.lifted.written_in_place & bound.keys():
            bound[name] = bound[name].clone() if isinstance(bound[name], Tensor) else copy.copy(bound[name])
        return self.lifted.body(conditioning.items[index], **bound)

    def _states(self, latents: Tensor, conditioning: Conditioning) -> dict[str, Tensor]:
        """The pipeline's own locals that the latents are."""
        parts = split_state(latents.to(conditioning.latent_dtype), conditioning.shapes)
        return dict(zip(self.lifted.states, parts))

    def begin(self, latents: Tensor, index: int, conditioning: Conditioning) -> LiftedStep:
        """The iteration ``index`` of the pipeline's loop up to its step, from latents [B, *X]; any index in any order."""
        body = self.enter(latents, index, conditioning)
        velocity = join_states(run_to_step(body, type(self.pipe).__name__, index, len(self.lifted.states)))
        if velocity.shape != latents.shape:
            raise ValueError(
                f"{type(self.pipe).__name__} steps {list(velocity.shape)} where its latents are {list(latents.shape)}: "
                f"the loop's state is more than the step's latents; {ADAPTER_ADVICE}"
            )
        if self.lifted.tail_is_idle:
            return LiftedStep(velocity)

        def finished(next_latents: Tensor) -> Tensor:
            with torch.no_grad():
                return finish(body, next_latents)[self.lifted.states[0]]

        return LiftedStep(velocity, finished)

    def velocity(self, latents: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        """The velocity of `begin`, [B, *X] -> [B, *X]; differentiable. For training, which needs no more of a step."""
        return self.begin(latents, index, conditioning).velocity

    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """The epilogue: final latents [B, *X] -> images float32 [B, 3, H, W] in [0, 1], video [B, T, 3, H, W]."""
        bound = self._bind(conditioning, self.lifted.epilogue_reads) | self._states(latents, conditioning)
        with torch.no_grad():
            images = self.lifted.epilogue(**bound)[0]
        if not isinstance(images, Tensor) or images.dim() not in (4, 5):
            raise ValueError(f"{type(self.pipe).__name__} decodes to {type(images).__name__}, not to a batch of images")
        return images.float()


def _settings(num_inference_steps: int, guidance_scale: float, negative_prompt: str | None = None) -> Settings:
    return Settings(num_inference_steps, float(guidance_scale), negative_prompt)


@contextmanager
def fixed_randomness(device: torch.device) -> Iterator[None]:
    """Some prologues draw from the global generator (the latents of a control image): the same every time, and outside
    nothing has been drawn.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


__all__ = [
    "Conditioning",
    "FlowPipeline",
    "LiftError",
    "Pipeline",
    "UnlikeConditioning",
]
