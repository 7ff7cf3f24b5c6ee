"""Stable Diffusion 3 and what is built on it."""

from __future__ import annotations

from diffusers import (
    DiffusionPipeline,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGImg2ImgPipeline,
    StableDiffusion3PAGPipeline,
)

from zoo.entries import Build, Entry, Inputs, no_media
from zoo.families import stable_diffusion_3
from zoo.media import mask, picture
from zoo.parts import autoencoder


def with_controlnet(cls: type[DiffusionPipeline], extra_channels: int = 0) -> DiffusionPipeline:
    base = stable_diffusion_3()
    controlnet = SD3ControlNetModel.from_transformer(
        base.transformer,
        num_layers=1,
        num_extra_conditioning_channels=extra_channels,
        load_weights_from_transformer=False,
    )
    return cls.from_pipe(base, controlnet=controlnet)


def inpainting() -> DiffusionPipeline:
    """The class accepts 16 or 33 channels only."""
    base = stable_diffusion_3()
    return StableDiffusion3InpaintPipeline.from_pipe(
        base,
        transformer=SD3Transformer2DModel.from_config(base.transformer.config, in_channels=16, out_channels=16),
        vae=autoencoder(16, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
    )


def entry(build: Build, inputs: Inputs = no_media) -> Entry:
    return Entry(
        build=build, call={"max_sequence_length": 32}, size={"height": 16, "width": 16}, guided=4.0, inputs=inputs
    )


ENTRIES: dict[str, Entry] = {
    "StableDiffusion3Pipeline": entry(stable_diffusion_3),
    "StableDiffusion3Img2ImgPipeline": entry(
        lambda: StableDiffusion3Img2ImgPipeline.from_pipe(stable_diffusion_3()), lambda row: {"image": picture(row)}
    ),
    "StableDiffusion3InpaintPipeline": entry(inpainting, lambda row: {"image": picture(row), "mask_image": mask(row)}),
    "StableDiffusion3ControlNetPipeline": entry(
        lambda: with_controlnet(StableDiffusion3ControlNetPipeline), lambda row: {"control_image": picture(row)}
    ),
    "StableDiffusion3ControlNetInpaintingPipeline": entry(
        lambda: with_controlnet(StableDiffusion3ControlNetInpaintingPipeline, extra_channels=1),
        lambda row: {"control_image": picture(row), "control_mask": mask(row)},
    ),
    "StableDiffusion3PAGPipeline": entry(lambda: StableDiffusion3PAGPipeline.from_pipe(stable_diffusion_3())),
    "StableDiffusion3PAGImg2ImgPipeline": entry(
        lambda: StableDiffusion3PAGImg2ImgPipeline.from_pipe(stable_diffusion_3()),
        lambda row: {"image": picture(row)},
    ),
}
