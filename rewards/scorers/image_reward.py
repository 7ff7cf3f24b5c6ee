"""ImageReward: how well people would like the image for its prompt (Xu et al. 2023, arXiv 2304.05977).

The published checkpoint (BLIP: a ViT-L/16 whose patches a BERT looks at while it reads the prompt, and linear layers on
BERT's first token) is loaded key for key into transformers' BLIP classes, which compute the same numbers; the package itself
is not needed. As in the package the first token stays [CLS]: BLIP's own [ENC] is never put in its place.

Letters: N images of one pass, P image patches with the class token, V and D widths of the two towers, L prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsteer.rewards.scorers.batching import (
    Fingerprint,
    PromptMemory,
    check_batch_size,
    check_max_tokens,
    libraries,
    pick_device,
    score_frames,
)
from flowsteer.rewards.scorers.heads import linear_layers
from flowsteer.rewards.scorers.preprocess import Preprocess, Resize, check_resize
from flowsteer.rewards.scorers.weights import (
    count_blocks,
    empty_model,
    find_file,
    find_folder,
    load_strictly,
    read_tensors,
    tensor,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores over the authors' data: ImageReward.py
HEAD_WIDTH = 64  # of both towers: 1024 / 16 and 768 / 12; tensors do not tell
# the rest of BLIP's pre-training, which the checkpoint holds and no score uses
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


class ImageReward:
    """How well people would like the image for its prompt: ImageReward v1.0, about -2.3 to 2.

    Normalised to mean 0 and deviation 1 over the authors' data. Of a video, the mean over its frames.

    Args:
        weights: file, or ``owner/repository[@revision]:file`` of the hub.
        tokenizer: folder, or ``owner/repository[@revision]`` of the hub, with BERT's tokenizer.
        sha256: what the weights' hash must be; ``fingerprint`` reports it.
        resize: to the square that is scored, the image's middle: ``pil`` as published; ``antialias`` or ``plain`` on floats.
        max_tokens: longer prompts are cut off; 35 as published.
        device: where it runs; None: an accelerator where there is one.
        batch_size: images in one pass.

    Raises:
        ValueError: weights that are not there or are something else, or an option that does not exist.
    """

    video = True

    def __init__(
        self,
        weights: str = "THUDM/ImageReward:ImageReward.pt",
        tokenizer: str = "bert-base-uncased",
        *,
        sha256: str | None = None,
        resize: Resize = "pil",
        max_tokens: int = 35,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        self.batch_size = check_batch_size(batch_size)
        check_resize(resize)
        check_max_tokens(max_tokens)
        self.device = pick_device(device)
        found, found_tokenizer = find_file(weights, sha256=sha256), find_folder(tokenizer, weights=False)
        vision, text, head = load_blip(read_tensors(found.path), name=str(found.path))
        most = text.config.max_position_embeddings
        if max_tokens > most:
            raise ValueError(f"max_tokens must be at most {most}, which is what this model takes, got {max_tokens}")
        self.vision, self.text, self.head = (part.to(self.device) for part in (vision, text, head))
        self.tokenizer = _bert_tokenizer(found_tokenizer.path, text.config.vocab_size)
        self.max_tokens = max_tokens
        self.preprocess = Preprocess(size=vision.config.image_size, fit="crop_round", resize=resize)
        self._tokens = PromptMemory(self._tokenize)
        self.fingerprint: Fingerprint = {
            "reward": "image_reward",
            "version": "v1.0",
            "weights_sha256": found.sha256,
            "tokenizer_sha256": found_tokenizer.sha256,
            "max_tokens": max_tokens,
            "dtype": "float32",
            **self.preprocess.fingerprint(),
            **libraries(),
        }

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB and B prompts to B scores."""
        return score_frames(self._score, images, prompts, name="image_reward", batch_size=self.batch_size)

    def _score(self, images: np.ndarray, prompts: Sequence[str]) -> Tensor:
        patches = self.vision(pixel_values=self.preprocess(images).to(self.device)).last_hidden_state  # [N, P, V]
        tokens = torch.stack(self._tokens(prompts)).to(self.device)  # [N, 2, L]
        read = self.text(
            input_ids=tokens[:, 0],
            attention_mask=tokens[:, 1],
            encoder_hidden_states=patches,
            is_decoder=False,  # the prompt is read as a whole, not from left to right
        ).last_hidden_state  # [N, L, D]
        return (self.head(read[:, 0])[:, 0] - MEAN) / STD

    def _tokenize(self, prompt: str) -> Tensor:
        """[2, L], token numbers and which of them count. What BERT makes of them depends on the image too."""
        tokens = self.tokenizer(
            [prompt], padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return torch.cat([tokens.input_ids, tokens.attention_mask])


def load_blip(held: Mapping[str, Any], *, name: str) -> tuple[Any, Any, Any]:
    """BLIP's vision tower, its text tower and the linear layers, from ImageReward's checkpoint.

    The widths and numbers of layers are read from the tensors.

    Args:
        held: the published file's tensors, by name.
        name: of the file, for messages.

    Raises:
        ValueError: it is something else, or a key is missing or unexpected.
    """
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.layers.": {}}
    for key, value in held.items():
        if key.startswith(UNUSED):
            continue
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"{name} has the unexpected {key}; these are weights of another model")
        parts[prefix][key.removeprefix(prefix)] = value
    seen, read, layers = parts.values()
    vision = _vision_tower(seen, name)
    text = _text_tower(read, vision.config.hidden_size, name)
    return vision, text, linear_layers(layers, "", width=text.config.hidden_size, name=name)


def _vision_tower(state: Mapping[str, Tensor], name: str) -> Any:
    from transformers import BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel

    patches = tensor(state, "patch_embed.proj.weight", name)  # [V, 3, side, side]
    positions = tensor(state, "pos_embed", name)  # [1, P, V]
    config = BlipVisionConfig(
        hidden_size=patches.shape[0],
        intermediate_size=len(tensor(state, "blocks.0.mlp.fc1.weight", name)),
        num_hidden_layers=count_blocks(state, "blocks."),
        num_attention_heads=patches.shape[0] // HEAD_WIDTH,
        image_size=round((positions.shape[1] - 1) ** 0.5) * patches.shape[-1],  # the first position is no patch
        patch_size=patches.shape[-1],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    model = empty_model(BlipVisionModel, config)
    load_strictly(model, {_vision_name(key): value for key, value in state.items()}, name)
    return model.eval().requires_grad_(False)


def _text_tower(state: Mapping[str, Tensor], encoder_width: int, name: str) -> Any:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    words = tensor(state, "embeddings.word_embeddings.weight", name)  # [vocabulary, D]
    config = BlipTextConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        encoder_hidden_size=encoder_width,
        intermediate_size=len(tensor(state, "encoder.layer.0.intermediate.dense.weight", name)),
        num_hidden_layers=count_blocks(state, "encoder.layer."),
        num_attention_heads=words.shape[1] // HEAD_WIDTH,
        max_position_embeddings=len(tensor(state, "embeddings.position_embeddings.weight", name)),
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # so that its layers have cross-attention
    )
    model = empty_model(BlipTextModel, config, add_pooling_layer=False)
    load_strictly(model, state, name)
    return model.eval().requires_grad_(False)


def _vision_name(key: str) -> str:
    """The name of a tensor in timm to that in transformers."""
    for old, new in _VISION_NAMES.items():
        if key.startswith(old):
            key = new + key.removeprefix(old)
            break
    for old, new in _BLOCK_NAMES.items():
        key = key.replace(old, new)
    return key


_VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
    "blocks.": "encoder.layers.",
}
_BLOCK_NAMES = {
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}


def _bert_tokenizer(folder: Any, vocab_size: int) -> Any:
    """BERT's, with the two tokens that BLIP adds at its end, so that a prompt that spells them is read as in the package."""
    from transformers import BertTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise ValueError(
            f"{folder} has no tokenizer (tokenizer.json or vocab.txt); give the folder of bert-base-uncased"
        )
    tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"{folder} has {len(tokenizer)} tokens with [DEC] and [ENC] and the model {vocab_size}: they do not belong together"
        )
    return tokenizer


__all__ = ["ImageReward", "load_blip"]
