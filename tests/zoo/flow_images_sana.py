"""Sana, with perturbed attention, with a ControlNet, and in few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

from zoo.encoders import gemma2, opening_tokenizer
from zoo.entries import Build, Entry, Inputs, no_media
from zoo.media import picture

TRANSFORMER: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 8,
    "patch_size": 1,
}


def autoencoder() -> AutoencoderDC:
    """Compresses four times on each side."""
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def sana(
    cls: Callable[..., DiffusionPipeline], scheduler: Any = None, transformer: Any = None, **parts: Any
) -> DiffusionPipeline:
    return cls(
        tokenizer=opening_tokenizer(),
        text_encoder=gemma2(),
        vae=autoencoder(),
        transformer=transformer or SanaTransformer2DModel(**TRANSFORMER),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    )


def sprint(cls: Callable[..., DiffusionPipeline]) -> DiffusionPipeline:
    transformer = SanaTransformer2DModel(**TRANSFORMER, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    return sana(cls, SCMScheduler(), transformer)


def with_controlnet() -> DiffusionPipeline:
    return sana(SanaControlNetPipeline, controlnet=SanaControlNetModel(**TRANSFORMER | {"num_layers": 1}))


def entry(build: Build, inputs: Inputs = no_media, **call: Any) -> Entry:
    return Entry(
        build=build,
        call={"max_sequence_length": 32, "complex_human_instruction": None, "use_resolution_binning": False} | call,
        size={"height": 32, "width": 32},
        guided=4.0,
        inputs=inputs,
    )


ENTRIES: dict[str, Entry] = {
    "SanaPipeline": entry(lambda: sana(SanaPipeline)),
    "SanaPAGPipeline": entry(lambda: sana(SanaPAGPipeline, pag_applied_layers="blocks.1")),
    "SanaControlNetPipeline": entry(with_controlnet, lambda row: {"control_image": picture(row, 32, 32)}),
    # the one intermediate time is for two steps
    "SanaSprintPipeline": entry(lambda: sprint(SanaSprintPipeline), intermediate_timesteps=None),
    "SanaSprintImg2ImgPipeline": entry(
        lambda: sprint(SanaSprintImg2ImgPipeline),
        lambda row: {"image": picture(row, 32, 32)},
        intermediate_timesteps=None,
    ),
}
