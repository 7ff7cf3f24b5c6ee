"""More of what tiny pipelines are made of: encoders that read pictures, processors, autoencoders of high compression.

Nothing here needs a file, and nothing needs torchvision: the image processors are those that work on PIL pictures.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    T5Config,
    T5EncoderModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor, VideoProcessorMixin

from zoo.parts import VOCABULARY, byte_tokenizer

if not hasattr(transformers, "VideoProcessorMixin"):
    # Processors look for this class there, to check what they are given; transformers puts it there with torchvision only.
    transformers.VideoProcessorMixin = VideoProcessorMixin

CHAT_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# The longer words of the pipelines' prompt templates are one token each. In bytes, templates would be long, and the few
# letters of a prompt would hardly count.
WORDS = """
    system user assistant Describe the key features input image color shape size texture objects background then explain
    how text instruction should alter modify Generate new that meets requirements while maintaining consistency with
    original where appropriate detailing quantity spatial relationships and are prompt engineer Based provided source
    first target second create interesting can used together editing expert analyze content attributes clearly precisely
    determine given ensuring only specified parts altered all other aspects remain consistent instructions reasons about
    descriptions You give structured responses focusing object relationships attribution actions without speculation
    assistant designed generate superior images degree alignment based textual prompts Comprehend
"""
# The placeholder of a picture, and the prompt with it; contents are strings or lists of parts.
CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.25,  # one over the root of the width, so that layers say something about their tokens
}
ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default"}


def chat_tokenizer(length: int = 4096, *more: str) -> Qwen2Tokenizer:
    """Bytes and the special tokens of Qwen's chats."""
    tokenizer = byte_tokenizer(length)
    tokenizer.add_tokens([*CHAT_TOKENS, *more], special_tokens=True)
    tokenizer.add_tokens([form for word in dict.fromkeys(WORDS.split()) for form in (word, f" {word}")])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def opening_tokenizer(length: int = 512) -> Qwen2Tokenizer:
    """Bytes after a token that opens every text, as Gemma's and GLM's have one: an empty prompt is one token long."""
    tokenizer = byte_tokenizer(length)
    tokenizer.add_tokens(["<bos>"], special_tokens=True)
    opening = [("<bos>", tokenizer.convert_tokens_to_ids("<bos>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", "<bos> $A $B", opening)
    return tokenizer


def token_ids(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    names = ("vision_start", "vision_end", "image", "video")
    tokens = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in zip(names, tokens)}


def qwen2_processor(tokenizer: Qwen2Tokenizer | None = None, patch_size: int = 14) -> Qwen2VLProcessor:
    """Pictures become four patches, one token, whatever their size."""
    tokenizer = tokenizer or chat_tokenizer()
    pixels = (2 * patch_size) ** 2
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels, patch_size=patch_size),
        tokenizer=tokenizer,
        video_processor=BaseVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def qwen3_processor(tokenizer: Qwen2Tokenizer | None = None, patch_size: int = 14) -> Qwen3VLProcessor:
    base = qwen2_processor(tokenizer, patch_size)
    return Qwen3VLProcessor(
        image_processor=base.image_processor,
        tokenizer=base.tokenizer,
        video_processor=base.video_processor,
        chat_template=CHAT_TEMPLATE,
    )


def qwen2_vl(tokenizer: Qwen2Tokenizer, **more: Any) -> Qwen2_5_VLForConditionalGeneration:
    text: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "head_dim"} | more
    config = Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": ROPE | {"rope_theta": 1000000.0}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "initializer_range": 0.25,
        },
        **token_ids(tokenizer),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl_config(tokenizer: Qwen2Tokenizer, **more: Any) -> Qwen3VLConfig:
    text: dict[str, Any] = TEXT | more
    return Qwen3VLConfig(
        text_config=text | {"rope_parameters": ROPE | {"rope_theta": 1000000.0}},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": text["hidden_size"],
            "patch_size": 14,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.25,
        },
        **token_ids(tokenizer),
    )


def qwen3_vl(tokenizer: Qwen2Tokenizer, **more: Any) -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer, **more))


def qwen3(**more: Any) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**TEXT | more))


def gemma() -> GemmaModel:
    return GemmaModel(GemmaConfig(**TEXT))


def gemma2() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**TEXT))


def t5(width: int = 16) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def lively(module: nn.Module) -> None:
    """Let signals through, and only as they are.

    torch's own initialisation leaves each convolution a third of its input's variance. And biases keep features away from
    zero, where a norm over few channels would make much of a rounding error.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.weight.data *= 3**0.5
            if layer.bias is not None:
                layer.bias.data = 0.3 * torch.randn_like(layer.bias).sign()


def deep_autoencoder(latent_channels: int, depth: int, **more: Any) -> AutoencoderKL:
    """Compresses ``2 ** (depth - 1)`` times on each side."""
    return AutoencoderKL(
        block_out_channels=(4,) * depth,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        latent_channels=latent_channels,
        norm_num_groups=2,
        layers_per_block=1,
        **more,
    )


def flux2_autoencoder(latent_channels: int = 4, depth: int = 1) -> AutoencoderKLFlux2:
    """Compresses ``2 ** (depth - 1)`` times on each side, before its patches of 2 x 2."""
    return AutoencoderKLFlux2(
        block_out_channels=(4,) * depth,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        latent_channels=latent_channels,
        norm_num_groups=2,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def qwen_autoencoder(levels: int = 2, z_dim: int = 4, **more: Any) -> AutoencoderKLQwenImage:
    """Compresses ``2 ** levels`` times on each side; without residual blocks at full size, for large pictures."""
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=z_dim,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=0,
        temperal_downsample=[False] * (levels - 1) + [True],
        latents_mean=[0.1] * z_dim,
        latents_std=[1.1] * z_dim,
        **more,
    )
    lively(vae)
    for layer in (vae.encoder.conv_out, vae.quant_conv, vae.decoder.conv_out):
        nn.init.zeros_(layer.bias)
    return vae


def wan_autoencoder(levels: int = 3, z_dim: int = 16, **more: Any) -> AutoencoderKLWan:
    """Compresses ``2 ** levels`` times on each side."""
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=z_dim,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=1,
        temperal_downsample=[False, True, True][-levels:] if levels <= 3 else [False] * (levels - 2) + [True, True],
        latents_mean=[0.1] * z_dim,
        latents_std=[1.1] * z_dim,
        **more,
    )
    lively(vae)
    for layer in (vae.encoder.conv_out, vae.quant_conv, vae.decoder.conv_out):
        nn.init.zeros_(layer.bias)
    return vae
