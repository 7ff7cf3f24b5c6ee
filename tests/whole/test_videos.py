"""Runs of a pipeline that draws videos: what rewards are shown, and the previews that play."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Make
from diffusers import CosmosTextToWorldPipeline
from inprocess import finished
from PIL import Image, ImageSequence
from typer.testing import CliRunner
from zoo.entries import built, entries

from flowsteer.rewards.pixels import to_uint8
from flowsteer.rl.command.main import app
from flowsteer.rl.films import save_film_grid, show
from flowsteer.rl.metrics import Log, read_metrics
from flowsteer.rl.prompt_files import frame_rate_of, rate_of
from flowsteer.rl.report.page import write_report
from flowsteer.rl.report.sheets import cut_films, embed_tile, sheets_of
from flowsteer.rollout.lifting.arguments import CallArguments
from flowsteer.rollout.lifting.pipeline import FlowPipeline

REWARDS = '''
"""A reward of images, and one of videos that writes down what it is told."""

import pathlib


def bright(images, prompts, **columns):
    assert images.ndim == 4
    return [float(image.mean()) / 255 for image in images]


class Timed:
    video = True

    def __call__(self, images, prompts, *, frame_rate, **columns):
        assert images.ndim == 5
        with (pathlib.Path(__file__).parent / "rates").open("a") as file:
            file.write(f"{len(images)} {images.shape[1]} {set(frame_rate)}\\n")
        return [float(video.mean()) / 255 for video in images]
'''


def frames_in(uri: str) -> list[Image.Image]:
    kind, _, data = uri.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as film:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(film)]


def test_a_run_with_videos(make_config: Make, tmp_path: Path) -> None:
    """LTX: an image reward scores frames, a video reward gets the rate, and the report plays."""
    entry = entries()["ltx"]
    built(entry).save_pretrained(tmp_path / "model")
    (tmp_path / "judges.py").write_text(REWARDS, encoding="utf-8")
    judges = tmp_path / "judges.py"
    model = {"path": str(tmp_path / "model"), "lora": {"rank": 4, "alpha": 8, "targets": ["to_q", "to_k", "to_v"]}}
    model |= {**entry.size, "call": {**entry.call, "frame_rate": 12}}
    sizes = {"num_inference_steps": 3, "prompts_per_step": 2, "group_size": 2, "batch_size": 2, "plan": {"name": "all"}}
    evaluation = {"prompts": str(tmp_path / "prompts.txt"), "num_prompts": 2, "num_inference_steps": 2}
    (tmp_path / "prompts.txt").write_text("\n".join(entry.prompts), encoding="utf-8")
    rewards: dict[str, Any] = {f"{judges}:bright": {"frames": {"every": 4}}, f"{judges}:Timed": {"weight": 0.1}}
    settings = {"num_steps": 1, "model": model, "rollout": sizes, "evaluation": evaluation, "rewards": rewards}
    run = finished(make_config(tmp_path / "run", **settings, **{"prompts.train": str(tmp_path / "prompts.txt")}))

    (line,) = read_metrics(run.folder / "metrics.jsonl")
    assert line["reward_missing"] == 0
    assert 0 < line["reward/judges.py:bright"] < 1
    told = (tmp_path / "rates").read_text().splitlines()
    assert len(told) == 4  # two batches of the step, and one of each evaluation
    assert set(told) == {"2 9 {12.0}"}

    film = run.folder / "evaluations" / "step_000001.webp"
    with Image.open(film) as opened:
        assert opened.n_frames == 9
    write_report(run.folder)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r'src="(data:image/webp;base64,[^"]+)"', page)
    assert len(shown) >= 4  # two prompts, before and after
    assert len(frames_in(shown[0])) == 9

    output = tmp_path / "drawn"
    arguments = ["sample", entry.prompts[0], "--run", str(run.folder), "--num-seeds", "1", "--num-inference-steps", "2"]
    for given in (output, tmp_path / "drawn.webp"):
        said = CliRunner().invoke(app, [*arguments, "-o", str(given)])
        assert said.exit_code == 0, said.output
    with Image.open(output / "0000.webp") as opened:
        assert opened.n_frames == 9
        opened.seek(1)
        opened.load()
        assert opened.info["duration"] == 83  # 1000 / 12
    assert json.loads((output / "metadata.jsonl").read_text()) == {"file_name": "0000.webp", "prompt": entry.prompts[0]}


@pytest.mark.parametrize(
    ("name", "call", "rate"),
    [("ltx", {}, 25.0), ("ltx", {"frame_rate": 8}, 8.0), ("wan_21", {}, None)],
)
def test_the_rate_of_a_pipeline(name: str, call: dict[str, Any], rate: float | None) -> None:
    entry = entries()[name]
    pipeline = FlowPipeline(built(entry), **entry.size, call_kwargs={**entry.call, **call})
    assert frame_rate_of(pipeline) == rate


def test_some_pipelines_call_it_fps() -> None:
    shared: Any = {"size": {}, "counts_from_zero": False, "has_guider": False}
    assert rate_of(CallArguments(CosmosTextToWorldPipeline, call_kwargs={}, **shared)) == 30.0
    assert rate_of(CallArguments(CosmosTextToWorldPipeline, call_kwargs={"fps": 16}, **shared)) == 16.0


@pytest.mark.parametrize("shape", [(10, 4, 3, 8, 12), (10, 3, 8, 12)])
def test_tensorboard_shows_them(shape: tuple[int, ...], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = Log(tmp_path, trackers=["tensorboard"], start=0, is_main=True, config={})
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).round()  # few colours, as a GIF has
    show(log.trackers, 3, images, frame_rate=10.0)
    log.close()
    (file,) = tmp_path.rglob("events*")
    events = accumulator.EventAccumulator(str(file), size_guidance={"images": 0}).Reload()
    assert len(events.Tags()["images"]) == 8
    (event,) = events.Images("evaluation/0")
    assert event.step == 3
    with Image.open(io.BytesIO(event.encoded_image_string)) as opened:
        frames = [
            torch.tensor(list(frame.convert("RGB").getdata())).view(8, 12, 3)
            for frame in ImageSequence.Iterator(opened)
        ]
    expected = torch.from_numpy(to_uint8(images[:1]))[0].view(-1, 8, 12, 3)
    assert torch.equal(torch.stack(frames), expected.long())


class TestSheets:
    def videos(self, count: int, frames: int, height: int, width: int) -> torch.Tensor:
        return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(0))

    def test_a_sheet_is_cut_into_its_videos_again(self, tmp_path: Path) -> None:
        videos = self.videos(5, 4, 128, 128)
        save_film_grid(videos, tmp_path / "sheet.webp", frame_rate=10.0, columns=12)
        film = sheets_of(tmp_path / "sheet.png")
        (tiles,) = cut_films([film], 5) or [[]]
        for tile, video in zip(tiles, to_uint8(videos)):
            for frame, expected in zip(tile, video, strict=True):
                assert (torch.tensor(list(frame.getdata())).view(128, 128, 3) == torch.from_numpy(expected)).all()
                assert frame.info["duration"] == 100
        again = frames_in(embed_tile(tiles[0], 64))
        assert [frame.size for frame in again] == [(64, 64)] * 4

    def test_long_and_wide_videos_are_thinned(self, tmp_path: Path) -> None:
        save_film_grid(self.videos(1, 81, 20, 512), tmp_path / "sheet.webp", frame_rate=None)
        film = sheets_of(tmp_path / "sheet.png")
        assert len(film) == 27  # every third
        assert film[0].size == (256 + 2, 10 + 2)
        assert film[0].info["duration"] == 188  # three sixteenths of a second
