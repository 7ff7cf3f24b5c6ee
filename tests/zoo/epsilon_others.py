"""Image pipelines that predict noise, beside Stable Diffusion: transformers, Kandinsky's and DeepFloyd's UNets."""

# The constructors take more than their annotations say.
# pyright: reportArgumentType=false

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    HunyuanDiTControlNetPipeline,
    HunyuanDiTPAGPipeline,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import BertConfig, BertModel, BertTokenizer, T5Config, T5EncoderModel

from zoo.entries import Entry
from zoo.epsilon_sd import SIZE, UNCHECKED, ddim
from zoo.media import CONTROL, picture
from zoo.parts import VOCABULARY, autoencoder, byte_tokenizer
from zoo.weights import opened

WIDTH = 32
"""Of the text embeddings."""


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=4))


def pixart(
    cls: Any, make_scheduler: Callable[[], Any] = DPMSolverMultistepScheduler
) -> Callable[[], DiffusionPipeline]:
    """Learned variances make the network's output twice as wide as its input."""
    return lambda: cls(
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=WIDTH,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
        ),
        vae=autoencoder(4),
        scheduler=make_scheduler(),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
    )


def bert_tokenizer() -> BertTokenizer:
    """One token per letter."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *string.digits]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, model_max_length=77)


HUNYUAN: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "in_channels": 4,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH,
    "pooled_projection_dim": 16,
    "hidden_size": 24,
    "activation_fn": "gelu-approximate",
}


def hunyuan_components() -> dict[str, Any]:
    return {
        "transformer": HunyuanDiT2DModel(**HUNYUAN, num_layers=4),
        "vae": autoencoder(4),
        "scheduler": DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.02,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            steps_offset=1,
            clip_sample=False,
        ),
        "text_encoder": BertModel(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=37,
                max_position_embeddings=80,
            )
        ),
        "tokenizer": bert_tokenizer(),
        "text_encoder_2": t5(),
        "tokenizer_2": byte_tokenizer(256),
        **UNCHECKED,
    }


def hunyuan(cls: Any) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**hunyuan_components())


def hunyuan_controlnet() -> DiffusionPipeline:
    network = HunyuanDiT2DControlNetModel(**HUNYUAN, transformer_num_layers=4)
    return HunyuanDiTControlNetPipeline(**hunyuan_components(), controlnet=opened(network))


def cogview_3() -> DiffusionPipeline:
    return CogView3PlusPipeline(
        transformer=CogView3PlusTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=2,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        vae=autoencoder(4),
        scheduler=CogVideoXDDIMScheduler(),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(),
    )


PIXART = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 32}
UNBINNED = {"use_resolution_binning": False}

ENTRIES: dict[str, Entry] = {
    "pixart_alpha": Entry(build=pixart(PixArtAlphaPipeline), call=PIXART, size=SIZE, guided=4.5),
    "pixart_sigma": Entry(build=pixart(PixArtSigmaPipeline), call=PIXART, size=SIZE, guided=4.5),
    "pixart_sigma_ddim_clip_sample": Entry(
        build=pixart(PixArtSigmaPipeline, lambda: ddim(clip_sample=True)), call=PIXART, size=SIZE, guided=4.5
    ),
    "pixart_sigma_pag": Entry(build=pixart(PixArtSigmaPAGPipeline), call=PIXART, size=SIZE, guided=4.5),
    "hunyuan_dit": Entry(build=hunyuan(HunyuanDiTPipeline), call=UNBINNED, size=SIZE, guided=5.0),
    "hunyuan_dit_pag": Entry(build=hunyuan(HunyuanDiTPAGPipeline), call=UNBINNED, size=SIZE, guided=5.0),
    "hunyuan_dit_controlnet": Entry(
        build=hunyuan_controlnet,
        call=UNBINNED,
        size=SIZE,
        guided=5.0,
        inputs=lambda row: {"control_image": picture(row + CONTROL)},
    ),
    "cogview3_plus": Entry(build=cogview_3, call={"max_sequence_length": 32}, size=SIZE, guided=5.0),
}
NOT_BUILT: dict[str, str] = {"DiTPipeline": "draws class labels, and takes no prompt"}
