"""Z-Image, with pictures, ControlNets and references."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    DiffusionPipeline,
    ZImageControlNetInpaintPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
    ZImageOmniPipeline,
    ZImageTransformer2DModel,
)
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from zoo.entries import Build, Entry, Inputs, no_media
from zoo.families import z_image
from zoo.media import mask, picture

LATENT = 16


def with_controlnet(cls: Callable[..., DiffusionPipeline], channels: int) -> DiffusionPipeline:
    base = z_image()
    controlnet = ZImageControlNetModel(
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner",
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    return cls(**base.components, controlnet=controlnet)


def omni() -> DiffusionPipeline:
    """With its autoencoder in bfloat16: the class casts references to that."""
    base = z_image()
    base.vae.to(torch.bfloat16)
    siglip = Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_patches=16,
            patch_size=4,
        )
    )
    base.transformer = ZImageTransformer2DModel.from_config(base.transformer.config, siglip_feat_dim=16)
    return ZImageOmniPipeline(
        **base.components, siglip=siglip, siglip_processor=Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16)
    )


def entry(build: Build, inputs: Inputs = no_media) -> Entry:
    return Entry(
        build=build, call={"max_sequence_length": 64}, size={"height": 16, "width": 16}, guided=4.0, inputs=inputs
    )


ENTRIES: dict[str, Entry] = {
    "ZImagePipeline": entry(z_image),
    "ZImageImg2ImgPipeline": entry(
        lambda: ZImageImg2ImgPipeline(**z_image().components), lambda row: {"image": picture(row)}
    ),
    "ZImageInpaintPipeline": entry(
        lambda: ZImageInpaintPipeline(**z_image().components),
        lambda row: {"image": picture(row), "mask_image": mask(row)},
    ),
    "ZImageControlNetPipeline": entry(
        lambda: with_controlnet(ZImageControlNetPipeline, LATENT), lambda row: {"control_image": picture(row)}
    ),
    "ZImageControlNetInpaintPipeline": entry(
        lambda: with_controlnet(ZImageControlNetInpaintPipeline, 2 * LATENT + 1),
        lambda row: {"image": picture(row), "mask_image": mask(row), "control_image": picture(row + 10)},
    ),
    "ZImageOmniPipeline": entry(omni, lambda row: {"image": [picture(row, 64, 64), picture(row + 10, 64, 64)]}),
}
