"""AnimateDiff: Stable Diffusion's UNet with layers along the frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPAGPipeline,
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    AnimateDiffSparseControlNetPipeline,
    AnimateDiffVideoToVideoControlNetPipeline,
    AnimateDiffVideoToVideoPipeline,
    DiffusionPipeline,
    MotionAdapter,
    SparseControlNetModel,
)

from zoo import epsilon_sd, epsilon_sdxl
from zoo.entries import Entry, no_media
from zoo.epsilon_sd import SIZE, WIDTH, controlnet, ddim
from zoo.media import CONTROL, picture, video
from zoo.weights import opened

FRAMES = 4


def motion(**more: Any) -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
        **more,
    )


def components() -> dict[str, Any]:
    return epsilon_sd.components() | {"scheduler": ddim(beta_schedule="linear"), "motion_adapter": motion()}


def of(cls: Any) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**components())


def with_controlnet(cls: Any) -> Callable[[], DiffusionPipeline]:
    return lambda: cls(**components(), controlnet=controlnet())


def sparse_controlnet() -> DiffusionPipeline:
    """Control pictures for some of the frames only."""
    network = SparseControlNetModel(
        in_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        norm_num_groups=2,
        motion_num_attention_heads=2,
        conditioning_channels=3,
        conditioning_embedding_out_channels=(4, 8),
        concat_conditioning_mask=True,
        use_simplified_condition_embedding=False,
    )
    return AnimateDiffSparseControlNetPipeline(**components(), controlnet=opened(network))


def sdxl() -> DiffusionPipeline:
    parts = epsilon_sdxl.components() | {
        "scheduler": ddim(beta_schedule="linear"),
        "motion_adapter": motion(use_motion_mid_block=False),
    }
    return AnimateDiffSDXLPipeline(**parts)


def frames(row: int) -> dict[str, Any]:
    return {"video": video(row, FRAMES)}


def control(row: int) -> dict[str, Any]:
    return {"conditioning_frames": video(row + CONTROL, FRAMES)}


def frames_and_control(row: int) -> dict[str, Any]:
    return frames(row) | control(row)


def entry(
    build: Callable[[], DiffusionPipeline],
    inputs: Callable[[int], dict[str, Any]] = no_media,
    **call: Any,
) -> Entry:
    return Entry(build=build, call=call, size=SIZE, guided=5.0, inputs=inputs)


ENTRIES: dict[str, Entry] = {
    "animatediff": entry(of(AnimateDiffPipeline), num_frames=FRAMES),
    "animatediff_sdxl": entry(sdxl, num_frames=FRAMES),
    "animatediff_v2v": entry(of(AnimateDiffVideoToVideoPipeline), frames),
    "animatediff_controlnet": entry(with_controlnet(AnimateDiffControlNetPipeline), control, num_frames=FRAMES),
    "animatediff_v2v_controlnet": entry(with_controlnet(AnimateDiffVideoToVideoControlNetPipeline), frames_and_control),
    "animatediff_sparse_controlnet": entry(
        sparse_controlnet,
        lambda row: {"conditioning_frames": [picture(row + CONTROL)]},
        num_frames=FRAMES,
        controlnet_frame_indices=[0],
    ),
    "animatediff_pag": entry(of(AnimateDiffPAGPipeline), num_frames=FRAMES),
}
NOT_BUILT: dict[str, str] = {}
