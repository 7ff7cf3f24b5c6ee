"""Tiny random pipelines of six families, built offline from the real diffusers and transformers classes.

Random weights of the real initialisation leave many networks near zero (gates, last layers), where a parity test would
compare nothing with nothing. So every parameter of every denoiser gets 0.08 * randn on top.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from flowsteer.rollout.lifting.pipeline import FlowPipeline

torch.set_num_threads(
    1
)  # for networks this small, waiting for a second thread on a busy machine costs ten times the work

START, END, VOCABULARY = "<|startoftext|>", "<|endoftext|>", 600
CHAT_TEMPLATE = """{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def byte_characters() -> list[str]:
    """The 256 printable characters by which byte-level BPE writes bytes (as GPT-2 chose them)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + place) for place in range(len(others))]


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """Byte-level, without merges: one token per byte."""
    characters = byte_characters()
    pieces = [START, END, *characters, *(character + "</w>" for character in characters)]
    return CLIPTokenizer(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], model_max_length=length)


def byte_tokenizer(length: int = 512) -> Qwen2Tokenizer:
    """Byte-level, without merges, with a chat template; stands for T5's and Qwen's tokenizers."""
    pieces = [END, *byte_characters()]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], model_max_length=length
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def clip_text(hidden_size: int = 32, *, projection: bool = True) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=hidden_size,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def autoencoder(latent_channels: int, **more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=2,
        layers_per_block=1,
        **more,
    )


def stable_diffusion_3() -> DiffusionPipeline:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(
            T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=32, num_layers=1, num_heads=4)
        ),
        tokenizer_3=byte_tokenizer(),
    )


def flux() -> DiffusionPipeline:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(4, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ),
        tokenizer_2=byte_tokenizer(),
    )


def qwen_image() -> DiffusionPipeline:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, 0.0, -0.1, 0.2],
            latents_std=[1.0, 0.9, 1.1, 1.2],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=byte_tokenizer(2048),
    )


def z_image() -> DiffusionPipeline:
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=VOCABULARY,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
            )
        ),
        tokenizer=byte_tokenizer(),
    )


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan() -> DiffusionPipeline:
    """Wan 2.2: two transformers that share the steps between them."""
    return WanPipeline(
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.75,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ),
        tokenizer=byte_tokenizer(),
    )


def stable_diffusion_xl() -> DiffusionPipeline:
    """An epsilon model, saved with the Euler scheduler as SDXL is."""
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=16,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 1),
            projection_class_embeddings_input_dim=80,  # 6 numbers * 8 + 32
            cross_attention_dim=64,
            norm_num_groups=2,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        vae=autoencoder(4),
        text_encoder=clip_text(projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(),
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to build a tiny pipeline and how it wants to be called."""

    build: Callable[[], DiffusionPipeline]
    guided: float  # a guidance_scale that switches guidance on
    size: dict[str, int] = field(default_factory=lambda: {"height": 16, "width": 16})
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    guidance_name: str = "guidance_scale"
    off: float = 1.0  # the pipeline's own way to say "no guidance"
    dead_lora: tuple[str, ...] = ()  # parts of LoRA names that get no gradient, with the reason beside them


ZOO: dict[str, Family] = {
    "sd3": Family(build=stable_diffusion_3, guided=4.0, call_kwargs={"max_sequence_length": 32}),
    "flux": Family(build=flux, guided=3.5, call_kwargs={"max_sequence_length": 48}),
    "qwen": Family(
        build=qwen_image, guided=4.0, call_kwargs={"max_sequence_length": 512}, guidance_name="true_cfg_scale"
    ),
    "zimage": Family(build=z_image, guided=4.0, call_kwargs={"max_sequence_length": 64}, off=0.0),
    "wan": Family(build=wan, guided=4.0, call_kwargs={"num_frames": 9, "max_sequence_length": 32}),
    "sdxl": Family(build=stable_diffusion_xl, guided=5.0),
}

NOISE = 0.08


def build(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A pipeline of the zoo with live random weights, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = ZOO[name].build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
                for parameter in component.parameters():
                    parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def lifted(name: str, pipe: DiffusionPipeline | None = None) -> FlowPipeline:
    """A fresh FlowPipeline over a pipeline of the zoo."""
    family = ZOO[name]
    return FlowPipeline(pipe or build(name), **family.size, call_kwargs=family.call_kwargs)


@functools.cache
def shared(name: str) -> FlowPipeline:
    """One FlowPipeline per test session, for tests that change nothing about it."""
    return lifted(name)


# Lines of Stable Diffusion 3's loop, to be replaced in variants of it.
STEP = "                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]\n"
CACHE = """\
                if i == 0:
                    kept = noise_pred
                noise_pred = noise_pred + 0.1 * kept
"""


def variant(folder: Path, name: str, *changes: tuple[str, str]) -> type[StableDiffusion3Pipeline]:
    """Stable Diffusion 3 with some of its lines replaced, as somebody's own pipeline class in a file of its own."""
    original = Path(inspect.getfile(StableDiffusion3Pipeline))
    source = original.read_text()
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
        source = source.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(source)
    # beside the original, so that its relative imports are right
    spec = importlib.util.spec_from_file_location(f"diffusers.pipelines.stable_diffusion_3.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.StableDiffusion3Pipeline


def build_variant(folder: Path, name: str, *changes: tuple[str, str]) -> DiffusionPipeline:
    """A pipeline of such a class, with the zoo's Stable Diffusion 3 components."""
    cls = variant(folder, name, *changes)
    pipe = cls(**build("sd3").components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_class_without_guidance() -> DiffusionPipeline:
    """A flow pipeline whose ``__call__`` has no guidance argument."""

    class Unguided(DiffusionPipeline):
        def __init__(self, transformer: nn.Module, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, prompt: list[str], num_inference_steps: int = 3, output_type: str = "pt") -> tuple:
            self.scheduler.set_timesteps(num_inference_steps)
            latents = torch.randn(len(prompt), 3, 4, 4)
            for t in self.scheduler.timesteps:
                latents = self.scheduler.step(self.transformer(latents), t, latents)[0]
            return (latents,)

    return Unguided(transformer=nn.Conv2d(3, 3, 1), scheduler=FlowMatchEulerDiscreteScheduler())
