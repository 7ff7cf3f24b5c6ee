"""Two processes that split the tokens of every pass are one: diffusers' context parallelism, forwards and backwards.

Each process of a team holds the whole prediction; its gradient is the part that its own tokens give.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from conftest import Make
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    ModelMixin,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from flowsteer.rewards.types import Scores
from flowsteer.rl.config import check_config, fitted, parse_config
from flowsteer.rl.config.teams import sharers
from flowsteer.rl.engine.context import SPLIT, check_split, split_sequences
from flowsteer.rl.engine.processes import Processes
from flowsteer.rl.scoring import read_scores, written_scores

# Products of half as many rows are added up in another order: some 1e-7 of the largest term. Norms are of terms of one sign.
ROUNDING = 2e-6

Case = tuple[ModelMixin, dict[str, Any]]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def grid(batch: tuple[int, ...], axes: int) -> Tensor:
    """Positions of 4 x 4 tokens."""
    ids = torch.zeros(*batch, 16, axes)
    ids[..., 1], ids[..., 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return ids


def wan(*, levels_of_tokens: bool = False) -> Case:
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2
    )
    timestep = torch.tensor([500.0, 300.0])
    if levels_of_tokens:  # Wan 2.2's 5B
        timestep = timestep[:, None].expand(2, 8).contiguous()
    return network, {
        "hidden_states": noise(2, 16, 2, 4, 4), "timestep": timestep, "encoder_hidden_states": noise(2, 7, 32),
    }  # fmt: skip


def flux() -> Case:
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    return network, {
        "hidden_states": noise(2, 16, 4), "timestep": torch.tensor([0.5, 0.3]), "encoder_hidden_states": noise(2, 8, 32),
        "pooled_projections": noise(2, 32), "guidance": torch.ones(2), "txt_ids": torch.zeros(8, 3), "img_ids": grid((), 3),
    }  # fmt: skip


def flux2() -> Case:
    network = Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    texts = torch.zeros(2, 8, 4)
    texts[..., 3] = torch.arange(8)
    return network, {
        "hidden_states": noise(2, 16, 4), "timestep": torch.tensor([0.5, 0.3]), "encoder_hidden_states": noise(2, 8, 32),
        "guidance": torch.ones(2), "txt_ids": texts, "img_ids": grid((2,), 4),
    }  # fmt: skip


CASES: dict[str, Callable[[], Case]] = {
    "wan": wan, "wan by token": lambda: wan(levels_of_tokens=True), "flux": flux, "flux2": flux2,
}  # fmt: skip


def passed(name: str, processes: Processes | None, *, checkpointing: bool) -> tuple[Tensor, Tensor]:
    """The prediction, and the gradient of all weights on this process."""
    torch.manual_seed(0)
    network, inputs = CASES[name]()
    for parameter in network.parameters():  # live ones, also where a new network has zeros
        nn.init.normal_(parameter, std=0.2)
    if checkpointing:
        network.enable_gradient_checkpointing()
    if processes is not None:
        split_sequences({"transformer": network}, processes)
    output: Tensor = network(**inputs, return_dict=False)[0]
    (output - noise(*output.shape)).square().mean().backward()
    gradients = [torch.zeros_like(own) if own.grad is None else own.grad for own in network.parameters()]
    return output.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def compared(config: dict[str, Any], *, resume: bool) -> None:
    """In each of two processes: what was split against what was not."""
    processes = Processes(cpu=True, timeout_s=60, team_size=2)
    found = {}
    for name in CASES:
        for checkpointing in (False, True):
            whole, expected = passed(name, None, checkpointing=checkpointing)
            output, part = passed(name, processes, checkpointing=checkpointing)
            one, other = processes.gather_all(output[None])
            gradient = processes.team_sum(part.clone())
            found[f"{name} {checkpointing}"] = {
                "alike": torch.equal(one, other),
                "output": float((output - whole).norm() / whole.norm()),
                "gradient": float((gradient - expected).norm() / expected.norm()),
                "part": float((2 * part - expected).norm() / expected.norm()),
            }
    said = processes.from_leader(b"the first" if processes.leads else b"somebody else")
    assert said == b"the first"
    assert processes.gather(torch.tensor([processes.process_index, 7])).tolist() == [0, 7]
    assert processes.gather_all(torch.tensor([processes.process_index])).tolist() == [0, 1]
    if processes.is_main:
        Path(config["output"]).write_text(json.dumps(found))
    processes.close()


def test_split_passes_are_whole_ones(tmp_path: Path) -> None:
    launch.run({"output": str(tmp_path / "found.json")}, processes=2, work=compared)
    found = json.loads((tmp_path / "found.json").read_text())
    assert {type(make()[0]).__name__ for make in CASES.values()} == set(SPLIT)
    for name, case in found.items():
        assert case["alike"], name  # bit for bit: all learn from the same samples
        assert case["output"] < ROUNDING, name
        assert case["gradient"] < ROUNDING, name
        assert case["part"] > 0.01, name  # neither process has it all


def test_scores_are_told_exactly() -> None:
    parts = {"ocr": torch.tensor([0.1, float("nan"), 1 / 3])}
    scores = Scores(total=parts["ocr"] * 3, parts=parts, failures={1: "the reward 'ocr' said nothing"})
    (told,) = read_scores(written_scores([scores]))
    assert told.total.dtype == torch.float32
    torch.testing.assert_close(told.total, scores.total, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(told.parts["ocr"], parts["ocr"], rtol=0, atol=0, equal_nan=True)
    assert told.failures == scores.failures


def test_what_cannot_be_split_is_refused() -> None:
    ltx = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
    )
    with pytest.raises(ValueError, match=r"context_parallel=2 cannot split transformer, a LTXVideoTransformer3DModel"):
        check_split({"transformer": ltx}, 2)
    with pytest.raises(ValueError, match=r"context_parallel=3 does not divide the 2 attention heads"):
        check_split({"transformer": wan()[0]}, 3)


@pytest.mark.parametrize(
    ("changes", "processes", "message"),
    [
        ({}, 3, "makes teams of so many processes, but the run has 3"),
        ({"model.attention": "sage"}, 2, "splits the attention of model.attention=native, not of sage"),
        ({"model.compile": True}, 2, "does not go together with model.compile"),
        ({"rollout.prompts_per_step": 3, "rollout.group_size": 3}, 4, r"among 2 teams of 2 processes x 2 updates"),
    ],
)
def test_settings_that_cannot_be_split_are_refused(
    make_config: Make, tmp_path: Path, changes: dict[str, Any], processes: int, message: str
) -> None:
    config = parse_config(make_config(tmp_path, **changes, **{"engine.context_parallel": 2}))
    with pytest.raises(ValueError, match=message):
        check_config(config, processes)


def test_a_team_counts_as_one(make_config: Make, tmp_path: Path) -> None:
    config = parse_config(make_config(tmp_path, **{"engine.context_parallel": 4}))
    check_config(config, 8)
    assert sharers(config, 8) == 2
    alone = parse_config(make_config(tmp_path))
    assert fitted(config, 8).rollout == fitted(alone, 2).rollout
