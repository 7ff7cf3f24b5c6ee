"""Every reward that we bring is certified, by its entry point: a new one cannot be forgotten.

Networks are tiny and random in their real file formats; a judge is a server that answers by hashes of what it is shown.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_rewards
from chat_server import Server
from elsewhere_server import one_interpreter
from tiny_preference import tiny_model

from flowsteer.rewards.certify import process
from flowsteer.rewards.certify.certificate import certify
from flowsteer.rewards.certify.inputs import built_in_inputs
from flowsteer.rewards.registry import load_reward
from flowsteer.rewards.scorers.edits import sample_case


def worth(image: np.ndarray, text: str) -> float:
    """0 to 1, of an image for a prompt, by a hash."""
    digest = hashlib.sha256(image.tobytes() + text.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def judge(images: list[np.ndarray], texts: list[str], count: int) -> str:
    """The reply to a question of any of the judges."""
    question = texts[-1]
    if "Preservation Score:" in question:
        first, second = worth(images[0], question), worth(images[1], question)
        return f"Instruction Score: {5 * (first + second):.6f}\nPreservation Score: {10 * abs(first - second):.6f}"
    prompt = re.search(r"\[(.*)\]$", question, re.DOTALL)
    values = [worth(image, prompt[1] if prompt else question) for image in images]
    if "Scores:" in question:
        return "Scores: " + ", ".join(f"{10 * value:.6f}" for value in values)
    if "<answer>" in question:
        return f"<answer>Image {1 if values[0] > values[1] else 2} is better</answer>"
    return f"Final Score: {1 + 4 * values[0]:.6f}"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, dict[str, Any]]]:
    """The options of each reward."""
    place: Path = tmp_path_factory.mktemp("weights")
    clip = str(tiny_rewards.clip(place / "clip"))
    siglip, detector = tiny_rewards.siglip(place / "siglip"), tiny_rewards.mask2former(place / "detector")
    bert = tiny_rewards.bert_tokenizer(place / "bert")
    tiny_model(perturbed=True).save(place / "preference")
    server = Server(judge)
    endpoint = {"base_url": server.url, "model": "tiny"}
    v25 = {"prefix": "scoring_head.", "places": (0, 2, 4, 6, 8)}
    yield {
        "composition": {},
        "edit_consistency": {},
        "edit_composition": {},
        "ocr": {"mode": "recognize"},
        "jpeg_compressibility": {},
        "jpeg_incompressibility": {},
        "step_preference": {"path": str(place / "preference"), "device": "cpu"},
        "image_reward": {
            "weights": str(tiny_rewards.image_reward(place / "image_reward.pt")),
            "tokenizer": str(bert),
        },
        "hpsv2": {"weights": str(tiny_rewards.hpsv2(place / "hpsv2.pt")), "tokenizer": clip},
        "pickscore": {"weights": clip, "tokenizer": None},
        "clip_score": {"weights": clip},
        "aesthetic_v2": {"head": str(tiny_rewards.aesthetic_head(place / "v2.pth", 24)), "weights": clip},
        "aesthetic_v2_5": {
            "head": str(tiny_rewards.aesthetic_head(place / "v25.pth", 32, **v25)),
            "weights": str(siglip),
        },
        "geneval": {"detector": str(detector), "weights": clip, "short_side": 64},
        "pixel_diversity": {},
        "clip_diversity": {"weights": clip},
        "unified_reward": {"endpoint": endpoint, "image_size": 128},  # smaller than its 512: a fifth of the time
        "vlm_rubric": {"endpoint": endpoint, "rubric": "Rate it: [{prompt}]", "min_score": 1, "max_score": 5},
        "vlm_edit": {"endpoint": endpoint, "image_size": 128},
        "vlm_pairwise": {"endpoint": endpoint, "image_size": 32},
        "vlm_groupwise": {"endpoint": endpoint, "image_size": 32},
    }
    server.close()


@pytest.fixture(scope="module", autouse=True)
def asked_elsewhere() -> Iterator[list[str]]:
    """What the one other interpreter was asked."""
    with one_interpreter(process) as asked:
        yield asked


OURS = sorted({point.name for point in entry_points(group="flowsteer.rewards") if "flowsteer." in point.value})


SCORES = {  # SALE is drawn for SALT
    "ocr": {'a sign that says "OPEN"': 1, 'a sign that says "SALT"': 0.75, "a red circle on black": None}
}


@pytest.mark.parametrize("name", OURS)
def test_it_is_certified(options: Mapping[str, dict[str, Any]], asked_elsewhere: list[str], name: str) -> None:
    given: dict[str, Any] = {}
    before = len(asked_elsewhere)
    images, prompts = built_in_inputs()
    if name == "vlm_pairwise":  # it asks about every pair
        given = {"images": images[:6], "prompts": prompts[:6]}
    if name == "geneval":  # what it looks for stands in columns, as in GenEval's metadata
        counts = [1 + row % 3 for row in range(len(images))]
        columns = {
            "tag": ["single_object" if count == 1 else "counting" for count in counts],
            "include": [[{"class": "computer mouse", "count": count}] for count in counts],
            "exclude": [[{"class": "computer mouse", "count": count + 1}] for count in counts],
        }
        given = {"images": images, "prompts": prompts, "columns": columns, "uses_prompt": False}
    if name == "edit_composition":  # ground truth, and pictures with another one's column
        cases = [sample_case(np.random.default_rng(row), reserved=False) for row in range(8)]
        shown = np.stack([case.target.draw() for case in [*cases, *cases]])
        expected = [case.expected for case in [*cases, *cases[1:], cases[0]]]
        prompts = [case.edit.text for case in [*cases, *cases[1:], cases[0]]]
        given = {"images": shown, "prompts": prompts, "columns": {"expected": expected}}
    certificate = certify(functools.partial(load_reward, name, **options[name]), name=name, **given)
    assert certificate.ok, certificate.text()
    assert len(asked_elsewhere) == before + 1
    assert certificate["another process"].status == "passed"
    said = dict(zip(prompts, certificate.scores))
    assert {prompt: said[prompt] for prompt in SCORES.get(name, {})} == SCORES.get(name, {})


def test_all_of_them_are_here(options: Mapping[str, dict[str, Any]]) -> None:
    assert sorted(options) == OURS
