"""How beautiful people find an image: aesthetic predictor v2.5, linear layers on SigLIP.

https://github.com/discus0434/aesthetic-predictor-v2-5. What differs from the package: weights are float32, and the images
are made smaller by Pillow whether or not torchvision is installed.

Letters: N images of one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from flowsteer.rewards.scorers.batching import Fingerprint, check_batch_size, libraries, pick_device, score_frames
from flowsteer.rewards.scorers.heads import linear_layers
from flowsteer.rewards.scorers.preprocess import Preprocess, Resize, check_resize
from flowsteer.rewards.scorers.weights import find_file, find_folder, load_pretrained, read_tensors

HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and deviation: pixels in [-1, 1]


class AestheticV25:
    """How beautiful people find the image, whatever its prompt: aesthetic predictor v2.5, 1 to 10.

    5.5 and more is good. Of a video, the mean over its frames.

    Args:
        head: file, or ``owner/repository[@revision]:file`` of the hub, with the linear layers:
            ``models/aesthetic_predictor_v2_5.pth`` of discus0434/aesthetic-predictor-v2-5 on GitHub.
        weights: folder, or ``owner/repository[@revision]`` of the hub, with the SigLIP model.
        head_sha256: what the head's hash must be; ``fingerprint`` reports it.
        sha256: what the SigLIP weights' hash must be; likewise.
        resize: to the square that is scored, the whole image: ``pil`` as published; ``antialias`` or ``plain`` on floats.
        device: where it runs; None: an accelerator where there is one.
        batch_size: images in one pass.

    Raises:
        ValueError: weights that are not there, are something else or do not fit together, or an option that does not exist.
    """

    uses_prompt = False
    video = True

    def __init__(
        self,
        head: str,
        weights: str = "google/siglip-so400m-patch14-384",
        *,
        head_sha256: str | None = None,
        sha256: str | None = None,
        resize: Resize = "pil",
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        from transformers import SiglipVisionModel

        self.batch_size = check_batch_size(batch_size)
        check_resize(resize)
        self.device = pick_device(device)
        found_head, found = find_file(head, sha256=head_sha256), find_folder(weights, sha256=sha256)
        text = (r"text_model\.", "logit_scale", "logit_bias")  # the file holds both towers
        self.model = load_pretrained(SiglipVisionModel, found, unexpected=text).to(self.device)
        config = self.model.config
        state = read_tensors(found_head.path)
        self.head = linear_layers(state, "scoring_head.", width=config.hidden_size, name=head).to(self.device)
        self.preprocess = Preprocess(size=config.image_size, fit="stretch", resize=resize, mean=HALF, std=HALF)
        self.fingerprint: Fingerprint = {
            "reward": "aesthetic_v2_5",
            "version": "v2.5",
            "head_sha256": found_head.sha256,
            "weights_sha256": found.sha256,
            "dtype": "float32",
            **self.preprocess.fingerprint(),
            **libraries(),
        }

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB to B scores; the prompts are only counted."""
        return score_frames(self._score, images, prompts, name="aesthetic_v2_5", batch_size=self.batch_size)

    def _score(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        pooled = self.model(pixel_values=self.preprocess(images).to(self.device)).pooler_output
        return self.head(F.normalize(pooled, dim=-1))[:, 0]


__all__ = ["AestheticV25"]
