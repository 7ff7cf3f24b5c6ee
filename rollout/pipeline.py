"""Any diffusers pipeline as three questions: prepare a prompt, the velocity at a step, decode the latents.

``FlowPipeline`` runs the pipeline's own code, cut at its denoising loop by ``lift``. It knows nothing about any model:
guidance, packing, timestep maps and the choice between transformers are the pipeline's. ``Pipeline`` is the protocol that
a hand-written adapter follows where a pipeline cannot be lifted.

Letters: B samples, T denoising steps, X latent shape of one sample.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from flowsteer.rollout.conditioning import Conditioning, Layout, UnlikeConditioning, find_layout
from flowsteer.rollout.lift import LiftError, lift
from flowsteer.rollout.schedules import read_schedule, steppable

EMBEDDED = "embedded"
_OURS = [
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "latents",
    "generator",
    "output_type",
    "return_dict",
    "num_images_per_prompt",
    "callback",
    "callback_steps",
    "callback_on_step_end",
    "height",
    "width",
]
_NEUTRAL_PROMPT = "a photo"

Call = Callable[..., Any]


class Pipeline(Protocol):
    """What sampling and learning ask of a model. ``FlowPipeline`` is one; a hand-written adapter may stand in."""

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The networks that the denoising loop calls, by component name."""
        ...

    def prepare(
        self, prompts: list[str], *, num_inference_steps: int, guidance_scale: float, negative_prompt: str | None = None
    ) -> Conditioning:
        """One row per prompt."""
        ...

    def velocity(self, latents: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        """[B, *X] -> [B, *X], differentiable, for any index in any order."""
        ...

    def advance(self, latents: Tensor, next_latents: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        """The latents that enter the next index, after this index's step gave ``next_latents``."""
        ...

    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, *X] -> images float32 [B, 3, H, W] in [0, 1], video [B, T, 3, H, W]."""
        ...


class Settings(NamedTuple):
    """Everything besides the prompt that a prepared row depends on."""

    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None


class _StepOutput(NamedTuple):
    """What the lifted body gets back from its ``yield``: ``scheduler.step(...)[0]`` or ``.prev_sample``."""

    prev_sample: Tensor


class _Denoiser:
    """Stands for a network in the lifted code: calls go to the route, everything else to the network itself."""

    def __init__(self, owner: FlowPipeline, name: str) -> None:
        self._owner, self._name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._owner._call(self._name, *args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(getattr(self._owner.pipe, self._name), attribute)

    @property
    def __class__(self) -> type:  # isinstance(pipe.transformer, ...) in pipelines
        return type(getattr(self._owner.pipe, self._name))


class FlowPipeline:
    """A diffusers pipeline, lifted.

    Args:
        pipe: the pipeline. An epsilon or v_prediction pipeline gets a DDIM scheduler in place of its own.
        height, width: pixels, None for the pipeline's default.
        call_kwargs: further arguments of the pipeline's ``__call__``, which win over what is derived here.
        cache_size: how many prepared prompts are kept.

    Raises:
        LiftError: the pipeline's loop cannot be lifted.
        ValueError: an argument that the pipeline does not have.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        height: int | None = None,
        width: int | None = None,
        call_kwargs: dict[str, Any] | None = None,
        cache_size: int = 256,
    ) -> None:
        self.pipe: Any = pipe
        self.lifted = lift(type(pipe))
        self._parameters = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
        size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
        self._check_arguments(size, call_kwargs or {})
        self._fixed = {**size, **(call_kwargs or {})}
        if not self.denoisers:
            raise LiftError(f"the denoising loop of {type(pipe).__name__} calls no network of the pipeline")
        scheduler = steppable(self.pipe.scheduler)
        if scheduler is not self.pipe.scheduler:
            self.pipe.scheduler = scheduler
        # What an earlier call of the pipeline left on it (pipe._guidance_scale) must not move under prepared rows.
        self._private = {name: value for name, value in vars(pipe).items() if name.startswith("_")}
        self._call: Call = self._call_inner
        self._cache_size = cache_size
        self._prepared: OrderedDict[tuple[str, Settings], Conditioning] = OrderedDict()
        self._layouts: dict[Settings, tuple[dict[str, Layout], dict[str, Any]]] = {}
        self._suspended: tuple[Tensor, int, Conditioning, Generator] | None = None

    @classmethod
    def load(
        cls, path: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **arguments: Any
    ) -> FlowPipeline:
        """From a folder, a hub id, or "embedded", the tiny pipeline that comes with this package.

        Components that ``model_index.json`` leaves out or lists as [null, null] are None: Stable Diffusion 3 without T5
        loads. Further arguments are the constructor's.
        """
        folder = str(Path(__file__).parent / "embedded") if path == EMBEDDED else path
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **_absent_components(folder))
        return cls(pipe.to(device), **arguments)

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The networks that the denoising loop calls, by component name: ``{"transformer": ...}``."""
        components = vars(self.pipe)
        return {
            name: component
            for name, component in components.items()
            if name in self.lifted.attributes and isinstance(component, nn.Module)
        }

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

        ``guidance_scale`` goes to the argument that switches guidance in this pipeline, in the pipeline's own unit; 1 is
        off. Raises UnlikeConditioning (a ValueError) where the prompts' rows have different shapes, as with pipelines
        that do not pad: prepare these prompts one by one.
        """
        if not prompts:
            raise ValueError("there is no prompt to prepare; give at least one")
        settings = Settings(num_inference_steps, float(guidance_scale), negative_prompt)
        place = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        try:
            joined = Conditioning.join([self._prepare_one(prompt, settings) for prompt in place])
        except UnlikeConditioning as error:
            listed = dict(enumerate(place))
            raise UnlikeConditioning(f"{error} (prompts: {listed})") from None
        return joined if len(place) == len(prompts) else joined.take([place[prompt] for prompt in prompts])

    def _prepare_one(self, prompt: str, settings: Settings) -> Conditioning:
        key = (prompt, settings)
        if key in self._prepared:
            self._prepared.move_to_end(key)
            return self._prepared[key]
        if settings not in self._layouts:
            self._layouts[settings] = self._probe(settings)
        layout, from_loop = self._layouts[settings]
        prepared = self._run_prologue([prompt], settings, layout, from_loop)
        self._prepared[key] = prepared
        while len(self._prepared) > self._cache_size:
            self._prepared.popitem(last=False)
        return prepared

    def _probe(self, settings: Settings) -> tuple[dict[str, Layout], dict[str, Any]]:
        """Which values carry rows, and what the epilogue wants from the loop besides latents."""
        try:
            two, three = (self._run_prologue([_NEUTRAL_PROMPT] * size, settings, {}, {}) for size in (2, 3))
        except Exception as error:
            raise ValueError(
                f"{type(self.pipe).__name__} cannot prepare two or three prompts at once, so how it lays out a batch is "
                f"unknown ({type(error).__name__}: {error}); write an adapter for it (flowsteer.rollout.pipeline.Pipeline)"
            ) from error
        if two.values.keys() != three.values.keys():
            raise ValueError(
                f"locals {sorted(two.values.keys() ^ three.values.keys())} exist for some batch sizes only"
            )
        found = {name: find_layout(two.values[name], three.values[name], name) for name in two.values}
        layout = {name: rows for name, rows in found.items() if rows is not None}
        missing = (self.lifted.epilogue_reads & self.lifted.writes) - two.values.keys() - {self.lifted.latents}
        from_loop = self._locals_of_one_pass(two) if missing else {}
        return layout, {name: value for name, value in from_loop.items() if name in missing}

    def _locals_of_one_pass(self, conditioning: Conditioning) -> dict[str, Any]:
        """Plain values (dtypes, numbers) that the loop leaves for the epilogue."""
        latents = torch.zeros(
            conditioning.size, *conditioning.latent_shape, dtype=conditioning.latent_dtype, device=self.pipe.device
        )
        with torch.no_grad():
            generator = self._enter(latents, 0, conditioning)
            next(generator)
            left = _finish(generator, latents)
        return {name: value for name, value in left.items() if not isinstance(value, (Tensor, list, tuple, dict))}

    def _run_prologue(
        self, prompts: list[str], settings: Settings, layout: Mapping[str, Layout], from_loop: Mapping[str, Any]
    ) -> Conditioning:
        """The prologue for ``prompts``, on a private view of the pipeline."""
        lifted = self.lifted
        view = self._view({"scheduler": copy.deepcopy(self.pipe.scheduler), "_progress_bar_config": {"disable": True}})
        if "guider" in vars(self.pipe):  # may keep momentum
            view.__dict__["guider"] = copy.deepcopy(self.pipe.guider)
            view.guider.guidance_scale = settings.guidance_scale
        before = dict(vars(view))
        with torch.no_grad():
            local, iterable = lifted.prologue(view, **self._arguments(len(prompts), prompts, settings))
        items = tuple(iterable)
        latents = local.get(lifted.latents)
        if not isinstance(latents, Tensor):
            raise LiftError(
                f"{type(self.pipe).__name__} gives {lifted.latents!r} to scheduler.step, which does not exist before the "
                "loop: its state is more than the step's latents; write an adapter for it"
            )
        read = (lifted.body_reads | lifted.epilogue_reads) & local.keys() - {lifted.latents}
        values = {**from_loop, **{name: local[name] for name in sorted(read)}}
        values |= dict.fromkeys(lifted.bars & values.keys(), SimpleNamespace(update=lambda *_: None))
        private = {name: value for name, value in vars(view).items() if before.get(name, view) is not value}
        private["scheduler"] = view.scheduler
        if "guider" in vars(self.pipe):
            private["guider"] = view.guider
        values |= {f"self.{name}": value for name, value in private.items()}
        return Conditioning(
            schedule=read_schedule(view.scheduler, len(items)),
            latent_shape=tuple(latents.shape[1:]),
            latent_dtype=latents.dtype,
            size=len(prompts),
            values=values,
            layout=layout,
            items=items,
        )

    # --- the arguments of __call__ ---

    def _check_arguments(self, size: Mapping[str, Any], call_kwargs: Mapping[str, Any]) -> None:
        name = type(self.pipe).__name__
        for key in call_kwargs:
            if key in _OURS:
                raise ValueError(f"call_kwargs[{key!r}] is set by FlowPipeline itself; leave it out")
        for key in itertools.chain(size, call_kwargs):
            if key not in self._parameters:
                near = difflib.get_close_matches(key, self._parameters, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(list(self._parameters)[1:])}"
                raise ValueError(f"{name}.__call__ has no argument {key!r}; {hint}")

    def _arguments(self, count: int, prompts: list[str], settings: Settings) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "prompt": prompts,
            "num_inference_steps": settings.num_inference_steps,
            "generator": torch.Generator().manual_seed(0),  # the prologue's own noise is never used
            "output_type": "pt",
            "return_dict": False,
            **self._guidance(settings.guidance_scale),
        }
        arguments = {name: value for name, value in arguments.items() if name in self._parameters} | self._fixed
        negative = settings.negative_prompt
        if negative is None and arguments.get("true_cfg_scale", 0) > 1:
            negative = ""  # such pipelines take a missing negative prompt for guidance off
        if negative is not None:
            if "negative_prompt" not in self._parameters:
                raise ValueError(f"{type(self.pipe).__name__} takes no negative prompt; leave it out")
            arguments["negative_prompt"] = [negative] * count
        return arguments

    def _guidance(self, scale: float) -> dict[str, float]:
        """The argument that switches guidance: ``true_cfg_scale`` where that is on by default, else ``guidance_scale``."""
        true_scale = self._parameters.get("true_cfg_scale")
        if true_scale is not None and (true_scale.default or 0) > 1:
            return {"true_cfg_scale": scale}
        if "guidance_scale" in self._parameters:
            return {"guidance_scale": 0.0 if scale == 1 and self._is_guided_at_one() else scale}
        if scale != 1 and "guider" not in vars(self.pipe):
            raise ValueError(f"{type(self.pipe).__name__} has no guidance; guidance_scale must be 1, got {scale}")
        return {}

    def _is_guided_at_one(self) -> bool:
        """True for pipelines that count guidance from 0: conditional + scale * (conditional - unconditional)."""
        return bool(getattr(self._view({"_guidance_scale": 1.0}), "do_classifier_free_guidance", False))

    # --- the loop ---

    def _view(self, attributes: Mapping[str, Any]) -> Any:
        """A shallow private copy of the pipeline, whose networks answer through the route."""
        view = object.__new__(type(self.pipe))
        public = {name: value for name, value in vars(self.pipe).items() if not name.startswith("_")}
        proxies = {name: _Denoiser(self, name) for name in self.denoisers}
        view.__dict__.update({**self._private, **public, **proxies, **attributes})
        return view

    def _bound(self, conditioning: Conditioning, names: frozenset[str]) -> dict[str, Any]:
        """``self`` and the locals ``names``, as the lifted functions want them."""
        prefix = "self."
        attributes = {name[len(prefix) :]: v for name, v in conditioning.values.items() if name.startswith(prefix)}
        local = {name: conditioning.values[name] for name in names if name in conditioning.values}
        return {"self": self._view(attributes), **local}

    def _enter(self, latents: Tensor, index: int, conditioning: Conditioning) -> Generator:
        shape = (conditioning.size, *conditioning.latent_shape)
        if latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; this conditioning needs {shape}")
        if not 0 <= index < len(conditioning.items):
            raise ValueError(f"denoising index {index}; allowed are 0 to {len(conditioning.items) - 1}")
        bound = self._bound(conditioning, self.lifted.body_reads)
        bound[self.lifted.latents] = latents.to(conditioning.latent_dtype)
        for name in self.lifted.written_in_place & bound.keys():
            bound[name] = bound[name].clone() if isinstance(bound[name], Tensor) else copy.copy(bound[name])
        return self.lifted.body(conditioning.items[index], **bound)

    def velocity(self, latents: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        """What the pipeline would give to ``scheduler.step`` at ``index``, guidance included: [B, *X] -> [B, *X].

        For an epsilon or v_prediction pipeline it is that prediction. Differentiable; any index in any order.
        """
        generator = self._enter(latents, index, conditioning)
        step = next(generator, None)
        if step is None:
            raise ValueError(f"{type(self.pipe).__name__} takes no step at denoising index {index}")
        args, kwargs = step
        velocity = args[0] if args else kwargs["model_output"]
        if velocity.shape != latents.shape:
            raise ValueError(
                f"{type(self.pipe).__name__} steps {list(velocity.shape)} where its latents are {list(latents.shape)}: its "
                "state is more than the step's latents; write an adapter for it (flowsteer.rollout.pipeline.Pipeline)"
            )
        if not self.lifted.tail_is_idle and not torch.is_grad_enabled():
            self._suspended = (latents, index, conditioning, generator)
        return velocity

    def advance(self, latents: Tensor, next_latents: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        """What the pipeline's loop does to ``next_latents`` [B, *X] after the step: paste an inpainting mask, cast.

        Most pipelines do nothing, and then neither does this. Where they do, the pass of the last ``velocity`` call is
        resumed if it was for these very arguments, else the pass is run again, network included.
        """
        if self.lifted.tail_is_idle:
            return next_latents
        suspended, self._suspended = self._suspended, None
        with torch.no_grad():
            if suspended is not None and all(a is b for a, b in zip(suspended[:3], (latents, index, conditioning))):
                generator = suspended[3]
            else:
                generator = self._enter(latents, index, conditioning)
                next(generator)
            return _finish(generator, next_latents)[self.lifted.latents]

    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """The pipeline's epilogue: final latents [B, *X] -> images float32 [B, 3, H, W] in [0, 1], video [B, T, 3, H, W]."""
        bound = self._bound(conditioning, self.lifted.epilogue_reads)
        bound[self.lifted.latents] = latents
        with torch.no_grad():
            images = self.lifted.epilogue(**bound)[0]
        if not isinstance(images, Tensor) or images.dim() not in (4, 5):
            raise ValueError(
                f"{type(self.pipe).__name__} decodes to {type(images).__name__}, not to a tensor of images"
            )
        return images.float()


def _finish(generator: Generator, next_latents: Tensor) -> dict[str, Any]:
    """Answer a suspended body's step and let it run out: its locals."""
    try:
        generator.send(_StepOutput(next_latents))
    except StopIteration as stop:
        return stop.value
    raise LiftError("the pipeline steps twice in one iteration; only one step can be trained")


def _absent_components(path: str) -> dict[str, None]:
    """Components of the pipeline's class that ``model_index.json`` does not name, or names as [null, null]."""
    index = DiffusionPipeline.load_config(path)
    import diffusers

    cls = getattr(diffusers, index["_class_name"], None)
    if cls is None:  # a pipeline class that comes with the checkpoint
        return {}
    expected, _ = cls._get_signature_keys(cls)
    return {name: None for name in expected if index.get(name, [None])[0] is None}


__all__ = ["Conditioning", "FlowPipeline", "LiftError", "Pipeline", "Settings", "UnlikeConditioning"]
