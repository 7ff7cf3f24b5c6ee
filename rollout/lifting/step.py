"""One denoising step of a pipeline: what it predicts, and what the pipeline's loop makes of the result.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class LiftedStep:
    """An iteration of a denoising loop that waits for the result of its step. `finish` may be called once.

    Example: with Euler steps of a rectified flow,
    ``step = pipeline.begin(latents, index, conditioning)`` and
    ``latents = step.finish(latents + (sigma[index + 1] - sigma[index]) * step.velocity)`` is one iteration.

    Args:
        velocity: what the pipeline would give to ``scheduler.step``, guidance included, [B, *X]; of an epsilon or
            v_prediction pipeline that prediction.
        finish: from the next latents [B, *X] to those that enter the next step; None where the pipeline does nothing.
    """

    def __init__(self, velocity: Tensor, finish: Callable[[Tensor], Any] | None = None) -> None:
        self.velocity = velocity
        self._finish = finish
        self._finished = False

    def finish(self, next_latents: Tensor) -> Tensor:
        """What enters the next step, [B, *X]: most pipelines leave ``next_latents`` as they are, some paste an inpainting
        mask or cast.

        Raises ValueError when it is called a second time: an iteration runs out once.
        """
        if self._finished:
            raise ValueError("this step is finished; begin another one")
        self._finished = True
        return next_latents if self._finish is None else self._finish(next_latents)
