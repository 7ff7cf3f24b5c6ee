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
from gpu_check import PUBLISHED_PARAMETERS, claims, main, peak_flops
from gpu_trial import CLIP_WIDTHS, TRANSFORMER, Trial, make_pipeline, nbytes
from inprocess import fresh_process

ROOT = Path(str(files("flowsteer.rl"))).resolve().parent
BOTH = {("flow_grpo", False), ("flow_grpo", True), ("diffusion_nft", False), ("diffusion_nft", True)}


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
    done = run("scripts/gpu_check.py", "--size", "tiny")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(lines: list[dict[str, Any]], claim: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["claim"] == claim]


def test_every_claim_has_its_line_and_holds(lines: list[dict[str, Any]]) -> None:
    counts = {"selfcheck": 1, "exact": 4, "memory": 4, "speed": 8, "seeds": 2, "resume": 2, "quickstart": 1}
    assert {claim: len(of(lines, claim)) for claim in counts} == counts
    assert len(lines) == sum(counts.values())
    assert all(line["ok"] is True for line in lines)
    for claim in ("exact", "memory", "speed"):
        assert {(line["algorithm"], line["gradient_checkpointing"]) for line in of(lines, claim)} == BOTH


def test_exactness_is_measured_where_it_could_fail(lines: list[dict[str, Any]]) -> None:
    for line in of(lines, "exact"):
        assert line["kl"] == 0.0
        assert line["kl_after_update"] > 0.0
        if line["algorithm"] == "flow_grpo":
            assert (line["ratio"], line["ratio_deviation"], line["ratio_deviation_after_update"]) == (1.0, 0.0, 0.0)
        else:
            assert (line["old_distance"], line["old_distance_after_update"]) == (0.0, 0.0)


def test_memory_is_by_part(lines: list[dict[str, Any]]) -> None:
    for line in of(lines, "memory"):
        assert (
            line["optimizer"] == 2 * line["gradients"] == 8 * line["trained_parameters"]
        )  # Adam's two float32 moments
        policies = {"flow_grpo": 2, "diffusion_nft": 3}[line["algorithm"]]  # current and ema; and old
        assert line["adapters"] == policies * 4 * line["trained_parameters"]
        assert line["weights"].keys() == {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
        assert line["rollout_peak"] is line["update_peak"] is line["held_after"] is None  # a CPU does not say


def test_flops_are_the_model_s(lines: list[dict[str, Any]]) -> None:
    work = {
        (line["algorithm"], line["act"], line["gradient_checkpointing"]): line["model_flops"]
        for line in of(lines, "speed")
    }
    for algorithm, act in {(algorithm, act) for algorithm, act, _ in work}:
        assert work[algorithm, act, True] == work[algorithm, act, False] > 0  # what is computed again does not count
    # With guidance a pass is two; 8 passes draw, decoding adds a little.
    assert 1.3 < work["flow_grpo", "rollout", False] / work["diffusion_nft", "rollout", False] < 2
    assert all(line["mfu"] is line["peak_flops"] is None for line in of(lines, "speed"))
    passes = {line["algorithm"]: line["passes"] for line in of(lines, "speed") if line["act"] == "update"}
    # 2 batches at 3 denoising steps: each with a gradient, and once for each other policy of the loss
    assert passes == {
        "flow_grpo": {"with_gradient": 6, "without": 6},
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
    found = list(claims("tiny", True, ["exact", "speed"], tmp_path))
    by_algorithm = {line["algorithm"]: line["ok"] for line in found if line["claim"] == "exact"}
    assert by_algorithm == {"flow_grpo": False, "diffusion_nft": True}
    errors = [line for line in found if "error" in line]
    assert len(errors) == 4
    assert errors[0]["claim"] == "exact, memory, speed of flow_grpo without gradient checkpointing"
    assert errors[0]["error"] == "OutOfMemoryError: no memory left"


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), -float("inf")])
def test_a_failing_claim_is_json_and_exit_code_1(
    figure: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss that is no number is what such a check is there to show: its line has to be read by any JSON reader."""
    found = [{"claim": "exact", "ok": False, "kl": figure}, {"claim": "quickstart", "ok": True, "loss": [1.0, figure]}]
    monkeypatch.setattr(gpu_check, "claims", lambda *_: iter(found))
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
        assert [line["claim"] for line in claims("tiny", True, ["selfcheck"], tmp_path)] == ["selfcheck"]


def test_the_full_size_wants_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--cpu"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "--size full needs a CUDA device, and none is used here; use --size tiny" in capsys.readouterr().err


def test_the_full_size_is_the_published_one() -> None:
    """Made without memory: 2.24 billion parameters in the denoiser, 84 million in the autoencoder."""
    pipe: Any = make_pipeline("full", torch.device("meta"))
    assert sum(parameter.numel() for parameter in pipe.transformer.parameters()) == PUBLISHED_PARAMETERS
    assert nbytes(pipe.transformer) == 2 * (PUBLISHED_PARAMETERS + 384 * 384 * 1536)  # with the table of positions
    assert round(sum(parameter.numel() for parameter in pipe.vae.parameters()) / 1e6, 1) == 83.8
    for size, widths in CLIP_WIDTHS.items():  # the pooled embeddings stand side by side
        assert sum(widths) == TRANSFORMER[size]["pooled_projection_dim"] <= TRANSFORMER[size]["joint_attention_dim"]


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
