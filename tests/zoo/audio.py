"""Pipelines of sounds: Stable Audio, Stable Audio 3, LongCat, ACE-Step, AudioLDM 2."""

# The constructors take more than their annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderOobleck,
    AutoencoderSAME,
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    StableAudio3AudioToAudioPipeline,
    StableAudio3DiTModel,
    StableAudio3InpaintPipeline,
    StableAudio3Pipeline,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3Model,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from zoo.entries import Entry
from zoo.media import sound
from zoo.parts import VOCABULARY, byte_characters, byte_tokenizer
from zoo.weights import enlarged, opened

WIDTH = 16
"""Of the text embeddings."""


def t5(width: int = WIDTH) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def oobleck(latents: int, rate: int) -> AutoencoderOobleck:
    """Two samples for one latent."""
    return AutoencoderOobleck(
        encoder_hidden_size=2 * latents,  # means and deviations
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=latents,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=rate,
    )


def stable_audio() -> DiffusionPipeline:
    """A v model with noise levels up to 500."""
    return StableAudioPipeline(
        transformer=StableAudioDiTModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=8,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=8,
        ),
        vae=oobleck(4, 8),
        scheduler=EDMDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
        ),
        text_encoder=t5(),
        tokenizer=byte_tokenizer(32),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=8, min_value=0, max_value=32
        ),
    )


def stable_audio_3(cls: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        module = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "sliding_window": 64,
            "layer_types": ["full_attention", "full_attention"],
        }
        transformer = enlarged(
            StableAudio3DiTModel(
                io_channels=8,
                embed_dim=32,
                depth=2,
                num_heads=4,
                cond_token_dim=WIDTH,
                global_cond_dim=WIDTH,
                local_add_cond_dim=9,  # the latents of the sound to be kept, and their mask
                timestep_features_dim=16,
                ff_mult=2,
                num_memory_tokens=3,
            ),
            3.0,
        )
        autoencoder = AutoencoderSAME(
            patch_size=2,
            encoder_channels=8,
            encoder_c_mults=[2],
            encoder_strides=[2],
            encoder_transformer_depths=[1],
            latent_dim=8,
            dim_heads=4,
            ff_mult=2,
            sampling_rate=16,
        )
        return cls(
            transformer=opened(transformer),
            vae=enlarged(autoencoder, 3.0),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            text_encoder=T5GemmaEncoderModel(
                T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False, vocab_size=VOCABULARY)
            ),
            tokenizer=byte_tokenizer(32),
            duration_embedder=StableAudio3DurationEmbedder(output_dim=WIDTH, fourier_dim=16),
        )

    return build


def longcat() -> DiffusionPipeline:
    """Its noise levels rise from data to noise."""
    return LongCatAudioDiTPipeline(
        transformer=LongCatAudioDiTTransformer(
            dit_dim=32, dit_depth=2, dit_heads=4, dit_text_dim=WIDTH, latent_dim=8, text_conv=False
        ),
        vae=LongCatAudioDiTVae(
            channels=16,
            c_mults=[1, 2],
            strides=[2],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=2,
            sample_rate=320,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        tokenizer=byte_tokenizer(64),
    )


def ace_step() -> DiffusionPipeline:
    encoder: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
    }
    return AceStepPipeline(
        transformer=AceStepTransformer1DModel(
            **encoder, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8
        ),
        condition_encoder=enlarged(
            AceStepConditionEncoder(
                **encoder,
                text_hidden_dim=WIDTH,
                timbre_hidden_dim=8,
                num_lyric_encoder_hidden_layers=1,
                num_timbre_encoder_hidden_layers=1,
            ),
            3.0,
        ),
        vae=enlarged(oobleck(8, 8), 2.0),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=8,
            )
        ),
        tokenizer=byte_tokenizer(),
    )


def letters(cls: Any) -> Any:
    """One token per letter, as a class of tokenizer by which the pipeline knows what it gives to whom."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if cls is RobertaTokenizer else ["<pad>", "</s>", "<unk>"]
    if cls is RobertaTokenizer:
        pieces = [*special, *byte_characters()]
        return cls(vocab={piece: place for place, piece in enumerate(pieces)}, merges=[], model_max_length=77)
    pieces = [*special, "▁", *string.ascii_lowercase]
    return cls(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=77)


def audio_ldm_2() -> DiffusionPipeline:
    """Two text encoders, whose projections a language model continues."""
    text = ClapTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=WIDTH,
        pad_token_id=0,
    )
    heard = ClapAudioConfig(
        spec_size=64,
        window_size=4,
        num_mel_bins=64,
        intermediate_size=16,
        depths=[1, 1],
        num_attention_heads=[1, 1],
        num_hidden_layers=2,
        hidden_size=16,
        patch_embeds_hidden_size=8,
        projection_dim=WIDTH,
        patch_size=2,
        patch_stride=2,
    )
    language = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_head=2, n_layer=2, n_positions=128)
    language.max_new_tokens = 4
    return AudioLDM2Pipeline(
        unet=AudioLDM2UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            norm_num_groups=2,
            cross_attention_dim=([None, WIDTH, 2 * WIDTH], [None, WIDTH, 2 * WIDTH]),
        ),
        vae=AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
        ),
        text_encoder=ClapModel(ClapConfig(text_config=text, audio_config=heard, projection_dim=WIDTH)),
        tokenizer=letters(RobertaTokenizer),
        feature_extractor=ClapFeatureExtractor(hop_length=7900),
        text_encoder_2=t5(2 * WIDTH),
        tokenizer_2=letters(T5Tokenizer),
        language_model=GPT2LMHeadModel(language),
        projection_model=AudioLDM2ProjectionModel(
            text_encoder_dim=WIDTH, text_encoder_1_dim=2 * WIDTH, langauge_model_dim=WIDTH
        ),
        vocoder=enlarged(
            SpeechT5HifiGan(
                SpeechT5HifiGanConfig(
                    model_in_dim=8,
                    upsample_initial_channel=16,
                    upsample_rates=[2, 2],
                    upsample_kernel_sizes=[4, 4],
                    resblock_kernel_sizes=[3],
                    resblock_dilation_sizes=[[1, 3, 5]],
                    normalize_before=False,
                )
            ),
            10.0,
        ),
    )


def heard(row: int) -> dict[str, Any]:
    """Two seconds of Stable Audio 3."""
    return {"audio": sound(row, 32)[None]}


def heard_in_part(row: int) -> dict[str, Any]:
    """Of its eight latents, those marked 0 are to be filled."""
    kept = torch.ones(1, 1, 8)
    kept[..., 2 : 5 + row % 3] = 0
    return heard(row) | {"mask": kept}


DURATION = {"duration": 2.0}

ENTRIES: dict[str, Entry] = {
    "stable_audio": Entry(build=stable_audio, call={"audio_end_in_s": 2.0}, size={}, guided=5.0),
    "stable_audio_3": Entry(build=stable_audio_3(StableAudio3Pipeline), call=DURATION, size={}, guided=4.0),
    "stable_audio_3_audio2audio": Entry(
        build=stable_audio_3(StableAudio3AudioToAudioPipeline),
        call=DURATION | {"init_noise_level": 0.8},
        size={},
        guided=None,
        inputs=heard,
    ),
    "stable_audio_3_inpaint": Entry(
        build=stable_audio_3(StableAudio3InpaintPipeline),
        call=DURATION,
        size={},
        guided=None,
        inputs=heard_in_part,
    ),
    "longcat_audio": Entry(build=longcat, call={"audio_duration_s": 0.1, "output_type": "pt"}, size={}, guided=4.0),
    "ace_step": Entry(build=ace_step, call={"audio_duration": 2.0, "max_lyric_length": 64}, size={}, guided=4.0),
    "ace_step_reference": Entry(
        build=ace_step,
        call={"audio_duration": 2.0, "max_lyric_length": 64},
        size={},
        guided=4.0,
        inputs=lambda row: {"reference_audio": sound(row, 160)},
    ),
    "audio_ldm2": Entry(build=audio_ldm_2, call={"audio_length_in_s": 0.004}, size={}, guided=3.5),
}
NOT_BUILT: dict[str, str] = {}
