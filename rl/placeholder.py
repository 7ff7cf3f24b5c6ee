"""A text encoder that gives zeros, for a Stable Diffusion 3 that has no T5.

`StableDiffusion3Pipeline` uses zeros in the place of T5's output when it has none. But diffusers counts T5 as required:
``DiffusionPipeline.from_pretrained(folder)`` refuses a folder whose ``model_index.json`` lists [null, null] for it, unless it
is told ``text_encoder_3=None, tokenizer_3=None``. With this encoder in its place the folder loads without arguments, and
draws the same pictures.
"""

from __future__ import annotations

import warnings

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import T5Config, T5EncoderModel, T5TokenizerFast  # type: ignore[attr-defined]  (made on import)


def fill_absent(pipe: DiffusionPipeline) -> None:
    """Put the encoder, and a tokenizer of three tokens, where a Stable Diffusion 3 has no T5.

    Another pipeline class that lacks a required component is left as it is, with a warning.
    """
    if not isinstance(pipe, StableDiffusion3Pipeline):
        required = set(pipe._get_signature_keys(type(pipe))[0]) - set(pipe._optional_components)
        absent = sorted(name for name in required if getattr(pipe, name, None) is None)
        if absent:
            arguments = ", ".join(f"{name}=None" for name in absent)
            warnings.warn(
                f"this {type(pipe).__name__} has no {', '.join(absent)}; load it with from_pretrained(folder, {arguments})",
                stacklevel=2,
            )
        return
    if pipe.text_encoder_3 is None:
        encoder = zero_encoder(pipe.transformer.config["joint_attention_dim"])
        pipe.register_modules(text_encoder_3=encoder.to(pipe.transformer.device, pipe.transformer.dtype))
    if pipe.tokenizer_3 is None:
        pipe.register_modules(tokenizer_3=small_tokenizer())


def zero_encoder(width: int) -> T5EncoderModel:
    """A T5 of one layer whose weights are all 0, and so its output: [B, L] tokens -> [B, L, width] zeros."""
    config = T5Config(vocab_size=3, d_model=width, d_kv=1, d_ff=1, num_heads=1, num_layers=1)
    encoder = T5EncoderModel(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    return encoder


def small_tokenizer() -> T5TokenizerFast:
    """Every word is the token <unk>: the encoder's output does not depend on it."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)
