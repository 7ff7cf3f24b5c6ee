"""`flowsteer plan`. What it needs is imported when it runs, as in `flowsteer.rl.command.main`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowsteer.rl.command.training import Overrides

if TYPE_CHECKING:
    from flowsteer.rl.plan.advice import Proposal
    from flowsteer.rl.plan.parts import Estimate

GB = 1e9
console = Console()


def plan(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of one that is shipped, such as `sd35m_flow_grpo_ocr`.")
    ],
    overrides: Overrides = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help="Processes of the run; default: WORLD_SIZE if it is set, else 8."),
    ] = None,
    memory: Annotated[float, typer.Option("--memory", min=1, help="GB (1e9 bytes) of each GPU.")] = 80.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Predict the memory of a run by part, from configuration files alone: no weights are read or made.

    Says whether the run fits, the largest `rollout.batch_size` that fits, and settings that save memory in the order of the
    time that they cost, each on top of those before it. Activations are counted with the real networks under fake tensors.
    Ends with exit code 1 if the run does not fit.

    **Example**: `flowsteer plan sd35m_flow_grpo_ocr --memory 24 rollout.batch_size=4`
    """
    from flowsteer.rl.config import load_config
    from flowsteer.rl.plan.advice import largest_batch, proposals
    from flowsteer.rl.plan.parts import checked_of, estimate
    from flowsteer.rl.plan.settings import Settings, accepts, batches_that_divide

    loaded = load_config(config, overrides or [])
    processes = gpus or int(os.environ.get("WORLD_SIZE", "8"))
    settings = Settings.of(loaded, processes)
    found = estimate(settings)
    limit = memory * GB
    sizes = batches_that_divide(loaded, processes, most=4 * max(loaded.rollout.batch_size, loaded.rollout.group_size))
    report: dict[str, Any] = {
        "config": config,
        "model": settings.path,
        "checked": checked_of(settings),
        "gpus": processes,
        "memory_gb": memory,
        "rollout_gb": _in_gb(found.rollout),
        "update_gb": _in_gb(found.update),
        "rollout_moments_gb": _in_gb(found.moments),
        "peak_gb": round(found.peak / GB, 2),
        "fits": found.peak <= limit,
        "batch_size": settings.batch_size,
        "batch_size_divides": settings.batch_size in sizes,
        "largest_batch_size": largest_batch(settings, limit, sizes),
        "trained_parameters": found.trained,
        "host_gb_per_node": round(found.host / GB, 1),
        "checkpoint_gb": round(found.disk / GB, 2),
        "rewards_not_counted": sorted(name for name, section in loaded.rewards.items() if section.host is None),
    }
    steps = [*proposals(settings, limit, sizes, accepts=lambda chosen: accepts(loaded, processes, chosen))]
    report["options"] = [
        {key: value for key, value in asdict(step).items() if key in ("setting", "costs")}
        | {"saves_gb": round(step.saves / GB, 2), "peak_gb": round(step.peak / GB, 2)}
        for step in steps
    ]
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _show(report, found, steps)
    if not report["fits"]:
        raise typer.Exit(1)


def _in_gb(parts: Any) -> dict[str, float]:
    return {name: round(value / GB, 3) for name, value in parts.items() if value}


def _show(report: dict[str, Any], found: Estimate, steps: Sequence[Proposal]) -> None:
    """The tables of a terminal."""
    table = Table("part", title=f"{report['config']}: GB of the GPU that has most", title_justify="left")
    table.add_column("rollout", justify="right")
    table.add_column("update", justify="right")
    for name in dict.fromkeys((*found.rollout, *found.update)):
        drawn, trained = found.rollout.get(name, 0.0), found.update.get(name, 0.0)
        if max(drawn, trained) >= GB / 200:
            table.add_row(Text(name), _number(drawn), _number(trained))
    table.add_section()
    table.add_row("sum", _number(sum(found.rollout.values())), _number(sum(found.update.values())))
    console.print(table)
    processes, memory = report["gpus"], report["memory_gb"]
    verdict = "fits" if report["fits"] else "does not fit"
    lines = [f"{report['peak_gb']:.1f} GB {verdict} into {processes} x {memory:g} GB"]
    largest = report["largest_batch_size"]
    lines.append(
        f"largest rollout.batch_size that fits and divides the samples over {processes} processes: {largest or 'none'} "
        f"(it is {report['batch_size']}{'' if report['batch_size_divides'] else ', which does not divide them'})"
    )
    lines.append(
        f"host memory of a node {report['host_gb_per_node']:.0f} GB, a checkpoint {report['checkpoint_gb']:.1f} GB"
    )
    lines.append(f"model files: {report['checked']}")
    if report["rewards_not_counted"]:
        lines.append(f"not counted: rewards in the trainer's process ({', '.join(report['rewards_not_counted'])})")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if steps:
        advice = Table("setting", "costs in time", title="each on top of those before it", title_justify="left")
        advice.add_column("saves GB", justify="right")
        advice.add_column("then GB", justify="right")
        for step in steps:
            advice.add_row(Text(step.setting), Text(step.costs), _number(step.saves), _number(step.peak))
        console.print(advice)
        if steps[-1].peak > memory * GB:
            console.print("with all of these it still does not fit", highlight=False)


def _number(value: float) -> str:
    return f"{value / GB:.2f}" if value else ""
