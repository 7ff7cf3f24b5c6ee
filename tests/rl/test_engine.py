"""The engine on one process: what the optimiser works with at each update, against closed forms."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import launch
import pytest
import torch
from torch import nn
from toy import Toy, toy_config

from flowsteer.rl.build import batches_per_update, build_optimizer_settings, build_processes
from flowsteer.rl.config import Config
from flowsteer.rl.engine.base import Engine, Strategy, prepare
from flowsteer.rl.engine.fsdp import FsdpBackend
from flowsteer.rl.engine.processes import Processes
from flowsteer.rl.engine.zero import WRITTEN_FOR, check_release
from flowsteer.rl.policy import Policy

COUNT, WARMUP, RATE = 8, 3, 0.02
# with L = 8 - 3 updates after the warm-up, of which l are done: linear is 1 - l / L, cosine (1 + cos(pi l / L)) / 2
WARMING = [RATE / 3, 2 * RATE / 3, RATE]
FALLING = {
    "constant": [RATE] * 5,
    "linear": [RATE * part for part in (1, 0.8, 0.6, 0.4, 0.2)],
    "cosine": [RATE * (1 + math.cos(math.pi * done / 5)) / 2 for done in range(5)],
}


def prepared(config: Config) -> tuple[Toy, Engine]:
    """The toy under its optimiser, one backward pass a batch."""
    toy = Toy()
    policy = Policy(toy, lora=None, variants=frozenset(), seed=0)  # type: ignore[arg-type]
    engine = prepare(
        build_processes(config),
        policy,
        build_optimizer_settings(config),
        strategy="plain",
        dtype=torch.float32,
        batch_size=config.rollout.batch_size,
        batches=batches_per_update(config, 1),
        passes_per_batch=1,
    )
    return toy, engine


def updates(overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], list[float]]:
    """The optimiser's settings at each update of a run of the toy, and the learning rates that are reported."""
    algorithm = {"name": "weighted_sft", "updates_per_rollout": 1}
    base = {"algorithm": algorithm, "rollout.plan": {"name": "none"}, "num_steps": COUNT, "rollout.prompts_per_step": 1}
    config = toy_config(base | overrides)
    seen: list[dict[str, Any]] = []
    step = torch.optim.AdamW.step

    def spied(self: torch.optim.AdamW, *arguments: Any) -> Any:
        seen.extend(
            {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} for group in self.param_groups
        )
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    toy, engine = prepared(config)
    reported = []
    for _ in range(COUNT):
        info = engine.backward(toy.network.weight.square().sum())
        assert info is not None
        reported.append(info.learning_rate)
    return seen, reported


@pytest.mark.parametrize("schedule", FALLING)
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_every_update_has_the_learning_rate_of_its_number(
    schedule: str, warmup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update of a warm-up has a part of the rate, not 0; the last of a linear fall has 1 / L of it, not 0."""
    settings = {"learning_rate": RATE, "schedule": schedule, "warmup_updates": warmup}
    seen, reported = updates({"optimizer": settings}, monkeypatch)
    if warmup:
        expected = WARMING + FALLING[schedule]
    else:
        left = [1 - done / COUNT for done in range(COUNT)]
        shape = {"constant": [1.0] * COUNT, "linear": left}
        shape["cosine"] = [(1 - math.cos(math.pi * part)) / 2 for part in left]
        expected = [RATE * part for part in shape[schedule]]
    assert [group["lr"] for group in seen] == pytest.approx(expected, rel=1e-12)
    assert reported == pytest.approx(expected, rel=1e-12)


def test_the_optimiser_works_with_what_is_set_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"betas": [0.8, 0.95], "epsilon": 1e-5, "weight_decay": 0.03}
    seen, _ = updates({"optimizer": given}, monkeypatch)
    for group in seen:
        assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-5, 0.03)


def test_betas_are_momentum_first_and_squares_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW by hand, with betas far apart: what a run's parameters become is told by the order of the two."""
    optimizer = {"learning_rate": 0.1, "betas": [0.5, 0.9], "weight_decay": 0.0}
    config = toy_config(
        {"algorithm": {"name": "flow_grpo"}, "rollout.prompts_per_step": 1, "optimizer": optimizer, "num_steps": 3}
    )
    toy, engine = prepared(config)
    value, first, second = toy.network.bias[0].item(), 0.0, 0.0
    for number, slope in enumerate((0.3, -0.2, 0.1), start=1):  # within the clip
        engine.backward(slope * toy.network.bias[0])
        first, second = 0.5 * first + 0.5 * slope, 0.9 * second + 0.1 * slope**2
        value -= 0.1 * (first / (1 - 0.5**number)) / (math.sqrt(second / (1 - 0.9**number)) + 1e-8)
        assert toy.network.bias[0].item() == pytest.approx(value, abs=1e-6)


def test_private_attributes_are_read_of_one_release_of_deepspeed_only() -> None:
    check_release(deepspeed.__version__)
    with pytest.raises(ValueError, match=rf"release {WRITTEN_FOR}; 1.2.3 is installed. Install deepspeed=="):
        check_release("1.2.3")


class Plain(nn.Module):
    """A layer in bfloat16, as the pipeline and its denoiser at once."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(16, 8, bias=False, dtype=torch.bfloat16)
        self.layer.weight.data = (torch.randn(8, 16, generator=generator) / 4).bfloat16()
        self.denoisers = {"network": self.layer}
        self.call: Any = lambda name, inputs: self.denoisers[name](inputs)

    def route(self, call: Any) -> None:
        self.call = call


PASSES = 64


def summed(strategies: Sequence[Strategy], log: Path) -> None:
    """In its own process: how far the gradient that the optimiser gets is from the float32 sum over the passes."""
    log.write_text(json.dumps({strategy: error_of_the_sum(strategy) for strategy in strategies}))


def error_of_the_sum(strategy: Strategy) -> tuple[int, str, float]:
    network = Plain()
    policy = Policy(network, lora=None, variants=frozenset(), seed=0)  # type: ignore[arg-type]
    settings = replace(build_optimizer_settings(toy_config({"algorithm": {"name": "flow_grpo"}})), max_grad_norm=1e9)
    engine = prepare(
        Processes(cpu=True, timeout_s=60),
        policy,
        settings,
        strategy=strategy,
        dtype=torch.bfloat16,
        batch_size=4,
        batches=PASSES,
        passes_per_batch=1,
    )
    passes: list[torch.Tensor] = []
    backend = engine.backend
    leaf = backend.leaves["network.weight"] if isinstance(backend, FsdpBackend) else network.layer.weight
    leaf.register_hook(lambda gradient: passes.append(gradient.clone()))
    given: list[torch.Tensor] = []
    step = torch.optim.AdamW.step

    def spied(self: torch.optim.AdamW, *arguments: Any) -> Any:
        given.extend(p.grad.detach().clone() for group in self.param_groups for p in group["params"])
        return step(self, *arguments)

    generator = torch.Generator().manual_seed(1)
    with patch.object(torch.optim.AdamW, "step", spied):
        for _ in range(PASSES):
            inputs = torch.randn(4, 16, generator=generator).bfloat16()
            engine.backward(network.call("network", inputs).float().square().mean())
    exact = torch.stack(passes).double().sum(0).flatten()  # each was divided by the number of passes before backward
    error = (given[0].double().flatten()[: len(exact)] - exact).norm() / exact.norm()
    return len(passes), str(given[0].dtype), float(error)


def test_gradients_of_passes_in_bfloat16_are_added_in_float32(tmp_path: Path) -> None:
    """Float32 sums are off by some 1e-7 of the norm; sums in bfloat16, of 8 bits, by 1e-2."""
    process = launch.process(summed, ("zero1", "zero2", "zero3", "fsdp2"), tmp_path / "log")
    process.start()
    assert launch.wait([process]) == [0]
    for strategy, (passes, dtype, error) in json.loads((tmp_path / "log").read_text()).items():
        assert passes == PASSES, strategy
        assert dtype == "torch.float32", strategy
        assert error < 1e-6, strategy


class TwoLayers(nn.Module):
    """A network of which a pass may leave the second layer out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, inputs: torch.Tensor, both: bool) -> torch.Tensor:
        return self.second(self.first(inputs)) if both else self.first(inputs)


def reached_on_one(config: dict[str, Any], *, resume: bool) -> None:
    """Two processes, of which the second's pass leaves a layer out: the gradient's norm, and the weights after an update."""
    found = {}
    processes = Processes(cpu=True, timeout_s=60)
    inputs = torch.ones(4, 16) * (1 + processes.process_index)
    for strategy in ("plain", "fsdp2"):
        network = Plain()
        network.denoisers = {"network": TwoLayers()}
        engine = prepare(
            processes,
            Policy(network, lora=None, variants=frozenset(), seed=0),  # type: ignore[arg-type]
            build_optimizer_settings(toy_config({"algorithm": {"name": "flow_grpo"}})),
            strategy=strategy,
            dtype=torch.float32,
            batch_size=4,
            batches=1,
            passes_per_batch=1,
        )
        output = network.denoisers["network"](inputs, processes.is_main)
        info = engine.backward(output.square().mean())
        assert info is not None
        weights = [engine.full(value).flatten().tolist() for value in network.denoisers["network"].parameters()]
        found[strategy] = [info.grad_norm, *itertools.chain(*weights)]
    if processes.is_main:
        Path(config["output"]).write_text(json.dumps(found))
    processes.close()


def test_a_layer_that_one_process_leaves_out_is_exchanged_all_the_same(tmp_path: Path) -> None:
    launch.run({"output": str(tmp_path / "found")}, processes=2, work=reached_on_one)
    found = json.loads((tmp_path / "found").read_text())
    assert found["fsdp2"] == pytest.approx(found["plain"], rel=1e-5, abs=1e-6)
