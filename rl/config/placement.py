"""The section that says where the parts of a pipeline are while they do not work."""

from __future__ import annotations

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
