"""The sections that say where the parts of a pipeline are, and how its autoencoder works."""

from __future__ import annotations

from typing import Literal

from flowsteer.rl.config.section import Section


class OffloadConfig(Section):
    """Parts of the pipeline that are on the CPU while they do not work. Lossless: what they compute stays the same bits."""

    text_encoders: bool = False
    """Text and image encoders are on the device only while the prompts of a training step (or of an evaluation) are encoded;
    encoded prompts are kept on the CPU. Lossless."""
    vae: bool = False
    """The autoencoder is on the device only while it decodes a batch or encodes a picture. Lossless."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of what is offloaded."""
        return tuple(name for name in type(self).model_fields if getattr(self, name))


class VAEConfig(Section):
    """How the autoencoder works, in training and evaluation. An export holds no autoencoder: what diffusers decodes with is the
    user's own choice there.
    """

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of its weights; null is ``model.dtype``. Lossy in pictures only: the last bits of pixels, and so of scores."""
    slicing: bool = False
    """Decode one sample of a batch after the other: less memory. Lossless up to rounding."""
    tiling: bool = False
    """Decode large pictures in overlapping tiles: far less memory. Lossy in pictures only: tiles are blended at their edges."""

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that are on."""
        return tuple(name for name in ("slicing", "tiling") if getattr(self, name))
