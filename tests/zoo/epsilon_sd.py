"""Stable Diffusion and its relatives with one text encoder: a UNet that predicts noise or v."""

# The constructors take more than their annotations say.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPAGInpaintPipeline,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImageVariationPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableUnCLIPImg2ImgPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig,
    DPTForDepthEstimation,
    DPTImageProcessorPil,
)

from zoo.entries import Entry
from zoo.media import CONTROL, mask, picture
from zoo.parts import autoencoder, clip_text, clip_tokenizer
from zoo.weights import opened

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = {"height": 16, "width": 16}
WIDTH = 32
"""Of the text and picture embeddings."""


def ddim(**more: Any) -> DDIMScheduler:
    """The scheduler of Stable Diffusion 1.5."""
    return DDIMScheduler(**{**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **more})


def unet(**changes: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 2,
            "cross_attention_dim": WIDTH,
            "norm_num_groups": 2,
            **changes,
        }
    )


def controlnet() -> ControlNetModel:
    return opened(
        ControlNetModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            in_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=WIDTH,
            norm_num_groups=2,
            conditioning_embedding_out_channels=(4, 8),  # one halving, as the autoencoder's
        )
    )


def image_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
    )


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def components(network: UNet2DConditionModel | None = None) -> dict[str, Any]:
    """What all these pipelines share."""
    return {
        "unet": network or unet(),
        "vae": autoencoder(4),
        "scheduler": ddim(),
        "text_encoder": clip_text(WIDTH, projection=False),
        "tokenizer": clip_tokenizer(),
    }


UNCHECKED: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def of(cls: Any, network: Callable[[], UNet2DConditionModel] = unet) -> Callable[[], DiffusionPipeline]:
    """Builds a class that needs the shared components only."""
    return lambda: cls(**components(network()), **UNCHECKED)


def with_controlnet(cls: Any) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**components(), **UNCHECKED, controlnet=controlnet())


def with_scheduler(make: Callable[[], Any]) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        pipe = StableDiffusionPipeline(**components(), **UNCHECKED)
        pipe.scheduler = make()  # its __init__ would switch clip_sample off
        return pipe

    return build


def latent_consistency(cls: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        parts = components(unet(time_cond_proj_dim=8)) | {"scheduler": LCMScheduler(**BETAS)}
        return cls(**parts, **UNCHECKED)

    return build


def instruct_pix2pix() -> DiffusionPipeline:
    return StableDiffusionInstructPix2PixPipeline(**components(unet(in_channels=8)), **UNCHECKED)


def depth_to_image() -> DiffusionPipeline:
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 4, 4, 4],
        fusion_hidden_size=4,
        readout_type="ignore",
    )
    return StableDiffusionDepth2ImgPipeline(
        **components(unet(in_channels=5)),
        depth_estimator=DPTForDepthEstimation(config),
        feature_extractor=DPTImageProcessorPil(size={"height": 32, "width": 32}),
    )


def upscale() -> DiffusionPipeline:
    """To four times the size in the real model; to the autoencoder's factor of 2 here."""
    return StableDiffusionUpscalePipeline(
        **components(unet(in_channels=7, num_class_embeds=1000)), low_res_scheduler=DDPMScheduler(), max_noise_level=350
    )


def latent_upscale() -> DiffusionPipeline:
    """A UNet of K blocks that predicts the sample itself, under Euler."""
    network = UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=[32, 32, 64, 64],  # K blocks normalise groups of 32
        time_cond_proj_dim=128 + WIDTH,  # the noise level's embedding and the prompt's
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=WIDTH,
        down_block_types=("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3),
        up_block_types=(*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D"),
        in_channels=8,
        out_channels=5,
        layers_per_block=1,
        mid_block_type=None,
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    )
    return StableDiffusionLatentUpscalePipeline(
        **(components(network) | {"scheduler": EulerDiscreteScheduler(prediction_type="sample")})
    )


def image_variation() -> DiffusionPipeline:
    return StableDiffusionImageVariationPipeline(
        vae=autoencoder(4),
        image_encoder=image_encoder(),
        unet=unet(),
        scheduler=ddim(),
        feature_extractor=image_processor(),
        safety_checker=None,
        requires_safety_checker=False,
    )


def unclip() -> DiffusionPipeline:
    network = unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH)
    return StableUnCLIPImg2ImgPipeline(
        **components(network),
        feature_extractor=image_processor(),
        image_encoder=image_encoder(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=WIDTH),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    )


def adapter() -> DiffusionPipeline:
    network = T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )
    return StableDiffusionAdapterPipeline(**components(), **UNCHECKED, adapter=network)


def image(row: int) -> dict[str, Any]:
    return {"image": picture(row)}


def image_and_mask(row: int) -> dict[str, Any]:
    return {"image": picture(row), "mask_image": mask(row)}


def image_and_control(row: int) -> dict[str, Any]:
    return {"image": picture(row), "control_image": picture(row + CONTROL)}


def image_mask_and_control(row: int) -> dict[str, Any]:
    return image_and_mask(row) | image_and_control(row)


def nine_channels() -> UNet2DConditionModel:
    """A UNet for inpainting, which is told the mask and the masked picture."""
    return unet(in_channels=9)


def plain(build: Callable[[], DiffusionPipeline], *, guided: float | None = 5.0, **call: Any) -> Entry:
    return Entry(build=build, call=call, size=SIZE, guided=guided)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim_linspace": lambda: ddim(timestep_spacing="linspace"),
    "ddim_trailing": lambda: ddim(timestep_spacing="trailing"),
    "ddim_clip_sample": lambda: ddim(clip_sample=True),
    "ddim_v": lambda: ddim(prediction_type="v_prediction"),
    "ddim_v_zero_snr": lambda: ddim(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "euler": lambda: EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    "euler_karras": lambda: EulerDiscreteScheduler(
        **BETAS, timestep_spacing="leading", steps_offset=1, use_karras_sigmas=True
    ),
    "dpm": lambda: DPMSolverMultistepScheduler(**BETAS),
    "dpm_karras": lambda: DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True),
    "pndm": lambda: PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
}
"""Further schedulers with which published models are saved; Stable Diffusion's own is DDIM with leading spacing."""

ENTRIES: dict[str, Entry] = {
    "sd": plain(of(StableDiffusionPipeline)),
    **{f"sd_{name}": plain(with_scheduler(make)) for name, make in SCHEDULERS.items()},
    "sd_img2img": Entry(build=of(StableDiffusionImg2ImgPipeline), call={}, size={}, guided=5.0, inputs=image),
    "sd_inpaint": Entry(
        build=of(StableDiffusionInpaintPipeline, nine_channels), call={}, size=SIZE, guided=5.0, inputs=image_and_mask
    ),
    "sd_inpaint_4_channels": Entry(
        build=of(StableDiffusionInpaintPipeline), call={}, size=SIZE, guided=5.0, inputs=image_and_mask
    ),
    "sd_instruct_pix2pix": Entry(build=instruct_pix2pix, call={}, size={}, guided=5.0, inputs=image),
    "sd_controlnet": Entry(
        build=with_controlnet(StableDiffusionControlNetPipeline), call={}, size=SIZE, guided=5.0, inputs=image
    ),
    "sd_controlnet_img2img": Entry(
        build=with_controlnet(StableDiffusionControlNetImg2ImgPipeline),
        call={},
        size=SIZE,
        guided=5.0,
        inputs=image_and_control,
    ),
    "sd_controlnet_inpaint": Entry(
        build=with_controlnet(StableDiffusionControlNetInpaintPipeline),
        call={},
        size=SIZE,
        guided=5.0,
        inputs=image_mask_and_control,
    ),
    "sd_depth2img": Entry(build=depth_to_image, call={}, size={}, guided=5.0, inputs=image),
    "sd_upscale": Entry(build=upscale, call={}, size={}, guided=5.0, inputs=image),
    "sd_latent_upscale": Entry(build=latent_upscale, call={}, size={}, guided=5.0, inputs=image),
    "sd_pag": plain(of(StableDiffusionPAGPipeline)),
    "sd_pag_img2img": Entry(build=of(StableDiffusionPAGImg2ImgPipeline), call={}, size={}, guided=5.0, inputs=image),
    "sd_pag_inpaint": Entry(
        build=of(StableDiffusionPAGInpaintPipeline), call={}, size=SIZE, guided=5.0, inputs=image_and_mask
    ),
    "sd_controlnet_pag": Entry(
        build=with_controlnet(StableDiffusionControlNetPAGPipeline), call={}, size=SIZE, guided=5.0, inputs=image
    ),
    "sd_controlnet_pag_inpaint": Entry(
        build=with_controlnet(StableDiffusionControlNetPAGInpaintPipeline),
        call={},
        size=SIZE,
        guided=5.0,
        inputs=image_mask_and_control,
    ),
    "sd_adapter": Entry(build=adapter, call={}, size=SIZE, guided=5.0, inputs=image),
    "sd_image_variation": Entry(build=image_variation, call={}, size=SIZE, guided=5.0, inputs=image),
    "sd_unclip_img2img": Entry(build=unclip, call={}, size=SIZE, guided=5.0, inputs=image),
    "lcm": plain(latent_consistency(LatentConsistencyModelPipeline)),
    "lcm_img2img": Entry(
        build=latent_consistency(LatentConsistencyModelImg2ImgPipeline), call={}, size={}, guided=5.0, inputs=image
    ),
}
NOT_BUILT: dict[str, str] = {}
