"""Whether an image shows the words that its prompt asks for, read by OCR on the CPU.

The rule is that of Flow-GRPO's code (``flow_grpo/ocr.py``), of the recognised text and the prompt's quoted target, both
in lower case and without spaces: 1 where the target is part of the text, else ``1 - min(distance, length) / length`` with
the edit distance between the two and the target's length. What differs: a prompt without a target, and an image that
cannot be read, have no score instead of ending the run or counting as 0; the reader is RapidOCR (PP-OCRv6, whose weights
are in its wheel) and not PaddleOCR, so scores are not comparable with published ones to the last digit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import numpy as np

from flowsteer.rewards.extras import need
from flowsteer.rewards.scorers.batching import Fingerprint, check_images
from flowsteer.rewards.types import Values

SMALL_SIDE = 64  # pixels; see OCRReward
_QUOTED = re.compile(r'"([^"]*)"')


class OCRReward:
    """How much of the quoted text in its prompt an image shows: 0 to 1, by OCR.

    The target is what stands between the first pair of double quotes (``"``) in the prompt: ``a sign that says "OPEN"``.
    Without one, or with an empty one, the score is missing. The part ``exact`` is 1 where the whole target is shown, else
    0. Each image is read alone, so its score does not depend on its batch. Of a video, the mean over its frames.

    Args:
        mode: ``detect`` finds the places with text and reads each, from top to bottom; about 0.25 s per image on one
            core, several times that for a wide one. ``recognize`` reads the whole image as one line of text, ten times
            faster, and is right only where the image holds nothing else. ``auto`` recognises where the shorter side has
            fewer than 64 pixels, where there is room for one short word, and detects otherwise.
        num_threads: of the CPU, for each image.

    Raises:
        ValueError: an unknown mode, fewer than one thread, or RapidOCR (``pip install 'flowsteer[ocr]'``) is not there.
    """

    video = True
    score_range = (0.0, 1.0)

    def __init__(self, mode: Literal["auto", "detect", "recognize"] = "auto", num_threads: int = 1) -> None:
        if mode not in ("auto", "detect", "recognize"):
            raise ValueError(f"mode must be auto, detect or recognize, got {mode!r}")
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        cv2, rapidocr, _ = (
            need(module, extra="ocr", what="the reward 'ocr'") for module in ("cv2", "rapidocr", "onnxruntime")
        )
        threads = "EngineConfig.onnxruntime"
        self.mode = mode
        self.fingerprint: Fingerprint = {
            "reward": "ocr",
            "version": "1",
            "mode": mode,
            "rapidocr": version("rapidocr"),  # and with it the weights
            "onnxruntime": version("onnxruntime"),
            "opencv": cv2.__version__,
        }
        self._engine = rapidocr.RapidOCR(
            params={
                "Global.log_level": "error",  # it warns of every image without text
                "Global.text_score": 0.0,  # as Flow-GRPO: every line that was read counts
                f"{threads}.intra_op_num_threads": num_threads,
                f"{threads}.inter_op_num_threads": 1,
            }
        )

    def unscorable(self, prompts: Sequence[str]) -> dict[str, str]:
        """The prompts without a target, and why there is none: prompt -> reason."""
        reason = 'it has no text between double quotes, as in: a sign that says "OPEN"'
        return {prompt: reason for prompt in prompts if not normalise_text(quoted_text(prompt))}

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> Mapping[str, Values]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB to ``score`` and ``exact``, B each."""
        check_images("ocr", images, prompts)
        scores = [self._score(image, prompt) for image, prompt in zip(images, prompts)]
        return {"score": [score for score, _ in scores], "exact": [exact for _, exact in scores]}

    def read(self, image: np.ndarray) -> str:
        """The text in one image, uint8 [H, W, 3] in RGB; lines joined by spaces, empty where there is none."""
        detect = self.mode == "detect" or (self.mode == "auto" and min(image.shape[:2]) >= SMALL_SIDE)
        found: Any = self._engine(np.ascontiguousarray(image[:, :, ::-1]), use_det=detect, use_cls=False, use_rec=True)
        return " ".join(found.txts or ())

    def _score(self, image: np.ndarray, prompt: str) -> tuple[float | None, float | None]:
        target = quoted_text(prompt)
        if not normalise_text(target):
            return None, None
        frames = image if image.ndim == 4 else image[None]
        scores = [match_score(self.read(frame), target) for frame in frames]
        return float(np.mean(scores)), float(np.mean([score == 1 for score in scores]))


def quoted_text(prompt: str) -> str:
    """What stands between the first pair of double quotes; empty where there is no pair."""
    found = _QUOTED.search(prompt)
    return found.group(1) if found else ""


def normalise_text(text: str) -> str:
    """In lower case, without white space."""
    return "".join(text.split()).lower()


def match_score(text: str, target: str) -> float:
    """Flow-GRPO's score of a recognised text against a target that is not empty: 0 to 1."""
    text, target = normalise_text(text), normalise_text(target)
    if target in text:
        return 1.0
    return 1.0 - min(edit_distance(text, target), len(target)) / len(target)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements that make one text the other."""
    previous = list(range(len(second) + 1))
    for row, left in enumerate(first, 1):
        current = [row]
        for column, right in enumerate(second, 1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (left != right)))
        previous = current
    return previous[-1]
