"""Kolors: Stable Diffusion XL's UNet with ChatGLM for a text encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import DiffusionPipeline, KolorsImg2ImgPipeline, KolorsPAGPipeline, KolorsPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.utils import is_sentencepiece_available
from torch import nn
from transformers import BatchEncoding, Qwen2Tokenizer

from zoo.entries import Entry
from zoo.epsilon_sd import SIZE, image
from zoo.epsilon_sdxl import euler, unet
from zoo.parts import END, VOCABULARY, autoencoder, byte_characters

WIDTH = 32


class PositionTokenizer(Qwen2Tokenizer):
    """Bytes, padded on the left and with their positions, as ChatGLM's tokenizer does (which needs sentencepiece)."""

    def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        encoding = super().__call__(*args, **kwargs)
        encoding["position_ids"] = (encoding["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return encoding


def tokenizer() -> PositionTokenizer:
    pieces = [END, *byte_characters()]
    return PositionTokenizer(
        vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], model_max_length=256, padding_side="left"
    )


def chat_glm() -> ChatGLMModel:
    """The class leaves its weights uninitialised."""
    model = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            ffn_hidden_size=37,
            kv_channels=8,
            num_attention_heads=4,
            seq_length=64,
            add_qkv_bias=True,
            multi_query_attention=True,
            multi_query_group_num=2,
            original_rope=True,
        )
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


def of(cls: Any) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(
        unet=unet(encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj"),
        vae=autoencoder(4),
        scheduler=euler(),
        text_encoder=chat_glm(),
        tokenizer=tokenizer(),
        image_encoder=None,
        feature_extractor=None,
    )


CALL = {"max_sequence_length": 32}

BUILDABLE: dict[str, Entry] = {
    "kolors": Entry(build=of(KolorsPipeline), call=CALL, size=SIZE, guided=5.0),
    "kolors_img2img": Entry(
        build=of(KolorsImg2ImgPipeline), call=CALL | {"strength": 0.8}, size=SIZE, guided=5.0, inputs=image
    ),
    "kolors_pag": Entry(build=of(KolorsPAGPipeline), call=CALL, size=SIZE, guided=5.0),
}
MISSING = "asks for the package sentencepiece, which is not installed"
ENTRIES: dict[str, Entry] = BUILDABLE if is_sentencepiece_available() else {}
NOT_BUILT: dict[str, str] = (
    {} if ENTRIES else dict.fromkeys(("KolorsPipeline", "KolorsImg2ImgPipeline", "KolorsPAGPipeline"), MISSING)
)
