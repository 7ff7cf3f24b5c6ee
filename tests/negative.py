"""A pipeline adapter whose pictures are the negatives of the embedded pipeline's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowsteer.rollout.lifting import pipeline


class Negative(pipeline.FlowPipeline):
    """Called as every adapter is; see `flowsteer.rollout.lifting.protocol.Pipeline`."""

    def __init__(self, *, path: str, dtype: Any, device: Any, call: Mapping[str, Any], **size: int | None) -> None:
        super().__init__(pipeline.load_diffusers(path, dtype=dtype, device=device), call_kwargs=call, **size)

    def decode(self, latents: Tensor, conditioning: pipeline.Conditioning) -> Tensor:
        """Images [B, 3, H, W] in [0, 1]."""
        return 1 - super().decode(latents, conditioning)
