"""The networks of the embedded editing pipeline, untrained, and its tokenizers; `scripts/pretrain_edit.py` trains them.

Letters: B samples, L prompt tokens, C latent channels, S tokens of a picture, D width of the prompt's embedding.
"""

# diffusers' own hints are narrower than what it takes and gives
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import string

import torch
from diffusers.models import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from embedded_networks import LATENT_CHANNELS, build_tokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from flowsteer.rewards.scorers.edits import all_things, edits_of

EDIT_LENGTH = 12  # tokens of an instruction: seven words, one beginning, one end, some to spare
LATENT_SIDE = 8
_WIDTH = 64  # of the text encoders


def edit_texts() -> list[str]:
    """Every instruction of the world of edits, each once."""
    pairs = [[thing, other] for thing in all_things() for other in all_things() if thing != other]
    kinds = ("recolor", "reshape", "remove", "add")
    return sorted({edit.text for pair in pairs for kind in kinds for edit in edits_of(pair, kind)})


def build_edit_tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    """CLIP's byte pairs and T5's pieces; each word of the world is one token of both, other words are spelt."""
    texts = edit_texts()
    words = sorted({word for text in texts for word in text.split()})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    # a letter costs more than a word does, so that a known word is not spelt
    letters = [(letter, -10.0) for letter in string.ascii_lowercase]
    pieces = [*special, *letters, *((f"▁{word}", -1.0) for word in words)]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=EDIT_LENGTH)
    return build_tokenizer(texts, EDIT_LENGTH), t5


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of width 64, for the pooled embedding."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_WIDTH,
            intermediate_size=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=EDIT_LENGTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Two layers of width 64, for an embedding of each token."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=_WIDTH,
            d_kv=_WIDTH // 2,
            d_ff=2 * _WIDTH,
            num_layers=2,
            num_heads=2,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=EDIT_LENGTH,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_flux() -> FluxTransformer2DModel:
    """Width 128 over 16 tokens of the sample, 16 of its source and the instruction; 2.3 million weights."""
    return FluxTransformer2DModel(
        patch_size=1,  # the pipeline itself packs two by two latents into a token
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        axes_dims_rope=(8, 12, 12),  # which picture, row, column
        guidance_embeds=False,
    )


class EditDenoiser(torch.nn.Module):
    """The transformer and its two text encoders, called as FluxKontextPipeline calls them."""

    def __init__(self, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.text_encoder = build_clip(clip_tokenizer)
        self.text_encoder_2 = build_t5(t5_tokenizer)
        self.transformer = build_flux()

    def forward(self, latents: Tensor, source: Tensor, sigma: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """The velocity [B, C, 8, 8] of latents at noise level ``sigma`` [B], to edit ``source`` [B, C, 8, 8]."""
        tokens = torch.cat([pack(latents), pack(source)], dim=1)  # [B, 2 S, 4 C]
        own = FluxKontextPipeline._prepare_latent_image_ids(1, LATENT_SIDE // 2, LATENT_SIDE // 2, "cpu", torch.float32)
        of_source = own.clone()
        of_source[..., 0] = 1
        velocity = self.transformer(
            hidden_states=tokens,
            timestep=sigma,
            guidance=None,
            pooled_projections=self.text_encoder(clip_ids).pooler_output,
            encoder_hidden_states=self.text_encoder_2(t5_ids)[0],
            txt_ids=torch.zeros(t5_ids.shape[1], 3),
            img_ids=torch.cat([own, of_source]),
            return_dict=False,
        )[0]
        return unpack(velocity[:, : tokens.shape[1] // 2])


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, 8, 8] to tokens [B, S, 4 C]."""
    return FluxKontextPipeline._pack_latents(latents, len(latents), *latents.shape[1:])


def unpack(tokens: Tensor) -> Tensor:
    """Tokens [B, S, 4 C] to latents [B, C, 8, 8]."""
    return FluxKontextPipeline._unpack_latents(tokens, LATENT_SIDE, LATENT_SIDE, vae_scale_factor=1)
