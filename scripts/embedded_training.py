"""How the shipped pipelines are trained: optimizers, schedule, running average, and a loop that can be interrupted.

Shared by `scripts/pretrain_embedded.py` and `scripts/pretrain_edit.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

console = Console()
EMA_DECAY = 0.998


def warmup_then_decay(step: int, steps: int, warmup: int) -> float:
    """A learning rate's factor: linearly up, then along a cosine down to one hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def bar() -> Progress:
    """A progress bar with a place for a note."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=console,
    )  # fmt: skip


def build_optimizers(denoiser: nn.Module, blocks: list[nn.Module], rate: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the transformer's blocks, AdamW for everything else."""
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in denoiser.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


class Ema:
    """A running average of a module's weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """One step towards the module; faster at first, so that the random start is forgotten."""
        self.updates += 1
        rate = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        ours = list(self.weights.values())
        torch._foreach_lerp_(ours, [p.detach() for p in module.parameters()], rate)


def train_denoiser(
    denoiser: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    *,
    blocks: list[nn.Module],
    steps: int,
    rate: float,
    seed: int,
    work: Path,
    save_every: int,
    publish: Callable[[int, Ema, float], None],
) -> Ema:
    """Fit transformer and text encoders. ``publish(step, ema, loss)`` is called at every snapshot and at the end.

    ``loss_of`` draws a batch from a generator and returns its loss; Muon is for the matrices in ``blocks``.

    The state in ``work / "state.pt"`` is taken up where one is found. Each step draws from a generator of its own, so a resumed
    run sees what the unbroken one would.
    """
    optimizers, ema, start = build_optimizers(denoiser, blocks, rate), Ema(denoiser, EMA_DECAY), 0
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_then_decay(step, steps, min(200, steps // 10 + 1))
        )
        for optimizer in optimizers
    ]
    if (work / "state.pt").exists():
        state = torch.load(work / "state.pt", weights_only=True)
        denoiser.load_state_dict(state["model"])
        ema.weights, ema.updates, start = state["ema"], state["step"], state["step"]
        for part, saved in zip([*optimizers, *schedules], state["optimizers"]):
            part.load_state_dict(saved)
        console.print(f"resuming at step {start}")
    losses: list[float] = []
    with bar() as progress:
        task = progress.add_task("transformer", total=steps, completed=start, note="")
        for step in range(start, steps):
            loss = loss_of(torch.Generator().manual_seed(seed * 10**6 + step))
            loss.backward()
            nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            for part in (*optimizers, *schedules):
                part.step()
            denoiser.zero_grad(set_to_none=True)
            ema.update(denoiser)
            losses.append(loss.item())
            progress.update(task, advance=1, note=f"loss {np.mean(losses[-100:]):.4f}")
            if (step + 1) % save_every == 0 or step + 1 == steps:
                parts = [part.state_dict() for part in (*optimizers, *schedules)]
                state = {"model": denoiser.state_dict(), "ema": ema.weights, "step": step + 1, "optimizers": parts}
                torch.save(state, work / "state.tmp")
                (work / "state.tmp").replace(work / "state.pt")
                publish(step + 1, ema, float(np.mean(losses[-save_every:])))
    return ema
