"""The ``flowsteer algorithms`` commands: what is there, and is it right.

What a command needs is imported when it runs, as in `flowsteer.rl.command.main`.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(help="Algorithms: list them, and check one.", no_args_is_help=True)
console = Console()

REFUSED = 1  # exit code of `check` if a check fails


@app.command("list")
def list_installed() -> None:
    """List the algorithms: their names, their papers, the package that brings them and where in it they are.

    A class of your own is an algorithm too, as `package.module:Class` or `path/to/file.py:Class`.

    **Example**: `flowsteer algorithms list`
    """
    from flowsteer.rl.plugins import list_algorithms

    table = Table("name", "what it does", "package", "where")
    for entry in list_algorithms():
        table.add_row(*map(Text, (entry.name, entry.about, entry.distribution, entry.target)))
    console.print(table)


@app.command()
def check(
    name: Annotated[
        str,
        typer.Argument(help="One of `flowsteer algorithms list`, `package.module:Class`, or `path/to/file.py:Class`."),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings to try it with, as in a configuration: `algorithm.clip_range=0.05 rollout.branching={}`.",
        ),
    ] = None,
) -> None:
    """Run the proofs that hold for every algorithm over one; a page, and exit code 1 if one fails.

    On a toy of four numbers, in about a minute: it learns, the first gradient raises the reward, ratios start at 1 and
    distances at 0, samples without a weight and groups with equal scores teach nothing, and more.

    **Example**: `flowsteer algorithms check ./my_algorithm.py:MyAlgorithm algorithm.clip_range=0.05`
    """
    from flowsteer.rl.check.page import check_algorithm, parse_settings, trials_of

    ok = True
    for title, trial in trials_of(name, parse_settings(settings or [])).items():
        with console.status(f"checking {title}") as status:
            page = check_algorithm(title, trial, progress=lambda text: status.update(f"checking {name}: {text}"))
        console.print(Text(page.text()), soft_wrap=True)
        ok = ok and page.ok
    if not ok:
        raise typer.Exit(REFUSED)
