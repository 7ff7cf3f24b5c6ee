"""LTX: version 1 from text, a picture or conditions on any frame; version 2 with sound."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Qwen2Tokenizer, T5Config, T5EncoderModel

from zoo.entries import Entry
from zoo.media import picture, video
from zoo.parts import VOCABULARY, byte_tokenizer

SIZE = {"height": 32, "width": 32}
WIDTH, LAYERS = 16, 2
"""Of version 2's text encoder."""


def components() -> dict[str, Any]:
    """What the pipelines of version 1 share."""
    autoencoder = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
    )
    autoencoder.use_framewise_encoding = autoencoder.use_framewise_decoding = False
    return {
        "transformer": LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=32,
        ),
        "vae": autoencoder,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": T5EncoderModel(
            T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ),
        "tokenizer": byte_tokenizer(),
    }


def text_encoder_2() -> Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 16,
    }
    vision = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def left_tokenizer() -> Qwen2Tokenizer:
    """Padded on the left from the beginning, as Gemma's: one pipeline remembers the side that it was built with."""
    tokenizer = byte_tokenizer()
    tokenizer.padding_side = "left"
    return tokenizer


def connectors() -> LTX2TextConnectors:
    """From all layers of the text encoder to what the video's and the sound's halves attend to."""
    return LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=LAYERS + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
    )


def components_2() -> dict[str, Any]:
    """What the pipelines of version 2 share: a transformer, an autoencoder and a vocoder for the sound, too."""
    autoencoder = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
    )
    autoencoder.use_framewise_encoding = autoencoder.use_framewise_decoding = False
    return {
        "transformer": LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=2,
            caption_channels=WIDTH,
            rope_double_precision=False,
            rope_type="split",
        ),
        "vae": autoencoder,
        "audio_vae": AutoencoderKLLTX2Audio(
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            resolution=32,
            latent_channels=2,
            mel_bins=8,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "text_encoder": text_encoder_2(),
        "tokenizer": left_tokenizer(),
        "connectors": connectors(),
        "vocoder": LTX2Vocoder(
            in_channels=16,  # 2 channels of 8 mel bins
            hidden_channels=32,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
    }


def ltx() -> DiffusionPipeline:
    return LTXPipeline(**components())


def ltx_image_to_video() -> DiffusionPipeline:
    return LTXImageToVideoPipeline(**components())


def ltx_condition() -> DiffusionPipeline:
    return LTXConditionPipeline(**components())


def ltx_2() -> DiffusionPipeline:
    return LTX2Pipeline(**components_2())


def ltx_2_image_to_video() -> DiffusionPipeline:
    return LTX2ImageToVideoPipeline(**components_2())


def ltx_2_condition() -> DiffusionPipeline:
    return LTX2ConditionPipeline(**components_2())


def image(row: int) -> dict[str, Any]:
    return {"image": picture(row, 32)}


CALL = {"num_frames": 9, "max_sequence_length": 32}
CALL_2 = {
    "num_frames": 5,
    "max_sequence_length": 32,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_guidance_scale": None,
    "audio_stg_scale": None,
    "audio_modality_scale": None,
}
"""Guidance by the prompt only, the sound's as the video's."""

ENTRIES: dict[str, Entry] = {
    "ltx": Entry(build=ltx, call=CALL, size=SIZE, guided=3.0),
    "ltx_i2v": Entry(build=ltx_image_to_video, call=CALL, size=SIZE, guided=3.0, inputs=image),
    "ltx_condition": Entry(build=ltx_condition, call=CALL, size=SIZE, guided=3.0, inputs=image),
    "ltx_condition_video": Entry(
        build=ltx_condition, call=CALL, size=SIZE, guided=3.0, inputs=lambda row: {"video": video(row, 5, 32)}
    ),
    "ltx2": Entry(build=ltx_2, call=CALL_2, size=SIZE, guided=3.0),
    "ltx2_i2v": Entry(build=ltx_2_image_to_video, call=CALL_2 | {"image_crf": 0}, size=SIZE, guided=3.0, inputs=image),
    "ltx2_condition": Entry(
        build=ltx_2_condition,
        call=CALL_2,
        size=SIZE,
        guided=3.0,
        inputs=lambda row: {"conditions": [LTX2VideoCondition(frames=picture(row, 32), crf=0)]},
    ),
}
NOT_BUILT: dict[str, str] = {}
