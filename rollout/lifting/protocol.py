"""What sampling and learning ask of a model: the seam at which a hand-written adapter may stand in.

Letters: B samples, T frames, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from flowsteer.rollout.lifting.conditioning import Conditioning
from flowsteer.rollout.lifting.step import LiftedStep


class Pipeline(Protocol):
    """What sampling and learning ask of a model. ``FlowPipeline`` is one; a hand-written adapter may stand in."""

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The networks that the denoising loop calls, by component name."""
        ...

    def route(self, call: Callable[..., Any]) -> None:
        """Send the calls of denoisers to ``call(name, *args, **kwargs)``: a trainer's wrapped network, under DeepSpeed."""
        ...

    def prepare(
        self, prompts: list[str], *, num_inference_steps: int, guidance_scale: float, negative_prompt: str | None = None
    ) -> Conditioning:
        """One row per prompt."""
        ...

    def begin(self, latents: Tensor, index: int, conditioning: Conditioning) -> LiftedStep:
        """A denoising step from latents [B, *X], for any index in any order: ``LiftedStep(velocity)``, or with what the loop
        does to the next latents.
        """
        ...

    def velocity(self, latents: Tensor, index: int, conditioning: Conditioning) -> Tensor:
        """The velocity of `begin`, [B, *X] -> [B, *X], differentiable."""
        ...

    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, *X] -> images float32 [B, 3, H, W] in [0, 1], video [B, T, 3, H, W]."""
        ...
