"""All weights in bfloat16 on two processes: what each keeps and writes is its share, and a resumed run is the unbroken one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from conftest import Make
from safetensors.torch import load_file

from flowsteer.rl.metrics import read_metrics

STEPS = 2
PADDING = 1.05  # shares of equal length, of tensors whose first dimension may be odd


def train_and_count(config: dict[str, Any], *, resume: bool = False) -> None:
    """A run in one of its processes; then how many weights there are, and the bytes that this process keeps and gathers."""
    from flowsteer.rl.config import parse_config
    from flowsteer.rl.engine.shares import whole_size
    from flowsteer.rl.start import start
    from flowsteer.rl.train import train

    run = start(parse_config(config), resume=resume, quiet=True)
    sizes = [whole_size(parameter) for parameter in run.policy.parameters().values()]
    train(run)
    policies = [value for name in run.policy.names - {"current"} for value in run.policy._variants.parts(name)]
    policies += [value for average in run.policy._averages.values() for value in average]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in policies}
    gathered: list[int] = []
    full = run.engine.backend.full

    def counted(parameter: torch.Tensor) -> torch.Tensor:
        whole = full(parameter)
        gathered.append(whole.numel())
        return whole

    run.engine.backend.full = counted  # type: ignore[method-assign]
    run.export()
    counts = {"weights": sum(sizes), "largest": max(sizes), "kept": sum(storages.values()), "gathered": gathered}
    (run.folder / f"counts_{run.engine.processes.process_index}.json").write_text(json.dumps(counts))
    run.close()


def state(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The metrics without times, and the exported weights."""
    lines = read_metrics(folder / "metrics.jsonl")
    (file,) = (folder / "export").rglob("*.safetensors")
    return [{key: own for key, own in line.items() if not key.startswith("seconds/")} for line in lines], load_file(
        file
    )


def saved_averages(folder: Path) -> list[torch.Tensor]:
    """The averaged policy in the last checkpoint, in the order and shape of the shares."""
    files = (folder / "checkpoints" / f"step_{STEPS:06d}").glob("*.safetensors")
    return [value for file in files for key, value in load_file(file).items() if key.startswith("policy/ema/")]


def sorted_values(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """All elements in bfloat16, without zeros, which also fill shares up."""
    values = torch.cat([value.flatten() for value in tensors]).bfloat16().float()
    return values[values != 0].sort().values


@pytest.mark.parametrize(
    "strategy", ["zero2", "fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero3"))]
)
def test_each_process_keeps_and_writes_its_share(make_config: Make, tmp_path: Path, strategy: str) -> None:
    """DiffusionNFT with an average: old, ema and reference beside the current weights."""
    settings = {"model.lora": None, "model.dtype": "bfloat16", "ema_decay": 0.5, "save_every": 1, "keep": 2}
    config = make_config(tmp_path / "run", num_steps=STEPS, **launch.nft(), **settings, **{"engine.strategy": strategy})
    run = launch.run(config, processes=2, work=train_and_count)
    # ZeRO-3 copies its bfloat16 shares, and averages beside them
    each = 4 + 4 + 2 if strategy != "zero3" else (4 + 2) + (4 + 2) + 2
    for rank in range(2):
        counts = json.loads((run / f"counts_{rank}.json").read_text())
        share = counts["weights"] / 2
        assert share * each <= counts["kept"] < share * each * PADDING
        assert max(counts["gathered"]) == counts["largest"] < counts["weights"] / 5  # one parameter at a time
        assert sum(counts["gathered"]) >= counts["weights"]
        file = run / "checkpoints" / f"step_{STEPS:06d}" / f"process_{rank:05d}.safetensors"
        written = 12 + 4 + 4 if strategy != "zero3" else 12 + 4 + 4 + 2  # master, two moments; old and ema; current
        assert share * written <= file.stat().st_size < share * written * PADDING + 100_000

    unbroken = state(run)
    trained = [value for key, value in unbroken[1].items() if key != "pos_embed.pos_embed"]  # a buffer
    # the export is the average
    assert torch.equal(sorted_values(trained), sorted_values(saved_averages(run)))
    stopped = shutil.copytree(run, tmp_path / "resumed")
    shutil.rmtree(stopped / "export")
    shutil.rmtree(stopped / "checkpoints" / f"step_{STEPS:06d}")
    resumed = state(launch.run(config | {"output": str(stopped)}, processes=2, resume=True))
    assert resumed[0] == unbroken[0]
    assert resumed[1].keys() == unbroken[1].keys()
    assert all(torch.equal(resumed[1][key], unbroken[1][key]) for key in unbroken[1])
