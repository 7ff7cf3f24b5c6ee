"""How a pipeline's final latents become what its autoencoder decodes, found by running its epilogue up to ``decode``.

The epilogue unpacks, scales, shifts and reorders latents, each pipeline in its own way. In all of them, every number that the
autoencoder gets is ``shift + scale * latent`` for one latent, and each latent is used once. There is no code per pipeline:
latents of zeros leave the shifts, a large value and its negative give the scales, and the order is read bit by bit, from
latents that are the binary digits of their own positions. (In bfloat16 whole positions would be rounded.)

Letters: N numbers of one sample, X its latent shape, Z the shape of what its autoencoder is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from flowsteer.rollout.lifting.conditioning import Conditioning
from flowsteer.rollout.lifting.loop import fixed_randomness, is_autoencoder
from flowsteer.rollout.lifting.pipeline import FlowPipeline

ADVICE = "pictures cannot be encoded for it; let the pipeline draw its samples (leave prompts.pictures out)"

_REACH = 64.0  # a power of two far above the shifts' size: scales are then known as well as the type allows
_ROUNDINGS = 8  # the pipeline's operations, those of the map and of its probes: each rounds by half an eps


@dataclass(frozen=True, kw_only=True)
class DecodeCall:
    """What an epilogue called its autoencoder's ``decode`` with."""

    autoencoder: nn.Module
    encoded: Tensor  # [*Z]
    arguments: tuple[Any, ...]  # further ones
    keywords: Mapping[str, Any]

    def decoded(self) -> Tensor:
        """What ``decode`` gives back: pixels [1, 3, H, W], or of videos [1, 3, T, H, W] or [T, 3, H, W]."""
        with torch.no_grad():
            answer = self.autoencoder.decode(self.encoded, *self.arguments, **self.keywords)  # type: ignore[operator]
        return answer[0]


class _Reached(Exception):
    """The epilogue has come to ``decode``."""

    def __init__(self, call: DecodeCall) -> None:
        super().__init__("the epilogue has come to decode")
        self.call = call


@contextmanager
def _stopping(pipe: Any) -> Iterator[None]:
    """Inside, the ``decode`` of each of the pipeline's autoencoders raises `_Reached`."""

    def stopped(autoencoder: nn.Module) -> Callable[..., NoReturn]:
        def decode(encoded: Tensor, *arguments: Any, **keywords: Any) -> NoReturn:
            raise _Reached(DecodeCall(autoencoder=autoencoder, encoded=encoded, arguments=arguments, keywords=keywords))

        return decode

    found = [component for component in vars(pipe).values() if is_autoencoder(component)]
    before = [vars(component).get("decode") for component in found]
    for component in found:
        vars(component)["decode"] = stopped(component)
    try:
        yield
    finally:
        for component, own in zip(found, before):
            del vars(component)["decode"]
            if own is not None:
                vars(component)["decode"] = own


def decode_call(pipeline: FlowPipeline, latents: Tensor, row: Conditioning) -> DecodeCall:
    """What the epilogue decodes, given the final latents [1, *X] of a row.

    Raises ValueError where the pipeline decodes without an autoencoder.
    """
    bound = pipeline.loop.bind(row, pipeline.lifted.epilogue_reads) | pipeline.loop.states(latents, row)
    try:
        with torch.no_grad(), fixed_randomness(pipeline.device), _stopping(pipeline.pipe):
            pipeline.lifted.epilogue(**bound)
    except _Reached as reached:
        return reached.call
    raise ValueError(f"{type(pipeline.pipe).__name__} decodes its latents without an autoencoder: {ADVICE}")


@dataclass(frozen=True, kw_only=True)
class LatentMap:
    """``encoded.flatten() = shift + scale * latents.flatten()[source]``, and back.

    Example: a Stable Diffusion 3 with 16 latent channels on 8 x 8 places has ``source = arange(1024)``, every scale is
    ``1 / 1.5305`` and every shift 0.0609.
    """

    source: Tensor  # [N] int64
    scale: Tensor  # [N] float32
    shift: Tensor  # [N] float32
    latent_shape: tuple[int, ...]  # X
    encoded_shape: tuple[int, ...]  # Z
    eps: float  # of the coarsest type on the way

    def to_latents(self, encoded: Tensor) -> Tensor:
        """From what the autoencoder makes of a picture [*Z] to final latents [1, *X] float32."""
        values = (encoded.flatten().float().to(self.shift.device) - self.shift) / self.scale
        return torch.empty_like(values).scatter_(0, self.source, values).reshape(1, *self.latent_shape)

    def to_encoded(self, latents: Tensor) -> Tensor:
        """From final latents [1, *X] to what the autoencoder is given, [*Z] float32."""
        return (self.shift + self.scale * latents.flatten().float()[self.source]).reshape(self.encoded_shape)

    def agrees(self, latents: Tensor, encoded: Tensor) -> bool:
        """Whether the autoencoder is given this for these latents, up to the rounding of the types on the way."""
        if tuple(encoded.shape) != self.encoded_shape:
            return False
        apart = (self.to_encoded(latents) - encoded.float()).flatten().abs()
        size = self.shift.abs() + (self.scale * latents.flatten().float()[self.source]).abs()
        return bool((apart <= _ROUNDINGS * self.eps * size).all())


def find_map(pipeline: FlowPipeline, row: Conditioning, dtype: torch.dtype) -> tuple[LatentMap, DecodeCall]:
    """The map of a row, and what ``decode`` is called with for latents of zeros of the pipeline's own type.

    The map is measured in float32 as far as the pipeline lets latents keep it.

    Args:
        pipeline: whose epilogue is asked.
        row: one row.
        dtype: the type that latents are stored in.

    Raises:
        ValueError: the pipeline decodes something else than its latents one by one.
    """
    name = type(pipeline.pipe).__name__
    exact = replace(row, latent_dtype=torch.float32)
    shape = (1, *row.latent_shape)

    def encoded(latents: Tensor) -> Tensor:
        return decode_call(pipeline, latents.to(pipeline.device).reshape(shape), exact).encoded.flatten().float()

    size = torch.Size(shape).numel()
    zeros = decode_call(pipeline, torch.zeros(shape, dtype=row.latent_dtype, device=pipeline.device), row)
    shift = encoded(torch.zeros(size))  # [N]
    if shift.numel() != size:
        raise ValueError(f"{name} gives its autoencoder {shift.numel()} numbers for {size} latents: {ADVICE}")
    high, low = (encoded(torch.full((size,), sign * _REACH)) for sign in (1, -1))
    scale = (high - low) / (2 * _REACH)
    place, source = torch.arange(size), torch.zeros(size, dtype=torch.int64)
    regular = bool((scale != 0).all())
    for bit in range(max(size - 1, 1).bit_length()) if regular else ():
        level = (encoded(_REACH * (place >> bit & 1).float()) - shift) / (_REACH * scale)  # 0 or 1
        regular = regular and bool(((level - level.round()).abs() < 0.25).all())
        source |= level.round().long().cpu().clamp(0, 1) << bit
    regular = regular and torch.equal(source.sort().values, place)
    types = (zeros.encoded.dtype, row.latent_dtype, dtype)
    found = LatentMap(
        source=source.to(shift.device),
        scale=scale,
        shift=shift,
        latent_shape=row.latent_shape,
        encoded_shape=tuple(zeros.encoded.shape),
        eps=max(torch.finfo(own).eps for own in types),
    )
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(pipeline.device)
    if not regular or not found.agrees(noise, encoded(noise).reshape(found.encoded_shape)):
        raise ValueError(f"what {name} decodes is not its latents one by one, each scaled and shifted: {ADVICE}")
    return found, zeros
