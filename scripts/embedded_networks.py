"""The networks of the embedded pipelines, untrained, and their tokenizers; `scripts/pretrain_embedded.py` trains them.

Letters: B samples, L prompt tokens, C latent channels, D width of the prompt's embedding.
"""

# diffusers' own hints are narrower than what it takes and gives
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.models import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from flowsteer.rewards.scorers.world import all_captions

PROMPT_LENGTH = 12  # tokens: ten words, one beginning, one end
LATENT_CHANNELS = 8


def build_vae() -> AutoencoderKL:
    """32x32 pixels to 8x8 latents of 8 channels; 0.17 million weights."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,  # one group per channel would lose the colour of flat areas: 2 dB less
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_tokenizer(texts: Iterable[str] | None = None, length: int = PROMPT_LENGTH) -> CLIPTokenizer:
    """A byte-pair tokenizer learnt from texts, by default the world's captions; each of their words becomes one token."""
    texts = [caption.text for caption in all_captions()] if texts is None else texts
    words = Counter(word for text in texts for word in text.split())
    merges = learn_merges(words)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges)]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *tokens])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909, algorithm 1) until every word is one symbol.

    Ties are broken by the alphabet; the tokenizers library breaks them at random, and the token ids with them.
    """
    split = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while any(len(symbols) > 1 for symbols in split.values()):
        counts: Counter[tuple[str, str]] = Counter()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                counts[pair] += words[word]
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        left, right = merges[-1]
        for symbols in split.values():
            for i in range(len(symbols) - 2, -1, -1):
                if symbols[i : i + 2] == [left, right]:
                    symbols[i : i + 2] = [left + right]
    return merges


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """Two layers of width 64; 0.1 million weights."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=PROMPT_LENGTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    """Four blocks of width 128 over 16 image tokens; 2.3 million weights."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=4,
    )


class CountedTokens:
    """SD3's joint attention in which the last prompt token stands for many equal ones.

    The zero tokens that the pipeline appends are all equal, and prompt tokens carry no position: n copies of a token act on
    every softmax as one copy whose logit is larger by log(n). One token then trains what any number of them would do at
    a fraction of the cost. ``attention_mask`` [B, 1, 1, keys] holds that logarithm, and zero for the other keys.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """As diffusers' JointAttnProcessor2_0, which has no mask."""
        batch, num_image = hidden_states.shape[:2]

        def heads(*parts: Tensor) -> Tensor:
            return torch.cat(parts, dim=1).view(batch, -1, attn.heads, parts[0].shape[-1] // attn.heads).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(
            heads(attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states)),
            heads(attn.to_k(hidden_states), attn.add_k_proj(encoder_hidden_states)),
            heads(attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states)),
            attn_mask=attention_mask,
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        image, prompt = mixed[:, :num_image], mixed[:, num_image:]
        return attn.to_out[0](image), prompt if attn.context_pre_only else attn.to_add_out(prompt)


class Denoiser(torch.nn.Module):
    """The transformer and its two text encoders, called as the pipeline calls them."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.text_encoder_2 = build_text_encoder(tokenizer)
        self.transformer = build_transformer()
        self.transformer.set_attn_processor(CountedTokens())

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] to the prompt's embedding [B, L + 1, D], its last token zero, and the pooled one [B, D].

        As StableDiffusion3Pipeline.encode_prompt: the layer before the last of each encoder, side by side.
        """
        outputs = [encoder(ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return F.pad(tokens, (0, 0, 0, 1)), torch.cat([output.text_embeds for output in outputs], dim=-1)

    def forward(self, latents: Tensor, sigma: Tensor, ids: Tensor, num_zero_tokens: Tensor) -> Tensor:
        """The velocity [B, C, 8, 8] at noise level ``sigma`` [B], with so many zero tokens [B] behind the prompt."""
        embeds, pooled = self.encode(ids)
        num_image = latents.shape[-1] * latents.shape[-2] // self.transformer.config.patch_size**2
        bias = torch.zeros(len(latents), 1, 1, num_image + embeds.shape[1])
        bias[..., -1] = num_zero_tokens.float().log()[:, None, None]
        return self.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            joint_attention_kwargs={"attention_mask": bias},
            return_dict=False,
        )[0]
