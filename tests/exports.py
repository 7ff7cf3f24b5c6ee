"""A tuned policy and its export, for the tests of what other tools make of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
import zoo

from flowsteer.rl.export import export_lora
from flowsteer.rl.policy import Policy

RANK = 4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# alpha / rank = 3 rounds every element of lora_B once (6e-8 of it), and W + B A rounds otherwise than W x + B (A x): some
# 1e-6 after the blocks, on outputs of size 1. A LoRA at another strength differs by more than 1e-2.
CLOSE = 1e-4


def tuned(model: str, alpha: int) -> Policy:
    """A policy whose adapter does something."""
    policy = Policy(zoo.lifted(model), lora=(RANK, alpha, TARGETS), variants=frozenset(), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def write(policy: Policy, folder: Path) -> Path:
    """The export of a run with this policy."""
    engine = SimpleNamespace(full=torch.Tensor.detach, is_main=True, wait=lambda: None)
    return export_lora(policy, engine, folder).parent  # type: ignore[arg-type]
