"""Stable Diffusion 3, guided in an interval of noise levels only (Kynkäänniemi et al., arXiv 2404.07724).

No class of diffusers does this. Guidance at high noise costs variety and at low noise changes nothing: outside of the interval
the prediction is the conditional one, and takes one network pass instead of two.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowsteer.rollout.lifting.conditioning import Conditioning, Rows
from flowsteer.rollout.lifting.loading import load_diffusers
from flowsteer.rollout.lifting.step import LiftedStep
from flowsteer.rollout.types import Schedule


class IntervalGuidedSD3:
    """An adapter (flowsteer.rollout.lifting.protocol.Pipeline). ``call`` may hold ``low`` and ``high``: sigmas of guidance."""

    def __init__(self, *, path: str, height: int | None, width: int | None, call: dict[str, Any], **where: Any) -> None:
        settings = {"low": 0.0, "high": 1.0, "max_sequence_length": 12}
        if unknown := call.keys() - settings.keys():
            raise ValueError(f"model.call has {', '.join(sorted(unknown))}; allowed are {', '.join(settings)}")
        self.low, self.high, self.length = (settings | call).values()
        self.pipe: Any = load_diffusers(path, **where)  # dtype and device
        self.size = [(side or self.pipe.default_sample_size * 8) // 8 for side in (height, width)]
        self.denoisers: dict[str, nn.Module] = {"transformer": self.pipe.transformer}
        self._call = lambda name, *args, **kwargs: self.denoisers[name](*args, **kwargs)

    def route(self, call: Any) -> None:
        self._call = call

    def prepare(self, prompts: list[str], **settings: Any) -> Conditioning:
        """One row per prompt, each encoded by itself, so that it does not depend on its company."""
        return Conditioning.join([self._prepare_one(prompt, **settings) for prompt in prompts])

    @torch.no_grad()
    def _prepare_one(
        self, prompt: str, num_inference_steps: int, guidance_scale: float, negative_prompt: str | None = None
    ) -> Conditioning:
        texts = {"negative_prompt": negative_prompt or "", "negative_prompt_2": None, "negative_prompt_3": None}
        found = self.pipe.encode_prompt(prompt, None, None, **texts, max_sequence_length=self.length)
        names = ("embeds", "negative_embeds", "pooled", "negative_pooled")
        self.pipe.scheduler.set_timesteps(num_inference_steps)
        sigma, timesteps = self.pipe.scheduler.sigmas.cpu(), self.pipe.scheduler.timesteps.cpu()
        return Conditioning(
            schedule=Schedule(sigma=sigma, alpha=1 - sigma, timesteps=timesteps),
            latent_shape=(self.pipe.transformer.config.in_channels, *self.size),
            latent_dtype=self.pipe.transformer.dtype,
            size=1,
            values={**dict(zip(names, found)), "scale": guidance_scale},
            layout={name: Rows(dim=0, blocks=1) for name in names},
            items=(),
        )

    def begin(self, latents: Tensor, index: int, conditioning: Conditioning) -> LiftedStep:
        """A step with the transformer's velocity [B, *X], guided where the noise level lies in the interval."""
        rows, sigma = conditioning.values, float(conditioning.schedule.sigma[index])
        embeds, pooled, guided = rows["embeds"], rows["pooled"], rows["scale"] > 1 and self.low <= sigma <= self.high
        if guided:
            latents = torch.cat([latents] * 2)
            embeds, pooled = torch.cat([rows["negative_embeds"], embeds]), torch.cat([rows["negative_pooled"], pooled])
        timestep = conditioning.schedule.timesteps[index].to(latents.device).expand(len(latents))
        given = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "return_dict": False}
        velocity = self._call("transformer", hidden_states=latents, timestep=timestep, **given)[0]
        if not guided:
            return LiftedStep(velocity)
        without, with_prompt = velocity.chunk(2)
        return LiftedStep(without + rows["scale"] * (with_prompt - without))

    @torch.no_grad()
    def decode(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """Images [B, 3, H, W] in [0, 1]."""
        config = self.pipe.vae.config
        images = self.pipe.vae.decode(latents.to(self.pipe.vae.dtype) / config.scaling_factor + config.shift_factor)[0]
        return (images / 2 + 0.5).clamp(0, 1).float()
