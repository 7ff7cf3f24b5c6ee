"""`flowsteer train`. What it needs is imported when it runs, as in `flowsteer.rl.command.main`."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from flowsteer.rollout.imports import importing

STOPPED = 128  # plus the signal's number: the exit code of a run that SIGTERM (143) or Ctrl-C (130) ended
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides such as `rollout.group_size=8 optimizer.learning_rate=1e-4`; `flowsteer config keys` lists all.",
    ),
]


def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of one that is shipped, such as `embedded_nft_composition`.")
    ],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output folder, if there is one.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Fine-tune a pipeline with rewards, and write the result as weights that diffusers loads.

    Runs on one process, or on many under `torchrun` or `accelerate launch`. The output folder gets `config.yaml`,
    `metrics.jsonl`, `evaluations/`, `checkpoints/`, `export/` and `report.html`.

    `flowsteer config keys` prints every key with its type, default and meaning.

    **Example**: `flowsteer train embedded_nft_composition output=runs/first num_steps=20`
    """
    with importing():
        from flowsteer.rl.compare import TooFewScores
        from flowsteer.rl.config import load_config
        from flowsteer.rl.start import start
        from flowsteer.rl.train import train as train_run

    unknown = next((given for given in (config, *(overrides or [])) if given.startswith("-")), None)
    if unknown is not None:
        raise ValueError(
            f"there is no option {unknown.partition('=')[0]}; settings are given without dashes, such as num_steps=20, and "
            "`flowsteer train --help` lists the options"
        )
    run = start(load_config(config, overrides or []), resume=resume, quiet=quiet)
    try:
        train_run(run)
        done = max(run.saving.checkpoints.steps())
        if done < run.num_steps:
            run.screen.print(f"stopped after {done} of {run.num_steps} steps; the same command with --resume goes on")
            raise typer.Exit(STOPPED + run.saving.stopped_by)
        exported = run.export()
        if run.engine.is_main:
            from flowsteer.rl.report.page import write_report

            report = write_report(run.folder)
            run.screen.print(f"weights: {exported}\nreport:  {report}")
    except KeyboardInterrupt:
        run.screen.print(_ended_now(run.saving.checkpoints.steps()))
        raise typer.Exit(STOPPED + signal.SIGINT) from None
    except TooFewScores as error:
        raise TooFewScores(
            f"{error}. The state before this step is saved: once the reward works again, go on with --resume"
        ) from error
    finally:
        run.close()


def _ended_now(saved: list[int]) -> str:
    """What is left of a run that a second Ctrl-C ended: ``saved`` are the steps with a checkpoint, ascending."""
    if not saved:
        return "ended in the middle of a step, before the first checkpoint"
    return f"ended in the middle of a step; the same command with --resume goes on after step {saved[-1]}"
