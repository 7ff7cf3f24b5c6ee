"""What to pass to a pipeline's ``__call__``, found from its signature.

Pipelines name guidance differently and switch it off at different values; this file knows how to ask. A user's own
``call_kwargs`` win over everything that is derived here, and an argument that the pipeline does not have is an error.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from flowsteer.rollout.data.inputs import kind_of

PER_ROW = ("negative_prompt", "height", "width")  # settings that a row may have of its own
_MEDIA = re.compile(
    r"(^|.*_)(image|images|video|audio|frames|waveforms|image_reference|image_embeds)|mask|control_mask|hint"
)
_SWITCHES = ("render_", "freeze_", "sample_", "num_")  # beginnings of names of truth values and counts
OURS = frozenset(
    {"self", "prompt", "negative_prompt", "num_inference_steps", "height", "width", "latents", "generator"}
    | {"output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt"}
    | {"callback", "callback_steps", "callback_on_step_end"}
)


class Settings(NamedTuple):
    """Everything besides the prompt that a prepared row depends on."""

    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None


class CallArguments:
    """The keyword arguments of one pipeline's ``__call__``.

    Args:
        cls: the pipeline's class.
        size: height and width in pixels, where given.
        call_kwargs: further arguments of the user's.
        counts_from_zero: the pipeline's guidance is off at 0 (``c + g (c - u)``) rather than at 1 (``u + g (c - u)``).
        has_guider: guidance is in a component of the pipeline, not in an argument.

    ``place`` may be set to what brings a tensor of a file to the pipeline's device and type.

    Raises ValueError for an argument that the pipeline does not have, or that is not the user's to set.
    """

    def __init__(
        self,
        cls: type,
        *,
        size: Mapping[str, int],
        call_kwargs: Mapping[str, Any],
        counts_from_zero: bool,
        has_guider: bool,
    ) -> None:
        self.name = cls.__name__
        self.parameters = inspect.signature(inspect.unwrap(cls.__call__)).parameters
        self.fixed = {**size, **call_kwargs}
        self.counts_from_zero = counts_from_zero
        self.has_guider = has_guider
        self.bare = False  # the pipeline wants a text and no list of prompts
        self.output_type = "pt"
        self.place: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
        for key in call_kwargs.keys() & OURS:
            raise ValueError(
                f"the call argument {key!r} is a setting of its own, or not for the user to set; leave it out of the further "
                "call arguments"
            )
        for key, value in call_kwargs.items():
            if key in self.media and isinstance(value, (str, list)):
                raise ValueError(
                    f"the call argument {key!r} takes what a file holds, which differs from row to row: map a column of the "
                    f"prompt file to it, as in inputs={{{key}: {{column: {key}, kind: {kind_of(key)}}}}}"
                )
        for key in self.fixed.keys() - self.parameters.keys():
            near = difflib.get_close_matches(key, self.parameters, n=1)
            takes = ", ".join(name for name in self.parameters if name not in OURS)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {takes}"
            raise ValueError(f"{self.name}.__call__ has no argument {key!r}; {hint}")

    def build(
        self,
        prompts: list[str],
        settings: Settings,
        inputs: Sequence[Mapping[str, Any]] | None = None,
        *,
        once: bool = False,
    ) -> dict[str, Any]:
        """Everything but ``latents``.

        Args:
            prompts: B of them.
            settings: what all rows share.
            inputs: further arguments of each row, B with the same names. Of one row they are passed as they are, of several
                as a list of their values, but for those of `PER_ROW` that all rows must share.
            once: several rows are passed one row's values as they are: a pipeline may repeat them itself.
        """
        own = self._of_rows(inputs or [{}] * len(prompts), once=once)
        wanted = {
            "prompt": prompts[0] if self.bare else prompts,
            "num_inference_steps": settings.num_inference_steps,
            "generator": torch.Generator().manual_seed(
                0
            ),  # noise is drawn by the sampler; nothing may touch global state
            "output_type": self.output_type,
            "return_dict": False,
            **self._guidance(settings.guidance_scale),
        }
        arguments = {name: value for name, value in wanted.items() if name in self.parameters} | self.fixed
        arguments |= own
        negative = own.get("negative_prompt", settings.negative_prompt)
        if negative is None and (arguments.get("true_cfg_scale") or 0) > 1:
            negative = ""  # these pipelines take a missing negative prompt for guidance off
        if negative is not None:
            if "negative_prompt" not in self.parameters:
                raise ValueError(f"{self.name} takes no negative prompt; leave it out")
            arguments["negative_prompt"] = negative if self.bare else [negative] * len(prompts)
        return arguments

    def check_inputs(self, names: Iterable[str]) -> None:
        """Raise ValueError where an input is no argument of the pipeline, or not one that a row may have of its own."""
        for name in names:
            if name in OURS and name not in PER_ROW:
                raise ValueError(
                    f"inputs.{name}: {name!r} is not for a row to set; of the settings, a row may have {', '.join(PER_ROW)}"
                )
            if name not in self.parameters:
                near = difflib.get_close_matches(name, self.parameters, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(self.media) or 'no pictures'}"
                raise ValueError(f"inputs.{name}: {self.name}.__call__ has no argument {name!r}; {hint}")

    @property
    def media(self) -> tuple[str, ...]:
        """The arguments that take pictures, masks, videos, sound or what was made of a picture, by their names."""
        names = (name for name in self.parameters if not name.startswith(_SWITCHES))
        return tuple(name for name in names if _MEDIA.fullmatch(name))

    def _of_rows(self, inputs: Sequence[Mapping[str, Any]], *, once: bool) -> dict[str, Any]:
        """One argument for all rows from one for each."""
        merged: dict[str, Any] = {}
        for name in inputs[0]:
            values = [own[name] for own in inputs]
            shared = once or len(values) == 1 or name in PER_ROW
            if _are_arrays(values[0]):
                merged[name] = self._stacked(values[:1] if shared else values)
            else:
                merged[name] = values[0] if shared else values
        return merged

    def _guidance(self, scale: float) -> dict[str, float]:
        """``true_cfg_scale`` where that is on by default (Qwen-Image) or the only one, else ``guidance_scale``."""
        true_scale = self.parameters.get("true_cfg_scale")
        on = true_scale is not None and isinstance(true_scale.default, (int, float)) and true_scale.default > 1
        if on or (true_scale is not None and "guidance_scale" not in self.parameters):
            return {"true_cfg_scale": scale}
        if "guidance_scale" in self.parameters:
            return {"guidance_scale": 0.0 if scale == 1 and self.counts_from_zero else scale}
        if scale != 1 and not self.has_guider:
            raise ValueError(f"{self.name} has no guidance: guidance_scale must be 1, got {scale:g}")
        return {}

    def _stacked(self, values: Sequence[Any]) -> Any:
        """Arrays [1, ...] of B rows as one tensor [B, ...]; a list of such tensors where each row has a list of arrays."""
        if isinstance(values[0], list):
            return [self._stacked(of_one_place) for of_one_place in zip(*values, strict=True)]
        return self.place(torch.from_numpy(np.concatenate(values)))


def _are_arrays(value: Any) -> bool:
    return isinstance(value[0] if isinstance(value, list) and value else value, np.ndarray)
