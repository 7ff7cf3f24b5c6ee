"""Objects in photographs: transformers' Mask2Former (Cheng et al. 2022, arXiv 2112.01527) for instances.

Pixels come in and masks go out as in mmdet's Mask2Former, with which GenEval was computed. transformers' own class for it
wants scipy, for a loss that is not needed here; so its one layer behind the model is put there here.

Letters: N images, Q the model's guesses, C classes, M objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowsteer.rewards.scorers.batching import pick_device
from flowsteer.rewards.scorers.weights import find_folder, load_pretrained, load_strictly, read_tensors, tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
LONGEST = 1333 / 800  # the longer side's limit, in shorter sides
STRIDE = 32  # of the backbone; images are padded to a multiple of it
MOST = 100  # objects per image
# published files were written before transformers put a whole SwinModel into its backbone: they lack that one's last norm,
# which the backbone does not use, and hold tables that are computed now
MISSING = (r"pixel_level_module\.encoder\.swin\.layernorm\.",)
UNEXPECTED = (
    r"class_predictor\.",  # read below
    r"criterion\.",  # the loss's
    r"model\.pixel_level_module\.encoder\..*\.attention\.self\.relative_position_index$",
)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One object: what it is and where."""

    label: str
    confidence: float  # of the class times that of the mask's pixels, in [0, 1]
    mask: np.ndarray  # bool [H, W], not empty

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels; the last two are the first outside."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class Mask2Former:
    """A Mask2Former for instances.

    Args:
        place: folder, or ``owner/repository[@revision]`` of the hub.
        sha256: what the weights' hash must be.
        short_side: to which the shorter side of an image is resized, in pixels.
        device: where it runs; None: an accelerator where there is one.

    Raises:
        ValueError: weights that are not there or are something else, or a short side below 32 pixels.
    """

    def __init__(
        self, place: str, *, sha256: str | None = None, short_side: int = 800, device: str | None = None
    ) -> None:
        from transformers import Mask2FormerModel

        if short_side < STRIDE:
            raise ValueError(f"short_side must be at least {STRIDE} pixels, got {short_side}")
        self.short_side, self.device = short_side, pick_device(device)
        found = find_folder(place, sha256=sha256)
        self.sha256 = found.sha256
        self.model = load_pretrained(Mask2FormerModel, found, missing=MISSING, unexpected=UNEXPECTED)
        self.model.to(self.device)
        self.labels: tuple[str, ...] = tuple(label for _, label in sorted(self.model.config.id2label.items()))
        names = ("model.safetensors", "pytorch_model.bin")
        file = next((found.path / name for name in names if (found.path / name).is_file()), None)
        if file is None:
            raise ValueError(f"{place} has none of {', '.join(names)}")
        held = read_tensors(file)
        state = {part: tensor(held, f"class_predictor.{part}", str(file)).float() for part in ("weight", "bias")}
        self.head = nn.Linear(self.model.config.hidden_dim, len(self.labels) + 1)  # the last: no object
        load_strictly(self.head, state, str(file))
        self.head.requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, images: np.ndarray, threshold: float) -> list[list[Segment]]:
        """The objects above a confidence in each of uint8 [N, H, W, 3] in RGB, the surest first."""
        height, width = images.shape[1:3]
        scale = min(self.short_side / min(height, width), LONGEST * self.short_side / max(height, width))
        shape = (int(height * scale + 0.5), int(width * scale + 0.5))
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).movedim(-1, 1).float() / 255
        pixels = F.interpolate(pixels, shape, mode="bilinear")
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD))
        padded = F.pad((pixels - mean) / std, (0, -shape[1] % STRIDE, 0, -shape[0] % STRIDE))
        given = self.model(pixel_values=padded, output_hidden_states=True)
        logits = self.head(given.transformer_decoder_intermediate_states[-1].transpose(0, 1))  # [N, Q, C + 1]
        masks = F.interpolate(given.masks_queries_logits[-1], padded.shape[-2:], mode="bilinear")  # [N, Q, ...]
        masks = F.interpolate(masks[..., : shape[0], : shape[1]], (height, width), mode="bilinear")
        return [segments(*guesses, labels=self.labels, threshold=threshold) for guesses in zip(logits, masks)]


def segments(logits: Tensor, masks: Tensor, *, labels: tuple[str, ...], threshold: float) -> list[Segment]:
    """Objects from the guesses of one image, the surest first; as mmdet's ``instance_postprocess``.

    Args:
        logits: [Q, C + 1], the last for no object.
        masks: logits [Q, H, W].
        labels: C names.
        threshold: confidences above it are kept.
    """
    scores = logits.softmax(-1)[:, :-1].flatten()  # [Q C]; one guess may name several classes
    scores, places = scores.topk(min(MOST, len(scores)))
    found = []
    for score, place in zip(scores.tolist(), places.tolist()):  # the surest first
        if score <= threshold:  # the mask's confidence is at most 1
            break
        guess, label = divmod(place, len(labels))
        inside = masks[guess] > 0
        if not inside.any():
            continue
        confidence = score * masks[guess][inside].sigmoid().mean().item()
        if confidence > threshold:
            found.append(Segment(label=labels[label], confidence=confidence, mask=inside.cpu().numpy()))
    return sorted(found, key=lambda segment: -segment.confidence)


__all__ = ["Mask2Former", "Segment", "segments"]
