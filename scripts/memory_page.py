"""docs/memory.md: what `flowsteer plan` says of well-known models and of the shipped configurations.

    python scripts/memory_page.py            # prints the page; about six minutes on a core
    python scripts/memory_page.py --write    # writes docs/memory.md
    python scripts/memory_page.py --whole    # only compares the plan's activations with those of whole networks

Nothing is downloaded and no weights are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import diffusers
import torch
import typer

from flowsteer.rl.config import load_config, shipped_configs
from flowsteer.rl.plan.advice import proposals
from flowsteer.rl.plan.count import activations, count_pass
from flowsteer.rl.plan.files import read_model
from flowsteer.rl.plan.inputs import UNPADDED_TOKENS, shapes_of
from flowsteer.rl.plan.parts import CUDA_CONTEXT, DTYPES, estimate
from flowsteer.rl.plan.settings import Settings, batches_that_divide

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/memory.md"
GB = 1e9
CARDS = (24, 40, 48, 80)

INTRODUCTION = """\
# Memory

What `flowsteer plan` predicts for well-known models and for the shipped configurations. Made by
`python scripts/memory_page.py --write` with diffusers {diffusers} and torch {torch}. Do not edit it by hand.

All numbers are GB of 1e9 bytes, of the GPU that has most, at the peak of the training step. A card of "80 GB" has 85 of
them. Weights come from configuration files, activations from the real networks under fake tensors, and {context:g} GB are
added for CUDA and NCCL. Not counted are workspaces of convolutions, fragmentation, and rewards on the trainer's GPU. No
number was measured on a GPU. Pipelines that do not pad their prompts (Qwen-Image, Z-Image) are given {tokens} text tokens.
"""
MODELS_NOTE = """\
Flow-GRPO with an averaged policy, rank 32 on all attention and feed-forward layers, bfloat16, 8 processes. Each column of a
LoRA is on top of those before it; *all weights* have parked encoders and gradient checkpointing, too. Columns: `parked` is
`model.offload.text_encoders=true`, `checkpointed` is `model.gradient_checkpointing=true`, `int8` and `nf4` are
`model.quantize`.
"""
CARDS_NOTE = """\
The smallest card on which a LoRA of rank 32 can be trained at the size above and `rollout.batch_size=1`, alone, with the
options that cost least time first.
"""
CONFIGS_NOTE = """\
As they are on 8 GPUs, and with what they fit one card of 24 GB by a LoRA, alone.
"""


WHOLE_NOTE = """\
`flowsteer plan` counts one and two blocks of each kind, one and two rows, and goes on in a straight line. Here are the
activations of an update's pass against a count of the whole network with all of its rows.
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model at a size."""

    name: str
    path: str
    size: str
    height: int
    width: int
    batch: int
    guided: bool
    video: bool = False

    def settings(self, **changed: object) -> Settings:
        """A Flow-GRPO run with a LoRA."""
        base = Settings(
            path=self.path,
            dtype="bfloat16",
            height=self.height,
            width=self.width,
            call="{}",
            rank=32,
            targets="auto",
            quantize=None,
            checkpointing=0,
            offload_text_encoders=False,
            offload_vae=False,
            vae_dtype="bfloat16",
            vae_slicing=False,
            vae_tiling=False,
            strategy="plain",
            optimizer="adamw",
            moving=("ema",),
            reference=False,
            num_processes=8,
            num_prompts=8 if self.video else 48,
            group_size=8 if self.video else 24,
            batch_size=self.batch,
            train_parts=1,
            updates=1,
            guided=self.guided,
            train_guided=self.guided,
            two_conditionings=False,
            pairs=False,
            pools=0,
            ways=1,
            transitions=9,
            means=False,
        )
        return replace(base, **changed)  # type: ignore[arg-type]


WAN = {"size": "480 x 832, 81 frames", "height": 480, "width": 832, "batch": 1, "guided": True, "video": True}
CASES = (
    Case(
        name="SD3.5-medium",
        path="stabilityai/stable-diffusion-3.5-medium",
        size="512",
        height=512,
        width=512,
        batch=8,
        guided=True,
    ),
    Case(
        name="FLUX.1-dev", path="black-forest-labs/FLUX.1-dev", size="512", height=512, width=512, batch=3, guided=True
    ),
    Case(
        name="FLUX.2-dev", path="black-forest-labs/FLUX.2-dev", size="512", height=512, width=512, batch=2, guided=True
    ),
    Case(name="Qwen-Image", path="Qwen/Qwen-Image", size="512", height=512, width=512, batch=4, guided=True),
    Case(
        name="Z-Image-Turbo",
        path="Tongyi-MAI/Z-Image-Turbo",
        size="1024",
        height=1024,
        width=1024,
        batch=2,
        guided=False,
    ),
    Case(name="Wan 2.1 1.3B", path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", **WAN),  # type: ignore[arg-type]
    Case(name="Wan 2.1 14B", path="Wan-AI/Wan2.1-T2V-14B-Diffusers", **WAN),  # type: ignore[arg-type]
)


def main(
    write: Annotated[bool, typer.Option("--write", help=f"Write {PAGE}.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="Only compare with whole networks.")] = False,
) -> None:
    """Make the page."""
    if whole:
        for line in comparison():
            typer.echo(line)
        return
    text = page()
    if write:
        (ROOT / PAGE).write_text(text, encoding="utf-8")
    else:
        typer.echo(text, nl=False)


def page() -> str:
    """The page as Markdown."""
    head = INTRODUCTION.format(
        diffusers=diffusers.__version__, torch=torch.__version__, context=CUDA_CONTEXT / GB, tokens=UNPADDED_TOKENS
    )
    parts = [head, "## Models\n", MODELS_NOTE, *models(), "", "## The smallest card\n", CARDS_NOTE, *cards(), ""]
    parts += [
        "## The shipped configurations\n",
        CONFIGS_NOTE,
        *configurations(),
        "",
        "## How far model files are confirmed\n",
    ]
    parts += [f"- {case.name}: {read_model(case.path).checked}." for case in CASES]
    return "\n".join(parts) + "\n"


def models() -> Iterator[str]:
    """GB by model and option."""
    columns = ("LoRA", "parked", "checkpointed", "int8", "nf4", "all weights, ZeRO-2", "ZeRO-3", "FSDP2")
    yield line(("model", "pixels", "batch", *columns))
    yield line(["---"] * (3 + len(columns)))
    for case in CASES:
        plain = case.settings()
        parked = replace(plain, offload_text_encoders=True)
        light = replace(parked, checkpointing=1)
        every = replace(light, rank=None)
        runs = (plain, parked, light, replace(light, quantize="int8"), replace(light, quantize="nf4"))
        shared = tuple(replace(every, strategy=name) for name in ("zero2", "zero3", "fsdp2"))
        yield line((case.name, case.size, case.batch, *(f"{estimate(run).peak / GB:.1f}" for run in (*runs, *shared))))


def cards() -> Iterator[str]:
    """The smallest card of each model, and with what."""
    yield line(("model", "pixels", "card", "GB", "settings"))
    yield line(["---"] * 5)
    for case in CASES:
        start = case.settings(batch_size=1, num_processes=1, num_prompts=1)
        found = next((fit for card in CARDS if (fit := fitted(start, card, [1])) is not None), None)
        if found is None:
            least = fitted(start, 0, [1], least=True)
            assert least is not None
            yield line((case.name, case.size, "none", f"{least[0]:.1f}", code(least[1])))
        else:
            yield line((case.name, case.size, f"{found[2]} GB", f"{found[0]:.1f}", code(found[1])))


def fitted(
    settings: Settings, card: int, sizes: Sequence[int], *, least: bool = False
) -> tuple[float, list[str], int] | None:
    """GB and settings with which a run fits a card, None if none do."""
    peak, chosen = estimate(settings).peak, {}
    for step in proposals(settings, card * GB, sizes):
        chosen[step.setting.split("=")[0]] = step.setting  # a later value takes the place of an earlier one
        peak = step.peak
    return (peak / GB, [*chosen.values()], card) if least or peak <= card * GB else None


def configurations() -> Iterator[str]:
    """Which shipped configurations fit 8 x 80 GB, and what makes them fit one card of 24 GB."""
    yield line(("configuration", "GB on 8 GPUs", "fits 80", "GB on one of 24", "with"))
    yield line(["---"] * 5)
    for name in real_configurations():
        config = load_config(name)
        settings = Settings.of(config, 8)
        peak = estimate(settings).peak / GB
        alone, before = Settings.of(config, 1), []
        if alone.rank is None:
            alone = replace(alone, rank=32, targets="auto", strategy="plain")
            before = ["model.lora={rank: 32}", "engine.strategy=plain"]
        most = max(config.rollout.batch_size, config.rollout.group_size)
        small = fitted(alone, 24, batches_that_divide(config, 1, most))
        one = (f"{small[0]:.1f}", code([*before, *small[1]])) if small else ("does not fit", "")
        yield line((f"`{name}`", f"{peak:.1f}", "yes" if peak <= 80 else "no", *one))


def comparison() -> Iterator[str]:
    """Activations of the plan against those of the whole network: of every configuration, and of every model above."""
    yield line(("of", "size", "checkpointing", "rows", "plan GB", "whole network GB", "difference"))
    yield line(["---"] * 7)
    named = [(name, Settings.of(load_config(name), 8)) for name in real_configurations()]
    named += [(case.name, case.settings(checkpointing=every)) for case in CASES for every in (0, 1)]
    done = set()
    for name, own in named:
        model = read_model(own.path)
        shapes = shapes_of(model, height=own.height, width=own.width, call=dict(own.arguments))
        rows = own.trained_rows * (2 if own.train_guided and shapes.guidance == "batch" else 1)
        lora, dtype = None if own.rank is None else (own.rank, own.targets), DTYPES[own.dtype]
        checkpointing = bool(own.checkpointing)
        key = (own.path, own.height, own.width, own.arguments, lora, checkpointing, rows)
        if key in done:
            continue
        done.add(key)
        planned = activations(*key[:4], dtype, lora, checkpointing).at(rows)
        counted = count_pass(
            model, shapes, dtype=dtype, lora=lora, checkpointing=checkpointing, rows=rows, sampling=False
        )
        mine, whole = (each.kept + each.beside for each in (planned, counted))
        numbers = (f"{mine / GB:.2f}", f"{whole / GB:.2f}", f"{100 * (mine / whole - 1):+.1f} %")
        yield line((name, f"{own.height} x {own.width}", "yes" if checkpointing else "no", rows, *numbers))


def real_configurations() -> list[str]:
    """The shipped configurations of published models."""
    names = [file.removesuffix(".yaml") for file in shipped_configs()]
    return [name for name in names if not name.startswith("embedded")]


def code(settings: Sequence[str]) -> str:
    return " ".join(f"`{setting}`" for setting in settings)


def line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    typer.run(main)
