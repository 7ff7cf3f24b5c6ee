# type: ignore  # what it imports is in another environment
"""The package image-reward 1.5 as a reward, for a worker in the environment ``originals``.

It scores by the package's own ``ImageReward.load`` and ``score``. Worked around:

- it is not called under ``no_grad`` by itself;
- it ignores weights that are missing from the checkpoint or have no place in the model: here an error;
- it knows only the published sizes: here they are those of the checkpoint, so that a test can use a tiny one;
- it wants bert-base-uncased from the hub: here also a folder.
"""

import hashlib
import importlib
import os
from importlib.metadata import version
from types import SimpleNamespace

import originals_shims  # noqa: F401

# isort: split
import ImageReward
import torch
from PIL import Image

HEAD_WIDTH = 64  # 1024 / 16, of the published vision tower
UNUSED = "position_ids"  # older files have this buffer


class ImageRewardOriginal:
    """Scores one image after another.

    Args:
        weights: a checkpoint; None: the published one, which the package downloads.
        med_config: the configuration of its text tower; None: the published one, downloaded likewise.
        tokenizer: a folder with BERT's tokenizer; None: bert-base-uncased of the hub.
        device: None: what the package chooses.
    """

    def __init__(self, weights=None, med_config=None, tokenizer=None, device=None):
        if tokenizer is not None:
            blip = importlib.import_module("ImageReward.models.BLIP.blip")
            load = blip.BertTokenizer.from_pretrained
            blip.BertTokenizer = SimpleNamespace(from_pretrained=lambda name: load(tokenizer))
        if weights is None:
            url = ImageReward.utils._MODELS["ImageReward-v1.0"]
            weights = ImageReward.utils.ImageReward_download(url, os.path.expanduser("~/.cache/ImageReward"))
        held = torch.load(weights, map_location="cpu", weights_only=True)
        use_sizes_of(held)
        keys = {key for key in held if not key.endswith(UNUSED)}
        del held  # 1.8 GB, which the package reads again
        options = {} if device is None else {"device": device}
        self.model = ImageReward.load(weights, med_config=med_config, **options)
        expected = {key for key in self.model.state_dict() if not key.endswith(UNUSED)}
        if keys != expected:
            raise ValueError(
                f"{weights}: missing {sorted(expected - keys)[:3]}, unexpected {sorted(keys - expected)[:3]}"
            )
        with open(weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.fingerprint = {"package": "image-reward " + version("image-reward"), "weights_sha256": digest}

    def __call__(self, images, prompts, **columns):
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB to B numbers."""
        return [
            self._score(image if image.ndim == 4 else image[None], prompt) for image, prompt in zip(images, prompts)
        ]

    @torch.no_grad()
    def _score(self, frames, prompt):
        return sum(self.model.score(prompt, Image.fromarray(frame)) for frame in frames) / len(frames)


def use_sizes_of(held):
    """Have the package build towers of a checkpoint's sizes; of the published one's they are what it builds anyway."""
    patches = held["blip.visual_encoder.patch_embed.proj.weight"]  # [width, 3, side, side]
    width, depth = len(patches), sum(key.endswith("norm1.weight") for key in held)
    text_width = held["mlp.layers.0.weight"].shape[1]
    blip = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    vision_class = importlib.import_module("ImageReward.models.BLIP.vit").VisionTransformer
    top = importlib.import_module("ImageReward.ImageReward")

    def create_vit(vit, image_size, *training_options):
        heads = width // HEAD_WIDTH
        return vision_class(image_size, patches.shape[-1], embed_dim=width, depth=depth, num_heads=heads), width

    blip.create_vit = create_vit
    head_class = top.MLP
    top.MLP = lambda published_width: head_class(text_width)
