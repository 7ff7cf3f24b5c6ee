"""Runs on a quantised base: exact where nothing has changed, resumable, and the export draws what training saw."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from conftest import Make
from diffusers import TorchAoConfig
from inprocess import finished
from safetensors.torch import load_file
from torch import Tensor
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

from flowsteer.rl.command.options import choose
from flowsteer.rl.config import check_config, parse_config
from flowsteer.rl.export import LORA_FILE
from flowsteer.rl.metrics import read_metrics
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.quantize import HOW_IN_DIFFUSERS, held_bytes

IN_DIFFUSERS = {"int8": TorchAoConfig(Int8WeightOnlyConfig()), "fp8": TorchAoConfig(Float8WeightOnlyConfig())}
KINDS = [("int8", "float32"), ("nf4", "bfloat16")]
SLOW = [("int8", "bfloat16"), ("fp8", "float32"), ("fp8", "bfloat16"), ("nf4", "float32")]


def lines(folder: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in line.items() if not key.startswith("seconds/")}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def velocity(pipeline: Any) -> Tensor:
    rows = pipeline.prepare(["a red circle"], num_inference_steps=4, guidance_scale=4.0)
    noise = torch.randn((1, *rows.latent_shape), generator=torch.Generator().manual_seed(0))
    latents, rows = rows.start(noise.to(rows.latent_dtype))
    with torch.no_grad():
        return pipeline.begin(latents, 1, rows).velocity


@pytest.mark.parametrize(("kind", "dtype"), [*KINDS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_run_is_exact_and_resumes_and_its_export_draws_what_training_saw(
    make_config: Make, tmp_path: Path, kind: str, dtype: str
) -> None:
    """The LoRA's alpha is twice its rank, so that the export holds the trained weights without another rounding."""
    config = make_config(
        tmp_path / "run",
        num_steps=2,
        save_every=1,
        **{"model.quantize": kind, "model.dtype": dtype, "model.lora.alpha": 8, "algorithm.updates_per_rollout": 1},
    )
    run = finished(config)
    first, second = lines(tmp_path / "run")
    assert (first["ratio"], first["ratio_deviation"], first["kl"]) == (1, 0, 0)
    assert (second["ratio"], second["ratio_deviation"]) == (1, 0)
    assert second["kl"] > 0  # it has learned
    width = {"int8": 1, "fp8": 1, "nf4": 0.5}[kind]
    (denoiser,) = run.policy.denoisers.values()
    base = [
        (path, module)
        for path, module in denoiser.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in path
    ]
    assert len(base) > 20
    assert sum(held_bytes(module) for _, module in base) < (width + 0.3) * sum(
        m.in_features * m.out_features for _, m in base
    )

    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    shutil.rmtree(again / "checkpoints" / "step_000002")
    shutil.rmtree(again / "export")
    finished(config | {"output": str(again)}, resume=True)
    assert lines(again) == lines(tmp_path / "run")
    mine, other = (load_file(folder / "export" / LORA_FILE) for folder in (again, tmp_path / "run"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)

    seen, loaded = velocity(run.policy.pipeline), velocity(choose(run=tmp_path / "run", device="cpu").load())
    if dtype == "float32":  # flowsteer evaluate and sample
        assert torch.equal(loaded, seen)
    else:  # diffusers rounds a LoRA to the dtype of the base
        assert (loaded.float() - seen.float()).norm() < 0.02 * seen.float().norm()
    if kind == "nf4":  # diffusers quantises by bitsandbytes on a GPU only
        return
    page = (Path(__file__).resolve().parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0].replace("bfloat16", dtype)
    names: dict[str, Any] = {"model": config["model"]["path"], "run": tmp_path / "run"}
    exec(code if kind == "int8" else code.replace("Int8Weight", "Float8Weight"), names)
    pipe = names["pipe"]
    size = {key: config["model"][key] for key in ("height", "width")}
    assert torch.equal(velocity(FlowPipeline(pipe, call_kwargs=config["model"]["call"], **size)), loaded)


def test_how_diffusers_loads_the_base_is_said_in_its_words() -> None:
    names = {"TorchAoConfig": TorchAoConfig, "Int8WeightOnlyConfig": Int8WeightOnlyConfig}
    names["Float8WeightOnlyConfig"] = Float8WeightOnlyConfig
    for kind, own in IN_DIFFUSERS.items():
        assert eval(HOW_IN_DIFFUSERS[kind], names).to_dict() == own.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_four_bits_under_deepspeed_on_two_processes(make_config: Make, tmp_path: Path, strategy: str) -> None:
    settings = {"num_steps": 2, "model.quantize": "nf4", "algorithm.updates_per_rollout": 1}
    one = launch.run(make_config(tmp_path / "one", **settings))
    two = launch.run(make_config(tmp_path / "two", **settings, **{"engine.strategy": strategy}), processes=2)
    for plain, zero in zip(lines(one), lines(two), strict=True):
        assert (zero["ratio"], zero["ratio_deviation"]) == (1, 0)
        assert zero["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
        assert zero["kl"] == pytest.approx(plain["kl"], rel=1e-4)


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ValueError, match=r"model\.quantize") as error:
        check_config(parse_config(config), 1)
    return str(error.value)


def test_what_cannot_be_trained_so_is_refused(make_config: Make, tmp_path: Path) -> None:
    said = refusal(make_config(tmp_path, **{"model.quantize": "nf4", "model.lora": None}))
    assert "freezes the weights, and model.lora=null trains them; give model.lora" in said
    said = refusal(make_config(tmp_path, **{"model.quantize": "int8", "engine.strategy": "zero1"}))
    assert "makes weights that engine.strategy=zero1 cannot hold; use engine.strategy=plain" in said
