"""Qwen-Image: from text, from pictures, with ControlNets, edits, layers, and version 2.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage21,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageControlNetInpaintPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImageLayeredPipeline,
    QwenImageTransformer2DModel,
)

from zoo.encoders import chat_tokenizer, qwen2_processor, qwen2_vl, qwen3_processor, qwen3_vl, qwen_autoencoder
from zoo.entries import Build, Entry, Inputs, no_media
from zoo.families import qwen_image
from zoo.media import mask, picture

LEVELS = 6  # edits enlarge their pictures to a million pixels: 1024 / 2 ** 6 is a latent of 16 x 16
EDIT = 2 ** (LEVELS + 1)  # pixels of a side, one token


def with_controlnet(cls: type[DiffusionPipeline], extra_channels: int = 0) -> DiffusionPipeline:
    base = qwen_image()
    controlnet = QwenImageControlNetModel.from_transformer(
        base.transformer,
        num_layers=1,
        attention_head_dim=base.transformer.config.attention_head_dim,
        num_attention_heads=base.transformer.config.num_attention_heads,
        load_weights_from_transformer=False,
        extra_condition_channels=extra_channels,
    )
    return cls.from_pipe(base, controlnet=controlnet)


def editing(
    cls: Callable[..., DiffusionPipeline], z_dim: int = 4, picture_channels: int = 3, **changes: Any
) -> DiffusionPipeline:
    base = qwen_image()
    tokenizer = chat_tokenizer()
    changes |= {"in_channels": 4 * z_dim, "out_channels": z_dim}
    return cls(
        transformer=QwenImageTransformer2DModel.from_config(base.transformer.config, **changes),
        scheduler=base.scheduler,
        vae=qwen_autoencoder(LEVELS, z_dim, input_channels=picture_channels),
        text_encoder=qwen2_vl(tokenizer),
        tokenizer=tokenizer,
        processor=qwen2_processor(tokenizer),
    )


def layered() -> DiffusionPipeline:
    """Its pictures have four channels; eight of the latents, since a tensor of as many is taken for latents."""
    return editing(QwenImageLayeredPipeline, 8, 4, use_layer3d_rope=True, use_additional_t_cond=True)


def qwen_image_21() -> DiffusionPipeline:
    tokenizer = chat_tokenizer()
    return QwenImage21Pipeline(
        transformer=QwenImage21Transformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=8,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True, True],
            latents_mean=[0.1] * 8,
            latents_std=[1.1] * 8,
        ),
        text_encoder=qwen3_vl(tokenizer),
        processor=qwen3_processor(tokenizer),
    )


def entry(build: Build, inputs: Inputs = no_media, side: int = 16, **call: Any) -> Entry:
    return Entry(
        build=build,
        call={"max_sequence_length": 512} | call,
        size={"height": side, "width": side},
        guided=4.0,
        guidance_name="true_cfg_scale",
        inputs=inputs,
    )


ENTRIES: dict[str, Entry] = {
    "QwenImagePipeline": entry(qwen_image),
    "QwenImageImg2ImgPipeline": entry(
        lambda: QwenImageImg2ImgPipeline.from_pipe(qwen_image()), lambda row: {"image": picture(row)}
    ),
    "QwenImageInpaintPipeline": entry(
        lambda: QwenImageInpaintPipeline.from_pipe(qwen_image()),
        lambda row: {"image": picture(row), "mask_image": mask(row)},
    ),
    "QwenImageControlNetPipeline": entry(
        lambda: with_controlnet(QwenImageControlNetPipeline), lambda row: {"control_image": picture(row)}
    ),
    "QwenImageControlNetInpaintPipeline": entry(
        lambda: with_controlnet(QwenImageControlNetInpaintPipeline, extra_channels=4),
        lambda row: {"control_image": picture(row), "control_mask": mask(row)},
    ),
    "QwenImageEditPipeline": entry(
        lambda: editing(QwenImageEditPipeline), lambda row: {"image": picture(row, EDIT, EDIT)}, EDIT
    ),
    "QwenImageEditInpaintPipeline": entry(
        lambda: editing(QwenImageEditInpaintPipeline),  # it decodes a million pixels, too: two seconds
        lambda row: {"image": picture(row, EDIT, EDIT), "mask_image": mask(row, EDIT, EDIT)},
        EDIT,
    ),
    "QwenImageEditPlusPipeline": entry(
        lambda: editing(QwenImageEditPlusPipeline),
        lambda row: {"image": [picture(row, EDIT, EDIT), picture(row + 10, EDIT, EDIT)]},
        EDIT,
    ),
    "QwenImageLayeredPipeline": Entry(
        build=layered,
        call={"max_sequence_length": 512, "layers": 2},
        size={},
        guided=4.0,
        guidance_name="true_cfg_scale",
        inputs=lambda row: {"image": picture(row, EDIT, EDIT).convert("RGBA")},
    ),
    "QwenImage21Pipeline": Entry(
        build=qwen_image_21,
        call={"output_resolution": 32},
        size={"height": 32, "width": 32},
        guided=4.0,
        guidance_name="true_cfg_scale",
        inputs=lambda row: {"image": [picture(row, 32, 32)]},
    ),
}
