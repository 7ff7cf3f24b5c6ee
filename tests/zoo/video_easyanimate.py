"""EasyAnimate: words to video, and inside a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLMagvit,
    DiffusionPipeline,
    EasyAnimateInpaintPipeline,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from zoo.entries import Entry
from zoo.media import mask, video
from zoo.parts import VOCABULARY, byte_tokenizer

SIZE = {"height": 16, "width": 16}
LATENTS, WIDTH, FRAMES = 4, 16, 5


def of(cls: Any, channels: int) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        text = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
            "initializer_range": 0.5,  # of an intermediate layer, whose size no norm has made one
        }
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 1}
        autoencoder = AutoencoderKLMagvit(
            latent_channels=LATENTS,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
            scaling_factor=4.0,  # brings the latents of a random encoder to a std of about 1
        )
        autoencoder.register_to_config(cache_mag_vae=True)  # which the inpainting pipeline reads
        return cls(
            transformer=EasyAnimateTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=channels,
                out_channels=LATENTS,
                time_embed_dim=4,
                text_embed_dim=WIDTH,
                num_layers=2,
                mmdit_layers=2,
                sample_width=16,
                sample_height=16,
                patch_size=2,
            ),
            vae=autoencoder,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)),
            tokenizer=byte_tokenizer(),
        )

    return build


def tensor(pictures: list[Any]) -> torch.Tensor:  # [1, C, F, H, W] in [0, 255]
    """A video as EasyAnimate takes it."""
    arrays = [np.atleast_3d(np.asarray(one, dtype=np.float32)) for one in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(3, 0, 1, 2)[None]


def masked(row: int) -> dict[str, Any]:
    return {"video": tensor(video(row, FRAMES)) / 255, "mask_video": tensor([mask(row)] * FRAMES)}


CALL = {"num_frames": FRAMES, "negative_prompt": "a grey wall"}
"""With guidance, a negative prompt must be given."""

ENTRIES: dict[str, Entry] = {
    "easyanimate": Entry(build=of(EasyAnimatePipeline, LATENTS), call=CALL, size=SIZE, guided=4.0),
    "easyanimate_inpaint": Entry(
        build=of(EasyAnimateInpaintPipeline, 2 * LATENTS + 1), call=CALL, size=SIZE, guided=4.0, inputs=masked
    ),
}
NOT_BUILT: dict[str, str] = {
    "EasyAnimateControlPipeline": "its __call__ gives its encode_prompt a text_encoder_index, which it does not take"
}
