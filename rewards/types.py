"""What a reward is given and what it gives back.

Letters: B samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:  # a reward without networks starts in a new process in a fifth of the time that torch is imported in
    from torch import Tensor

Values = Sequence[float | None]


@runtime_checkable
class Reward(Protocol):
    """Images in, one number per image out; ``None`` where nobody could tell.

    ``images`` is uint8 [B, H, W, 3] in RGB (video: [B, T, H, W, 3]); ``prompts`` has B entries; ``columns`` are the other
    columns of the prompt file, B entries each. The answer is a sequence of B numbers, or a mapping of named parts, of
    which ``"score"`` is the one that counts. A reward must not raise for one bad image: it says ``None`` for that one.

    A run asks a reward from one thread at a time, but not always from the same one.

    What a class may say of its objects besides, or a function as its attribute (``my_reward.uses_prompt = False``), all of
    it optional:

    - ``groupwise = True``: it compares. Each call gets the images of exactly one group, all of the same prompt, and gives
      each a number relative to the others, or ``None`` to all where they are too few.
    - ``video = True``: it takes videos, which `flowsteer rewards certify` then asks for, and gets their rate in frames a
      second as the column ``frame_rate`` (None where the pipeline has none). Others are shown a video frame by frame.
    - ``pictures = {"source": "image", "mask": "mask"}``: these columns are pictures, and it gets them as pixels
      (`flowsteer.rewards.pictures`), each under its name, with None for a sample without one.
    - ``sound = True``: ``images`` is sound, float32 [B, C, N] in [-1, 1], of C channels.
    - ``uses_prompt = False``: the prompt plays no part, so `flowsteer rewards certify` does not ask for it.
    - ``score_range = (0.0, 1.0)``: all its scores and parts lie between these; evaluations then cut their intervals there.
    - ``fingerprint``: a mapping of names to texts and numbers on which scores depend (weights' hash, preprocessing, versions);
      it is kept with a run.
    - ``unscorable(prompts)``: which of the prompts no image can be scored for, as a mapping ``{prompt: reason}``. A run asks
      at its start and warns or, where a step would draw more of them than ``advantage.min_scored`` allows, refuses.
    - ``close()``: called at the end of a run.
    """

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]
    ) -> Values | Mapping[str, Values]: ...


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One score per sample that is a number or missing.

    A failed score is missing, never zero. ``total`` is NaN exactly where ``missing`` is true, so that using a missing
    score by mistake cannot go unnoticed.

    Example: three samples of which the second could not be scored have ``total = tensor([0.8, nan, 0.3])``,
    ``parts = {"ocr": tensor([0.8, nan, 0.3])}`` and
    ``failures = {1: "reward 'ocr' gave no score (None)"}``; ``missing`` is ``tensor([False, True, False])``.
    """

    total: Tensor  # [B] float32, NaN where missing
    parts: dict[str, Tensor] = field(default_factory=dict)  # name -> [B] float32, NaN where missing
    failures: dict[int, str] = field(default_factory=dict)  # row -> why its score is missing

    def __post_init__(self) -> None:
        if self.total.dim() != 1:
            raise ValueError(f"scores have one number per sample, got the shape {tuple(self.total.shape)}")
        for name, part in self.parts.items():
            if part.shape != self.total.shape:
                raise ValueError(
                    f"part {name!r} has the shape {tuple(part.shape)}, the total {tuple(self.total.shape)}"
                )

    @property
    def missing(self) -> Tensor:
        """[B] bool, true where there is no score."""
        return self.total.isnan()

    def __len__(self) -> int:
        return len(self.total)
