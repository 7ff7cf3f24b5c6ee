"""The page of pipelines is in step with the installed diffusers, and what it is made of is asked rightly."""

from __future__ import annotations

import dataclasses
import datetime
import json
import signal
from pathlib import Path
from typing import Any

import diffusers
import pytest
import survey_pipelines
from pipelines_page import PAGE, page, read_page
from zoo.classes import class_of, denoising_classes, kind_of_class, missing_packages
from zoo.survey import Answer, survey_class, survey_entry

LIFTED = Answer(
    name="wan_21",
    cls="WanPipeline",
    kind="Video",
    verdict="lifted",
    tried=True,
    needs=("prompt",),
    parity=0.0,
    microbatch=2e-6,
    gradient="32 of 32",
    algorithm="flow_grpo",
    redrawn=6e-7,
    loads='pipe.load_lora_weights("export")',
)
REFUSED = dataclasses.replace(LIFTED, name="wan_other", verdict="refused", said="it has | in it\nand two lines")


def test_the_page_lists_the_classes_of_diffusers() -> None:
    release, lines = read_page((Path(__file__).parents[2] / PAGE).read_text(encoding="utf-8"))
    if release != diffusers.__version__:
        pytest.skip(f"the page was made with diffusers {release}")
    assert {line.cls for line in lines} == denoising_classes().keys()
    assert len(lines) == len({line.name for line in lines})


def test_classes_are_found_by_their_loops() -> None:
    """In ``__call__``, in a helper, in a base, over several schedulers; a pipeline that only calls others has none."""
    found = denoising_classes()
    assert {
        "FluxPipeline",
        "LTX2DFRPipeline",
        "StableDiffusionOnnxPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
    } <= found.keys()
    assert (
        not {"VersatileDiffusionPipeline", "StableCascadeCombinedPipeline", "AutoPipelineForText2Image"} & found.keys()
    )
    assert all(isinstance(class_of(name), type) for name in ("FluxPipeline", "StableDiffusionOnnxPipeline"))


def test_kinds_are_read_off_arguments_and_results() -> None:
    kinds = {
        "FluxPipeline": "Text to picture",
        "FluxKontextPipeline": "Picture to picture",
        "JoyImageEditPlusPipeline": "Several pictures to picture",
        "FluxFillPipeline": "Inpainting",
        "FluxControlNetInpaintPipeline": "Control",
        "WanPipeline": "Video",
        "StableAudioPipeline": "Sound",
        "MarigoldDepthPipeline": "Other",
    }
    assert {name: kind_of_class(class_of(name)) for name in kinds} == kinds
    assert kind_of_class(class_of("Flux2Pipeline"), []) == "Text to picture"  # without its picture
    assert kind_of_class(class_of("Flux2Pipeline"), ["image"], several=True) == "Several pictures to picture"


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers.utils, "is_ftfy_available", lambda: False)
    assert missing_packages(class_of("PRXPipeline")) == ["ftfy"]
    monkeypatch.setattr(diffusers.utils, "is_ftfy_available", lambda: True)
    assert missing_packages(class_of("PRXPipeline")) == []


def test_a_pipeline_is_trained_and_redrawn() -> None:
    answer = survey_entry("StableDiffusion3Img2ImgPipeline")
    assert (answer.verdict, answer.kind, answer.needs) == ("lifted", "Picture to picture", ("prompt", "image"))
    assert (answer.parity, answer.redrawn, answer.algorithm) == (0.0, 0.0, "flow_grpo")
    assert (answer.gradient, answer.failed) == ("40 of 40", "")


def test_a_lora_that_diffusers_does_not_load_is_fused_and_redrawn_nearly() -> None:
    answer = survey_entry("pixart_sigma")
    assert answer.loads.startswith("only as a whole pipeline")
    assert answer.redrawn is not None
    assert 0 < answer.redrawn < 1e-4  # fused weights round otherwise


def test_one_that_is_refused_says_why_in_flowsteers_own_words() -> None:
    by_check, by_scheduler, by_source = (
        survey_entry("Flux2KleinKVPipeline"),
        survey_entry("sd_euler_karras"),
        survey_class("UnCLIPPipeline"),
    )
    assert {answer.verdict for answer in (by_check, by_scheduler, by_source)} == {"refused"}
    assert by_check.said.startswith("purity: steps by themselves differ")
    assert "train with model.scheduler={use_karras_sigmas: false}" in by_scheduler.said
    assert "has 3 denoising loops" in by_source.said


def test_what_no_file_can_hold_and_what_no_pipeline_is_built_of() -> None:
    left_out = survey_entry("ltx2_condition")
    assert left_out.verdict == "left out"
    assert left_out.said == "conditions is a list"
    assert survey_class("DiTPipeline") == Answer(
        name="DiTPipeline",
        cls="DiTPipeline",
        kind="Other",
        verdict="not built",
        said="draws class labels, and takes no prompt",
    )
    assert survey_class("AmusedPipeline").said == "deprecated by diffusers"


def test_a_page_is_read_as_it_was_written() -> None:
    text = page([LIFTED, REFUSED], "9.9", datetime.date(2026, 1, 2))
    release, lines = read_page(text)
    assert release == "9.9"
    assert [(line.cls, line.name, line.verdict, line.equal) for line in lines] == [
        ("WanPipeline", "wan_21", "lifted", "bit for bit"),
        ("WanPipeline", "wan_other", "refused", ""),
    ]
    assert "on 2026-01-02" in text
    assert r"| `WanPipeline` wan_other | it has \| in it and two lines |" in text
    assert "| trained | 1 | 1 |" in text


def test_answers_of_another_release_are_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    assert survey_pipelines.read(file) == {}
    given: list[dict[str, Any]] = [
        {"diffusers": "0.1", **dataclasses.asdict(REFUSED)},
        {"diffusers": diffusers.__version__, **dataclasses.asdict(LIFTED), "parity": 1.0},
        {"diffusers": diffusers.__version__, **dataclasses.asdict(LIFTED)},
    ]
    file.write_text("".join(json.dumps(own) + "\n" for own in given), encoding="utf-8")
    assert survey_pipelines.read(file) == {"wan_21": LIFTED}


@pytest.mark.slow
def test_a_process_that_dies_is_an_answer() -> None:
    kill: Any = signal.raise_signal
    names: Any = [int(signal.SIGKILL)]
    (answer,) = survey_pipelines.each_answer(names, kill, 1, 2)
    assert answer.verdict == "refused"
    assert answer.said.startswith("its process died")


@pytest.mark.slow
def test_a_class_stands_for_its_entries() -> None:
    assert [*survey_pipelines.expanded(["WanPipeline", "sd_pag", "UnCLIPPipeline"])] == [
        "wan_21", "wan_unipc", "wan_5b", "sd_pag", "UnCLIPPipeline",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'NoPipeline' is no entry"):
        list(survey_pipelines.expanded(["NoPipeline"]))
