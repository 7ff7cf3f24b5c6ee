"""Further flow models of videos: Sana, Mochi, Kandinsky 5, Motif."""

# The constructors take more than their annotations say.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from diffusers import (
    AutoencoderKLMochi,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotifVideoImage2VideoPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from diffusers.guiders import AdaptiveProjectedGuidance
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    T5Config,
    T5EncoderModel,
    T5Gemma2Encoder,
    T5Gemma2EncoderConfig,
    T5Gemma2TextConfig,
)

from zoo import video_hunyuan, video_wan
from zoo.entries import Entry
from zoo.media import picture
from zoo.parts import VOCABULARY, byte_tokenizer, clip_text, clip_tokenizer

SIZE = {"height": 32, "width": 32}
WIDTH = 32
"""Of the text embeddings."""


def sana(cls: Any, scheduler: Callable[[], Any] | None = None) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        return cls(
            transformer=SanaVideoTransformer3DModel(
                in_channels=16,
                out_channels=16,
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=12,
                cross_attention_dim=24,
                caption_channels=WIDTH,
                sample_size=8,
                rope_max_seq_len=32,
            ),
            vae=video_wan.autoencoder(),
            scheduler=scheduler() if scheduler else FlowMatchEulerDiscreteScheduler(shift=8.0),
            text_encoder=Gemma2Model(
                Gemma2Config(
                    vocab_size=VOCABULARY,
                    hidden_size=WIDTH,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=8,
                )
            ),
            tokenizer=byte_tokenizer(),
        )

    return build


def dpm() -> DPMSolverMultistepScheduler:
    """The scheduler with which Sana's video model is published."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)


def mochi() -> DiffusionPipeline:
    """Its noise level rises from 0 to 1 in the scheduler's own count, which runs from data to noise."""
    return MochiPipeline(
        transformer=MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=WIDTH,
            time_embed_dim=4,
            max_sequence_length=32,
        ),
        vae=AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),  # its norms have 32 groups
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        ),
        tokenizer=byte_tokenizer(256),
    )


def template_tokenizer(template: str, count: int) -> Qwen2Tokenizer:
    """Bytes, but the template before the prompt has as many tokens as the pipeline cuts off."""
    before = template.split("{}")[0]
    edges = [place * len(before) // count for place in range(count + 1)]
    tokenizer = byte_tokenizer(2048)
    tokenizer.add_tokens([before[start:end] for start, end in itertools.pairwise(edges)])
    assert len(tokenizer(before).input_ids) == count
    return tokenizer


def kandinsky_5(cls: Any) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        text = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [2, 2, 4], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
        }
        vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
        pipe = cls(
            transformer=Kandinsky5Transformer3DModel(
                in_visual_dim=4,
                in_text_dim=WIDTH,
                in_text_dim2=WIDTH,
                time_dim=16,
                out_visual_dim=4,
                model_dim=16,
                ff_dim=32,
                num_text_blocks=1,
                num_visual_blocks=2,
                axes_dims=(4, 6, 6),
                visual_cond=True,
            ),
            vae=video_hunyuan.autoencoder(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
            tokenizer=byte_tokenizer(),
            text_encoder_2=clip_text(WIDTH, projection=False),
            tokenizer_2=clip_tokenizer(),
        )
        pipe.tokenizer = template_tokenizer(pipe.prompt_template, pipe.prompt_template_encode_start_idx)
        return pipe

    return build


def motif(cls: Any, vision_width: int | None) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        text = T5Gemma2TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=32,
            max_position_embeddings=128,
            dropout_rate=0.0,
        )
        vision = SiglipVisionConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
        return cls(
            transformer=MotifVideoTransformer3DModel(
                in_channels=33,
                out_channels=16,
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=1,
                num_single_layers=1,
                patch_size=1,
                text_embed_dim=WIDTH,
                image_embed_dim=vision_width,
                rope_axes_dim=(4, 4, 4),
            ),
            vae=video_wan.autoencoder(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder=T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=text, vision_config=vision)),
            tokenizer=byte_tokenizer(),
            feature_extractor=SiglipImageProcessorPil(size={"height": 16, "width": 16}),
            guider=AdaptiveProjectedGuidance(guidance_scale=4.0),
        )

    return build


def image(row: int) -> dict[str, Any]:
    return {"image": picture(row, 32)}


SANA_CALL = {
    "frames": 5,
    "max_sequence_length": 32,
    "complex_human_instruction": None,
    "use_resolution_binning": False,
}
CALL = {"num_frames": 5, "max_sequence_length": 32}
KANDINSKY_CALL = {"num_frames": 9, "max_sequence_length": 600}
"""The pipeline's own negative prompt is long."""
FIVE_LATENT_FRAMES = {"num_frames": 17}
"""Picture to video ends by fitting the first four latent frames to those after them."""

ENTRIES: dict[str, Entry] = {
    "sana_video": Entry(build=sana(SanaVideoPipeline), call=SANA_CALL, size=SIZE, guided=4.5),
    "sana_video_dpm": Entry(build=sana(SanaVideoPipeline, dpm), call=SANA_CALL, size=SIZE, guided=4.5),
    "sana_i2v": Entry(build=sana(SanaImageToVideoPipeline), call=SANA_CALL, size=SIZE, guided=4.5, inputs=image),
    "mochi": Entry(
        build=mochi, call={"num_frames": 7, "max_sequence_length": 32}, size={"height": 16, "width": 16}, guided=4.5
    ),
    "kandinsky5_t2v": Entry(build=kandinsky_5(Kandinsky5T2VPipeline), call=KANDINSKY_CALL, size=SIZE, guided=5.0),
    "kandinsky5_i2v": Entry(
        build=kandinsky_5(Kandinsky5I2VPipeline),
        call=KANDINSKY_CALL | FIVE_LATENT_FRAMES,
        size=SIZE,
        guided=5.0,
        inputs=image,
    ),
    "motif_video": Entry(
        build=motif(MotifVideoPipeline, None), call=CALL, size=SIZE, guided=4.0, guidance_name="guider"
    ),
    "motif_video_i2v": Entry(
        build=motif(MotifVideoImage2VideoPipeline, 8),
        call=CALL,
        size=SIZE,
        guided=4.0,
        guidance_name="guider",
        inputs=image,
    ),
}
NOT_BUILT: dict[str, str] = {}
