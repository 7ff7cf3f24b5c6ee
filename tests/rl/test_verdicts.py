"""The self-check at the start of a run: made once for the same weights and settings, unless it is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from flowsteer.rewards.caches import cache_folder
from flowsteer.rl.build import build_pipeline, build_plan
from flowsteer.rl.checkpoint import fingerprint
from flowsteer.rl.config import parse_config
from flowsteer.rl.fit import checked_plan
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting import selfcheck
from flowsteer.rollout.lifting.selfcheck import Finding, Report

Begin = Callable[..., int]


@pytest.fixture
def begin(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Come to the self-check as a start does; how many checks were made."""
    monkeypatch.setenv("FLOWSTEER_CACHE", str(tmp_path / "cache"))
    made: list[Any] = []
    check = selfcheck.check

    def counted(*arguments: Any, **settings: Any) -> Report:
        made.append(settings)
        return check(*arguments, **settings)

    monkeypatch.setattr(selfcheck, "check", counted)

    def begun(**overrides: Any) -> int:
        made.clear()
        config = parse_config(make_config(tmp_path / "run", **overrides))
        pipeline = build_pipeline(config, torch.device("cpu"))
        plan = build_plan(config.rollout.plan, config)
        prompts = Prompts(texts=("a red circle", "the sea at night"))
        checked_plan(config, pipeline, plan, prompts, weights=fingerprint(dict(pipeline.denoisers)))
        return len(made)

    return begun


def test_a_good_verdict_is_kept_for_the_same_run_only(begin: Begin, tiny_sd3: Path, tmp_path: Path) -> None:
    assert [begin(), begin()] == [1, 0]
    (file,) = cache_folder("selfcheck").iterdir()
    assert "StableDiffusion3Pipeline: can be trained" in file.read_text()
    moved = shutil.copytree(tiny_sd3, tmp_path / "moved")
    assert begin(**{"model.path": str(moved)}) == 0, "where a model lies says nothing"
    assert begin(**{"model.lora.rank": 8}) == 0, "the check is of the base"
    assert begin(**{"rollout.guidance_scale": 3.0}) == 1
    assert begin(**{"model.height": 32}) == 1
    assert begin(**{"model.scheduler": {"shift": 1.0}}) == 1
    assert begin(**{"model.dtype": "bfloat16"}) == 1
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(moved / "transformer")
    with torch.no_grad():
        transformer.proj_out.weight[0, 0] += 1  # type: ignore[index]
    transformer.save_pretrained(moved / "transformer")
    assert begin(**{"model.path": str(moved)}) == 1, "other weights"


def test_it_can_be_asked_for_and_left_out(begin: Begin, caplog: pytest.LogCaptureFixture) -> None:
    always = {"model.selfcheck": "always"}
    assert [begin(**always), begin(**always), begin()] == [1, 1, 0]
    assert begin(**{"model.selfcheck": "never", "rollout.guidance_scale": 3.0}) == 0
    assert "the self-check is left out (model.selfcheck=never)" in caplog.text


def test_a_bad_verdict_is_not_kept(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Report(title="a pipeline", findings=(Finding(name="purity", ok=False, detail="a cache"),))
    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "check", lambda *_, **__: bad)
        with pytest.raises(ValueError, match="FAIL  purity  a cache"):
            begin()
    assert begin() == 1


def test_a_folder_that_cannot_be_written_costs_only_time(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWSTEER_CACHE", str(tmp_path / "file"))
    assert [begin(), begin()] == [1, 1]
