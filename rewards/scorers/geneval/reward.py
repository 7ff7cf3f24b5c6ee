"""Does a photograph show what was asked for? GenEval's rules (Ghosh et al. 2023, arXiv 2310.11513) on another detector.

**These are not GenEval's own numbers.** Rules, thresholds, colours and prompts to CLIP are those of its
``evaluate_images.py``; the objects are found by transformers' Mask2Former (Swin-S, COCO instances) where GenEval uses mmdet's.
Compare runs of this reward with one another, and take numbers to publish from the original.

1. Mask2Former finds objects of the 80 classes of COCO, each with a mask and a confidence.
2. Those above 0.3 count (0.9 in counting tasks), at most 16 of a class, the surest first.
3. The colour of an object is the one of ten that CLIP finds nearest, of its box with everything but its mask in gray.
4. `flowsteer.rewards.scorers.geneval.rules` compares number, colours, positions and what must not be there with the metadata.

The metadata are the columns of GenEval's ``evaluation_metadata.jsonl`` beside the prompt: ``tag``, ``include``
(``[{"class": "bench", "count": 2, "color": "red", "position": ["left of", 0]}]``) and ``exclude``, null where there is none.

Letters: B samples, P width of CLIP's joint space, H and W of an image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowsteer.rewards.scorers.batching import Fingerprint, check_batch_size, check_images
from flowsteer.rewards.scorers.clip_model import load_clip
from flowsteer.rewards.scorers.geneval.mask2former import Mask2Former, Segment
from flowsteer.rewards.scorers.geneval.rules import COLORS, Detection, Metadata, judge, read_metadata

logger = logging.getLogger(__name__)

Score = Literal["graded", "strict"]

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of the confidence
MAX_OBJECTS = 16  # of a class
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GRAY = 153  # "#999", behind an object whose colour is asked for
SPELLINGS = {  # COCO's names of classes, of which detectors have several, to GenEval's
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}


class GenEvalReward:
    """Whether a photograph shows what its prompt's metadata ask for, 0 to 1: GenEval's rules, not GenEval's numbers.

    The detector is another one; see the module's docstring. Where a prompt has no metadata (``include`` is null or empty)
    there is no score, nor where they are not GenEval's, which the log says. Of a video, the mean over its frames.

    Args:
        detector: folder, or ``owner/repository[@revision]`` of the hub, with a Mask2Former of COCO instances.
        weights: likewise, with the CLIP model that names colours.
        detector_sha256: what the detector's hash must be; ``fingerprint`` reports it.
        sha256: what the CLIP weights' hash must be; likewise.
        score: which of the parts ``graded`` and ``strict`` is ``"score"``, the one that counts.
        short_side: to which the shorter side of an image is resized for the detector, in pixels, the longer one to at most
            5/3 of it. The original's is 800; less is faster and finds less.
        device: where it runs; None: an accelerator where there is one.
        batch_size: images in one pass of the detector.

    Raises:
        ValueError: weights that are not there or are something else, or an option that does not exist.
    """

    video = True
    score_range = (0.0, 1.0)

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        weights: str = "openai/clip-vit-large-patch14",
        *,
        detector_sha256: str | None = None,
        sha256: str | None = None,
        score: Score = "graded",
        short_side: int = 800,
        device: str | None = None,
        batch_size: int = 4,
    ) -> None:
        if score not in ("graded", "strict"):
            raise ValueError(f"score must be graded or strict, got {score!r}")
        self.score: Score = score
        self.batch_size = check_batch_size(batch_size)
        self.detector = Mask2Former(detector, sha256=detector_sha256, short_side=short_side, device=device)
        self.clip, of_clip = load_clip(weights, None, sha256=sha256, fit="crop_round", device=device)
        self.names = [SPELLINGS.get(label, label) for label in self.detector.labels]
        self.fingerprint: Fingerprint = {
            "reward": "geneval",
            "version": "1, with transformers' detector: not GenEval's numbers",
            "score": score,
            "detector_sha256": self.detector.sha256,
            "short_side": short_side,
            **of_clip,
        }

    @torch.no_grad()
    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        *,
        include: Sequence[Any] | None = None,
        exclude: Sequence[Any] | None = None,
        tag: Sequence[Any] | None = None,
        **columns: Sequence[Any],
    ) -> dict[str, list[float | None]]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB and their metadata to ``graded``, ``strict`` and ``score``, B each.

        Raises ValueError for images of another kind, and where no row's metadata are GenEval's.
        """
        check_images("geneval", images, prompts)
        if include is None:
            raise ValueError("geneval needs GenEval's metadata as columns of the prompt file: include, exclude, tag")
        none = [None] * len(images)
        rows = zip(include, exclude or none, tag or none)
        wanted = self._wanted(list(rows))
        videos = images if images.ndim == 5 else images[:, None]
        asked = [(row, frame) for row, one in enumerate(wanted) if one for frame in range(videos.shape[1])]
        answers: dict[int, list[dict[str, float]]] = {}
        for start in range(0, len(asked), self.batch_size):
            places = asked[start : start + self.batch_size]
            frames = np.stack([videos[place] for place in places])
            for (row, _), frame, found in zip(places, frames, self.detector(frames, THRESHOLD)):
                answers.setdefault(row, []).append(self._judge(frame, found, wanted[row]))
        parts: dict[str, list[float | None]] = {
            name: [
                float(np.mean([answer[name] for answer in answers[row]])) if row in answers else None
                for row in range(len(images))
            ]
            for name in ("graded", "strict")
        }
        return {"score": parts[self.score], **parts}

    def _wanted(self, rows: Sequence[tuple[Any, Any, Any]]) -> list[Metadata | None]:
        """What each row of metadata asks for; None of one that asks for nothing, or cannot be read."""
        wanted: list[Metadata | None] = []
        errors: list[ValueError] = []
        for row in rows:
            try:
                wanted.append(read_metadata(*row, names=self.names))
            except ValueError as error:
                wanted.append(None)
                errors.append(error)
        if errors and len(errors) == len(rows):
            raise errors[0]
        for reason in dict.fromkeys(str(error) for error in errors):  # the images of a prompt share it
            logger.warning("no score of some images, whose metadata are wrong: %s", reason)
        return wanted

    def _judge(self, image: np.ndarray, found: Sequence[Segment], wanted: Metadata | None) -> dict[str, float]:
        assert wanted is not None
        threshold = COUNTING_THRESHOLD if wanted.counting else THRESHOLD
        objects: dict[str, list[Detection]] = {}
        for segment in found:  # the surest first
            name = SPELLINGS.get(segment.label, segment.label)
            of_class = objects.setdefault(name, [])
            if segment.confidence > threshold and len(of_class) < MAX_OBJECTS:
                asked = any(
                    clause.name == name and clause.color and len(of_class) < clause.count for clause in wanted.include
                )
                color = self.color(image, segment, name) if asked else None
                of_class.append(Detection(box=segment.box, confidence=segment.confidence, color=color))
        return judge(wanted, objects)

    def color(self, image: np.ndarray, segment: Segment, name: str) -> str:
        """The colour, one of COLORS, of an object in uint8 [H, W, 3]."""
        left, top, right, bottom = segment.box
        alone = np.where(segment.mask[..., None], image, np.uint8(GRAY))[top:bottom, left:right]
        return COLORS[int((self._color_vectors(name) @ self.clip.images(alone[None])[0]).argmax())]

    def _color_vectors(self, name: str) -> Tensor:
        """Of each colour of a class a unit vector, [10, P]: the mean over the prompts that name it."""
        texts = [form.format(color=color, name=name) for color in COLORS for form in COLOR_PROMPTS]
        vectors = self.clip.prompts(texts).unflatten(0, (len(COLORS), -1))
        return F.normalize(vectors.mean(1), dim=-1)


__all__ = ["GenEvalReward"]
