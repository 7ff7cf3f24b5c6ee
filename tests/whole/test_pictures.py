"""Runs whose pipelines are given pictures: trained from a configuration, exported, and redrawn by plain diffusers."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Make
from diffusers import DiffusionPipeline
from inprocess import finished, fresh_process
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner
from zoo.entries import Entry, built, entries
from zoo.training import drawn

from flowsteer.rewards.pixels import to_uint8
from flowsteer.rewards.scorers import edit_consistency
from flowsteer.rewards.scorers.edit_consistency import EditConsistency
from flowsteer.rl.command.main import app
from flowsteer.rl.config import parse_config
from flowsteer.rl.export import LORA_FILE, load_lora
from flowsteer.rl.metrics import read_metrics
from flowsteer.rl.start import start
from flowsteer.rl.train import train
from flowsteer.rollout.data.inputs import kind_of
from flowsteer.rollout.lifting.loop import fixed_randomness
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.types import Rollout

ENTRIES = entries()
# a picture that samples start from, along the sequence, along the channels, with a mask, for a ControlNet; on a UNet
KINDS = {
    "StableDiffusion3Img2ImgPipeline": {"strength": 0.7},
    "FluxKontextPipeline": {},
    "FluxFillPipeline": {},
    "FluxInpaintPipeline": {},
    "FluxControlNetPipeline": {},
    "sd_instruct_pix2pix": {},
    "sd_controlnet": {},
}
STEPS = 4
SETTINGS = {"num_inference_steps": STEPS, "guidance_scale": 1.0}
EDITS = f"{edit_consistency.__file__}:EditConsistency"


def prompt_file(entry: Entry, folder: Path) -> tuple[Path, dict[str, str]]:
    """Three rows with their pictures, and which columns are which inputs."""
    rows = []
    for place, prompt in enumerate(entry.prompts):
        row = {"prompt": prompt}
        for name, picture in entry.inputs(place).items():
            assert isinstance(picture, Image.Image)
            picture.save(folder / f"{name}{place}.png")
            row[f"{name}_file"] = f"{name}{place}.png"
        rows.append(row)
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file, {name: f"{name}_file" for name in entry.inputs(0)}


def configuration(name: str, make_config: Make, folder: Path, **more: Any) -> dict[str, Any]:
    entry = ENTRIES[name]
    built(entry).save_pretrained(folder / "model")
    file, inputs = prompt_file(entry, folder)
    model = {
        "path": str(folder / "model"),
        "lora": {"rank": 4, "alpha": 8, "targets": ["to_q", "to_k", "to_v"]},
        **entry.size,
        "call": {**entry.call, **KINDS[name]},
    }
    sizes: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "prompts_per_step": 2,
        "group_size": 2,
        "batch_size": 2,
        "plan": {"name": "all"},
    }
    if "unet" in {path.name for path in (folder / "model").iterdir()}:
        sizes["kernel"] = {"name": "ddim"}
    settings: dict[str, Any] = {"num_steps": 2, "model": model, "rollout": sizes, "prompts.train": str(file)}
    return make_config(folder / "run", **settings, inputs=inputs, **more)


@pytest.mark.parametrize("name", KINDS)
def test_a_pipeline_with_pictures_is_trained_exported_and_redrawn(name: str, make_config: Make, tmp_path: Path) -> None:
    run = finished(configuration(name, make_config, tmp_path))
    pipeline = run.worker.pipeline
    assert isinstance(pipeline, FlowPipeline)
    row = run.worker.prompts.row(0)
    assert set(dict(row.inputs)) == set(ENTRIES[name].inputs(0))
    with run.policy.using("current"):
        after = drawn(pipeline, row.text, dict(row.inputs), SETTINGS)

    plain = DiffusionPipeline.from_pretrained(tmp_path / "model")
    plain.set_progress_bar_config(disable=True)
    if getattr(plain, "safety_checker", None) is not None:
        plain.safety_checker = None
    lifted = FlowPipeline(plain, **ENTRIES[name].size, call_kwargs={**ENTRIES[name].call, **KINDS[name]})
    arguments = lifted.call_arguments([row.text], inputs=[dict(row.inputs)], **SETTINGS)

    def by_diffusers() -> Tensor:
        with fixed_randomness(torch.device("cpu")):
            return plain(**arguments | {"generator": torch.Generator().manual_seed(0)})[0]

    base = by_diffusers()
    load_lora(plain, run.folder / "export")
    for network in plain.components.values():
        if isinstance(network, torch.nn.Module):
            network.requires_grad_(False)  # as training froze it: torch multiplies by whether a weight wants a gradient
    assert torch.equal(by_diffusers(), after)
    assert (after - base).abs().max() > 1e-4
    with safe_open(run.folder / "export" / LORA_FILE, framework="pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} <= {"transformer", "unet"}  # noqa: SIM118  (no mapping)


@pytest.mark.parametrize("host", [None, {"python": sys.executable}], ids=["this process", "a worker"])
@pytest.mark.parametrize("name", ["FluxFillPipeline", "FluxKontextPipeline"])
def test_a_reward_compares_the_result_with_the_source(
    name: str, host: dict[str, Any] | None, make_config: Make, tmp_path: Path
) -> None:
    """In this process and in a worker: the scores are those of the rollout's own pictures, asked by hand."""
    columns = {"source": "image_file", **({"mask": "mask_image_file"} if name == "FluxFillPipeline" else {})}
    section = {"columns": columns, **({"host": {**host, "target": EDITS}} if host else {})}
    config = configuration(name, make_config, tmp_path, rewards={"edit_consistency": section})
    evaluation = {"prompts": [{"file": str(tmp_path / "rows.jsonl")}], "num_prompts": 2, "num_inference_steps": 2}
    config |= {"num_steps": 1, "evaluation": evaluation}
    expected, seen = EditConsistency(), []
    with fresh_process(), contextlib.closing(start(parse_config(config), quiet=True)) as run:
        submit = run.scorer.submit

        def watched(rollout: Rollout) -> None:
            seen.append(rollout)
            submit(rollout)

        run.scorer.submit = watched
        train(run)
        run.export()
    scores = []
    for rollout in seen:
        given = {
            own: [picture and picture.pixels() for picture in rollout.pictures[name]] for own, name in columns.items()
        }
        scores += expected(to_uint8(rollout.images), rollout.prompts, **given)
    (line,) = read_metrics(run.folder / "metrics.jsonl")
    assert line["reward/edit_consistency"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)
    assert line["reward_missing"] == 0
    assert len({*scores}) > 1
    table = json.loads((run.folder / "evaluations" / "step_000001.json").read_text())
    assert all(0 <= score <= 1 for row in table["scores"]["edit_consistency"] for score in row)
    if host is None:
        small = ["--num-seeds", "1", "--num-prompts", "2", "--num-inference-steps", "2"]
        output = tmp_path / "again.json"
        said = CliRunner().invoke(app, ["evaluate", "--run", str(run.folder), *small, "--output", str(output)])
        assert said.exit_code == 0, said.output
        again = json.loads(output.read_text())["scores"]["edit_consistency"]
        assert again == [pytest.approx(row, abs=1e-3) for row in table["scores"]["edit_consistency"]]


def test_a_column_of_a_reward_that_is_not_there_is_refused(make_config: Make, tmp_path: Path) -> None:
    section = {"columns": {"source": "photo"}}
    config = configuration("FluxFillPipeline", make_config, tmp_path, rewards={"edit_consistency": section})
    with pytest.raises(
        ValueError, match=r"rewards\.edit_consistency\.columns\.source=photo: prompts\.train=.* no such column"
    ):
        start(parse_config(config), quiet=True)
    config["rewards"] = {"edit_consistency": {}}
    with pytest.raises(ValueError, match=r"requires the column 'source', .* section: \{columns: \{source: COLUMN\}\}"):
        start(parse_config(config), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_column_that_is_mapped_nowhere_is_told(
    make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The class also draws without a picture: it would be trained without ever seeing one."""
    config = configuration("FluxKontextPipeline", make_config, tmp_path) | {"inputs": {}}
    with caplog.at_level(logging.WARNING), contextlib.closing(start(parse_config(config), quiet=True)):
        pass
    assert "the column 'image_file' looks like an input, but FluxKontextPipeline is not given it" in caplog.text
    assert "inputs={image: image_file}" in caplog.text


def test_a_picture_that_is_needed_and_not_given_ends_the_run_by_name(make_config: Make, tmp_path: Path) -> None:
    config = configuration("StableDiffusion3Img2ImgPipeline", make_config, tmp_path) | {"inputs": {}}
    with pytest.raises(ValueError, match=r"StableDiffusion3Img2ImgPipeline cannot prepare .* It was not given image"):
        start(parse_config(config), quiet=True)
    assert not (tmp_path / "run").exists()


def test_commands_give_pictures_too(make_config: Make, tmp_path: Path) -> None:
    """Files for every prompt, or columns of a prompt file, without a run and with one."""
    name = "FluxFillPipeline"
    run = finished(configuration(name, make_config, tmp_path) | {"num_steps": 1})
    entry, model = ENTRIES[name], str(tmp_path / "model")
    shared = ["--height", "16", "--width", "16", *(f"--call={key}={value}" for key, value in entry.call.items())]
    files = [f"--input={argument}={tmp_path / f'{argument}0.png'}" for argument in entry.inputs(0)]
    columns = [f"--input={argument}={argument}_file" for argument in entry.inputs(0)]
    small = ["--num-seeds", "1", "--num-inference-steps", "2", "--num-prompts", "2", "-r", "jpeg_compressibility"]
    drawn_by = {}
    for case, given in {
        "files": ["sample", "a cat", "--model", model, *files, *shared],
        "files of another row": ["sample", "a cat", "--model", model, *shared]
        + [option.replace("0.png", "1.png") for option in files],
    }.items():
        output = tmp_path / f"{case}.png"
        said = CliRunner().invoke(app, [*given, "-o", str(output), "--num-seeds", "1", "--num-inference-steps", "2"])
        assert said.exit_code == 0, said.output
        drawn_by[case] = output.read_bytes()
    assert drawn_by["files"] != drawn_by["files of another row"]
    for given in (
        ["check-model", model, "--targets", "to_q", *files, *shared],
        ["evaluate", str(tmp_path / "rows.jsonl"), "--model", model, *columns, *shared, *small],
        ["evaluate", str(tmp_path / "rows.jsonl"), "--run", str(run.folder), *small],
    ):
        said = CliRunner().invoke(app, given)
        assert said.exit_code == 0, said.output
    said = CliRunner().invoke(app, ["check-model", "--config", str(run.folder / "config.json")])
    assert said.exit_code == 0, said.output
    (line,) = [line for line in said.output.splitlines() if line.startswith("  ok    inputs ")]
    for argument in entry.inputs(0):
        assert f"{argument} from the column '{argument}_file'" in line
    assert f"are trained at rank {run.config.model.lora.rank}" in said.output  # type: ignore[union-attr]
    for option, message in {
        "--input=image": "give an argument of the pipeline and what it gets",
        "--input=image=none.png": "there is no file",
        "--input=height=tall": "a number is needed",
    }.items():
        said = CliRunner().invoke(
            app, ["sample", "a cat", "--model", model, option, *shared, "-o", str(tmp_path / "x.png")]
        )
        assert isinstance(said.exception, ValueError)
        assert message in str(said.exception)


def test_kinds_of_the_zoo_are_read_off_names() -> None:
    kinds = {kind_of(argument) for name in KINDS for argument in ENTRIES[name].inputs(0)}
    assert kinds == {"image", "mask"}
