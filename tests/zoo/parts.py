"""What the tiny pipelines are made of: tokenizers that need no file, text encoders, autoencoders."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
)

START, END, VOCABULARY = "<|startoftext|>", "<|endoftext|>", 600
CHAT_TEMPLATE = """{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def byte_characters() -> list[str]:
    """The 256 printable characters by which byte-level BPE writes bytes (as GPT-2 chose them)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + place) for place in range(len(others))]


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """Byte-level, without merges: one token per byte."""
    characters = byte_characters()
    pieces = [START, END, *characters, *(character + "</w>" for character in characters)]
    return CLIPTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], model_max_length=length)


def byte_tokenizer(length: int = 512) -> Qwen2Tokenizer:
    """Byte-level, without merges, with a chat template; stands for T5's and Qwen's tokenizers."""
    pieces = [END, *byte_characters()]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], model_max_length=length
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def clip_text(hidden_size: int = 32, *, projection: bool = True) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=hidden_size,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def autoencoder(latent_channels: int, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=2,
        layers_per_block=1,
        **more,
    )
