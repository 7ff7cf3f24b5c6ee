"""A diffusers pipeline as three questions: prepare a prompt, the velocity at a step, decode the latents.

``FlowPipeline`` runs the pipeline's own code, cut at its denoising loop by ``lift``. It knows nothing about any model:
guidance, packing, timestep maps and the choice between transformers are the pipeline's. Where a pipeline cannot be lifted,
a hand-written adapter follows the protocol that this class follows, ``Pipeline``.

Letters: B samples, T denoising steps, X latent shape of one sample.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from flowsteer.rollout.data.inputs import Value
from flowsteer.rollout.data.prompts import Row
from flowsteer.rollout.lifting.arguments import CallArguments, Settings
from flowsteer.rollout.lifting.company import TOGETHER
from flowsteer.rollout.lifting.conditioning import Conditioning, UnlikeConditioning
from flowsteer.rollout.lifting.lift import ADAPTER_ADVICE, LiftError, lift
from flowsteer.rollout.lifting.loading import SHIPPED, load_diffusers
from flowsteer.rollout.lifting.loop import GUIDES, Call, Loop
from flowsteer.rollout.lifting.prepare import Preparer
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.quantize import Quantization, quantize_layers
from flowsteer.rollout.lifting.schedules import steppable, with_settings
from flowsteer.rollout.lifting.several import Prepared, Several, join
from flowsteer.rollout.lifting.step import Body, LiftedStep, finish, join_states, run_to_step
from flowsteer.rollout.lifting.waiting import Places

logger = logging.getLogger(__name__)


class FlowPipeline:
    """A diffusers pipeline, lifted.

    A safety checker that blackens pictures (Stable Diffusion 1) is off while sampling here: most rewards score a black
    picture, so a policy would learn to be caught. The pipeline itself keeps its checker.

    Args:
        pipe: the pipeline. An epsilon or v_prediction pipeline gets a DDIM scheduler in place of its own.
        height, width: pixels, None for the pipeline's default.
        call_kwargs: further arguments of the pipeline's ``__call__``, which win over what is derived here.
        scheduler: settings of the scheduler that differ from those that it was saved with.
        cache_size: how many prepared prompts are kept.
        together: how many prompts are encoded at once, where that leaves a row's bits to the row alone, see `Preparer`.
        offload: what waits on the CPU while it does not work, ``text_encoders`` and ``vae``. Prepared prompts wait there, too.
        device: where the pipeline is brought to, but for what waits; None leaves it where it is.
        quantize: how the linear layers of the denoisers are stored, see `quantize_layers`; None leaves them as they are.
        vae_modes: of its autoencoders, ``slicing`` and ``tiling``.

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
        scheduler: Mapping[str, Any] | None = None,
        cache_size: int = 256,
        together: int = 1,
        offload: Collection[str] = (),
        device: torch.device | str | None = None,
        quantize: Quantization | None = None,
        vae_modes: Collection[str] = (),
    ) -> None:
        self.pipe: Any = pipe
        self.lifted = lift(type(pipe))
        stepped = steppable(with_settings(self.pipe.scheduler, scheduler or {}))
        if stepped is not self.pipe.scheduler:
            self.pipe.scheduler = stepped
        # Cosmos has a safety checker without this method, and refuses to run without it: that one stays.
        checked = hasattr(pipe, "run_safety_checker") and getattr(pipe, "safety_checker", None) is not None
        self.loop = Loop(pipe, self.lifted, {"safety_checker": None} if checked else {})
        if not self.denoisers:
            raise LiftError(f"the denoising loop of {type(pipe).__name__} calls no network of the pipeline itself")
        for name, component in vars(pipe).items():
            if name.startswith(GUIDES) and isinstance(component, nn.Module):
                component.requires_grad_(False)
        for name, denoiser in self.denoisers.items():
            if any("_hf_hook" in vars(module) for module in denoiser.modules()):
                raise ValueError(f"{name} carries offloading hooks; load the pipeline without offloading it")
        if checked:
            logger.warning(
                "the safety checker of %s is off in training: its black pictures would be scored", type(pipe).__name__
            )
        at_one = self.loop.view({"_guidance_scale": 1.0})
        arguments = CallArguments(
            type(pipe),
            size={name: value for name, value in (("height", height), ("width", width)) if value is not None},
            call_kwargs=call_kwargs or {},
            counts_from_zero=bool(getattr(at_one, "do_classifier_free_guidance", False)),
            has_guider="guider" in vars(pipe),
        )
        if quantize is not None:
            for denoiser in self.denoisers.values():
                quantize_layers(denoiser, quantize, device=device or self.loop.device)
        for mode in vae_modes:
            self._enable(mode)
        typed = {name for name, own in self.loop.autoencoders.items() if _dtype_of(own) != self.loop.dtype}
        self.loop.places = Places(pipe, self._waiting(offload), torch.device(device or self.loop.device), typed)
        if offload or device is not None:
            self.loop.places.settle()
        self.preparer = Preparer(self.loop, arguments, cache_size, together)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        quantize: Quantization | None = None,
        vae_dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> FlowPipeline:
        """From a folder, a hub id, or a name of `SHIPPED`; further arguments are the constructor's. See ``load_diffusers``.

        A shipped pipeline is called with the arguments that it was trained with unless ``call_kwargs`` says otherwise.
        With ``quantize``, the denoisers' linear layers come to the device in 8 or 4 bits.
        """
        if path in SHIPPED:
            arguments["call_kwargs"] = {**SHIPPED[path], **(arguments.get("call_kwargs") or {})}
        own = {} if vae_dtype is None else {"vae_dtype": vae_dtype}
        if arguments.get("offload") or quantize is not None:  # it is not to be on the device whole, not even at first
            on_cpu = load_diffusers(path, dtype=dtype, device="cpu", **own)
            return cls(on_cpu, device=device, quantize=quantize, **arguments)
        return cls(load_diffusers(path, dtype=dtype, device=device, **own), **arguments)

    def _enable(self, mode: str) -> None:
        """Switch a mode of the autoencoders on. Raises ValueError where they do not have it."""
        name = type(self.pipe).__name__
        if not self.loop.autoencoders:
            raise ValueError(f"model.vae.{mode}: {name} has no autoencoder; leave it out")
        for component, own in self.loop.autoencoders.items():
            try:
                getattr(own, f"enable_{mode}")()
            except (AttributeError, NotImplementedError) as error:
                raise ValueError(
                    f"model.vae.{mode}: {component} of {name}, a {type(own).__name__}, cannot do that; leave it out"
                ) from error

    def _waiting(self, kinds: Collection[str]) -> set[str]:
        """The names of the components of these kinds. Raises ValueError where the pipeline has none of a kind."""
        found = {"text_encoders": self.loop.encoders, "vae": self.loop.autoencoders}
        for kind in kinds:
            if not found[kind]:
                raise ValueError(f"model.offload.{kind}: {type(self.pipe).__name__} has none; leave it out")
        return {name for kind in kinds for name in found[kind]}

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The networks that the denoising loop calls, by component name: ``{"transformer": ...}``."""
        return self.loop.denoisers

    @property
    def device(self) -> torch.device:
        """Where the first denoiser is."""
        return self.loop.device

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The signature of the pipeline's ``__call__``."""
        return self.preparer.arguments.parameters

    def route(self, call: Call) -> None:
        """Send the loop's network calls to ``call(name, *args, **kwargs)``, such as a trainer's wrapped network.

        Attributes (``self.transformer.config``) are still read from the pipeline's own network.
        """
        self.loop.call = call

    # --- prepare ---

    def prepare(
        self,
        prompts: Sequence[str],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str | None = None,
        inputs: Sequence[Mapping[str, Value]] | None = None,
    ) -> Prepared:
        """One row per prompt, by the pipeline's prologue; what was prepared before comes from memory.

        Args:
            prompts: of the rows.
            num_inference_steps: as the pipeline counts them; one that starts from a picture may take fewer.
            guidance_scale: goes to the argument that switches guidance in this pipeline, in its own unit; 1 is off.
            negative_prompt: of all rows that have none of their own.
            inputs: further arguments of each row, such as its picture (rollout/data/inputs.py); None is none.

        Raises:
            UnlikeConditioning: rows cannot stand in one batch, as with pipelines that do not pad: sample such prompts in
                batches of their own.
            ValueError: an input that the pipeline does not have; none where it needs one.
        """
        if not prompts:
            raise ValueError("there is no prompt to prepare; give at least one")
        settings = _settings(num_inference_steps, guidance_scale, negative_prompt)
        rows = _rows(prompts, inputs)
        place = {row: number for number, row in enumerate(dict.fromkeys(rows))}
        try:
            joined = join(self._prepared([*place], settings))
        except UnlikeConditioning as error:
            if (several := self._several(place, settings)) is not None:
                return several.take([place[row] for row in rows])
            raise UnlikeConditioning(f"{error} (prompts: {dict(enumerate(row.text for row in place))})") from None
        return joined if len(place) == len(rows) else joined.take([place[row] for row in rows])

    def _prepared(self, rows: Sequence[Row], settings: Settings) -> list[Conditioning]:
        """Each row by itself, on the device."""
        with self.loop.places.visit():
            prepared = self.preparer.rows(rows, settings)
        return [row.to(self.loop.places.device) for row in prepared] if self.loop.rows_wait else prepared

    def prepare_ahead(self, rows: Sequence[Row], **settings: Any) -> None:
        """Prepare all these rows now, so that `prepare` finds them; ``settings`` are those of `prepare`."""
        with self.loop.places.visit():
            self.preparer.rows(rows, _settings(**settings))

    def one_by_one(self, prompt: str, *, inputs: Mapping[str, Value] | None = None, **settings: Any) -> str:
        """Why a run encodes prompts like this one by one; empty where it encodes several at once."""
        (row,) = _rows([prompt], [inputs or {}])
        with self.loop.places.visit():
            return self.preparer.company(row, _settings(**settings), max(self.preparer.together, TOGETHER)).reason

    def _several(self, rows: Iterable[Row], settings: Settings) -> Several | None:
        """Rows with pictures that cannot stand in one batch, each by itself; None where their latents or steps differ."""
        parts = tuple(self._prepared([*rows], settings))
        alike = all(
            part.latent_shape == parts[0].latent_shape and part.schedule.equals(parts[0].schedule) for part in parts
        )
        return Several(parts=parts) if alike and all(row.inputs for row in rows) else None

    def call_arguments(
        self, prompts: Sequence[str], *, inputs: Sequence[Mapping[str, Value]] | None = None, **settings: Any
    ) -> dict[str, Any]:
        """The arguments with which ``pipe(**arguments)`` draws what this class draws; the others are those of `prepare`."""
        return self.preparer.call_arguments(_rows(prompts, inputs), _settings(**settings))

    def own_start(
        self, prompt: str, *, inputs: Mapping[str, Value] | None = None, **settings: Any
    ) -> tuple[Tensor, Conditioning]:
        """The latents [1, *X] with which the pipeline itself would start from its argument ``generator``, and that row."""
        (row,) = _rows([prompt], [inputs or {}])
        with self.loop.places.visit():
            return self.preparer.own_start(row, _settings(**settings))

    def forget(self) -> None:
        """Drop every prepared row: the next `prepare` asks the pipeline's prologue again."""
        self.preparer.prepared.clear()

    # --- the loop ---

    def enter(
        self, latents: Tensor, index: int, conditioning: Conditioning, instead: Mapping[str, Any] | None = None
    ) -> Body:
        """One pass of the lifted body, not yet begun, on fresh locals; ``instead`` replaces some of them."""
        return self.loop.enter(latents, index, conditioning, instead)

    def begin(self, latents: Tensor, index: int, conditioning: Prepared) -> LiftedStep:
        """The iteration ``index`` of the pipeline's loop up to its step, from latents [B, *X]; any index in any order."""
        if isinstance(conditioning, Several):
            return LiftedStep.of([self.begin(own, index, row) for own, row in conditioning.each(latents)])
        body = self.loop.enter(latents, index, conditioning)
        velocity = self.predicted(body, index, conditioning)
        if velocity.shape != latents.shape:
            raise ValueError(
                f"{type(self.pipe).__name__} steps {list(velocity.shape)} where its latents are {list(latents.shape)}: "
                f"the loop's state is more than the step's latents; {ADAPTER_ADVICE}"
            )
        if self.lifted.ends_at_step:
            return LiftedStep(velocity)
        if len(self.lifted.states) > 1:
            raise ValueError(
                f"the loop of {type(self.pipe).__name__} goes on after stepping {' and '.join(self.lifted.states)}; "
                f"{ADAPTER_ADVICE}"
            )

        def finished(next_latents: Tensor) -> Tensor:
            with torch.no_grad():
                return finish(body, next_latents)[self.lifted.states[0]]

        return LiftedStep(velocity, finished)

    def predicted(self, body: Body, index: int, conditioning: Conditioning) -> Tensor:
        """Run a body that was entered up to its step: what the model predicts, [B, *X]."""
        name, states = type(self.pipe).__name__, len(self.lifted.states)
        return join_states(run_to_step(body, name, index, states, rising=conditioning.schedule.rising))

    def velocity(self, latents: Tensor, index: int, conditioning: Prepared) -> Tensor:
        """The velocity of `begin`, [B, *X] -> [B, *X]; differentiable. For training, which needs no more of a step."""
        return self.begin(latents, index, conditioning).velocity

    def decode(self, latents: Tensor, conditioning: Prepared) -> Tensor:
        """The epilogue: final latents [B, *X] -> images float32 [B, 3, H, W] in [0, 1], video [B, T, 3, H, W], sound [B, C, N]
        in [-1, 1], of C channels.
        """
        if isinstance(conditioning, Several):
            return torch.cat([self.decode(own, row) for own, row in conditioning.each(latents)])
        bound = self.loop.bind(conditioning, self.lifted.epilogue_reads) | self.loop.states(latents, conditioning)
        with torch.no_grad(), self.loop.places.visit():
            if "output_type" in bound:
                bound["output_type"] = self.preparer.arguments.output_type
            images = as_tensor(self.lifted.epilogue(**bound), type(self.pipe).__name__)
            if images.dim() > 3 and bound.get("output_type") == "pt" and beyond_range(images):
                # DeepFloyd IF and Kandinsky 3 hand tensors back as they are, and only scale arrays to [0, 1]
                self.preparer.arguments.output_type = bound["output_type"] = "np"
                images = as_tensor(self.lifted.epilogue(**bound), type(self.pipe).__name__)
        if len(images) != len(latents):
            raise ValueError(
                f"{type(self.pipe).__name__} draws {len(images)} results for {len(latents)} samples; {ADAPTER_ADVICE}"
            )
        return images


def _dtype_of(network: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in network.parameters()), None)


def beyond_range(images: Tensor) -> bool:
    """Whether some numbers lie outside of [0, 1], where those of finished pictures do not. NaN says nothing."""
    return bool(((images < 0) | (images > 1)).any())


def as_tensor(output: Any, name: str) -> Tensor:
    """What a pipeline's ``__call__`` returns as `FlowPipeline.decode` gives it: a tuple's first, or itself (Stable Video).

    Some pipelines give arrays, [B, H, W, 3], whatever they are asked for; some a sound without its one channel, [B, N]; some
    pictures with an alpha channel.
    Raises ValueError for anything that is no batch of pictures, videos or sounds.
    """
    if isinstance(output, tuple):
        output = output[0]
    if isinstance(output, np.ndarray):
        output = torch.from_numpy(output)
        output = output.movedim(-1, -3) if output.dim() > 3 else output
    if not isinstance(output, Tensor) or not 2 <= output.dim() <= 5:
        raise ValueError(
            f"{name} draws a {type(output).__name__}, not a batch of pictures, videos or sounds; {ADAPTER_ADVICE}"
        )
    if output.dim() == 4 and output.shape[1] == 4:  # a picture with an alpha channel, laid on white
        output = output[:, :3] * output[:, 3:] + (1 - output[:, 3:])
    return (output[:, None] if output.dim() == 2 else output).float()


def _settings(num_inference_steps: int, guidance_scale: float, negative_prompt: str | None = None) -> Settings:
    return Settings(num_inference_steps, float(guidance_scale), negative_prompt)


def _rows(prompts: Sequence[str], inputs: Sequence[Mapping[str, Value]] | None) -> list[Row]:
    """Raises ValueError where there is not one of each."""
    given = inputs or [{}] * len(prompts)
    if len(given) != len(prompts):
        raise ValueError(f"{len(given)} rows of inputs for {len(prompts)} prompts; give one for each")
    return [Row.of(text, own) for text, own in zip(prompts, given)]


__all__ = [
    "Conditioning",
    "FlowPipeline",
    "LiftError",
    "Pipeline",
    "UnlikeConditioning",
]
