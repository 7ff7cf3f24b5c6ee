"""The native ImageReward and HPSv2 give the numbers of the packages image-reward 1.5 and hpsv2 1.2.0.

The packages run in the managed environment ``originals``, which is built first: a minute and about 300 MB of downloads, or as
long as a build of torch takes to download. It stays in the user's cache (`FLOWSTEER_CACHE`), so only the first run pays.
Both sides read the same tiny random checkpoints in the published formats.

Letters: B images.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_rewards
import torch
import zoo
from transformers import CLIPTokenizer

from flowsteer.rewards.envs.environments import check, create, locate
from flowsteer.rewards.hosts.child import WorkerReward
from flowsteer.rewards.scorers.hpsv2 import HPSv2
from flowsteer.rewards.scorers.image_reward import ImageReward
from flowsteer.rewards.types import Reward

TOLERANCE = 1e-5  # float32, the same operations in another order
SIZES = ((48, 80), (300, 200), (224, 224), (257, 511))  # enlarged, reduced, as it is, odd
PROMPTS = ("a red circle", "a blue square, a red circle", "very long prompt, " * 40)
NUM_MERGES = 49152 - 256 - 2  # of CLIP's vocabulary of 49408: what is no byte, end of word, start or end of text


@pytest.fixture(scope="module")
def environment() -> Path:
    return create("originals")


@pytest.fixture(scope="module")
def batches() -> list[tuple[np.ndarray, tuple[str, ...]]]:
    """Of each size three images, [B, H, W, 3], smooth and with noise, and their prompts."""
    rng = np.random.default_rng(0)
    batches = []
    for height, width in SIZES:
        rows, columns = np.linspace(0, 3, height)[:, None, None], np.linspace(0, 4, width)[:, None]
        phase, noise = rng.uniform(0, 6, (3, 1, 1, 3)), rng.uniform(-40, 40, (3, height, width, 3))
        waves = 127 + 80 * np.sin(rows * (1 + phase) + columns + phase)
        batches.append(((waves + noise).round().clip(0, 255).astype(np.uint8), PROMPTS))
    return batches


def original(scorer: str, **options: Any) -> WorkerReward:
    """The package in a worker of its own, without the hub."""
    python, target = locate("originals", scorer)
    return WorkerReward(target, python=str(python), options=options, env={"HF_HUB_OFFLINE": "1"})


def scores_of(reward: Reward, batches: list[tuple[np.ndarray, tuple[str, ...]]]) -> np.ndarray:
    """All of them, one after another."""
    return np.array([score for images, prompts in batches for score in reward(images, prompts)], dtype=np.float64)


def full_size_image_reward(file: Path) -> Path:
    """The tiny checkpoint, with the published sizes in the places where the package builds no others."""
    held = torch.load(tiny_rewards.image_reward(file), weights_only=True)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    vision, text = tiny_rewards.IMAGE_REWARD_VISION["embed_dim"], tiny_rewards.MED_CONFIG["hidden_size"]
    held["blip.visual_encoder.pos_embed"] = random(1, (224 // 16) ** 2 + 1, vision)
    for name, width in (("vision", vision), ("text", text)):
        held |= {f"blip.{name}_proj.weight": random(256, width), f"blip.{name}_proj.bias": random(256)}
    width = text
    for place, out in zip((0, 2, 4, 6, 7), (1024, 128, 64, 16, 1)):
        held |= {f"mlp.layers.{place}.weight": random(out, width), f"mlp.layers.{place}.bias": random(out)}
        width = out
    torch.save(held, file)
    return file


def clip_vocabulary(merges_file: Path, folder: Path) -> Path:
    """CLIP's tokenizer as transformers reads it, from the file of merges that open_clip reads."""
    lines = gzip.decompress(merges_file.read_bytes()).decode().split("\n")
    merges: Any = [tuple(line.split()) for line in lines[1 : NUM_MERGES + 1]]
    characters = zoo.parts.byte_characters()
    pieces = [*characters, *(character + "</w>" for character in characters), *map("".join, merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hpsv2_files(environment, tmp_path_factory) -> tuple[str, str]:
    """A checkpoint for images of 224 pixels, and CLIP's tokenizer."""
    folder = tmp_path_factory.mktemp("hpsv2")
    weights = tiny_rewards.hpsv2(folder / "HPS_v2.1_compressed.pt", image_size=224, vocab_size=49408)
    merges = next(environment.glob("lib/python*/site-packages/hpsv2/src/open_clip/bpe_simple_vocab_16e6.txt.gz"))
    return str(weights), str(clip_vocabulary(merges, folder / "tokenizer"))


@pytest.fixture(scope="module")
def hpsv2_scores(hpsv2_files, batches) -> np.ndarray:
    with original("hpsv2", weights=hpsv2_files[0], device="cpu") as package:
        scores = scores_of(package, batches)
        assert package.fingerprint["package"] == "hpsv2 1.2.0"
        assert_video_is_mean(package, *batches[0])
    return scores


def test_the_environment_still_computes_what_it_did(environment):
    check("originals")


def test_image_reward(environment, batches, tmp_path):
    """Also with weights that the checkpoint lacks: the package would score with random ones."""
    weights, tokenizer = (
        full_size_image_reward(tmp_path / "ImageReward.pt"),
        tiny_rewards.bert_tokenizer(tmp_path / "bert"),
    )
    config = tmp_path / "med_config.json"
    config.write_text(json.dumps(tiny_rewards.MED_CONFIG))
    options = {"weights": str(weights), "med_config": str(config), "tokenizer": str(tokenizer), "device": "cpu"}
    with original("image_reward", **options) as package:
        expected = scores_of(package, batches)
        assert package.fingerprint["package"] == "image-reward 1.5"
        assert_video_is_mean(package, *batches[0])
    held = torch.load(weights, weights_only=True)
    torch.save(
        {key: value for key, value in held.items() if key != "blip.visual_encoder.norm.bias"}, tmp_path / "less.pt"
    )
    with pytest.raises(ConnectionError, match=r"missing \['blip.visual_encoder.norm.bias'\]"):
        original("image_reward", **options | {"weights": str(tmp_path / "less.pt")})
    given = scores_of(ImageReward(str(weights), str(tokenizer), device="cpu"), batches)
    assert np.abs(given - expected).max() < TOLERANCE
    assert differ(expected)


def test_hpsv2_as_it_scores_under_the_present_torchvision(hpsv2_files, hpsv2_scores, batches):
    weights, tokenizer = hpsv2_files
    given = scores_of(HPSv2("v2.1", weights, tokenizer, antialias=True, device="cpu"), batches)
    assert np.abs(given - hpsv2_scores).max() < TOLERANCE
    assert differ(hpsv2_scores)


def test_hpsv2_without_antialiasing_is_another_score(hpsv2_files, hpsv2_scores, batches):
    weights, tokenizer = hpsv2_files
    given = scores_of(HPSv2("v2.1", weights, tokenizer, device="cpu"), batches)
    largest = dict(zip(SIZES, np.abs(given - hpsv2_scores).reshape(len(SIZES), len(PROMPTS)).max(1)))
    assert largest.pop((224, 224)) < TOLERANCE, "nothing is resized"
    assert min(largest.values()) > 100 * TOLERANCE


def assert_video_is_mean(reward: Reward, frames: np.ndarray, prompts: tuple[str, ...]) -> None:
    """Of three frames with one prompt."""
    one_by_one = scores_of(reward, [(frames, prompts[:1] * 3)])
    assert scores_of(reward, [(frames[None], prompts[:1])]) == [pytest.approx(one_by_one.mean())]


def differ(scores: np.ndarray) -> bool:
    """Whether equality of two such lists says something: no two scores are near each other."""
    return bool(np.diff(np.sort(scores)).min() > 10 * TOLERANCE)
