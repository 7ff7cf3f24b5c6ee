"""HPSv2 and v2.1: how well people would like the image for its prompt (Wu et al. 2023, arXiv 2306.09341).

The published checkpoint is of open_clip's ViT-H-14. It is loaded key for key into transformers' CLIPModel, which computes the
same numbers; neither open_clip nor torchvision is needed.

What differs from the package: weights are float32 and the pass is too (the package runs under fp16 autocast on a GPU); an
image whose longer side is exactly 224 is padded like any other, where the package fails; of ftfy's cleaning of prompts
only what prompts have in practice is done, and the words that a prompt must not spell are others (`clean_prompt`).

Letters: N images of one pass, D width of a tower, S side of the vision tower's input.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from flowsteer.rewards.scorers.batching import (
    Fingerprint,
    check_batch_size,
    check_max_tokens,
    pick_device,
    score_frames,
)
from flowsteer.rewards.scorers.clip_model import ClipEmbedder, load_tokenizer
from flowsteer.rewards.scorers.preprocess import Preprocess
from flowsteer.rewards.scorers.weights import count_blocks, empty_model, find_file, load_strictly, read_tensors, tensor

Version = Literal["v2.0", "v2.1"]

FILES = {"v2.0": "xswu/HPSv2:HPS_v2_compressed.pt", "v2.1": "xswu/HPSv2:HPS_v2.1_compressed.pt"}
VISION_HEAD_WIDTH, TEXT_HEAD_WIDTH = 80, 64  # open_clip's ViT-H-14: 1280 / 16 and 1024 / 16; tensors do not tell
PLAIN = {  # ftfy's ``uncurl_quotes`` and ``fix_character_width``
    **dict.fromkeys(range(0x2018, 0x201C), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    0x02BC: "'",
    0x3000: " ",
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)},
}


class HPSv2:
    """How well people would like the image for its prompt: HPS v2.1 or v2.0, the cosine, 0.1 to 0.4.

    The leaderboard shows 100 times it. Scores of v2.0 and v2.1 are not comparable. Of a video, the mean over its frames.

    Args:
        version: ``v2.1``, or ``v2.0``, which is the package's default. Which file is fetched, and what the fingerprint says.
        weights: file, or ``owner/repository[@revision]:file`` of the hub, in place of the published one of this version.
        tokenizer: folder, or ``owner/repository[@revision]`` of the hub, with CLIP's tokenizer.
        sha256: what the file's hash must be; ``fingerprint`` reports it.
        antialias: of the resize to 224 pixels. False is the package with torchvision below 0.17, which was current when the
            published numbers were computed; True is the package with a newer one. Of one image: 0.0406 and 0.0415.
        max_tokens: longer prompts are cut off; None: 77, what the model takes.
        device: where it runs; None: an accelerator where there is one.
        batch_size: images in one pass.

    Raises:
        ValueError: weights that are not there or are something else, or an option that does not exist.
    """

    video = True

    def __init__(
        self,
        version: Version = "v2.1",
        weights: str | None = None,
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        sha256: str | None = None,
        antialias: bool = False,
        max_tokens: int | None = None,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        if version not in get_args(Version):
            raise ValueError(f"version must be {' or '.join(get_args(Version))}, got {version!r}")
        self.batch_size = check_batch_size(batch_size)
        check_max_tokens(max_tokens)
        runs_on = pick_device(device)
        found = find_file(weights or FILES[version], sha256=sha256)
        tokens, found_tokenizer = load_tokenizer(tokenizer)
        model = clip_from_open_clip(read_tensors(found.path), name=str(found.path))
        size = model.config.vision_config.image_size
        preprocess = Preprocess(size=size, fit="pad", resize="antialias" if antialias else "plain")
        self.clip = ClipEmbedder(model, tokens, preprocess, device=runs_on, max_tokens=max_tokens, clean=clean_prompt)
        self.fingerprint: Fingerprint = {
            "reward": "hpsv2",
            "version": version,
            "antialias": antialias,
            **self.clip.fingerprint(found, found_tokenizer),
        }

    def __call__(self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB and B prompts to B scores."""
        return score_frames(self.clip.cosine, images, prompts, name="hpsv2", batch_size=self.batch_size)


def clean_prompt(text: str) -> str:
    """What open_clip's tokenizer does to a text first: HTML's references, curled quotes and full width become plain.

    What still differs: ftfy also repairs text that was decoded wrongly, parts ligatures and removes control characters; and
    it leaves a quote curled that stands as a reference (``&rsquo;``) in a text with ``<``. The words that are read as the
    start or end of the text are ``<|startoftext|>`` and ``<|endoftext|>`` here, ``<start_of_text>`` and ``<end_of_text>``
    there.
    """
    return html.unescape(html.unescape(text)).translate(PLAIN).strip()


def clip_from_open_clip(held: Mapping[str, Any], *, name: str) -> Any:
    """A transformers ``CLIPModel`` with an open_clip checkpoint of the ViT-H-14 family.

    The widths and numbers of layers are read from the tensors; open_clip's activation is the exact GELU (no QuickGELU).

    Args:
        held: ``{"state_dict": {...}}`` as in the published files.
        name: of the file, for messages.

    Raises:
        ValueError: it is something else, or a key is missing or unexpected.
    """
    from transformers import CLIPConfig, CLIPModel

    state = held.get("state_dict")
    if not isinstance(state, Mapping):
        raise ValueError(f"{name} has no 'state_dict' (it has {', '.join(list(held)[:3])}); it is no HPSv2 checkpoint")
    patches, words = tensor(state, "visual.conv1.weight", name), tensor(state, "token_embedding.weight", name)
    positions, text_positions = (tensor(state, f"{tower}positional_embedding", name) for tower in ("visual.", ""))
    projected = tensor(state, "text_projection", name)
    side = round((len(positions) - 1) ** 0.5) * patches.shape[-1]  # S; the first position is the class token's
    config = CLIPConfig(
        projection_dim=projected.shape[1],
        text_config={
            **_tower(state, "transformer.", words.shape[1], TEXT_HEAD_WIDTH, name),
            "vocab_size": len(words),
            "max_position_embeddings": len(text_positions),
            "projection_dim": projected.shape[1],
            "eos_token_id": 2,  # transformers' sign for "the text ends at its largest token", open_clip's rule
        },
        vision_config={
            **_tower(state, "visual.transformer.", len(patches), VISION_HEAD_WIDTH, name),
            "image_size": side,
            "patch_size": patches.shape[-1],
            "projection_dim": projected.shape[1],
        },
    )
    model = empty_model(CLIPModel, config)
    load_strictly(model, rename_open_clip(state), name)
    return model.eval().requires_grad_(False)


def rename_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under transformers' names; what has no counterpart keeps its own.

    Queries, keys and values, one tensor in open_clip, are three in transformers; projections are transposed.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "attn_mask":  # the causal mask, a buffer
            continue
        if key in _TRANSPOSED:
            renamed[_TRANSPOSED[key]] = value.T
            continue
        new = _NAMES.get(key, key)
        for tower, place in _TOWERS.items():
            if key.startswith(tower):
                new = place + key.removeprefix(tower)
        for old, part in _PARTS.items():
            new = new.replace(old, part)
        if ".attn.in_proj_" in new:
            stem, kind = new.split(".attn.in_proj_")  # kind: weight [3 D, D] or bias [3 D]
            for part, third in zip("qkv", value.chunk(3)):
                renamed[f"{stem}.self_attn.{part}_proj.{kind}"] = third
        else:
            renamed[new] = value
    return renamed


_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_PARTS = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}


def _tower(state: Mapping[str, Tensor], prefix: str, width: int, head_width: int, name: str) -> dict[str, Any]:
    if width % head_width:
        raise ValueError(f"{name}: a tower of ViT-H-14 has heads of {head_width} numbers, which do not divide {width}")
    return {
        "hidden_size": width,
        "intermediate_size": len(tensor(state, f"{prefix}resblocks.0.mlp.c_fc.bias", name)),
        "num_hidden_layers": count_blocks(state, f"{prefix}resblocks."),
        "num_attention_heads": width // head_width,
        "hidden_act": "gelu",
    }


__all__ = ["HPSv2", "clean_prompt", "clip_from_open_clip", "rename_open_clip"]
