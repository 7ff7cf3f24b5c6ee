"""Stable Diffusion XL and its relatives: two text encoders, picture sizes as conditions, Euler by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPAGImg2ImgPipeline,
    StableDiffusionXLControlNetPAGPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPAGImg2ImgPipeline,
    StableDiffusionXLPAGInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)

from zoo import epsilon_sd
from zoo.entries import Entry
from zoo.epsilon_sd import BETAS, SIZE, ddim, image, image_and_control, image_and_mask, image_mask_and_control
from zoo.media import CONTROL, picture
from zoo.parts import autoencoder, clip_text, clip_tokenizer
from zoo.weights import opened

NETWORK: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "in_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 1),
    "projection_class_embeddings_input_dim": 80,  # 6 numbers * 8 + 32
    "cross_attention_dim": 64,
    "norm_num_groups": 2,
}
"""What the UNet and the ControlNet beside it have in common."""


def unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            **NETWORK,
            "sample_size": 8,
            "out_channels": 4,
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            **changes,
        }
    )


def controlnet() -> ControlNetModel:
    return opened(ControlNetModel(**NETWORK, conditioning_embedding_out_channels=(4, 8)))


def euler(**more: Any) -> EulerDiscreteScheduler:
    """The scheduler of Stable Diffusion XL."""
    return EulerDiscreteScheduler(**{**BETAS, "timestep_spacing": "leading", "steps_offset": 1, **more})


def components(network: UNet2DConditionModel | None = None) -> dict[str, Any]:
    return {
        "unet": network or unet(),
        "vae": autoencoder(4),
        "scheduler": euler(),
        "text_encoder": clip_text(projection=False),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text(),
        "tokenizer_2": clip_tokenizer(),
    }


def of(cls: Any, **changes: Any) -> Callable[[], DiffusionPipeline]:
    """Builds a class that needs the shared components only, over a UNet with these changes."""
    return lambda: cls(**components(unet(**changes)))


def with_controlnet(cls: Any) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**components(), controlnet=controlnet())


def with_scheduler(make: Callable[[], Any]) -> Callable[[], DiffusionPipeline]:
    return lambda: StableDiffusionXLPipeline(**(components() | {"scheduler": make()}))


def controlnet_union(cls: Any) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**components(), controlnet=opened(union()))


def union() -> ControlNetUnionModel:
    """One network for six kinds of control pictures."""
    return ControlNetUnionModel(
        **NETWORK,
        conditioning_embedding_out_channels=(4, 8),
        num_control_type=6,
        num_trans_channel=8,
        num_trans_head=2,
        num_trans_layer=1,
        num_proj_channel=8,
    )


def adapter() -> DiffusionPipeline:
    network = T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    return StableDiffusionXLAdapterPipeline(**components(), adapter=network)


def controls(row: int) -> dict[str, Any]:
    return {"control_image": [picture(row + CONTROL)]}


def entry(build: Callable[[], DiffusionPipeline], inputs: Callable[[int], dict[str, Any]], **call: Any) -> Entry:
    return Entry(build=build, call=call, size=SIZE, guided=5.0, inputs=inputs)


def without_size(build: Callable[[], DiffusionPipeline], **call: Any) -> Entry:
    """Picture to picture: the size is the picture's."""
    return Entry(build=build, call=call, size={}, guided=5.0, inputs=image)


def plain(build: Callable[[], DiffusionPipeline]) -> Entry:
    return Entry(build=build, call={}, size=SIZE, guided=5.0)


SCHEDULERS: dict[str, Callable[[], Any]] = epsilon_sd.SCHEDULERS | {
    "ddim": ddim,
    "euler_karras": lambda: euler(use_karras_sigmas=True),
    "euler_linspace": lambda: euler(timestep_spacing="linspace"),
    "euler_trailing": lambda: euler(timestep_spacing="trailing"),
    "euler_v_zero_snr": lambda: euler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
}
"""Further schedulers with which published models are saved; Stable Diffusion XL's own is Euler with leading spacing."""

ENTRIES: dict[str, Entry] = {
    "sdxl": plain(of(StableDiffusionXLPipeline)),
    **{f"sdxl_{name}": plain(with_scheduler(make)) for name, make in SCHEDULERS.items() if name != "euler"},
    "sdxl_img2img": without_size(of(StableDiffusionXLImg2ImgPipeline), strength=0.8),
    "sdxl_inpaint": entry(of(StableDiffusionXLInpaintPipeline, in_channels=9), image_and_mask),
    "sdxl_inpaint_4_channels": entry(of(StableDiffusionXLInpaintPipeline), image_and_mask),
    "sdxl_instruct_pix2pix": entry(of(StableDiffusionXLInstructPix2PixPipeline, in_channels=8), image),
    "sdxl_controlnet": entry(with_controlnet(StableDiffusionXLControlNetPipeline), image),
    "sdxl_controlnet_img2img": entry(with_controlnet(StableDiffusionXLControlNetImg2ImgPipeline), image_and_control),
    "sdxl_controlnet_inpaint": entry(
        with_controlnet(StableDiffusionXLControlNetInpaintPipeline), image_mask_and_control
    ),
    "sdxl_controlnet_union": entry(
        controlnet_union(StableDiffusionXLControlNetUnionPipeline), controls, control_mode=[3]
    ),
    "sdxl_controlnet_union_img2img": entry(
        controlnet_union(StableDiffusionXLControlNetUnionImg2ImgPipeline),
        lambda row: image(row) | controls(row),
        control_mode=[3],
    ),
    "sdxl_controlnet_union_inpaint": entry(
        controlnet_union(StableDiffusionXLControlNetUnionInpaintPipeline),
        lambda row: image_and_mask(row) | controls(row),
        control_mode=[3],
    ),
    "sdxl_controlnet_pag_img2img": entry(
        with_controlnet(StableDiffusionXLControlNetPAGImg2ImgPipeline), image_and_control
    ),
    "sdxl_pag": plain(of(StableDiffusionXLPAGPipeline)),
    "sdxl_pag_img2img": without_size(of(StableDiffusionXLPAGImg2ImgPipeline), strength=0.8),
    "sdxl_pag_inpaint": entry(of(StableDiffusionXLPAGInpaintPipeline), image_and_mask),
    "sdxl_controlnet_pag": entry(with_controlnet(StableDiffusionXLControlNetPAGPipeline), image),
    "sdxl_adapter": entry(adapter, image),
}
NOT_BUILT: dict[str, str] = {}
