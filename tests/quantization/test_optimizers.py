"""The optimisers: what each makes of a gradient, what it keeps, and that a resumed run goes on with the same bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import launch
import pytest
import torch
from conftest import Make
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toy import toy_config

from flowsteer.rl.build import build_optimizer_settings
from flowsteer.rl.config import check_config
from flowsteer.rl.engine.optimizer import restored_state, saved_state
from flowsteer.rl.metrics import read_metrics

RATE = 0.01
TOY = {"algorithm": {"name": "weighted_sft"}, "rollout.plan": {"name": "none"}}


def optimizer(name: str, parameters: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    given = {"name": name, "learning_rate": RATE, "weight_decay": 0.0, **settings}
    return build_optimizer_settings(toy_config(TOY | {"optimizer": given})).make(parameters)


def stepped(name: str, gradients: list[Tensor], **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """How far a parameter of zeros has come after these gradients, and the optimiser's state."""
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    made = optimizer(name, [parameter], **settings)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        made.step()
    return parameter.detach(), saved_state(made.state[parameter])


def noise(count: int, *shape: int) -> list[Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)))


def test_adamw8bit_is_adamw_up_to_the_rounding_of_its_state() -> None:
    """The first update starts from zeros, which are exact; from then on the two means have 8 bits."""
    first = noise(1, 64, 128)
    mine, exact = stepped("adamw8bit", first)[0], stepped("adamw", first)[0]
    torch.testing.assert_close(mine, exact, rtol=1e-5, atol=0)
    many = noise(20, 64, 128)
    mine, exact = stepped("adamw8bit", many)[0], stepped("adamw", many)[0]
    assert 0 < (mine - exact).norm() / exact.norm() < 0.05


def test_adafactor_is_exact_for_a_gradient_of_rank_one() -> None:
    """The square of r c is r^2 c^2: mean of the row times mean of the column over the mean. So an update is the sign's."""
    rows, columns = noise(1, 8)[0] + 3, noise(1, 6)[0] - 3
    moved, state = stepped("adafactor", [torch.outer(rows, columns)])
    torch.testing.assert_close(moved, torch.full((8, 6), RATE))  # the gradient is negative everywhere
    assert {key: value.shape for key, value in state.items() if value.dim()} == {
        "exp_avg_sq_row": (8,), "exp_avg_sq_col": (6,),
    }  # fmt: skip


def test_adafactor_moves_a_parameter_of_zeros_by_the_whole_rate() -> None:
    """A LoRA's second factor starts as zeros: a rate relative to a parameter's size would leave it there."""
    moved, _ = stepped("adafactor", noise(1, 16, 32))
    assert moved.square().mean().sqrt() == pytest.approx(RATE, rel=0.2)


@pytest.mark.parametrize(("name", "most"), [("adamw", 8.001), ("adamw8bit", 2.04), ("adafactor", 0.02)])
def test_the_bytes_of_the_state(name: str, most: float) -> None:
    """For each weight of a large matrix. bitsandbytes' blocks of 256 have two scales of 4 bytes: 2 + 8 / 256, and two maps
    of 1 KB for each tensor.
    """
    _, state = stepped(name, noise(1, 512, 512))
    held = sum(value.numel() * value.element_size() for value in state.values()) / 512**2
    assert 0.5 * most < held < most


def test_a_restored_state_is_what_it_was() -> None:
    """Counts are numbers or scalars on the CPU, but beside the parameter where a fused kernel reads them."""
    for name in ("adamw", "adamw8bit", "adafactor"):
        parameter = nn.Parameter(torch.zeros(64, 64))
        made = optimizer(name, [parameter])
        parameter.grad = torch.ones_like(parameter)
        made.step()
        before = made.state[parameter]
        after = restored_state(saved_state(before), parameter, fused=False)
        assert {key: type(value) for key, value in after.items()} == {key: type(value) for key, value in before.items()}
        assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in before)
    far, saved = torch.empty(2, device="meta"), {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}
    for fused, device in ((False, "cpu"), (True, "meta")):
        state = restored_state(saved, far, fused=fused)
        assert (state["step"].device.type, state["exp_avg"].device.type) == (device, "meta")


CASES = [("adamw8bit", "zero2", 1), ("adafactor", "plain", 1)]  # optimiser, strategy, processes
SLOW = [
    ("adamw8bit", "plain", 1),
    ("adamw8bit", "zero1", 1),
    ("adamw8bit", "zero2", 2),
    ("adamw8bit", "zero3", 2),
    ("adafactor", "plain", 2),
]


@pytest.mark.parametrize(
    ("name", "strategy", "processes"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_resumed_run_is_the_unbroken_one(
    make_config: Make, tmp_path: Path, name: str, strategy: str, processes: int
) -> None:
    """All weights are trained, of which 64 % are in tensors large enough for 8 bits."""
    settings = {
        "model.lora": None,
        "optimizer": {"name": name, "learning_rate": 1e-3, "max_grad_norm": 5e-3},
        "engine.strategy": strategy,
        "rollout.prompts_per_step": 2,
        "algorithm": {"name": "flow_grpo", "updates_per_rollout": 1, "kl_coef": 0.1},
    }
    unbroken = launch.run(make_config(tmp_path / "unbroken", **settings, num_steps=2), processes=processes)
    config = make_config(tmp_path / "run", **settings, num_steps=1)
    launch.run(config, processes=processes)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*/process_00000.safetensors")
    saved = load_file(checkpoint)
    if name == "adamw8bit":
        assert (
            sum(value.numel() for key, value in saved.items() if key.endswith("/state1") and value.dtype == torch.uint8)
            > 5e4 / processes
        )
    else:
        assert any(key.endswith("/exp_avg_sq_row") for key in saved)
    resumed = launch.run(config | {"num_steps": 2}, processes=processes, resume=True)
    ends = [
        [
            {key: value for key, value in line.items() if "seconds" not in key}
            for line in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (unbroken, resumed)
    ]
    assert ends[0] == ends[1]
    assert (ends[0][0]["ratio"], ends[0][0]["kl"]) == (1, 0)
    files = [
        {file.name: load_file(file) for file in (folder / "export").rglob("*.safetensors")}
        for folder in (unbroken, resumed)
    ]
    assert files[0].keys() == files[1].keys() != set()
    for file, tensors in files[0].items():
        assert all(torch.equal(value, files[1][file][key]) for key, value in tensors.items())


def test_adamw_is_fused_on_cuda_only() -> None:
    """PyTorch's own choice there holds copies of all parameters; on a CPU it stays, and with it the bits."""
    with FakeTensorMode():
        assert optimizer("adamw", [nn.Parameter(torch.empty(2, device="cuda"))]).defaults["fused"]
    assert optimizer("adamw", [nn.Parameter(torch.empty(2))]).defaults["fused"] is None


def refusal(**given: Any) -> str:
    with pytest.raises(ValueError, match="optimizer") as error:
        check_config(toy_config(TOY | given), 1)
    return str(error.value)


def test_settings_that_do_nothing_are_refused() -> None:
    told = refusal(optimizer={"name": "adafactor", "betas": (0.8, 0.9), "epsilon": 1e-5})
    assert (
        told == "optimizer.name=adafactor has no betas and no epsilon; leave optimizer.betas and optimizer.epsilon out"
    )
    told = refusal(optimizer={"name": "adafactor"}, **{"engine.strategy": "zero2"})
    assert "engine.strategy=zero2 puts all weights into one row; use optimizer.name=adamw8bit" in told


def test_a_missing_package_and_an_unfit_device_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(_: Any) -> None:
        raise NotImplementedError("no kernel for this device\nand a trace")

    parameters = [nn.Parameter(torch.zeros(2))]
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", no_kernel)
    with pytest.raises(
        ValueError, match=r"adamw8bit does not run on cpu with .* \(no kernel for this device\); use optimizer"
    ):
        optimizer("adamw8bit", parameters)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes.*pip install 'flowsteer\[quantization\]'"):
        optimizer("adamw8bit", parameters)
