"""Runs that learn from pictures of a file: all algorithms that can, restarted bit for bit; what cannot be is refused by key."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from conftest import Make
from draw_pictures import main as draw_pictures
from inprocess import finished
from PIL import Image
from safetensors.torch import load_file

from flowsteer.rl.compare import TooFewScores
from flowsteer.rl.config import check_config, load_config, parse_config
from flowsteer.rl.metrics import read_metrics
from flowsteer.rl.run import Run
from flowsteer.rl.start import start
from flowsteer.rollout.lifting import pipeline

PAIRS = {"chosen": "best", "rejected": "worst"}
SCORED = {"image": "pictures", "score": "scores"}
JPEG = {"jpeg_compressibility": {"options": {"quality": 10}}}


def settings(file: Path, pictures: dict[str, str], algorithm: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Two training steps of two updates."""
    group_size = 1 if algorithm.get("weights") == "all" else 2 if "chosen" in pictures else 4
    return {
        "num_steps": 2,
        "prompts": {"train": str(file), "pictures": pictures},
        "rollout": {
            "num_inference_steps": 4,
            "prompts_per_step": 8 // group_size,
            "group_size": group_size,
            "batch_size": 4,
            "plan": {"name": "none"},
        },
        "algorithm": {"updates_per_rollout": 2, "noise_levels_per_sample": 2, **algorithm},
        **more,
    }


CASES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "sft": ({"image": "best"}, {"name": "weighted_sft", "weights": "all"}),
    "best": (SCORED, {"name": "weighted_sft"}),
    "reward-weighted regression": (SCORED, {"name": "weighted_sft", "weights": "exponential"}),
    "with a live reward": ({"image": "pictures"}, {"name": "weighted_sft", "weights": "exponential"}),
    "nft": (SCORED, {"name": "diffusion_nft"}),
    "awm": (SCORED, {"name": "awm"}),
    "dgpo": (SCORED, {"name": "dgpo"}),
    "dpo": (PAIRS, {"name": "diffusion_dpo"}),
}


def lines(folder: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if not key.startswith("seconds/")}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def exported(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "export" / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_pictures_train_and_a_restart_is_bit_for_bit(
    name: str, make_config: Make, picture_file: Path, tmp_path: Path
) -> None:
    pictures, algorithm = CASES[name]
    own = settings(picture_file, {**pictures, "cache": str(tmp_path / "cache")}, algorithm)
    unbroken = finished(make_config(tmp_path / "unbroken", **own))
    finished(make_config(tmp_path / "broken", **{**own, "num_steps": 1}))
    resumed = finished(make_config(tmp_path / "broken", **own), resume=True)
    mine, other = exported(unbroken), exported(resumed)
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert lines(unbroken.folder) == lines(resumed.folder)

    seen = lines(unbroken.folder)
    assert len(seen) == 2
    assert all(line["grad_norm"] > 0 for line in seen)
    expected = {"sft": None, "with a live reward": "negative", "dpo": 0.5}.get(name, 1.5)
    if expected is None:
        assert "reward_mean" not in seen[0], "nobody was asked"
    elif expected == "negative":
        assert seen[0]["reward/jpeg_compressibility"] == pytest.approx(seen[0]["reward_mean"], rel=1e-6)
        assert seen[0]["reward_mean"] < 0
    else:
        assert seen[0]["reward_mean"] == expected, "the file's scores"
        assert "reward/jpeg_compressibility" not in seen[0]


def test_every_picture_has_the_same_weight_in_plain_fine_tuning(
    make_config: Make, picture_file: Path, tmp_path: Path
) -> None:
    run = finished(make_config(tmp_path / "run", **settings(picture_file, *CASES["sft"])))
    rollouts = run.worker.sample(0)
    for rollout in rollouts:
        run.scorer.submit(rollout)
    comparisons, _ = run.compare(rollouts, run.scorer.collect(), lambda values: values)
    assert [own.weight.tolist() for own in comparisons] == [[1.0] * 4] * 2
    for batch in run.algorithm.batches(rollouts, comparisons, 0):
        loss, metrics = run.algorithm.loss(run.policy, batch)
        mean = metrics["matching_loss"]
        assert float(loss.detach()) == pytest.approx(float(mean.total) / mean.count, rel=1e-6)  # type: ignore[union-attr]


def test_a_file_of_few_scores_ends_the_run(make_config: Make, picture_file: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in picture_file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["pictures"] = [str(picture_file.parent / name) for name in row["pictures"]]
        row["scores"][0] = None
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = make_config(tmp_path / "run", **settings(file, *CASES["nft"]))
    with pytest.raises(TooFewScores, match=r"only 75.0% .* the prompt file has no score for the picture"):
        finished(config)
    finished(config | {"advantage": {"min_scored": 0.5}}, resume=True)


def test_a_restart_with_other_pictures_is_refused(make_config: Make, picture_file: Path, tmp_path: Path) -> None:
    own = settings(picture_file, *CASES["sft"])
    finished(make_config(tmp_path / "run", **{**own, "num_steps": 1}))
    other = {**own, "prompts": {"train": str(picture_file), "pictures": {"image": "worst"}}}
    with pytest.raises(ValueError, match=r"prompts.pictures.image: 'best' then, 'worst' now"):
        finished(make_config(tmp_path / "run", **other), resume=True)
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in picture_file.parent.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    moved = {**own, "prompts": {"train": str(copied / picture_file.name), "pictures": {"image": "best"}}}
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(copied / "0_3.png")
    with pytest.raises(ValueError, match=r"the content of prompts.train has changed"):
        finished(make_config(tmp_path / "run", **moved), resume=True)


def test_pictures_to_spare_are_no_inputs(
    make_config: Make, picture_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run = finished(make_config(tmp_path / "run", **settings(picture_file, *CASES["sft"])))
    assert "looks like an input" not in caplog.text
    assert "rewards have no effect" in caplog.text, "without an evaluation"
    assert set(run.worker.prompts.columns) == {"pictures", "scores", "worst", "number"}


class TestRefused:
    def test_a_pipeline_that_cannot_encode_before_anything_is_written(
        self, make_config: Make, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pipeline of one's own whose latents are clamped before they are decoded."""
        unscale = "            latents = (latents / self.vae.config.scaling_factor) + self.vae.config.shift_factor\n"
        changed = zoo.build_variant(
            tmp_path, "clamped", (unscale, f"{unscale}            latents = latents.clamp(-1, 1)\n")
        )
        monkeypatch.setattr(pipeline, "load_diffusers", lambda *_, **__: changed)
        config = make_config(tmp_path / "run", **settings(picture_file, *CASES["sft"]))
        with pytest.raises(ValueError, match=r"what StableDiffusion3Pipeline decodes is not its latents one by one"):
            start(parse_config(config), quiet=True)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("algorithm", {"name": "flow_grpo"}, "algorithm.name=flow_grpo learns from the steps that drew a sample"),
            ("rollout.solver", "dpmpp_2m", "prompts.pictures draws nothing, so rollout.solver do nothing"),
            ("rollout.train_guidance_scale", 3.0, r"\(rollout.guidance_scale is that of training\)"),
            ("rollout.group_size", 4, "chosen and rejected pictures are groups of two, and rollout.group_size=4"),
            ("model.adapter", "a:b", "prompts.pictures needs a pipeline of diffusers; model.adapter=a:b"),
            ("advantage.combine", "gdpo", "advantage.combine=gdpo is for several rewards"),
            ("rollout.plan", {"name": "all"}, "algorithm.name=diffusion_dpo noises the final latents again"),
            (
                "algorithm",
                {"name": "weighted_sft", "weights": "all"},
                "algorithm.weights=all learns from every picture alike, so their scores do nothing",
            ),
            (
                "algorithm",
                {"name": "weighted_sft", "refresh_every": 3},
                "algorithm.refresh_every says which policy draws, but prompts.pictures draws nothing",
            ),
        ],
    )
    def test_what_pictures_cannot_be_used_with(
        self, key: str, value: Any, message: str, make_config: Make, picture_file: Path, tmp_path: Path
    ) -> None:
        config = make_config(tmp_path / "run", **{**settings(picture_file, *CASES["dpo"]), key: value})
        with pytest.raises(ValueError, match=message):
            check_config(parse_config(config), 1)

    @pytest.mark.parametrize(
        ("pictures", "message"),
        [
            ({}, "pictures are an image column, or a chosen and a rejected one"),
            ({"chosen": "best"}, "pictures are an image column, or a chosen and a rejected one"),
            ({"image": "best", **PAIRS}, "pictures are an image column, or a chosen and a rejected one"),
            ({"score": "scores", **PAIRS}, "chosen and rejected pictures have the scores 1 and 0; leave score out"),
            ({"image": "best", "scores": "scores"}, "prompts.pictures.scores: unknown key; did you mean 'score'"),
        ],
    )
    def test_columns_of_no_shape(
        self, pictures: dict[str, str], message: str, make_config: Make, picture_file: Path, tmp_path: Path
    ) -> None:
        config = make_config(tmp_path / "run", **settings(picture_file, PAIRS, {"name": "diffusion_dpo"}))
        config["prompts"]["pictures"] = pictures
        with pytest.raises(ValueError, match=message):
            parse_config(config)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rollout.group_size": 1}, "rollout.group_size=1 leaves nothing to compare a sample with"),
            ({"algorithm": {"name": "weighted_sft", "weights": "all"}}, "give pictures"),
        ],
    )
    def test_groups_of_one_and_all_alike_are_for_pictures(
        self, changes: dict[str, Any], message: str, make_config: Make, tmp_path: Path
    ) -> None:
        own = {"algorithm": {"name": "weighted_sft"}, "rollout.plan": {"name": "none"}, **changes}
        with pytest.raises(ValueError, match=message):
            check_config(parse_config(make_config(tmp_path / "run", **own)), 1)

    def test_a_comparison_that_is_not_made_has_no_settings(
        self, make_config: Make, picture_file: Path, tmp_path: Path
    ) -> None:
        config = make_config(tmp_path / "run", **settings(picture_file, *CASES["sft"]), advantage={"clip": 3.0})
        with pytest.raises(ValueError, match=r"compares no samples with these settings; leave advantage.clip out"):
            check_config(parse_config(config), 1)


@pytest.mark.parametrize("name", ["embedded_sft_pictures", "embedded_offline_dpo_pictures"])
def test_a_shipped_configuration_runs_on_what_the_script_draws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(name, ["trackers=[]", "engine.device=cpu", "evaluation=null", "num_steps=1"])
    (source,) = config.prompts.train
    assert source.file is not None
    assert source.made_by is not None
    with pytest.raises(ValueError, match=f"there is no prompt file {source.file}; make it first: {source.made_by}"):
        start(config, quiet=True)

    program, folder, *options = source.made_by.removeprefix("python ").split()
    assert program == "scripts/draw_pictures.py"
    given = {option.removeprefix("--").replace("-", "_"): value for option, value in zip(options[::2], options[1::2])}
    few: dict[str, Any] = {
        "rows": 4,
        "num_inference_steps": 6,
        "prompts_per_batch": 12,
        "option": [given.pop("option")],
    }
    numbers = {key: int(value) if key == "per_prompt" else float(value) for key, value in given.items()}
    drawn = {"per_prompt": 4, "least_score": None, "least_gap": 0.0, "guidance_scale": 1.0, **numbers}
    draw_pictures(
        Path(folder), model="embedded", prompts="shapes_train.txt", reward="composition", seed=0, **few, **drawn
    )
    rows = [json.loads(line) for line in (tmp_path / source.file).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert len(row["pictures"]) == len(row["scores"]) == drawn["per_prompt"]
        scores = dict(zip(row["pictures"], row["scores"]))
        assert scores[row["best"]] - scores[row["worst"]] >= drawn["least_gap"]
        assert scores[row["best"]] >= (drawn["least_score"] or -math.inf)
    overrides = {"prompts_per_step": 4, "batch_size": 4 * config.rollout.group_size}
    small = config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update=overrides),
            "algorithm": config.algorithm.model_copy(update={"updates_per_rollout": 1}),
        }
    )
    run = finished(json.loads(small.model_dump_json()))
    (line,) = lines(run.folder)
    assert line["grad_norm"] > 0
