"""Pipelines with random weights for `scripts/gpu_check.py`: networks of published shapes, written once as diffusers folders.

A run then loads such a folder by the same code as real weights. Text encoders are one layer deep and give embeddings of the
published shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from flowsteer.rollout.lifting.loading import load_diffusers

DTYPE = torch.bfloat16
AUTOENCODER: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
    latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
CHANNELS = {"full": (128, 256, 512, 512), "tiny": (8, 8, 16, 16)}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What `make_pipeline` makes: the published ``config.json`` of its parts, and a tiny version of the transformer's."""

    transformer: type[nn.Module]
    parameters: int  # of the published transformer
    shapes: dict[str, dict[str, Any]]  # of the transformer, by size
    autoencoder: dict[str, Any]  # what differs between models
    clip_widths: dict[str, tuple[int, ...]]  # of the CLIP text encoders, by size
    configs: dict[str, str] = field(default_factory=dict)  # the shipped configuration of each algorithm


MODELS = {
    "sd35m": Model(
        transformer=SD3Transformer2DModel,
        parameters=2_243_171_520,
        shapes={
            "full": dict(sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24,
                         joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
                         pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
                         patch_size=2, in_channels=16, out_channels=16),
            "tiny": dict(sample_size=16, num_layers=3, attention_head_dim=8, num_attention_heads=4,
                         joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=48,
                         pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
                         patch_size=2, in_channels=16, out_channels=16),
        },
        autoencoder=dict(scaling_factor=1.5305, shift_factor=0.0609),
        clip_widths={"full": (768, 1280), "tiny": (16, 32)},
        configs={"flow_grpo": "sd35m_flow_grpo_ocr", "mixgrpo": "sd35m_flow_grpo_ocr",
                 "diffusion_nft": "sd35m_nft_ocr"},
    ),
    "flux1dev": Model(
        transformer=FluxTransformer2DModel,
        parameters=11_901_408_320,
        shapes={
            "full": dict(in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128,
                         num_attention_heads=24, joint_attention_dim=4096, pooled_projection_dim=768,
                         guidance_embeds=True, axes_dims_rope=(16, 56, 56)),
            "tiny": dict(in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
                         num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=32,
                         guidance_embeds=True, axes_dims_rope=(4, 6, 6)),
        },
        autoencoder=dict(scaling_factor=0.3611, shift_factor=0.1159),
        clip_widths={"full": (768,), "tiny": (32,)},
        configs={"flow_grpo": "flux1dev_flow_grpo_ocr"},
    ),
}  # fmt: skip


def make_pipeline(model: str, size: str, device: torch.device) -> Any:
    """A pipeline with random weights of a fixed seed, in bfloat16 on the device.

    Args:
        model: one of `MODELS`.
        size: ``full`` or ``tiny``.
        device: where the weights are drawn; ``meta`` draws none.
    """
    about, channels = MODELS[model], CHANNELS[size]
    tokenizer = load_diffusers("embedded").tokenizer  # type: ignore[attr-defined]
    tokenizer.model_max_length = 77
    depth: dict[str, Any] = {
        "num_hidden_layers": 1, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    joint = about.shapes[size]["joint_attention_dim"]
    clip = CLIPTextModelWithProjection if model == "sd35m" else CLIPTextModel
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)  # in float32 a large transformer would not fit beside its own copy
    try:
        with device:  # drawn where it lives: on a CPU so many numbers take a minute
            transformer = about.transformer(**about.shapes[size])
            blocks: dict[str, Any] = {"block_out_channels": channels, "norm_num_groups": min(32, channels[0])}
            vae = AutoencoderKL(**AUTOENCODER, **about.autoencoder, **blocks)
            clips = [
                clip(CLIPTextConfig(
                    hidden_size=w, projection_dim=w, intermediate_size=w, num_attention_heads=4, **depth,
                ))
                for w in about.clip_widths[size]
            ]  # fmt: skip
            t5 = T5EncoderModel(
                T5Config(vocab_size=len(tokenizer), d_model=joint, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
            )
    finally:
        torch.set_default_dtype(before)
    parts: dict[str, Any] = {"transformer": transformer, "vae": vae, "text_encoder": clips[0], "tokenizer": tokenizer,
                             "tokenizer_2": tokenizer}  # fmt: skip
    if model == "sd35m":
        parts |= {"text_encoder_2": clips[1], "text_encoder_3": t5, "tokenizer_3": tokenizer}
        return StableDiffusion3Pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(scheduler=scheduler, text_encoder_2=t5, **parts)


def written(model: str, size: str, device: torch.device, root: Path) -> Path:
    """The folder of a model, made at the first call."""
    folder = root / f"{model}_{size}"
    if not folder.exists():
        make_pipeline(model, size, device).save_pretrained(folder)
    return folder


def nbytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
