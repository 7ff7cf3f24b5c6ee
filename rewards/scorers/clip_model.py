"""A CLIP model as rewards use it: images and prompts to unit vectors.

Letters: N images or prompts, P width of the joint space, L prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowsteer.rewards.scorers.batching import Fingerprint, PromptMemory, check_max_tokens, libraries, pick_device
from flowsteer.rewards.scorers.preprocess import Fit, Preprocess, Resize, check_resize
from flowsteer.rewards.scorers.weights import Found, find_folder, load_pretrained


class ClipEmbedder:
    """A transformers ``CLIPModel`` behind two methods; a prompt is encoded once and then remembered.

    Args:
        model: a ``transformers.CLIPModel``.
        tokenizer: of its prompts.
        preprocess: uint8 [N, H, W, 3] to what the vision tower wants.
        device: where it runs; None: an accelerator where there is one.
        max_tokens: prompts are cut off there, start and end tokens included; None: what the text tower allows.
        clean: applied to a prompt before the tokenizer sees it.

    Raises:
        ValueError: the model cannot take as many tokens, or the tokenizer has tokens that the model does not know.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        preprocess: Preprocess,
        *,
        device: str | torch.device | None = None,
        max_tokens: int | None = None,
        clean: Callable[[str], str] | None = None,
    ) -> None:
        text = model.config.text_config
        most = text.max_position_embeddings
        check_max_tokens(max_tokens)
        if max_tokens is not None and max_tokens > most:
            raise ValueError(f"max_tokens must be at most {most}, which is what this model takes, got {max_tokens}")
        if len(tokenizer) > text.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens and the model {text.vocab_size}: they do not belong together"
            )
        self.device = pick_device(device)
        self.model = model.to(self.device)
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.max_tokens: int = max_tokens or most
        self._clean = clean
        self._prompts = PromptMemory(self._embed_prompt)

    @property
    def logit_scale(self) -> Tensor:
        """CLIP's temperature, exp(logit_scale), about 100 in trained models."""
        return self.model.logit_scale.exp()

    def images(self, images: np.ndarray) -> Tensor:
        """uint8 [N, H, W, 3] to unit vectors [N, P]."""
        pixels = self.preprocess(images).to(self.device)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=-1)

    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """N texts to unit vectors [N, P]."""
        return torch.stack(self._prompts(prompts))

    def cosine(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        """Of each image with its own prompt, [N]."""
        return (self.images(images) * self.prompts(prompts)).sum(-1)

    def fingerprint(self, found: Found, tokenizer: Found) -> Fingerprint:
        """What its vectors depend on."""
        return {
            "weights_sha256": found.sha256,
            "tokenizer_sha256": tokenizer.sha256,
            "max_tokens": self.max_tokens,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **self.preprocess.fingerprint(),
            **libraries(),
        }

    def _embed_prompt(self, prompt: str) -> Tensor:
        """[P]."""
        text = self._clean(prompt) if self._clean else prompt
        ids = self.tokenizer(
            [text], padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)  # [1, L]; attention is causal, so what follows the end is not seen
        pooled = self.model.text_model(input_ids=ids).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=-1)[0]


def load_clip(
    weights: str,
    tokenizer: str | None,
    *,
    sha256: str | None = None,
    fit: Fit = "crop",
    resize: Resize = "pil",
    device: str | torch.device | None = None,
    max_tokens: int | None = None,
) -> tuple[ClipEmbedder, Fingerprint]:
    """A CLIP model as transformers writes it.

    Args:
        weights: folder or repository of the model; see `flowsteer.rewards.scorers.weights`.
        tokenizer: folder or repository of the tokenizer; None: that of the weights.
        sha256: what the hash of the model's folder must be.
        fit: see `flowsteer.rewards.scorers.preprocess`.
        resize: likewise.
        device: see `ClipEmbedder`.
        max_tokens: likewise.

    Raises:
        ValueError: the weights or the tokenizer are not there, or are something else; or an option that does not exist,
            which is said before anything is read.
    """
    from transformers import CLIPModel

    check_resize(resize)
    check_max_tokens(max_tokens)
    device = pick_device(device)
    found = find_folder(weights, sha256=sha256)
    model = load_pretrained(CLIPModel, found)
    preprocess = Preprocess(size=model.config.vision_config.image_size, fit=fit, resize=resize)
    tokens, found_tokenizer = load_tokenizer(str(found.path)) if tokenizer is None else load_tokenizer(tokenizer)
    embedder = ClipEmbedder(model, tokens, preprocess, device=device, max_tokens=max_tokens)
    return embedder, embedder.fingerprint(found, found_tokenizer)


def load_tokenizer(place: str) -> tuple[Any, Found]:
    """CLIP's tokenizer of a folder or repository, and where it was found.

    Raises ValueError where there is none.
    """
    from transformers import CLIPTokenizer

    found = find_folder(place, weights=False)
    if not any((found.path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"{place} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); give one that has")
    return CLIPTokenizer.from_pretrained(found.path, local_files_only=True), found


__all__ = ["ClipEmbedder", "load_clip", "load_tokenizer"]
