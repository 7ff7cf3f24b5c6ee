"""FLUX.1 and the models with its packed latents: Chroma, Bria, Ovis-Image, VisualCloze."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import (
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaImg2ImgPipeline,
    ChromaInpaintPipeline,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    VisualClozeGenerationPipeline,
)

from zoo.entries import Build, Entry, Inputs, no_media
from zoo.families import flux, z_image
from zoo.media import mask, picture

LATENT = 16  # channels of a packed latent: 4 of the autoencoder, 2 x 2 places


def of(cls: type[DiffusionPipeline], in_channels: int = LATENT, **parts: Any) -> DiffusionPipeline:
    """FLUX as another class, with more input channels where pictures are concatenated to the latents."""
    base = flux()
    if in_channels != LATENT:
        config = base.transformer.config
        parts["transformer"] = FluxTransformer2DModel.from_config(config, in_channels=in_channels, out_channels=LATENT)
    return cls.from_pipe(base, **parts)


def with_controlnet(cls: type[DiffusionPipeline]) -> DiffusionPipeline:
    base = flux()
    config = base.transformer.config
    return cls.from_pipe(base, controlnet=FluxControlNetModel.from_config(config))


def visual_cloze() -> DiffusionPipeline:
    return VisualClozeGenerationPipeline(**of(FluxFillPipeline, 3 * LATENT).components, resolution=16)


def chroma(cls: Callable[..., DiffusionPipeline] = ChromaPipeline) -> DiffusionPipeline:
    base = flux()
    transformer = ChromaTransformer2DModel(
        in_channels=LATENT,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    # asked for by the inpainting class, though Chroma has no such setting
    transformer.register_to_config(guidance_embeds=False)
    return cls(
        transformer=transformer,
        scheduler=base.scheduler,
        vae=base.vae,
        text_encoder=base.text_encoder_2,
        tokenizer=base.tokenizer_2,
    )


def bria() -> DiffusionPipeline:
    base = flux()
    transformer = BriaTransformer2DModel(
        in_channels=LATENT,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return BriaPipeline(
        transformer=transformer,
        scheduler=base.scheduler,
        vae=base.vae,
        text_encoder=base.text_encoder_2,
        tokenizer=base.tokenizer_2,
    )


def ovis() -> DiffusionPipeline:
    base, text = flux(), z_image()
    transformer = OvisImageTransformer2DModel(
        in_channels=LATENT,
        out_channels=LATENT,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return OvisImagePipeline(
        transformer=transformer,
        scheduler=base.scheduler,
        vae=base.vae,
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizer,
    )


def entry(build: Build, inputs: Inputs = no_media, guided: float = 3.5, **call: Any) -> Entry:
    return Entry(
        build=build,
        call={"max_sequence_length": 48} | call,
        size={"height": 16, "width": 16},
        guided=guided,
        inputs=inputs,
    )


def edited(row: int) -> dict[str, Any]:
    return {"image": picture(row)}


def inpainted(row: int) -> dict[str, Any]:
    return {"image": picture(row), "mask_image": mask(row)}


def controlled(row: int) -> dict[str, Any]:
    return {"control_image": picture(row + 10)}


def grid(row: int) -> dict[str, Any]:
    """One example of the task, from the first picture to the second, and a question."""
    return {"image": [[picture(row), picture(row + 10)], [picture(row + 20), None]]}


ENTRIES: dict[str, Entry] = {
    "FluxPipeline": entry(flux),
    "FluxImg2ImgPipeline": entry(lambda: of(FluxImg2ImgPipeline), edited),
    "FluxInpaintPipeline": entry(lambda: of(FluxInpaintPipeline), inpainted),
    "FluxControlPipeline": entry(lambda: of(FluxControlPipeline, 2 * LATENT), controlled),
    "FluxControlImg2ImgPipeline": entry(
        lambda: of(FluxControlImg2ImgPipeline, 2 * LATENT), lambda row: edited(row) | controlled(row)
    ),
    "FluxControlInpaintPipeline": entry(
        lambda: of(FluxControlInpaintPipeline, 2 * LATENT), lambda row: inpainted(row) | controlled(row)
    ),
    "FluxFillPipeline": entry(lambda: of(FluxFillPipeline, 3 * LATENT), inpainted),
    "FluxKontextPipeline": entry(lambda: of(FluxKontextPipeline), edited, max_area=16 * 16, _auto_resize=False),
    "FluxKontextInpaintPipeline": entry(
        lambda: of(FluxKontextInpaintPipeline),
        lambda row: inpainted(row) | {"image_reference": picture(row + 10)},
        max_area=16 * 16,
        _auto_resize=False,
    ),
    "FluxControlNetPipeline": entry(lambda: with_controlnet(FluxControlNetPipeline), controlled),
    "FluxControlNetImg2ImgPipeline": entry(
        lambda: with_controlnet(FluxControlNetImg2ImgPipeline), lambda row: edited(row) | controlled(row)
    ),
    "FluxControlNetInpaintPipeline": entry(
        lambda: with_controlnet(FluxControlNetInpaintPipeline), lambda row: inpainted(row) | controlled(row)
    ),
    "VisualClozeGenerationPipeline": Entry(
        build=visual_cloze,
        call={"max_sequence_length": 256, "content_prompt": "a picture"},
        size={},
        guided=3.5,
        inputs=grid,
        prompt_name="task_prompt",
    ),
    "ChromaPipeline": entry(chroma, guided=4.0),
    "ChromaImg2ImgPipeline": entry(
        lambda: chroma(ChromaImg2ImgPipeline),
        edited,
        guided=4.0,
        strength=0.6,  # at 0.9, its default, three steps start from noise alone
    ),
    "ChromaInpaintPipeline": entry(lambda: chroma(ChromaInpaintPipeline), inpainted, guided=4.0),
    "BriaPipeline": entry(bria, guided=4.0),
    "OvisImagePipeline": entry(ovis, guided=4.0, max_sequence_length=256),
}
