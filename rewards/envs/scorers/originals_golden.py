# type: ignore  # what it imports is in another environment
"""Scores of tiny random checkpoints by the packages of the environment ``originals``, as one JSON object.

The checkpoints are made from a seed, in the published formats, with the packages' own classes and a vocabulary of a few
words. ``flowsteer rewards env check originals`` compares the numbers with those in the recipe.
"""

import contextlib
import importlib
import json
import math
import os
import sys
import tempfile

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # an isolated python does not look beside its script

from hpsv2_original import HPSv2Original, create_model_and_transforms, factory, img_score
from image_reward_original import ImageRewardOriginal, use_sizes_of

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "on", "the", "sea")
PROMPTS = ["a red circle", "the blue sea", "a red circle on the sea"]
SIZES = ((48, 80), (224, 224), (300, 200))


def main():
    torch.manual_seed(0)  # for the parameters that `fill` leaves as the packages make them
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in SIZES]
    scores = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # the packages print
        for name, make in (("image_reward", make_image_reward), ("hpsv2", make_hpsv2)):
            scorer = make(folder)
            for number, (image, prompt) in enumerate(zip(images, PROMPTS)):
                scores[name + "_" + str(number)] = scorer(image[None], [prompt])[0]
    print(json.dumps(scores))


def make_image_reward(folder):
    """ImageReward with two layers in each tower."""
    text = {
        "vocab_size": len(WORDS) + 2, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
        "intermediate_size": 128, "max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12,
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pad_token_id": 0,
        "add_cross_attention": True, "encoder_width": 128, "model_type": "bert", "initializer_range": 0.02,
    }  # fmt: skip
    config, tokenizer, weights = (os.path.join(folder, name) for name in ("med_config.json", "bert", "ImageReward.pt"))
    os.mkdir(tokenizer)
    with open(config, "w") as file:
        json.dump(text, file)
    with open(os.path.join(tokenizer, "vocab.txt"), "w") as file:
        file.write("\n".join(WORDS) + "\n")
    use_sizes_of(
        {"blip.visual_encoder.patch_embed.proj.weight": torch.empty(128, 3, 16, 16)}
        | {f"blip.visual_encoder.blocks.{layer}.norm1.weight": None for layer in range(2)}
        | {"mlp.layers.0.weight": torch.empty(1024, 64)}
    )
    blip = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")
    init_tokenizer, blip.init_tokenizer = blip.init_tokenizer, lambda: None  # the model does not use it
    model = importlib.import_module("ImageReward.ImageReward").ImageReward(config)
    blip.init_tokenizer = init_tokenizer
    torch.save(fill(model), weights)
    return ImageRewardOriginal(weights, config, tokenizer, device="cpu")


def make_hpsv2(folder):
    """HPSv2 with two layers in each tower, in half precision as published."""
    config = factory._MODEL_CONFIGS["ViT-H-14"]
    config["embed_dim"] = 64
    config["vision_cfg"].update(width=160, layers=2)
    config["text_cfg"].update(width=64, heads=1, layers=2)
    model, _, _ = create_model_and_transforms("ViT-H-14", light_augmentation=True)
    weights = os.path.join(folder, "HPS_v2.1_compressed.pt")
    torch.save({"state_dict": {key: value.half() for key, value in fill(model).items()}}, weights)
    img_score.model_dict.clear()
    return HPSv2Original(weights, device="cpu")


def fill(model):
    """Its weights, with random numbers of a size that lets the images and the prompts through to the score."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            std = 1 / math.sqrt(parameter[0].numel())
            parameter.data.normal_(0, std, generator=generator)
    return model.state_dict()


if __name__ == "__main__":
    main()
