"""Wan's video pipelines and those that share its autoencoder and transformer: SkyReels V2, ChronoEdit, Lucy, AnyFlow."""

# The constructors take more than their annotations say.
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLWan,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LucyEditPipeline,
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)
from diffusers.utils import is_ftfy_available
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
)

from zoo.entries import Entry, no_media
from zoo.media import CONTROL, SECOND, mask, picture, video
from zoo.parts import VOCABULARY, byte_tokenizer

FRAMES = 5
"""Two latent frames, since the autoencoder joins four frames after the first."""
SIZE = {"height": 32, "width": 32}
LATENTS, VISION, VISION_TOKENS = 16, 8, 5
"""Channels of the latents; width and number of the picture embeddings."""

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "out_channels": LATENTS,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
SEES: dict[str, Any] = {"image_dim": VISION, "added_kv_proj_dim": 24}
"""Further arguments of a transformer that is told the embedding of a picture."""
MASKED = 2 * LATENTS + 4
"""Channels where the first frame is given: noise, the mask's four frames, the frame's latents."""


def autoencoder() -> AutoencoderKLWan:
    """Its random encoder is nearly constant, so that what depends on the picture is scaled up by the latents' std."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENTS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENTS,
        latents_std=[0.1] * LATENTS,
    )


def text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))


def image_encoder(cls: Any = CLIPVisionModel) -> Any:
    return cls(
        CLIPVisionConfig(
            hidden_size=VISION,
            projection_dim=VISION,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            intermediate_size=16,
            patch_size=8,
        )
    )


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def components(scheduler: Any = None) -> dict[str, Any]:
    """What all these pipelines share."""
    return {
        "vae": autoencoder(),
        "text_encoder": text_encoder(),
        "tokenizer": byte_tokenizer(),
        "scheduler": scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def unipc() -> UniPCMultistepScheduler:
    """The scheduler with which Wan is published."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def network(channels: int, **more: Any) -> WanTransformer3DModel:
    return WanTransformer3DModel(**TRANSFORMER, in_channels=channels, **more)


def text_to_video(**more: Any) -> DiffusionPipeline:
    return WanPipeline(**components(), transformer=network(LATENTS), **more)


def text_to_video_unipc() -> DiffusionPipeline:
    return WanPipeline(**components(unipc()), transformer=network(LATENTS))


def image_to_video_21(**more: Any) -> DiffusionPipeline:
    """Wan 2.1: the picture is given as latents and as an embedding."""
    return WanImageToVideoPipeline(
        **components(),
        transformer=network(MASKED, **SEES, **more),
        image_encoder=image_encoder(),
        image_processor=image_processor(),
    )


def image_to_video_22() -> DiffusionPipeline:
    """Wan 2.2: two transformers, each for a part of the noise levels, and no picture embedding."""
    return WanImageToVideoPipeline(
        **components(), transformer=network(MASKED), transformer_2=network(MASKED), boundary_ratio=0.75
    )


def image_to_video_5b() -> DiffusionPipeline:
    """Wan 2.2's small model: the first frame's latents are kept, and each token has its own timestep."""
    return WanImageToVideoPipeline(**components(), transformer=network(LATENTS), expand_timesteps=True)


def video_to_video() -> DiffusionPipeline:
    return WanVideoToVideoPipeline(**components(), transformer=network(LATENTS))


def vace() -> DiffusionPipeline:
    return WanVACEPipeline(
        **components(),
        transformer=WanVACETransformer3DModel(
            **TRANSFORMER, in_channels=LATENTS, vace_layers=[0], vace_in_channels=2 * LATENTS + 64
        ),
    )


def skyreels(cls: Any, channels: int, sees: bool) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        transformer = SkyReelsV2Transformer3DModel(**TRANSFORMER, in_channels=channels, **(SEES if sees else {}))
        more = (
            {"image_encoder": image_encoder(CLIPVisionModelWithProjection), "image_processor": image_processor()}
            if sees
            else {}
        )
        return cls(**components(unipc()), transformer=transformer, **more)

    return build


def chrono_edit() -> DiffusionPipeline:
    return ChronoEditPipeline(
        **components(),
        transformer=ChronoEditTransformer3DModel(**TRANSFORMER, in_channels=MASKED, **SEES),
        image_encoder=image_encoder(),
        image_processor=image_processor(),
    )


def lucy_edit() -> DiffusionPipeline:
    return LucyEditPipeline(**components(), transformer=network(2 * LATENTS), expand_timesteps=True)


def any_flow() -> DiffusionPipeline:
    """A map between any two noise levels, which is told both of them."""
    return AnyFlowPipeline(
        **components(FlowMapEulerDiscreteScheduler()),
        transformer=AnyFlowTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=LATENTS,
            out_channels=LATENTS,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
    )


def any_flow_far() -> DiffusionPipeline:
    """It draws one part of the video after the other."""
    return AnyFlowFARPipeline(
        **components(FlowMapEulerDiscreteScheduler()),
        transformer=AnyFlowFARTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
    )


def image(row: int) -> dict[str, Any]:
    return {"image": picture(row)}


def first_and_last(row: int) -> dict[str, Any]:
    return {"image": picture(row), "last_image": picture(row + CONTROL)}


def frames(row: int) -> dict[str, Any]:
    return {"video": video(row, FRAMES)}


def everything(row: int) -> dict[str, Any]:
    """A video to keep outside of the mask, and a picture of what is to be in it."""
    return {
        "video": video(row, FRAMES),
        "mask": [mask(row)] * FRAMES,
        "reference_images": [picture(row + SECOND)],
    }


CALL = {"num_frames": FRAMES, "max_sequence_length": 32}


def entry(
    build: Callable[[], DiffusionPipeline], inputs: Callable[[int], dict[str, Any]] = no_media, **more: Any
) -> Entry:
    return Entry(build=build, call=CALL | more, size=SIZE, guided=4.0, inputs=inputs)


FORCING = {"num_frames": 9, "base_num_frames": 9}
"""Each latent frame has a noise level of its own."""

CLEANED: dict[str, Entry] = {
    "wan_i2v_21": entry(image_to_video_21, image),
    "wan_i2v_21_last_image": entry(
        lambda: image_to_video_21(pos_embed_seq_len=2 * VISION_TOKENS),
        first_and_last,
    ),
    "wan_i2v_22": entry(image_to_video_22, image),
    "wan_i2v_5b": entry(image_to_video_5b, image),
    "wan_v2v": Entry(build=video_to_video, call={"max_sequence_length": 32}, size=SIZE, guided=4.0, inputs=frames),
    "wan_vace": entry(vace, everything),
    "skyreels_v2": entry(skyreels(SkyReelsV2Pipeline, LATENTS, False)),
    "skyreels_v2_i2v": entry(skyreels(SkyReelsV2ImageToVideoPipeline, MASKED, True), image),
    "skyreels_v2_df": entry(skyreels(SkyReelsV2DiffusionForcingPipeline, LATENTS, False), **FORCING),
    "skyreels_v2_df_i2v": entry(
        skyreels(SkyReelsV2DiffusionForcingImageToVideoPipeline, LATENTS, False), image, **FORCING
    ),
    "skyreels_v2_df_v2v": entry(
        skyreels(SkyReelsV2DiffusionForcingVideoToVideoPipeline, LATENTS, False),
        frames,
        **FORCING | {"num_frames": 17, "overlap_history": 5},
    ),
    "chrono_edit": entry(chrono_edit, image),
    "lucy_edit": entry(lucy_edit, frames),
}
"""Of classes that clean their prompts with ftfy, whether or not it is installed."""

ENTRIES: dict[str, Entry] = {
    "wan_21": entry(text_to_video),
    "wan_unipc": entry(text_to_video_unipc),
    "wan_5b": entry(lambda: text_to_video(expand_timesteps=True)),
    "any_flow": entry(any_flow),
    "any_flow_far": entry(any_flow_far, num_frames=9, chunk_partition=[1, 1, 1]),
    **(CLEANED if is_ftfy_available() else {}),
}
NOT_BUILT: dict[str, str] = (
    {}
    if is_ftfy_available()
    else dict.fromkeys(
        (
            "WanImageToVideoPipeline",
            "WanVideoToVideoPipeline",
            "WanVACEPipeline",
            "SkyReelsV2Pipeline",
            "SkyReelsV2ImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
            "ChronoEditPipeline",
            "LucyEditPipeline",
        ),
        "cleans prompts with the package ftfy, which is not installed: NameError",
    )
)
