"""Runs whose processes share each sample (`engine.context_parallel`) are those of processes that have samples of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
import zoo
from conftest import Make
from safetensors.torch import load_file
from torch import Tensor
from variants import VARIANTS

from flowsteer.rl.metrics import read_metrics

# As in test_processes.py; and products of half as many rows are rounded otherwise, in every pass and not in sums alone.
RELATIVE = 2e-4
ABSOLUTE = {"ratio": 5e-7, "ratio_deviation": 5e-7, "loss": 5e-7}
WEIGHTS = 1e-6  # of 1e-3 and more that training moves
# A reward sees 8-bit pixels. With all weights trained, one of 12,288 pixels of a picture may fall on the other side of a
# boundary between two grey levels after an update: 1e-4 of the scores' deviation, and of what they weigh.
PIXEL = 1e-3

Runs = Callable[..., Path]


def counted(config: dict[str, Any], *, resume: bool) -> None:
    """A run whose reward leaves a line for each image that this process asks it of."""
    import os

    from brightness import Brightness

    score = Brightness.__call__
    asked = Path(config["output"]).with_suffix(f".asked{os.environ.get('RANK', '0')}")
    asked.write_text("")

    def scored(self: Brightness, images: Any, prompts: Any, **columns: Any) -> list[float]:
        with asked.open("a") as file:
            file.writelines(f"{prompt}\n" for prompt in prompts)
        return score(self, images, prompts, **columns)

    Brightness.__call__ = scored
    launch.train_and_export(config, resume=resume)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a Wan 2.2 with two transformers and four tokens."""
    folder = tmp_path_factory.mktemp("model") / "wan"
    zoo.build("wan").save_pretrained(folder)
    lora = {
        "rank": 4,
        "alpha": 12,
        "targets": ["to_q", "to_k", "to_v", "proj_out"],
    }  # the last is where tokens are joined
    return {
        "num_steps": 2,
        "model": {"path": str(folder), "lora": lora, "height": 32, "width": 32, "call": {"num_frames": 1}},
        "rewards": {"brightness:Brightness": {}},
        "optimizer.learning_rate": 3e-3,
    }


def lines(folder: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if not key.startswith("seconds/")}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def weights(folder: Path) -> dict[str, Tensor]:
    files = sorted((folder / "export").rglob("*.safetensors"))
    return {f"{file.name} {key}": value for file in files for key, value in load_file(file).items()}


def assert_close(one: Path, other: Path, *, later: float = RELATIVE) -> None:
    """``later``: the relative tolerance of the metrics after the first step."""
    mine, theirs = lines(one), lines(other)
    assert len(mine) == len(theirs) > 1
    assert mine[0]["grad_norm"] > 1e-4
    for step, (first, second) in enumerate(zip(mine, theirs)):
        assert first.keys() == second.keys()
        for key, value in first.items():
            near = pytest.approx(second[key], rel=later if step else RELATIVE, abs=ABSOLUTE.get(key, 0.0), nan_ok=True)
            assert value == near, key
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    if moved := [float(value.abs().max()) for key, value in left.items() if "lora_B" in key]:
        assert max(moved) > 1e-3
    for key, value in left.items():
        torch.testing.assert_close(value, right[key], rtol=0, atol=WEIGHTS)


def test_a_team_is_one_process_and_asks_its_rewards_once(
    make_config: Make, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {**settings, "algorithm.updates_per_rollout": 1, "rollout.prompts_per_step": 2}
    one = launch.run(make_config(tmp_path / "one", **settings), work=counted)
    team = {**settings, "engine.context_parallel": 2}
    two = launch.run(make_config(tmp_path / "two", **team), processes=2, work=counted)
    assert_close(one, two)
    first, second = lines(two)
    assert (first["ratio"], first["ratio_deviation"], first["kl"]) == (1, 0, 0)  # not nearly
    assert second["kl"] > 0
    assert one.with_suffix(".asked0").read_text() == two.with_suffix(".asked0").read_text() != ""
    assert two.with_suffix(".asked1").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["plain", "zero1", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_teams_are_processes_under_every_strategy_and_resume_bit_for_bit(
    make_config: Make, tmp_path: Path, settings: dict[str, Any], strategy: str, kind: str
) -> None:
    """Two teams of two against two processes; and the teams, resumed before the last step, against unbroken."""
    changes = {"ema_decay": 0.9, "evaluation": {"prompts": settings_prompts(make_config, tmp_path), "num_prompts": 3}}
    settings = {**settings, **changes, "model": dict(settings["model"])}
    settings["evaluation"]["num_inference_steps"] = 2
    if kind == "full":
        settings["model"]["lora"] = None
        settings["model"]["gradient_checkpointing"] = True
    two = launch.run(make_config(tmp_path / "two", **settings), processes=2)
    team = {**settings, "engine.context_parallel": 2, "engine.strategy": strategy, "save_every": 1}
    four = launch.run(make_config(tmp_path / "four", **team), processes=4)
    assert_close(two, four, later=PIXEL if kind == "full" else RELATIVE)
    assert lines(four)[-1]["kl"] > 1e-6  # something was learned

    config = make_config(tmp_path / "resumed", **team)
    stopped = shutil.copytree(four, tmp_path / "resumed")
    shutil.rmtree(stopped / "export")
    shutil.rmtree(stopped / "checkpoints" / "step_000002")
    resumed = launch.run(config, processes=4, resume=True)
    assert lines(resumed) == lines(four)
    mine, other = weights(resumed), weights(four)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


def settings_prompts(make_config: Make, folder: Path) -> str:
    return make_config(folder)["prompts"]["train"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion_nft", "dgpo", "mix_grpo"])
def test_a_team_learns_flux_as_one_process_does(make_config: Make, tmp_path: Path, name: str) -> None:
    zoo.build("flux").save_pretrained(tmp_path / "flux")
    settings: dict[str, Any] = {
        "num_steps": 2,
        **VARIANTS[name],
        "model": {
            "path": str(tmp_path / "flux"),
            "lora": {"rank": 4, "alpha": 12, "targets": ["to_q", "to_k", "to_v"]},
            "height": 32,
            "width": 32,
            "call": {"max_sequence_length": 48},
        },
        "rewards": {"brightness:Brightness": {}},
        "optimizer.learning_rate": 3e-3,
    }
    one = launch.run(make_config(tmp_path / "one", **settings))
    team = {**settings, "engine.context_parallel": 2, "engine.strategy": "zero2"}
    assert_close(one, launch.run(make_config(tmp_path / "two", **team), processes=2))


@pytest.mark.slow
def test_a_sequence_that_does_not_divide_is_refused_before_anything_is_written(
    make_config: Make, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = {**settings["model"], "height": 16, "width": 16}  # one token
    config = make_config(tmp_path / "run", **{**settings, "model": model, "engine.context_parallel": 2})
    with pytest.raises(AssertionError, match=r"context_parallel=2 does not divide a sequence of 1 tokens"):
        launch.run(config, processes=2)
    assert not (tmp_path / "run").exists()
