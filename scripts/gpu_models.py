"""Pipelines with random weights for `scripts/gpu_check.py`: networks of published shapes, written once as diffusers folders.

A run then loads such a folder by the same code as real weights. The shapes are those that `flowsteer plan` knows
(`rl/plan/models/`). Text encoders are one layer deep and give embeddings of the published shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from flowsteer.rl.plan.files import read_model
from flowsteer.rollout.lifting.loading import load_diffusers

DTYPE = torch.bfloat16
TINY_VAE: dict[str, Any] = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 8}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What `make_pipeline` makes, and how its tiny version differs."""

    path: str  # the hub's id
    parameters: int  # of the published transformer
    configs: dict[str, str]  # the shipped configuration of each algorithm
    scheduler: dict[str, Any]
    tiny: dict[str, Any]  # of the transformer
    tiny_clips: tuple[int, ...]  # widths of the CLIP text encoders

    def transformer(self, size: str) -> dict[str, Any]:
        """The transformer's ``config.json``, or its tiny version."""
        published = dict(read_model(self.path).components["transformer"].config)
        return published if size == "full" else published | self.tiny

    def clips(self, size: str) -> dict[str, tuple[str, int]]:
        """Class and width of each CLIP text encoder, by component."""
        found = {
            name: (own.cls, own.config["hidden_size"])
            for name, own in sorted(read_model(self.path).components.items())
            if own.cls.startswith("CLIPText")
        }
        widths = self.tiny_clips if size == "tiny" else [width for _, width in found.values()]
        return {name: (cls, width) for (name, (cls, _)), width in zip(found.items(), widths, strict=True)}


MODELS = {
    "sd35m": Model(
        path="stabilityai/stable-diffusion-3.5-medium",
        parameters=2_243_171_520,
        configs={
            "flow_grpo": "sd35m_flow_grpo_ocr",
            "mixgrpo": "sd35m_flow_grpo_ocr",
            "diffusion_nft": "sd35m_nft_ocr",
        },
        scheduler={"shift": 3.0},
        tiny={
            "sample_size": 16, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 4,
            "joint_attention_dim": 64, "caption_projection_dim": 32, "pooled_projection_dim": 48,
            "pos_embed_max_size": 16, "dual_attention_layers": (0,),
        },
        tiny_clips=(16, 32),
    ),
    "flux1dev": Model(
        path="black-forest-labs/FLUX.1-dev",
        parameters=11_901_408_320,
        configs={"flow_grpo": "flux1dev_flow_grpo_ocr"},
        scheduler={"shift": 3.0, "use_dynamic_shifting": True},
        tiny={
            "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
        },
        tiny_clips=(32,),
    ),
}  # fmt: skip


def make_pipeline(model: str, size: str, device: torch.device) -> Any:
    """A pipeline with random weights of a fixed seed, in bfloat16 on the device.

    Args:
        model: one of `MODELS`.
        size: ``full`` or ``tiny``.
        device: where the weights are drawn; ``meta`` draws none.
    """
    about, files = MODELS[model], read_model(MODELS[model].path)
    shapes = about.transformer(size)
    tokenizer = load_diffusers("embedded").tokenizer  # type: ignore[attr-defined]
    tokenizer.model_max_length = 77
    shallow: dict[str, Any] = {
        "num_hidden_layers": 1, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)  # in float32 a large transformer would not fit beside its own copy
    parts: dict[str, Any] = {}
    try:
        with device:  # drawn where it lives: on a CPU so many numbers take a minute
            parts["transformer"] = getattr(diffusers, files.components["transformer"].cls)(**shapes)
            autoencoder = dict(files.components["vae"].config) | (TINY_VAE if size == "tiny" else {})
            parts["vae"] = diffusers.AutoencoderKL(**autoencoder)
            for name, (cls, width) in about.clips(size).items():
                config = transformers.CLIPTextConfig(
                    hidden_size=width, projection_dim=width, intermediate_size=width, num_attention_heads=4, **shallow
                )
                parts[name] = getattr(transformers, cls)(config)
            (last,) = (name for name, own in files.components.items() if own.cls == "T5EncoderModel")
            joint = shapes["joint_attention_dim"]
            parts[last] = transformers.T5EncoderModel(
                transformers.T5Config(
                    vocab_size=len(tokenizer), d_model=joint, d_kv=16, d_ff=64, num_layers=1, num_heads=4
                )
            )
    finally:
        torch.set_default_dtype(before)
    tokenizers = {name.replace("text_encoder", "tokenizer"): tokenizer for name in parts if name.startswith("text_")}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**about.scheduler)
    return getattr(diffusers, files.pipeline)(scheduler=scheduler, **parts, **tokenizers)


def written(model: str, size: str, device: torch.device, root: Path) -> Path:
    """The folder of a model, made at the first call."""
    folder = root / f"{model}_{size}"
    if not folder.exists():
        make_pipeline(model, size, device).save_pretrained(folder)
    return folder


def nbytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
