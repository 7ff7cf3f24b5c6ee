"""Families that draw from text and pictures, with encoders that read both."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderTiny,
    BriaFiboEditPipeline,
    DiffusionPipeline,
    DreamLiteMobilePipeline,
    DreamLitePipeline,
    DreamLiteUNetModel,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    HunyuanImageRefinerPipeline,
    HunyuanImageTransformer2DModel,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Kandinsky5I2IPipeline,
    LongCatImageEditPipeline,
)
from diffusers.pipelines.joyimage.image_processor import BUCKETS, JoyImageEditImageProcessor
from torch import nn
from transformers import ByT5Tokenizer, GlmImageConfig, GlmImageForConditionalGeneration, GlmImageProcessor
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil

from zoo.encoders import (
    TEXT,
    chat_tokenizer,
    deep_autoencoder,
    lively,
    qwen2_vl,
    qwen3_processor,
    qwen3_vl,
    t5,
    token_ids,
    wan_autoencoder,
)
from zoo.entries import Entry
from zoo.flow_images_text import SHIFTED, bria_fibo, euler, kandinsky5_parts, longcat_parts
from zoo.media import mask, picture
from zoo.parts import VOCABULARY

WIDTH = TEXT["hidden_size"]


def refiner() -> DiffusionPipeline:
    """Its scale of guidance is told to the transformer."""
    tokenizer = chat_tokenizer(4096, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return HunyuanImageRefinerPipeline(
        scheduler=euler(shift=4.0),
        vae=AutoencoderKLHunyuanImageRefiner(
            latent_channels=4,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
        ),
        text_encoder=qwen2_vl(tokenizer, num_hidden_layers=3),
        tokenizer=tokenizer,
        transformer=HunyuanImageTransformer2DModel(
            in_channels=16,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1, 1),
            text_embed_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
            guidance_embeds=True,
        ),
    )


def kandinsky5_edit() -> DiffusionPipeline:
    pipe = Kandinsky5I2IPipeline(**kandinsky5_parts(visual_cond=True))
    pipe.resolutions = [(64, 64)]  # instead of those of a million pixels
    return pipe


def longcat_edit() -> DiffusionPipeline:
    """It enlarges its pictures to a million pixels: 1024 / 2 ** 6 is a latent of 16 x 16."""
    vae = deep_autoencoder(16, 7, **SHIFTED)
    lively(vae)
    return LongCatImageEditPipeline(**longcat_parts(vae))


def dreamlite(cls: Callable[..., DiffusionPipeline]) -> DiffusionPipeline:
    tokenizer = chat_tokenizer()
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    nn.init.constant_(vae.decoder.layers[-1].bias, 0.5)  # its pictures are between 0 and 1
    return cls(
        text_encoder=qwen3_vl(tokenizer),
        tokenizer=tokenizer,
        processor=qwen3_processor(tokenizer),
        vae=vae,
        unet=DreamLiteUNetModel(
            sample_size=8,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            block_out_channels=(8, 16),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            layers_per_block=1,
            norm_num_groups=4,
            ff_mult=2,
        ),
        scheduler=euler(use_dynamic_shifting=True),
    )


def glm_image() -> DiffusionPipeline:
    """A language model draws a coarse picture in tokens, which the transformer then refines.

    Without input pictures: what the class does with the encoder's answer to them is for an older transformers.
    """
    tokenizer = chat_tokenizer(4096, "<grid>", "</grid>", "<bos>")
    tokenizer.image_token, tokenizer.grid_bos_token, tokenizer.grid_eos_token = "<|image_pad|>", "<grid>", "</grid>"
    tokenizer.bos_token = "<bos>"
    ids = token_ids(tokenizer)
    side, codes = 28, 128
    language_model = GlmImageForConditionalGeneration(
        GlmImageConfig(
            text_config=TEXT
            | {
                "vision_vocab_size": codes,
                "max_position_embeddings": 512,
                "eos_token_id": VOCABULARY - 1,  # no code: the picture is drawn to its end
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": (2, 1, 1)},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "image_size": side,
                "patch_size": 14,
            },
            vq_config={"embed_dim": 16, "num_embeddings": codes, "latent_channels": 16},
            image_token_id=ids["image_token_id"],
            image_start_token_id=ids["vision_start_token_id"],
            image_end_token_id=ids["vision_end_token_id"],
        )
    )
    return GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=GlmImageProcessor(
            image_processor=GlmImageImageProcessorPil(
                size={"shortest_edge": side * side, "longest_edge": side * side},
                patch_size=14,
                temporal_patch_size=1,
                merge_size=1,
            ),
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
        ),
        text_encoder=t5(),
        vision_language_encoder=language_model,
        vae=deep_autoencoder(4, 4, latents_mean=[0.1] * 4, latents_std=[1.1] * 4),
        transformer=GlmImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=16,
            condition_dim=8,
            prior_vq_quantizer_codebook_size=codes,
        ),
        scheduler=euler(),
    )


def joy_parts(transformer: Any) -> dict[str, Any]:
    tokenizer = chat_tokenizer()
    return {
        "scheduler": euler(shift=3.0),
        "vae": wan_autoencoder(3, 4),
        "text_encoder": qwen3_vl(tokenizer),
        "tokenizer": tokenizer,
        "transformer": transformer(
            patch_size=[1, 2, 2],
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=WIDTH,
            num_layers=1,
            rope_dim_list=[4, 6, 6],
        ),
        "processor": qwen3_processor(tokenizer),
    }


def joy_processor() -> JoyImageEditImageProcessor:
    """For pictures of 32 x 32 pixels: the class would enlarge all to one of its sizes, a million pixels each."""
    BUCKETS[32] = [(32, 32)]
    return JoyImageEditImageProcessor(vae_scale_factor=8, basesize=32)


def joy() -> DiffusionPipeline:
    pipe = JoyImageEditPipeline(**joy_parts(JoyImageEditTransformer3DModel))
    pipe.vae_image_processor = joy_processor()
    return pipe


def joy_plus() -> DiffusionPipeline:
    pipe = JoyImageEditPlusPipeline(**joy_parts(JoyImageEditPlusTransformer3DModel))
    pipe.image_processor = joy_processor()
    return pipe


def instruction(text: str) -> str:
    return json.dumps({"edit_instruction": text})


ENTRIES: dict[str, Entry] = {
    "HunyuanImageRefinerPipeline": Entry(
        build=refiner,
        call={},
        size={"height": 16, "width": 16},
        guided=4.0,
        guidance_name="distilled_guidance_scale",
        inputs=lambda row: {"image": picture(row)},
    ),
    "Kandinsky5I2IPipeline": Entry(
        build=kandinsky5_edit,
        call={},
        size={"height": 64, "width": 64},
        guided=4.0,
        inputs=lambda row: {"image": picture(row, 64, 64)},
    ),
    "LongCatImageEditPipeline": Entry(
        build=longcat_edit, call={}, size={}, guided=4.0, inputs=lambda row: {"image": picture(row, 128, 128)}
    ),
    "DreamLitePipeline": Entry(
        build=lambda: dreamlite(DreamLitePipeline),
        call={},
        size={"height": 16, "width": 16},
        guided=4.0,
        inputs=lambda row: {"image": picture(row)},
    ),
    "DreamLiteMobilePipeline": Entry(
        build=lambda: dreamlite(DreamLiteMobilePipeline),
        call={},
        size={"height": 16, "width": 16},
        guided=None,
        inputs=lambda row: {"image": picture(row)},
    ),
    "GlmImagePipeline": Entry(
        build=glm_image,
        call={"max_sequence_length": 64},
        size={"height": 32, "width": 32},
        guided=4.0,
    ),
    "JoyImageEditPipeline": Entry(
        build=joy,
        call={},
        size={"height": 32, "width": 32},
        guided=4.0,
        inputs=lambda row: {"image": picture(row, 32, 32)},
    ),
    "JoyImageEditPlusPipeline": Entry(
        build=joy_plus,
        call={},
        size={"height": 32, "width": 32},
        guided=4.0,
        inputs=lambda row: {"images": [picture(row, 32, 32), picture(row + 10, 32, 32)]},
    ),
    "BriaFiboEditPipeline": Entry(
        build=lambda: bria_fibo(BriaFiboEditPipeline),
        call={"_auto_resize": False},
        size={"height": 64, "width": 64},
        guided=4.0,
        inputs=lambda row: {"image": picture(row, 64, 64), "mask": mask(row, 64, 64)},
        prompts=(instruction("a red circle"), instruction("a blue field"), instruction("a dark cloud")),
    ),
}
