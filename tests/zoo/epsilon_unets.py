"""UNets that predict noise and its variance: Kandinsky 2.2 and 3, DeepFloyd IF."""

# The constructors take more than their annotations say.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    IFImg2ImgPipeline,
    IFInpaintingPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    Kandinsky3Img2ImgPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    KandinskyV22ControlnetImg2ImgPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    UNet2DConditionModel,
    VQModel,
)

from zoo.entries import Entry
from zoo.epsilon_others import WIDTH, t5
from zoo.epsilon_sd import SIZE, UNCHECKED, ddim, image, image_and_mask
from zoo.media import CONTROL, picture
from zoo.parts import byte_tokenizer


def movq(levels: int = 2) -> VQModel:
    return VQModel(
        block_out_channels=(32,) * levels,  # its spatial norms have 32 groups
        down_block_types=(*("DownEncoderBlock2D",) * (levels - 1), "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * (levels - 1)),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def kandinsky_22(cls: Any, channels: int = 4, told: str = "image") -> Callable[[], DiffusionPipeline]:
    """The decoder, which is told what to draw by the embedding of a picture."""
    return lambda: cls(
        unet=UNet2DConditionModel(
            in_channels=channels,
            out_channels=8,
            addition_embed_type=told,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(8, 16),
            layers_per_block=1,
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=2,
            resnet_time_scale_shift="scale_shift",
        ),
        scheduler=ddim(beta_schedule="linear"),
        movq=movq(2 if told == "image" else 4),  # a hint is made smaller by 8, as the autoencoder's latents are
    )


def kandinsky_3(cls: Any) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(
        unet=Kandinsky3UNet(
            in_channels=4,
            time_embedding_dim=4,
            groups=2,
            attention_head_dim=4,
            layers_per_block=2,
            block_out_channels=(8, 16),
            cross_attention_dim=4,
            encoder_hid_dim=WIDTH,
        ),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="squaredcos_cap_v2", steps_offset=1, clip_sample=True
        ),
        movq=movq(),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
    )


def deepfloyd(cls: Any, channels: int = 3, **more: Any) -> Callable[[], DiffusionPipeline]:
    """In pixel space, without an autoencoder."""
    return lambda: cls(
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            out_channels=6,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            cross_attention_dim=32,  # its norm has 32 groups
            encoder_hid_dim=WIDTH,
            attention_head_dim=4,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            norm_num_groups=2,
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            class_embed_type="timestep" if more else None,
        ),
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2", thresholding=True, variance_type="learned_range", sample_max_value=1.0
        ),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
        watermarker=None,
        **UNCHECKED,
        **more,
    )


def super_resolution() -> DiffusionPipeline:
    """A second network, which sees the small picture with noise on it, and is told how much."""
    noise = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    return deepfloyd(IFSuperResolutionPipeline, 6, image_noising_scheduler=noise)()


def embeddings(row: int) -> dict[str, Any]:
    """What Kandinsky's prior makes of a prompt, and of no prompt."""
    generator = torch.Generator().manual_seed(row)
    return {
        "image_embeds": torch.randn(1, WIDTH, generator=generator),
        "negative_image_embeds": torch.randn(1, WIDTH, generator=generator),
    }


def hint(row: int) -> dict[str, Any]:
    """A control picture, as numbers in [-1, 1]."""
    return {"hint": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(row + CONTROL)) * 2 - 1}


def small(row: int) -> dict[str, Any]:
    return {"image": picture(row, 8)}


HINT_SIZE = {"height": 64, "width": 64}
STRENGTH = {"strength": 0.8}
CALL = {"clean_caption": False}

ENTRIES: dict[str, Entry] = {
    "kandinsky22": Entry(build=kandinsky_22(KandinskyV22Pipeline), call={}, size=SIZE, guided=4.0, inputs=embeddings),
    "kandinsky22_img2img": Entry(
        build=kandinsky_22(KandinskyV22Img2ImgPipeline),
        call=STRENGTH,
        size=SIZE,
        guided=4.0,
        inputs=lambda row: image(row) | embeddings(row),
    ),
    "kandinsky22_inpaint": Entry(
        build=kandinsky_22(KandinskyV22InpaintPipeline, 9),
        call={},
        size=SIZE,
        guided=4.0,
        inputs=lambda row: image_and_mask(row) | embeddings(row),
    ),
    "kandinsky22_controlnet": Entry(
        build=kandinsky_22(KandinskyV22ControlnetPipeline, 8, "image_hint"),
        call={},
        size=HINT_SIZE,
        guided=4.0,
        inputs=lambda row: hint(row) | embeddings(row),
    ),
    "kandinsky22_controlnet_img2img": Entry(
        build=kandinsky_22(KandinskyV22ControlnetImg2ImgPipeline, 8, "image_hint"),
        call=STRENGTH,
        size=HINT_SIZE,
        guided=4.0,
        inputs=lambda row: image(row) | hint(row) | embeddings(row),
    ),
    "kandinsky3": Entry(build=kandinsky_3(Kandinsky3Pipeline), call={}, size=SIZE, guided=4.0),
    "kandinsky3_img2img": Entry(
        build=kandinsky_3(Kandinsky3Img2ImgPipeline), call=STRENGTH, size={}, guided=4.0, inputs=image
    ),
    "deepfloyd_if": Entry(build=deepfloyd(IFPipeline), call=CALL, size={"height": 8, "width": 8}, guided=7.0),
    "deepfloyd_if_img2img": Entry(
        build=deepfloyd(IFImg2ImgPipeline), call=CALL | STRENGTH, size={}, guided=7.0, inputs=image
    ),
    "deepfloyd_if_inpaint": Entry(
        build=deepfloyd(IFInpaintingPipeline), call=CALL, size={}, guided=7.0, inputs=image_and_mask
    ),
    "deepfloyd_if_super_resolution": Entry(build=super_resolution, call=CALL, size=SIZE, guided=7.0, inputs=small),
}
NOT_BUILT: dict[str, str] = {}
