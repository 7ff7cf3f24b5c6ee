"""A vision-language model as a judge of edits: it sees the source and the result.

Letters: B samples, T frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowsteer.rewards.scorers.batching import Fingerprint, check_images
from flowsteer.rewards.scorers.vlm.client import ChatClient
from flowsteer.rewards.scorers.vlm.judges import check_size, check_template, shared_fingerprint
from flowsteer.rewards.scorers.vlm.prompts import EDIT, EDIT_PARTS, fill, image_part, read_edit, text_part
from flowsteer.rewards.types import Values


class EditJudge:
    """How well an edit follows its instruction and keeps the rest, by a judge that sees source and result: 0 to 1.

    The prompt is the instruction. The judge gives two scores from 0 to 10; both are parts, ``instruction`` and
    ``preservation``, and the smaller one is the score, each divided by 10: as VIEScore (Ku et al. 2023, arXiv 2312.14867)
    takes the smallest of its scores, so that neither an untouched picture nor a new one is worth much. VIEScore's score of
    naturalness is left out. A sample without a source has no score.

    Args:
        endpoint: options of `ChatClient`.
        template: the question in other words, with ``{prompt}``; the reply has the same form. The images stand before it, each
            after its name, the source first.
        image_size: the longer side of both images in pixels, by bicubic resize. None: as they are.

    Raises:
        ValueError: an endpoint or a template that cannot be.
    """

    pictures = {"source": "image"}  # noqa: RUF012  (read only)
    score_range = (0.0, 1.0)
    video = True

    def __init__(self, endpoint: Mapping[str, Any], template: str | None = None, image_size: int | None = 512) -> None:
        self.template, self.image_size = check_template(template or EDIT), check_size(image_size)
        self._client = ChatClient.of(endpoint)
        self.fingerprint: Fingerprint = {
            "reward": "vlm_edit",
            "version": "1",
            **shared_fingerprint(self._client, self.template, image_size),
        }

    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        *,
        source: Sequence[np.ndarray | None],
        **columns: Sequence[Any],
    ) -> Mapping[str, Values]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB, sources [h, w, 3] and B instructions to B of each score."""
        check_images("vlm_edit", images, prompts)
        given = {row: picture for row, picture in enumerate(source) if picture is not None}
        rows, results = list(given), self._client.show(images[list(given)], self.image_size)
        sources = [[image_part(picture, self.image_size)] for picture in given.values()]
        questions = [
            [
                text_part("Source:"),
                *before,
                text_part("Result:"),
                *after,
                text_part(fill(self.template, prompt=prompts[row])),
            ]
            for row, before, after in zip(rows, sources, results)
        ]
        found = dict(zip(rows, self._client.verdicts(questions, read_edit)))
        answers = [found.get(row) for row in range(len(images))]
        parts = {name: [None if one is None else one[name] / 10 for one in answers] for name in EDIT_PARTS}
        return {"score": [None if one is None else min(one.values()) / 10 for one in answers], **parts}


__all__ = ["EditJudge"]
