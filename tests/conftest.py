"""What several test files share: a tiny Stable Diffusion 3 on disk, prompts, and configurations of runs with it."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: networks of this size only lose by threads
if "ATEN_CPU_CAPABILITY" in os.environ:
    # An older processor is imitated. torch's attention asks oneDNN, which looks at the real one: "pack_vnni2 is only supported
    # when avx512 is supported" is raised in bfloat16 on a processor with AMX.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from flowsteer.rewards.caches import cache_folder

PROMPTS = ("a red circle", "two blue squares", "a cat", "the sea at night", "a green hill")
SIZE = {"height": 16, "width": 16, "call": {"max_sequence_length": 32}}

Make = Callable[..., dict[str, Any]]

# The files that take longest, in that order. They begin first: a worker that begins with a long one last is waited for.
LONG = ("processes", "every_reward", "scripts", "resume", "cli", "gpu_check", "certify_deeper", "certify", "plugin")
LONG += ("pipeline_adapter", "algorithm_plugin", "hosts", "columns", "worker_faults", "original_packages", "bad_input")
LONG += ("zoo", "survey", "embedded_edit", "offline", "encode", "pictures", "videos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; inside a file, and among the other files, the order stays."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Verdicts of self-checks are those of this session; the environments of rewards take long to build and are kept."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "reward-envs").symlink_to(cache_folder("reward-envs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWSTEER_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Stable Diffusion 3 with two blocks and live random weights."""
    folder = tmp_path_factory.mktemp("models") / "sd3"
    diffusers_logging.disable_progress_bar()
    zoo.build("sd3").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts, a line each."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def picture_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts with four pictures of coloured noise each, and everything that a file may say of them.

    The columns: ``pictures`` and ``scores`` are lists of four, ``best`` and ``worst`` single ones; ``number`` is the row's.
    """
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for row, prompt in enumerate(PROMPTS):
        names = [f"{row}_{place}.png" for place in range(4)]
        for place, name in enumerate(names):
            pixels = np.random.default_rng((row, place)).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        scores = [float((row + place) % 4) for place in range(4)]
        best, worst = names[scores.index(3.0)], names[scores.index(0.0)]
        rows.append(
            {"prompt": prompt, "pictures": names, "scores": scores, "best": best, "worst": worst, "number": row}
        )
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def make_config(tiny_sd3: Path, prompt_file: Path) -> Make:
    """``make_config(output, **{"section.key": value})``: a short Flow-GRPO run on the tiny model, as a mapping.

    What runs are compared by must be a smooth function of rounding errors. The gradient's norm, about 0.01, is above
    ``max_grad_norm``, so that clipping takes part; epsilon is above the gradient's elements, about 1e-4: with a tiny one
    Adam gives every element a step of full length, even where the gradient is nothing but rounding. The JPEG's quality is
    low: at 95 one grey level in one pixel changes the size in one case of nine, at 10 in one of three hundred.
    """
    base: dict[str, Any] = {
        "num_steps": 3,
        "trackers": [],
        "model": {
            "path": str(tiny_sd3),
            "lora": {"rank": 4, "alpha": 12, "targets": ["to_q", "to_k", "to_v", "to_out.0"]},
            **SIZE,
        },
        "prompts": {"train": str(prompt_file)},
        "rollout": {
            "num_inference_steps": 4,
            "prompts_per_step": 4,
            "group_size": 4,
            "batch_size": 4,
            "plan": {"name": "all"},
        },
        "rewards": {"jpeg_compressibility": {"options": {"quality": 10}}},
        "algorithm": {"name": "flow_grpo", "updates_per_rollout": 2, "kl_coef": 0.1},
        "optimizer": {"learning_rate": 3e-2, "epsilon": 1e-3, "max_grad_norm": 5e-3},
        "engine": {"device": "cpu"},
        "evaluation": None,
    }

    def make(output: Path, **overrides: Any) -> dict[str, Any]:
        config = copy.deepcopy(base) | {"output": str(output)}
        for key, value in overrides.items():
            section = config
            *parents, last = key.split(".")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return config

    return make
