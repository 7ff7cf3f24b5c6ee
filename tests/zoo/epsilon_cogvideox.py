"""Transformers of videos that predict noise or v: CogVideoX, ConsisID, Allegro, Latte; and Stable Video Diffusion."""

# The constructors take more than their annotations say.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLTemporalDecoder,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
    ConsisIDPipeline,
    ConsisIDTransformer3DModel,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from zoo.entries import Entry
from zoo.epsilon_others import t5
from zoo.epsilon_sd import ddim
from zoo.media import CONTROL, picture, video
from zoo.parts import autoencoder, byte_tokenizer

SIZE = {"height": 16, "width": 16}
LATENTS, WIDTH, FRAMES, TOKENS = 4, 32, 9, 16
VISION = 8
"""Of the embeddings of a face."""

TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "out_channels": LATENTS,
    "time_embed_dim": 4,
    "text_embed_dim": WIDTH,
    "num_layers": 2,
    "sample_width": 2,
    "sample_height": 2,
    "sample_frames": FRAMES,
    "max_text_seq_length": TOKENS,
}


def components(scheduler: Any = None) -> dict[str, Any]:
    """What CogVideoX and ConsisID share."""
    return {
        "vae": AutoencoderKLCogVideoX(
            latent_channels=LATENTS,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=4.0,  # brings the latents of a random encoder to a std of about 1
        ),
        "scheduler": scheduler
        or CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
        "text_encoder": t5(),
        "tokenizer": byte_tokenizer(),
    }


def dpm() -> CogVideoXDPMScheduler:
    return CogVideoXDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )


def cogvideox(
    cls: Any, channels: int = LATENTS, scheduler: Callable[[], Any] | None = None, **more: Any
) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(
        **components(scheduler() if scheduler else None),
        transformer=CogVideoXTransformer3DModel(**TRANSFORMER, in_channels=channels, **more),
    )


def consisid() -> DiffusionPipeline:
    """A picture's latents, and embeddings of the face on it."""
    return ConsisIDPipeline(
        **components(dpm()),
        transformer=ConsisIDTransformer3DModel(
            **TRANSFORMER,
            in_channels=2 * LATENTS,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
            is_train_face=True,
            cross_attn_interval=1,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=VISION,
            LFE_vit_dim=VISION,
            LFE_depth=2,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=2,
            LFE_output_dim=21,  # two thirds of the transformer's width
            LFE_ff_mult=1,
            LFE_num_scale=1,
        ),
    )


def allegro() -> DiffusionPipeline:
    """Its autoencoder works in tiles only."""
    tiled = AutoencoderKLAllegro(
        latent_channels=LATENTS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    tiled.enable_tiling()
    tile: Any = (8, 16, 16)  # the whole video; one smaller than a tile comes out black
    tiled.kernel = tiled.stride = tile
    return AllegroPipeline(
        transformer=AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            cross_attention_dim=24,
            sample_width=8,
            sample_height=8,
            sample_frames=8,
            caption_channels=WIDTH,
        ),
        vae=tiled,
        scheduler=EulerAncestralDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="linspace"
        ),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
    )


def latte() -> DiffusionPipeline:
    return LattePipeline(
        transformer=LatteTransformer3DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=WIDTH,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            video_length=4,
        ),
        vae=autoencoder(4),
        scheduler=ddim(beta_schedule="linear", set_alpha_to_one=True),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
    )


def stable_video() -> DiffusionPipeline:
    """A v model with continuous timesteps and Karras' noise levels up to 700; a picture instead of words."""
    return StableVideoDiffusionPipeline(
        unet=UNetSpatioTemporalConditionModel(
            block_out_channels=(32, 64),  # its norms have 32 groups
            layers_per_block=1,
            sample_size=8,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=WIDTH,
            num_attention_heads=(2, 4),
            projection_class_embeddings_input_dim=24,
            addition_time_embed_dim=8,
        ),
        vae=AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
        ),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=37,
                image_size=224,  # to which the pipeline resizes
                patch_size=56,
            )
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
            timestep_spacing="leading",
            timestep_type="continuous",
            steps_offset=1,
        ),
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 224}),
    )


def image(row: int) -> dict[str, Any]:
    return {"image": picture(row)}


def face(row: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(row)
    return image(row) | {
        "id_cond": torch.randn(1, VISION, generator=generator),
        "id_vit_hidden": [torch.randn(1, 4, VISION, generator=generator)],
    }


CALL: dict[str, Any] = {"num_frames": FRAMES, "max_sequence_length": TOKENS}
WITHOUT_FRAMES = {"max_sequence_length": TOKENS}

ENTRIES: dict[str, Entry] = {
    "cogvideox": Entry(build=cogvideox(CogVideoXPipeline), call=CALL, size=SIZE, guided=6.0),
    "cogvideox_dpm": Entry(
        build=cogvideox(CogVideoXPipeline, scheduler=dpm, use_rotary_positional_embeddings=True),
        call=CALL | {"use_dynamic_cfg": True},
        size=SIZE,
        guided=6.0,
    ),
    "cogvideox_i2v": Entry(
        build=cogvideox(
            CogVideoXImageToVideoPipeline,
            2 * LATENTS,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        ),
        call=CALL,
        size=SIZE,
        guided=6.0,
        inputs=image,
    ),
    "cogvideox_v2v": Entry(
        build=cogvideox(CogVideoXVideoToVideoPipeline),
        call=WITHOUT_FRAMES,
        size=SIZE,
        guided=6.0,
        inputs=lambda row: {"video": video(row, FRAMES)},
    ),
    "cogvideox_fun_control": Entry(
        build=cogvideox(CogVideoXFunControlPipeline, 2 * LATENTS),
        call=WITHOUT_FRAMES,
        size=SIZE,
        guided=6.0,
        inputs=lambda row: {"control_video": video(row + CONTROL, FRAMES)},
    ),
    "consisid": Entry(build=consisid, call=CALL, size=SIZE, guided=6.0, inputs=face),
    "allegro": Entry(
        build=allegro,
        call={"num_frames": 8, "max_sequence_length": 32, "clean_caption": False},
        size=SIZE,
        guided=6.0,
    ),
    "allegro_leading": Entry(
        build=allegro,
        call={"num_frames": 8, "max_sequence_length": 32, "clean_caption": False},
        size=SIZE,
        guided=6.0,
        scheduler={"timestep_spacing": "leading"},
    ),
    "latte": Entry(build=latte, call={"video_length": 4, "clean_caption": False}, size=SIZE, guided=5.0),
    "stable_video": Entry(
        build=stable_video,
        call={"num_frames": 3},
        size=SIZE,
        guided=3.0,
        guidance_name="max_guidance_scale",
        inputs=image,
    ),
    "stable_video_uniform": Entry(
        build=stable_video,
        call={"num_frames": 3, "max_guidance_scale": 3.0},
        size=SIZE,
        guided=None,
        inputs=image,
        scheduler={"use_karras_sigmas": False},
    ),
}
NOT_BUILT: dict[str, str] = {}
