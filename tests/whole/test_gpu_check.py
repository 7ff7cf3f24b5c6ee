"""The check of a device, at its tiny size: a line for each claim. What only a GPU can say is null here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch
from gpu_check import OPTIONS, claims, left_out, main, peak_flops
from gpu_models import MODELS, make_pipeline, nbytes
from gpu_trial import Trial
from inprocess import fresh_process

ROOT = Path(str(files("flowsteer.rl"))).resolve().parent
QUICK = ("checkpointing", "checkpointing_nft", "offload", "merge_lora")  # the others are tried by the slow test
RUNS = {
    ("flow_grpo", "none"),
    ("mixgrpo", "none"),
    ("diffusion_nft", "none"),
    *((OPTIONS[o].algorithm, o) for o in QUICK),
}
MISSING = ("cv2", "rapidocr", "onnxruntime", "trl", "tensorboard")


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All claims, where no package of a reward's extra can be imported, in the children too: none is needed."""
    folder = tmp_path_factory.mktemp("blocked")
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({MISSING}))\n"
    (folder / "sitecustomize.py").write_text(blocked)  # every Python process reads it at its start
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
        )

    assert "ModuleNotFoundError" in run("-c", "import cv2").stderr
    done = run("scripts/gpu_check.py", "--size", "tiny", "--options", *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(lines: list[dict[str, Any]], claim: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["claim"] == claim]


def test_every_claim_has_its_line_and_holds(lines: list[dict[str, Any]]) -> None:
    runs = len(RUNS)
    counts = {
        "selfcheck": 1,
        "plan": 1,
        "exact": runs,
        "memory": runs,
        "speed": 2 * runs,
        "seeds": 2,
        "resume": 2,
        "quickstart": 1,
    }
    assert {claim: len(of(lines, claim)) for claim in counts} == counts
    assert len(lines) == sum(counts.values())
    assert all(line["ok"] is True for line in lines)
    for claim in ("exact", "memory", "speed"):
        assert {(line["algorithm"], line["option"]) for line in of(lines, claim)} == RUNS


def test_exactness_is_measured_where_it_could_fail(lines: list[dict[str, Any]]) -> None:
    for line in of(lines, "exact"):
        assert line["kl"] == 0.0
        assert line["kl_after_update"] > 0.0
        if line["algorithm"] != "diffusion_nft":
            assert (line["ratio"], line["ratio_deviation"], line["ratio_deviation_after_update"]) == (1.0, 0.0, 0.0)
        else:
            assert (line["old_distance"], line["old_distance_after_update"]) == (0.0, 0.0)


def test_memory_is_by_part(lines: list[dict[str, Any]]) -> None:
    for line in of(lines, "memory"):
        assert (
            line["optimizer"] == 2 * line["gradients"] == 8 * line["trained_parameters"]
        )  # Adam's two float32 moments
        policies = {"flow_grpo": 2, "mixgrpo": 2, "diffusion_nft": 3}[line["algorithm"]]  # current and ema; and old
        assert line["adapters"] == policies * 4 * line["trained_parameters"]
        assert line["weights"].keys() == {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
        assert line["rollout_peak"] is line["update_peak"] is line["held_after"] is None  # a CPU does not say


def test_flops_are_the_model_s(lines: list[dict[str, Any]]) -> None:
    speed = {(line["option"], line["algorithm"], line["act"]): line for line in of(lines, "speed")}
    for (option, algorithm, act), line in speed.items():  # what checkpointing computes again does not count
        assert line["model_flops"] == speed["none", algorithm, act]["model_flops"] > 0
        assert line["mfu"] is line["peak_flops"] is None
        assert (line["gain"] is None) == (option == "none")
    # With guidance a pass is two; 8 passes draw, decoding adds a little.
    drawn = [speed["none", algorithm, "rollout"]["model_flops"] for algorithm in ("flow_grpo", "diffusion_nft")]
    assert 1.3 < drawn[0] / drawn[1] < 2
    # 2 batches at 3 (or 2) denoising steps: each with a gradient, and once for each other policy of the loss
    assert {algorithm: speed["none", algorithm, "update"]["passes"] for _, algorithm, _ in speed} == {
        "flow_grpo": {"with_gradient": 6, "without": 6},
        "mixgrpo": {"with_gradient": 4, "without": 4},
        "diffusion_nft": {"with_gradient": 6, "without": 12},
    }


def test_a_claim_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples whose log density is off by a little, and an error on the way."""
    sample = Trial.sample

    def shifted(self: Trial, step: int) -> Any:
        rollouts = sample(self, step)
        for rollout in rollouts:
            if rollout.trajectory is not None:
                rollout.trajectory.log_prob.add_(1e-6)
        return rollouts

    monkeypatch.setattr(Trial, "sample", shifted)

    def broken(self: Trial, rollout: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(Trial, "flops", broken)
    found = list(claims("tiny", True, ["exact", "speed"], tmp_path, options=["none"]))
    by_algorithm = {line["algorithm"]: line["ok"] for line in found if line["claim"] == "exact"}
    assert by_algorithm == {"flow_grpo": False, "mixgrpo": False, "diffusion_nft": True}
    errors = [line for line in found if "error" in line]
    assert len(errors) == 3
    assert errors[0]["claim"] == "exact, memory, speed of flow_grpo on sd35m"
    assert errors[0]["error"] == "OutOfMemoryError: no memory left"


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), -float("inf")])
def test_a_failing_claim_is_json_and_exit_code_1(
    figure: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is no number is what such a check is there to show: its line has to be read by any JSON reader."""
    found = [{"claim": "exact", "ok": False, "kl": figure}, {"claim": "quickstart", "ok": True, "loss": [1.0, figure]}]
    monkeypatch.setattr(gpu_check, "claims", lambda *_, **__: iter(found))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--size", "tiny"])
    assert main() == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"claim": "exact", "ok": False, "kl": str(figure)},
        {"claim": "quickstart", "ok": True, "loss": [1.0, str(figure)]},
    ]


def test_parts_are_chosen(tmp_path: Path) -> None:
    with fresh_process():
        found = claims("tiny", True, ["selfcheck"], tmp_path, options=["none"])
        assert [line["claim"] for line in found] == ["selfcheck"]


def test_what_cannot_be_tried_is_said_and_does_not_fail(tmp_path: Path) -> None:
    """For want of a GPU, and for want of time."""
    assert left_out("attention_flash", cpu=True) == "it needs a GPU"
    assert left_out("attention_flash", cpu=False) is None
    found = list(claims("tiny", True, ["selfcheck", "seeds"], tmp_path, options=["none"], limit_s=-1))
    assert [line["ok"] for line in found] == [None] * 3
    assert found[0] == {"claim": "selfcheck of sd35m", "ok": None, "left_out": "-1 seconds are over (--limit-s)"}


@pytest.mark.slow
def test_every_option_holds(tmp_path: Path) -> None:
    """Those that a CPU can try."""
    with fresh_process():
        found = list(claims("tiny", True, ["exact", "memory", "speed"], tmp_path, options=list(OPTIONS)))
    assert not [line for line in found if line["ok"] is False]
    tried = {line["option"] for line in found if line["ok"]}
    assert {name for name, about in OPTIONS.items() if not (about.gpu or about.full or about.package)} <= tried


def test_the_full_size_wants_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--cpu"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "--size full needs a CUDA device, and none is used here; use --size tiny" in capsys.readouterr().err


@pytest.mark.parametrize("model", MODELS)
def test_the_full_size_is_the_published_one(model: str) -> None:
    """Made without memory; the autoencoders have 84 million parameters."""
    pipe: Any = make_pipeline(model, "full", torch.device("meta"))
    about, numel = MODELS[model], sum(parameter.numel() for parameter in pipe.transformer.parameters())
    assert numel == about.parameters
    table_of_positions = 384 * 384 * 1536 if model == "sd35m" else 0
    assert nbytes(pipe.transformer) == 2 * numel + 4 * table_of_positions  # float32 until it is loaded
    assert round(sum(parameter.numel() for parameter in pipe.vae.parameters()) / 1e6, 1) == 83.8
    for size in ("full", "tiny"):  # the pooled embeddings stand side by side
        shapes, widths = about.transformer(size), [width for _, width in about.clips(size).values()]
        assert sum(widths) == shapes["pooled_projection_dim"] <= shapes["joint_attention_dim"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Some other device", None),
    ],
)
def test_peaks_go_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
