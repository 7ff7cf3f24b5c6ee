# type: ignore  # what it imports is in another environment
"""The package hpsv2 1.2.0 as a reward, for a worker in the environment ``originals``.

It scores by the package's own ``hpsv2.img_score.score``, which ``hpsv2.score`` is. Worked around:

- before it loads the checkpoint it downloads LAION's weights of the same model, 3.9 GB, and overwrites them: here the model
  begins empty;
- it takes one prompt at a time and reads the checkpoint again at every call: here once for each different prompt of a batch;
- it knows only the published sizes: here they are those of the checkpoint, so that a test can use a tiny one.

Not worked around: an image whose longer side is exactly 224 and whose shorter one is not is not padded, and raises. What
the scores are depends on torchvision: from 0.17 on the resize antialiases, before it did not.
"""

import hashlib
from importlib.metadata import version as version_of

import originals_shims  # noqa: F401

# isort: split
import huggingface_hub
import torch
from hpsv2 import img_score
from hpsv2.src.open_clip import create_model_and_transforms, factory
from PIL import Image

TEXT_HEAD_WIDTH = 64  # 1024 / 16, of the published text tower; the vision tower's is in the package's configuration


class HPSv2Original:
    """Scores one image after another.

    Args:
        weights: a checkpoint; None: the published one of the version, from the hub.
        version: ``v2.1`` or ``v2.0``.
        device: None: what the package chooses.
    """

    def __init__(self, weights=None, version="v2.1", device=None):
        self.weights = weights or huggingface_hub.hf_hub_download("xswu/HPSv2", img_score.hps_version_map[version])
        img_score.device = device or img_score.device
        use_sizes_of(torch.load(self.weights, map_location="cpu", weights_only=True)["state_dict"])
        model, _, preprocess = create_model_and_transforms(
            "ViT-H-14", precision="amp", device=img_score.device, light_augmentation=True, output_dict=True
        )
        img_score.model_dict.update(model=model, preprocess_val=preprocess)
        with open(self.weights, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.fingerprint = {"package": "hpsv2 " + version_of("hpsv2"), "version": version, "weights_sha256": digest}

    def __call__(self, images, prompts, **columns):
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB to B numbers."""
        scores = [None] * len(prompts)
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, other in enumerate(prompts) if other == prompt]
            videos = [images[row] if images[row].ndim == 4 else images[row][None] for row in rows]
            frames = [Image.fromarray(frame) for video in videos for frame in video]
            given = iter(img_score.score(frames, prompt, cp=self.weights))
            for row, video in zip(rows, videos):
                scores[row] = sum(float(next(given)) for _ in video) / len(video)
        return scores


def use_sizes_of(held):
    """Have the package build towers of a checkpoint's sizes; of the published ones' they are what it builds anyway."""
    config = factory._MODEL_CONFIGS["ViT-H-14"]
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = held["text_projection"].shape[1]
    vision["width"], vision["patch_size"] = held["visual.conv1.weight"].shape[0], held["visual.conv1.weight"].shape[-1]
    text["width"] = held["text_projection"].shape[0]
    text["heads"] = text["width"] // TEXT_HEAD_WIDTH
    text["vocab_size"] = len(held["token_embedding.weight"])
    text["context_length"] = len(held["positional_embedding"])
    for tower, prefix in ((vision, "visual.transformer."), (text, "transformer.")):
        tower["layers"] = sum(key.startswith(prefix) and key.endswith("ln_1.weight") for key in held)
