"""What each kind of denoiser is called with: latents, texts, and how guidance doubles them.

Letters: B rows, N latent tokens, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowsteer.rl.plan.files import Component, ModelFiles

UNPADDED_TOKENS = 256
"""Text tokens that are assumed of a pipeline that does not pad: a long prompt."""


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes of one row of a batch, in numbers of elements.

    Example, Stable Diffusion 3.5 medium at 512 px with 128 tokens of T5: ``latent = (16, 64, 64)``, ``tokens = 205``,
    ``row = 205 * 4096 + 2048``, ``frames = (1, 512, 512)``, ``guidance = "batch"``.
    """

    latent: tuple[int, ...]  # of one sample, as it is stored
    tokens: int  # of the text
    row: int  # elements of a prepared prompt, without its negative
    frames: tuple[int, int, int]  # frames, height and width of what is drawn
    guidance: Literal["batch", "passes", "embedded"]  # how guidance is computed, where it is on
    decoded: tuple[int, ...]  # what the VAE decodes, without the batch
    call: Callable[[int, torch.dtype], dict[str, Any]]  # the denoiser's arguments for B rows; under a FakeTensorMode


def shapes_of(model: ModelFiles, *, height: int | None, width: int | None, call: Mapping[str, Any]) -> Shapes:
    """The shapes of a pipeline. Raises ValueError for a denoiser that is not known here."""
    asked = {**model.defaults, **call}
    denoiser = model.components[model.denoisers[0]] if model.denoisers else None
    make = _KINDS.get(denoiser.cls) if denoiser else None
    if denoiser is None or make is None:
        raise ValueError(
            f"`flowsteer plan` does not know what {denoiser.cls if denoiser else model.pipeline} is called with; it knows "
            f"{', '.join(_KINDS)}"
        )
    scale = _vae_scale(model)
    default = denoiser.config.get("sample_size") or 128
    side = (default if isinstance(default, int) else default[0]) * scale
    rows, columns = height or asked.get("height") or side, width or asked.get("width") or side
    size = (int(asked.get("num_frames") or 1), int(rows), int(columns))
    return make(denoiser, model, size, scale, asked)


def _vae_scale(model: ModelFiles) -> int:
    """Pixels of a latent's side."""
    vae = model.components.get("vae")
    if vae is None:
        return 8
    if "block_out_channels" in vae.config:
        return 2 ** (len(vae.config["block_out_channels"]) - 1)
    return 2 ** len(vae.config.get("temperal_downsample", (0, 0, 0)))


def _sd3(own: Component, model: ModelFiles, size: Any, scale: int, asked: Mapping[str, Any]) -> Shapes:
    _, height, width = size
    channels, dim, pooled = (own.config[key] for key in ("in_channels", "joint_attention_dim", "pooled_projection_dim"))
    clip = model.components.get("text_encoder")
    short = clip.config.get("max_position_embeddings", 77) if clip else 77
    tokens = min(short, 77) + int(asked.get("max_sequence_length") or 256)
    latent = (channels, height // scale, width // scale)

    def call(rows: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": _empty(rows, *latent, dtype=dtype),
            "encoder_hidden_states": _empty(rows, tokens, dim, dtype=dtype),
            "pooled_projections": _empty(rows, pooled, dtype=dtype),
            "timestep": _empty(rows),
        }

    return _shapes(latent, tokens, tokens * dim + pooled, size, "batch", latent, call)


def _flux(own: Component, model: ModelFiles, size: Any, scale: int, asked: Mapping[str, Any]) -> Shapes:
    _, height, width = size
    channels, dim, pooled = (own.config[key] for key in ("in_channels", "joint_attention_dim", "pooled_projection_dim"))
    tokens, count = int(asked.get("max_sequence_length") or 512), (height // (2 * scale)) * (width // (2 * scale))
    seen = 2 * count if "Kontext" in model.pipeline else count  # the source picture stands behind the latents

    def call(rows: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": _empty(rows, seen, channels, dtype=dtype),
            "encoder_hidden_states": _empty(rows, tokens, dim, dtype=dtype),
            "pooled_projections": _empty(rows, pooled, dtype=dtype),
            "timestep": _empty(rows, dtype=dtype),
            "guidance": _empty(rows) if own.config.get("guidance_embeds") else None,
            "img_ids": _empty(seen, 3),
            "txt_ids": _empty(tokens, 3),
        }

    decoded = (channels // 4, height // scale, width // scale)
    return _shapes((count, channels), tokens, tokens * dim + pooled, size, "embedded", decoded, call)


def _flux2(own: Component, model: ModelFiles, size: Any, scale: int, asked: Mapping[str, Any]) -> Shapes:
    _, height, width = size
    channels, dim = own.config["in_channels"], own.config["joint_attention_dim"]
    tokens, count = int(asked.get("max_sequence_length") or 512), (height // (2 * scale)) * (width // (2 * scale))

    def call(rows: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": _empty(rows, count, channels, dtype=dtype),
            "encoder_hidden_states": _empty(rows, tokens, dim, dtype=dtype),
            "timestep": _empty(rows, dtype=dtype),
            "guidance": _empty(rows),
            "img_ids": _empty(rows, count, 4),
            "txt_ids": _empty(rows, tokens, 4),
        }

    decoded = (channels // 4, height // scale, width // scale)
    return _shapes((count, channels), tokens, tokens * dim, size, "embedded", decoded, call)


def _qwen(own: Component, model: ModelFiles, size: Any, scale: int, asked: Mapping[str, Any]) -> Shapes:
    _, height, width = size
    channels, dim = own.config["in_channels"], own.config["joint_attention_dim"]
    rows_, columns = height // (2 * scale), width // (2 * scale)
    tokens = min(int(asked.get("max_sequence_length") or 512), UNPADDED_TOKENS)

    def call(rows: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": _empty(rows, rows_ * columns, channels, dtype=dtype),
            "encoder_hidden_states": _empty(rows, tokens, dim, dtype=dtype),
            "encoder_hidden_states_mask": None,
            "timestep": _empty(rows, dtype=dtype),
            "img_shapes": [[(1, rows_, columns)]] * rows,
        }

    decoded = (channels // 4, 1, height // scale, width // scale)
    return _shapes((rows_ * columns, channels), tokens, tokens * dim, size, "passes", decoded, call)


def _z_image(own: Component, model: ModelFiles, size: Any, scale: int, asked: Mapping[str, Any]) -> Shapes:
    _, height, width = size
    channels, dim = own.config["in_channels"], own.config["cap_feat_dim"]
    tokens = min(int(asked.get("max_sequence_length") or 512), UNPADDED_TOKENS)
    latent = (channels, height // scale, width // scale)

    def call(rows: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "x": [_empty(channels, 1, *latent[1:], dtype=dtype) for _ in range(rows)],
            "t": _empty(rows),
            "cap_feats": [_empty(tokens, dim, dtype=dtype) for _ in range(rows)],
        }

    return _shapes(latent, tokens, tokens * dim, size, "batch", latent, call)


def _wan(own: Component, model: ModelFiles, size: Any, scale: int, asked: Mapping[str, Any]) -> Shapes:
    frames, height, width = size
    channels, dim = own.config["in_channels"], own.config["text_dim"]
    tokens = int(asked.get("max_sequence_length") or 512)
    latent = (channels, (frames - 1) // 4 + 1, height // scale, width // scale)

    def call(rows: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": _empty(rows, *latent, dtype=dtype),
            "timestep": _empty(rows),
            "encoder_hidden_states": _empty(rows, tokens, dim, dtype=dtype),
        }

    return _shapes(latent, tokens, tokens * dim, size, "passes", latent, call)


def _unet(own: Component, model: ModelFiles, size: Any, scale: int, asked: Mapping[str, Any]) -> Shapes:
    _, height, width = size
    channels, dim = own.config["in_channels"], own.config["cross_attention_dim"]
    latent, tokens = (channels, height // scale, width // scale), 77
    more = own.config.get("addition_embed_type") == "text_time"
    times = 6 * (own.config.get("addition_time_embed_dim") or 0)
    pooled = own.config["projection_class_embeddings_input_dim"] - times if more else 0

    def call(rows: int, dtype: torch.dtype) -> dict[str, Any]:
        added = {"text_embeds": _empty(rows, pooled, dtype=dtype), "time_ids": _empty(rows, 6, dtype=dtype)}
        return {
            "sample": _empty(rows, *latent, dtype=dtype),
            "timestep": _empty(rows),
            "encoder_hidden_states": _empty(rows, tokens, dim, dtype=dtype),
            **({"added_cond_kwargs": added} if more else {}),
        }

    return _shapes(latent, tokens, tokens * dim + pooled, size, "batch", latent, call)


def _shapes(
    latent: tuple[int, ...], tokens: int, row: int, frames: Any, guidance: Any, decoded: tuple[int, ...], call: Any
) -> Shapes:
    return Shapes(latent=latent, tokens=tokens, row=row, frames=frames, guidance=guidance, decoded=decoded, call=call)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


_KINDS: dict[str, Callable[..., Shapes]] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen,
    "ZImageTransformer2DModel": _z_image,
    "WanTransformer3DModel": _wan,
    "UNet2DConditionModel": _unet,
}
