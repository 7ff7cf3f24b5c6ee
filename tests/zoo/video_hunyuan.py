"""HunyuanVideo 1.0 and 1.5: text to video, picture to video."""

# The constructors take more than their annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from zoo.entries import Entry
from zoo.media import picture
from zoo.parts import VOCABULARY, byte_tokenizer, clip_text, clip_tokenizer

SIZE = {"height": 16, "width": 16}
LATENTS, WIDTH, POOLED, VISION = 4, 16, 32, 16
"""Channels of the latents; widths of the text, pooled text and picture embeddings."""
LAYERS = 3
"""Of the text encoders, whose last two layers the pipelines leave out."""
VISION_TOKENS = 4


def autoencoder() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENTS,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=4.0,  # brings the latents of a random encoder to a std of about 1
    )


def transformer(channels: int, **more: Any) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=channels,
        out_channels=LATENTS,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(2, 4, 4),
        **more,
    )


def llama_config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=LAYERS,
        pad_token_id=0,
        **more,
    )


def components(text_encoder: Any, tokenizer: Any, shift: float = 7.0) -> dict[str, Any]:
    """What the pipelines of version 1.0 share."""
    return {
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "text_encoder_2": clip_text(POOLED, projection=False),
        "tokenizer_2": clip_tokenizer(),
        "vae": autoencoder(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
    }


def text_to_video() -> DiffusionPipeline:
    return HunyuanVideoPipeline(
        **components(LlamaModel(llama_config()), byte_tokenizer()),
        transformer=transformer(LATENTS, guidance_embeds=True),
    )


def skyreels() -> DiffusionPipeline:
    return HunyuanSkyreelsImageToVideoPipeline(
        **components(LlamaModel(llama_config()), byte_tokenizer()),
        transformer=transformer(2 * LATENTS, guidance_embeds=True),
    )


MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
PLAIN_TEMPLATE = {"template": "Describe the video: {}", "crop_start": len("Describe the video: ")}
"""The pipeline's own is longer, in bytes, than what is kept of the prompt."""


def llava_tokenizer() -> Qwen2Tokenizer:
    """Bytes, and the marks by which the pipeline finds its way in the text."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(MARKS), special_tokens=True)
    return tokenizer


def picture_template() -> dict[str, Any]:
    """The pipeline's own template without its instructions, and where the picture stands in it."""
    before = "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe it.<|eot_id|>\n\n"
    before += "<|start_header_id|>user<|end_header_id|>\n\n"
    after = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    tokenizer = llava_tokenizer()
    tokens = tokenizer(before).input_ids
    start = tokens.index(tokenizer.convert_tokens_to_ids("<image>"))
    return {
        "template": before + "{}" + after,
        "crop_start": len(tokens),
        "image_emb_start": start,
        "image_emb_end": start + VISION_TOKENS,
        "image_emb_len": VISION_TOKENS,
    }


def image_to_video(channels: int, condition: str) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        tokenizer = llava_tokenizer()
        vision = CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            projection_dim=8,
            num_attention_heads=2,
            num_hidden_layers=2,
            image_size=16,
            patch_size=8,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=llama_config(),
            pad_token_id=0,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        return HunyuanVideoImageToVideoPipeline(
            **components(LlavaForConditionalGeneration(config), tokenizer),
            transformer=transformer(channels, guidance_embeds=False, image_condition_type=condition),
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        )

    return build


CHAT_TEMPLATE = """{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'system' %}{{ m['content'][:94] }}
{%- else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
"""108 bytes before the prompt, which is how many tokens version 1.5 cuts off."""


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = byte_tokenizer(2048)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def components_15(task: str) -> dict[str, Any]:
    """What the pipelines of version 1.5 share: the state beside its picture's latents and a mask, and a guider."""
    text = Qwen2_5_VLTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_scaling={"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        rope_theta=1000000.0,
        initializer_range=0.5,  # of an intermediate layer, whose size no norm has made one
    )
    glyphs = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return {
        "transformer": HunyuanVideo15Transformer3DModel(
            in_channels=2 * LATENTS + 1,
            out_channels=LATENTS,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=WIDTH,
            text_embed_2_dim=32,
            image_embed_dim=VISION,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type=task,
        ),
        "vae": AutoencoderKLHunyuanVideo15(
            latent_channels=LATENTS,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "text_encoder": Qwen2_5_VLTextModel(text),
        "tokenizer": chat_tokenizer(),
        "text_encoder_2": T5EncoderModel(glyphs),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=4.0),
    }


def text_to_video_15() -> DiffusionPipeline:
    return HunyuanVideo15Pipeline(**components_15("t2v"))


def image_to_video_15() -> DiffusionPipeline:
    vision = SiglipVisionConfig(
        hidden_size=VISION,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return HunyuanVideo15ImageToVideoPipeline(
        **components_15("i2v"),
        image_encoder=SiglipVisionModel(vision),
        feature_extractor=SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    )


def image(row: int) -> dict[str, Any]:
    return {"image": picture(row)}


CALL = {"max_sequence_length": 32, "negative_prompt": "a grey wall"}
"""Without a negative prompt there is no guidance."""
PICTURE_CALL = CALL | {"num_frames": 9, "prompt_template": picture_template()}
"""The first four frames are the picture's, and are left out."""

ENTRIES: dict[str, Entry] = {
    "hunyuan_video": Entry(
        build=text_to_video,
        call=CALL | {"num_frames": 5, "prompt_template": PLAIN_TEMPLATE},
        size=SIZE,
        guided=4.0,
        guidance_name="true_cfg_scale",
    ),
    "hunyuan_video_i2v": Entry(
        build=image_to_video(2 * LATENTS + 1, "latent_concat"),
        call=PICTURE_CALL,
        size=SIZE,
        guided=4.0,
        guidance_name="true_cfg_scale",
        inputs=image,
    ),
    "hunyuan_video_i2v_token_replace": Entry(
        build=image_to_video(LATENTS, "token_replace"),
        call=PICTURE_CALL,
        size=SIZE,
        guided=4.0,
        guidance_name="true_cfg_scale",
        inputs=image,
    ),
    "hunyuan_skyreels_i2v": Entry(
        build=skyreels,
        call=CALL | {"num_frames": 5, "prompt_template": PLAIN_TEMPLATE},
        size=SIZE,
        guided=4.0,
        guidance_name="true_cfg_scale",
        inputs=image,
    ),
    "hunyuan_video_15": Entry(
        build=text_to_video_15, call={"num_frames": 5}, size=SIZE, guided=4.0, guidance_name="guider"
    ),
    "hunyuan_video_15_i2v": Entry(
        build=image_to_video_15, call={"num_frames": 5}, size={}, guided=4.0, guidance_name="guider", inputs=image
    ),
}
NOT_BUILT: dict[str, str] = {}
