"""Prompts that are longer than what an encoder sees are counted at the start of a run."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import zoo
from conftest import Make
from inprocess import fresh_process
from zoo.entries import built, entries

from flowsteer.rl.config import parse_config
from flowsteer.rl.prompt_files import windows
from flowsteer.rl.start import start
from flowsteer.rollout.lifting.pipeline import FlowPipeline

SHORT = "a red circle on black"
LONG = "a red circle left of a blue square on white"  # 12 tokens, as many as there are
LONGER = "three quite extraordinarily purple hexagons on white"


def warnings(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a run's start says of long prompts."""
    with caplog.at_level(logging.WARNING), fresh_process(), contextlib.closing(start(parse_config(config), quiet=True)):
        pass
    return [record.getMessage() for record in caplog.records if "its encoder sees" in record.getMessage()]


def embedded(make_config: Make, tmp_path: Path, texts: list[str], more: list[str]) -> dict[str, Any]:
    for name, lines in (("train", texts), ("more", more)):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    evaluation = {"prompts": str(tmp_path / "more.txt"), "num_prompts": 1}
    settings = {"model": {"path": "embedded"}, "evaluation": evaluation}
    return make_config(tmp_path / "run", **settings, **{"prompts.train": str(tmp_path / "train.txt")})


def test_a_run_counts_them(make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = FlowPipeline.load("embedded")
    count = len(pipeline.pipe.tokenizer(LONGER).input_ids)
    assert len(pipeline.pipe.tokenizer(LONG).input_ids) == 12 < count
    said = warnings(embedded(make_config, tmp_path, [SHORT, LONGER, LONG, LONGER], [SHORT, LONGER]), caplog)
    assert [line.partition(":")[0] for line in said] == ["tokenizer", "tokenizer_2"]  # not of the T5 that is not there
    for line in said:
        assert "its encoder sees 12 tokens" in line
        assert f"prompts.train={tmp_path}/train.txt: 2 of 4 prompts are longer" in line
        assert f"the longest has {count} tokens: {LONGER!r}" in line
        assert f"evaluation.prompts={tmp_path}/more.txt: 1 of 2 prompts are longer" in line


def test_short_prompts_are_no_news(make_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(embedded(make_config, tmp_path, [SHORT, LONG], [SHORT]), caplog) == []


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("sd3", {}, {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 256}),
        ("sd3", {"max_sequence_length": 32}, {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 32}),
        ("flux", {}, {"tokenizer": 77, "tokenizer_2": 512}),
        ("sdxl", {}, {"tokenizer": 77, "tokenizer_2": 77}),
        ("qwen", {"max_sequence_length": 64}, {"tokenizer": 64}),
    ],
)
def test_windows(name: str, call: dict[str, Any], expected: dict[str, int]) -> None:
    pipeline = FlowPipeline(zoo.build(name), **zoo.ZOO[name].size, call_kwargs=call)
    assert {own: window for own, _, window in windows(pipeline)} == expected


def test_a_window_that_nobody_knows_is_none() -> None:
    entry = entries()["ltx"]
    pipe = built(entry)
    pipe.tokenizer.model_max_length = int(1e30)  # as transformers reads T5's without a number
    pipeline = FlowPipeline(pipe, **entry.size, call_kwargs=entry.call)
    assert {own: window for own, _, window in windows(pipeline)} == {"tokenizer": 32}
    sdxl = zoo.build("sdxl")
    sdxl.tokenizer_2.model_max_length = int(1e30)
    assert [own for own, _, _ in windows(FlowPipeline(sdxl, **zoo.ZOO["sdxl"].size))] == ["tokenizer"]
