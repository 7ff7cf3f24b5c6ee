"""Cosmos 1, 2 and 2.5: worlds from a picture, a video or words alone."""

# The constructors take more than their annotations say.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKLCosmos,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    CosmosVideoToWorldPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import is_torchvision_available
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, T5Config, T5EncoderModel

from zoo.entries import Entry
from zoo.media import picture, video
from zoo.parts import VOCABULARY, byte_tokenizer
from zoo.video_wan import autoencoder

SIZE = {"height": 32, "width": 32}
WIDTH, LAYERS = 16, 2


class AllowAll:
    """Stands for Cosmos' guardrail, which loads its own large models from the hub."""

    def to(self, _: Any) -> AllowAll:
        return self

    def check_text_safety(self, _: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


GIVEN = 17
"""Channels: the state, and a mask of the frames that are given."""


def transformer(**more: Any) -> CosmosTransformer3DModel:
    return CosmosTransformer3DModel(
        **{
            "in_channels": GIVEN,
            "out_channels": 16,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mlp_ratio": 2,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            **more,
        }
    )


def cosmos_2(cls: Any, channels: int) -> Callable[[], DiffusionPipeline]:
    """Noise levels up to 80."""
    return lambda: cls(
        transformer=transformer(in_channels=channels, text_embed_dim=32),
        vae=autoencoder(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ),
        tokenizer=byte_tokenizer(),
        safety_checker=AllowAll(),
    )


def cosmos_1(cls: Any, channels: int) -> Callable[[], DiffusionPipeline]:
    """Preconditioned as in EDM, with that paper's Euler scheduler."""
    return lambda: cls(
        transformer=transformer(in_channels=channels, out_channels=4, text_embed_dim=32),
        vae=AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        scheduler=EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
        ),
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ),
        tokenizer=byte_tokenizer(),
        safety_checker=AllowAll(),
    )


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endif %}{% endfor %}"
)
"""The prompt alone, so that it is not lost among the tokens of the instructions."""


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def given_video() -> DiffusionPipeline:
    return cosmos_2(Cosmos2VideoToWorldPipeline, GIVEN)()


def predict() -> DiffusionPipeline:
    """It attends to all layers of its text encoder, one beside the other."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 16,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    return Cosmos2_5_PredictBasePipeline(
        transformer=transformer(
            text_embed_dim=32,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=WIDTH * LAYERS,
            encoder_hidden_states_channels=32,
        ),
        vae=autoencoder(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            use_karras_sigmas=True,
            sigma_max=200.0,
            sigma_min=0.01,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=chat_tokenizer(),
        safety_checker=AllowAll(),
    )


def image(row: int) -> dict[str, Any]:
    return {"image": picture(row, 32)}


def frames(row: int) -> dict[str, Any]:
    return {"video": video(row, 5, 32)}


CALL = {"num_frames": 9, "max_sequence_length": 16}

BUILDABLE: dict[str, Entry] = {
    "cosmos1_t2w": Entry(build=cosmos_1(CosmosTextToWorldPipeline, 4), call=CALL, size=SIZE, guided=4.0),
    "cosmos1_v2w": Entry(build=cosmos_1(CosmosVideoToWorldPipeline, 5), call=CALL, size=SIZE, guided=4.0, inputs=image),
    "cosmos2_t2i": Entry(
        build=cosmos_2(Cosmos2TextToImagePipeline, 16), call={"max_sequence_length": 16}, size=SIZE, guided=4.0
    ),
    "cosmos2_v2w_image": Entry(
        build=cosmos_2(Cosmos2VideoToWorldPipeline, GIVEN), call=CALL, size=SIZE, guided=4.0, inputs=image
    ),
    "cosmos2_v2w_video": Entry(
        build=cosmos_2(Cosmos2VideoToWorldPipeline, GIVEN), call=CALL, size=SIZE, guided=4.0, inputs=frames
    ),
    "cosmos25_predict": Entry(build=predict, call=CALL, size=SIZE, guided=4.0),
    "cosmos25_predict_image": Entry(build=predict, call=CALL, size=SIZE, guided=4.0, inputs=image),
    "cosmos25_predict_video": Entry(build=predict, call=CALL, size=SIZE, guided=4.0, inputs=frames),
}
MISSING = "its transformer resizes masks with torchvision, which is not installed: NameError"
ENTRIES: dict[str, Entry] = BUILDABLE if is_torchvision_available() else {}
NOT_BUILT: dict[str, str] = (
    {}
    if ENTRIES
    else dict.fromkeys(
        (
            "CosmosTextToWorldPipeline",
            "CosmosVideoToWorldPipeline",
            "Cosmos2TextToImagePipeline",
            "Cosmos2VideoToWorldPipeline",
            "Cosmos2_5_PredictBasePipeline",
        ),
        MISSING,
    )
)
