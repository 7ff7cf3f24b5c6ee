"""FLUX.2 and what has its autoencoder: Klein in four classes, Ernie-Image, Ideogram 4, Bria Fibo 2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    BriaFibo2Pipeline,
    BriaFibo2Transformer2DModel,
    DiffusionPipeline,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinInpaintPipeline,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
)
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Mistral3Model, Qwen3VLModel

from zoo.encoders import (
    TEXT,
    chat_tokenizer,
    flux2_autoencoder,
    qwen3,
    qwen3_processor,
    qwen3_vl,
    qwen3_vl_config,
    token_ids,
)
from zoo.entries import Build, Entry, Inputs, no_media
from zoo.media import mask, picture

LATENT = 16  # channels of a packed latent: 4 of the autoencoder, 2 x 2 places
LAYERS = (0, 1, 2)  # of the text encoder, side by side in the embeddings
SIDE = 64  # references must be that large


def transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=LATENT,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=len(LAYERS) * TEXT["hidden_size"],
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def mistral_config() -> Mistral3Config:
    return Mistral3Config(
        text_config={"model_type": "mistral"} | TEXT,
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 8,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_index=token_ids(chat_tokenizer())["image_token_id"],
    )


def flux2() -> DiffusionPipeline:
    """With a tokenizer instead of Pixtral's processor, which needs torchvision: the class asks for the chat template only."""
    return Flux2Pipeline(
        scheduler=scheduler(),
        vae=flux2_autoencoder(depth=3),
        text_encoder=Mistral3ForConditionalGeneration(mistral_config()),
        tokenizer=chat_tokenizer(),
        transformer=transformer(guidance_embeds=True),
    )


def klein(cls: Callable[..., DiffusionPipeline]) -> DiffusionPipeline:
    return cls(
        scheduler=scheduler(),
        vae=flux2_autoencoder(depth=3),
        text_encoder=qwen3(),
        tokenizer=chat_tokenizer(),
        transformer=transformer(guidance_embeds=False),
    )


def ernie() -> DiffusionPipeline:
    return ErnieImagePipeline(
        transformer=ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=LATENT,
            out_channels=LATENT,
            text_in_dim=TEXT["hidden_size"],
            rope_axes_dim=(4, 6, 6),
        ),
        vae=flux2_autoencoder(),
        text_encoder=Mistral3Model(mistral_config()),
        tokenizer=chat_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def ideogram() -> DiffusionPipeline:
    """Two transformers, one of them without the prompt; the encoder's depth is given by the layers that the class reads."""
    tokenizer = chat_tokenizer()
    parts = {
        "in_channels": LATENT,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": len(QWEN3_VL_ACTIVATION_LAYERS) * TEXT["hidden_size"],
        "rope_theta": 10_000,
        "mrope_section": (2, 1, 1),
    }
    depth = max(QWEN3_VL_ACTIVATION_LAYERS) + 1
    return Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_autoencoder(),
        text_encoder=Qwen3VLModel(qwen3_vl_config(tokenizer, num_hidden_layers=depth)),
        tokenizer=tokenizer,
        transformer=Ideogram4Transformer2DModel(**parts),
        unconditional_transformer=Ideogram4Transformer2DModel(**parts),
    )


def bria_fibo_2() -> DiffusionPipeline:
    tokenizer = chat_tokenizer()
    return BriaFibo2Pipeline(
        transformer=BriaFibo2Transformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=6,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=3 * TEXT["hidden_size"],
            injection_layer_ids=(0, 1, 2, 3, 4),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=4,
            gist_min_text_len=4,
            gist_max_text_len=64,
            axes_dims=(8, 4, 4),
        ),
        scheduler=scheduler(),
        vae=flux2_autoencoder(),
        text_encoder=qwen3_vl(tokenizer, num_hidden_layers=36),
        processor=qwen3_processor(tokenizer),
    )


def entry(build: Build, inputs: Inputs = no_media, **call: Any) -> Entry:
    return Entry(
        build=build,
        call={"max_sequence_length": 64, "text_encoder_out_layers": LAYERS} | call,
        size={"height": 32, "width": 32},
        guided=4.0,
        inputs=inputs,
    )


ENTRIES: dict[str, Entry] = {
    "Flux2Pipeline": entry(flux2, lambda row: {"image": [picture(row, SIDE, SIDE), picture(row + 10, SIDE, SIDE)]}),
    "Flux2KleinPipeline": entry(lambda: klein(Flux2KleinPipeline), lambda row: {"image": [picture(row, SIDE, SIDE)]}),
    "Flux2KleinKVPipeline": Entry(
        build=lambda: klein(Flux2KleinKVPipeline),
        call={"max_sequence_length": 64, "text_encoder_out_layers": LAYERS},
        size={"height": 32, "width": 32},
        guided=None,
        inputs=lambda row: {"image": [picture(row, SIDE, SIDE)]},
    ),
    "Flux2KleinInpaintPipeline": entry(
        lambda: klein(Flux2KleinInpaintPipeline),
        lambda row: {"image": picture(row, 32, 32), "mask_image": mask(row, 32, 32)},
    ),
    "ErnieImagePipeline": Entry(build=ernie, call={"use_pe": False}, size={"height": 16, "width": 16}, guided=4.0),
    "Ideogram4Pipeline": Entry(
        build=ideogram,
        call={"guidance_schedule": None, "max_sequence_length": 64},
        size={"height": 16, "width": 16},
        guided=4.0,
    ),
    "BriaFibo2Pipeline": Entry(build=bria_fibo_2, call={}, size={"height": 16, "width": 16}, guided=4.0),
}
