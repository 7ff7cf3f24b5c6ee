"""PickScore, CLIPScore and the aesthetic predictor v2: rewards on a CLIP model as transformers writes it.

What differs from the code that was published with them: each image is scored against its own prompt only, never against
the whole batch; a prompt is encoded once; weights are float32 whatever the file holds.
Letters: N images of one pass, P width of the joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from flowsteer.rewards.scorers.batching import Fingerprint, check_batch_size, pick_device, score_frames
from flowsteer.rewards.scorers.clip_model import load_clip
from flowsteer.rewards.scorers.heads import linear_layers
from flowsteer.rewards.scorers.preprocess import Resize, check_resize
from flowsteer.rewards.scorers.weights import find_file, read_tensors

Convention = Literal["cosine", "logits", "paper"]


class PickScore:
    """How well people would like the image for its prompt: PickScore v1 (Kirstain et al. 2023, arXiv 2305.01569).

    exp(logit_scale) times the cosine of image and prompt, about 18 to 24; many divide it by 26. Of two images of one prompt,
    the sigmoid of the difference is the probability that the first is preferred. Of a video, the mean over its frames.

    Args:
        weights: folder, or ``owner/repository[@revision]`` of the hub.
        tokenizer: likewise; the published weights come without one. None: that of the weights.
        sha256: what the weights' hash must be; ``fingerprint`` reports it.
        resize: to the square that is scored, the image's middle: ``pil`` as published; ``antialias`` or ``plain`` on floats.
        logit_scale: False leaves the cosine itself, about 0.18 to 0.24.
        max_tokens: longer prompts are cut off; None: 77, what the model takes.
        device: where it runs; None: an accelerator where there is one.
        batch_size: images in one pass.

    Raises:
        ValueError: weights that are not there or are something else, or an option that does not exist.
    """

    video = True

    def __init__(
        self,
        weights: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        sha256: str | None = None,
        resize: Resize = "pil",
        logit_scale: bool = True,
        max_tokens: int | None = None,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.batch_size = check_batch_size(batch_size)
        self.clip, of_clip = load_clip(
            weights, tokenizer, sha256=sha256, resize=resize, device=device, max_tokens=max_tokens
        )
        self.logit_scale = logit_scale
        self.fingerprint: Fingerprint = {"reward": "pickscore", "version": "v1", "logit_scale": logit_scale, **of_clip}

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB and B prompts to B scores."""
        return score_frames(self._score, images, prompts, name="pickscore", batch_size=self.batch_size)

    def _score(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        cosine = self.clip.cosine(images, prompts)
        return self.clip.logit_scale * cosine if self.logit_scale else cosine


class CLIPScore:
    """How well the image fits its prompt: CLIP's cosine (Radford et al. 2021, arXiv 2103.00020).

    Of a video, the mean over its frames.

    Args:
        weights: folder, or ``owner/repository[@revision]`` of the hub.
        tokenizer: likewise; None: that of the weights.
        sha256: what the weights' hash must be; ``fingerprint`` reports it.
        convention: ``cosine``, 0.15 to 0.35 with ViT-L/14. ``logits``: exp(logit_scale) times it. ``paper``: 2.5 max(cosine, 0)
            (Hessel et al. 2021, arXiv 2104.08718, equation 1; they use ViT-B/32 and put "A photo depicts " before the
            prompt, which is not done here).
        resize: to the square that is scored, the image's middle: ``pil`` as published; ``antialias`` or ``plain`` on floats.
        max_tokens: longer prompts are cut off; None: 77, what the model takes.
        device: where it runs; None: an accelerator where there is one.
        batch_size: images in one pass.

    Raises:
        ValueError: weights that are not there or are something else, or an option that does not exist.
    """

    video = True

    def __init__(
        self,
        weights: str = "openai/clip-vit-large-patch14",
        tokenizer: str | None = None,
        *,
        sha256: str | None = None,
        convention: Convention = "cosine",
        resize: Resize = "pil",
        max_tokens: int | None = None,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        if convention not in get_args(Convention):
            raise ValueError(f"convention must be {', '.join(get_args(Convention))}, got {convention!r}")
        self.batch_size = check_batch_size(batch_size)
        self.clip, of_clip = load_clip(
            weights, tokenizer, sha256=sha256, resize=resize, device=device, max_tokens=max_tokens
        )
        self.convention = convention
        self.fingerprint: Fingerprint = {"reward": "clip_score", "version": "1", "convention": convention, **of_clip}

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB and B prompts to B scores."""
        return score_frames(self._score, images, prompts, name="clip_score", batch_size=self.batch_size)

    def _score(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        cosine = self.clip.cosine(images, prompts)
        if self.convention == "logits":
            return self.clip.logit_scale * cosine
        return 2.5 * cosine.clamp(min=0) if self.convention == "paper" else cosine


class AestheticV2:
    """How beautiful people find the image, whatever its prompt: LAION's aesthetic predictor v2, about 1 to 10.

    Linear layers without activations between them, on the unit vector of CLIP ViT-L/14. Typical images have 4.5 to 6.5. Of
    a video, the mean over its frames.

    Args:
        head: file, or ``owner/repository[@revision]:file`` of the hub, with the linear layers:
            ``sac+logos+ava1-l14-linearMSE.pth`` of christophschuhmann/improved-aesthetic-predictor on GitHub (3.7 MB).
        weights: folder, or ``owner/repository[@revision]`` of the hub, with the CLIP model.
        head_sha256: what the head's hash must be; ``fingerprint`` reports it.
        sha256: what the CLIP weights' hash must be; likewise.
        resize: to the square that is scored, the image's middle: ``pil`` as published; ``antialias`` or ``plain`` on floats.
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
        weights: str = "openai/clip-vit-large-patch14",
        *,
        head_sha256: str | None = None,
        sha256: str | None = None,
        resize: Resize = "pil",
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.batch_size = check_batch_size(batch_size)
        check_resize(resize)
        runs_on = pick_device(device)
        found = find_file(head, sha256=head_sha256)
        self.clip, of_clip = load_clip(weights, None, sha256=sha256, fit="crop_round", resize=resize, device=runs_on)
        width = self.clip.model.config.projection_dim
        self.head = linear_layers(read_tensors(found.path), "layers.", width=width, name=head).to(self.clip.device)

        self.fingerprint: Fingerprint = {
            "reward": "aesthetic_v2",
            "version": "v2",
            "head_sha256": found.sha256,
            **of_clip,
        }

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB to B scores; the prompts are only counted."""
        return score_frames(self._score, images, prompts, name="aesthetic_v2", batch_size=self.batch_size)

    def _score(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        return self.head(self.clip.images(images))[:, 0]


__all__ = ["AestheticV2", "CLIPScore", "PickScore"]
