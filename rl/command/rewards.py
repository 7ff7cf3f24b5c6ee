"""The ``flowsteer rewards`` commands: what is installed, is it right, and where it runs.

What a command needs is imported when it runs, as in `flowsteer.rl.command.main`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(help="Rewards: list, certify and serve them; environments for old packages.", no_args_is_help=True)
env_app = typer.Typer(help="Environments of their own for rewards whose packages cannot live with ours.")
app.add_typer(env_app, name="env", no_args_is_help=True)
console = Console()

REFUSED = 1  # exit code of a certificate that was refused

NameArgument = Annotated[
    str,
    typer.Argument(
        help="A reward of `flowsteer rewards list`, `package.module:attribute`, or `path/to/file.py:attribute`."
    ),
]
OptionOption = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="KEY=VALUE", help="An argument of the reward's constructor; repeatable."),
]
EnvironmentArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A recipe of `flowsteer rewards env list`, or the path of a `.toml` file.")
]


@app.command("list")
def list_installed() -> None:
    """List the installed rewards: their names, what they score, the package that brings them.

    A function or class of your own is a reward too, as `package.module:attribute` or `path/to/file.py:attribute`.

    **Example**: `flowsteer rewards list`
    """
    from flowsteer.rewards.registry import list_rewards

    table = Table("name", "what it scores", "package")
    for entry in list_rewards():
        table.add_row(*map(Text, (entry.name, entry.doc, entry.distribution)))
    console.print(table)


@app.command()
def certify(
    name: NameArgument,
    option: OptionOption = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images, their prompts in its `metadata.jsonl` or file names; default: built-in ones."
        ),
    ] = None,
    environment: Annotated[
        str | None, typer.Option(help="Ask the scorer NAME of this managed environment, in a worker.")
    ] = None,
    prompt: Annotated[
        bool | None,
        typer.Option(
            "--prompt/--no-prompt", help="Whether the prompt must matter; default: what the reward says itself."
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="What equal scores may differ by, relative to their spread; bfloat16 wants 1e-2."),
    ] = 1e-4,
    golden: Annotated[Path | None, typer.Option(help="File of golden scores that must be met.")] = None,
    write_golden: Annotated[
        Path | None, typer.Option(help="Write the scores, once certified, as golden ones into this file.")
    ] = None,
) -> None:
    """Hold a reward to the contract that training relies on; one page, and exit code 1 if it is refused.

    Order, batches, sizes, determinism, sensitivity to image and prompt, threads, missing scores, side effects, and how
    fast it is. `docs/rewards.md` explains each check.

    **Example**: `flowsteer rewards certify ocr -o mode=recognize`
    """
    from functools import partial

    from flowsteer.rewards.certify.certificate import CHECKS
    from flowsteer.rewards.certify.certificate import certify as hold_to_the_contract
    from flowsteer.rewards.certify.hosted import hosted_checks
    from flowsteer.rewards.certify.inputs import read_folder
    from flowsteer.rewards.hosts.child import WorkerReward
    from flowsteer.rewards.registry import load_reward, target_of
    from flowsteer.rl.config import parse_overrides

    options = parse_overrides(option or [])
    checks = CHECKS
    if environment is None:
        target_of(name)  # a name that is none is no reward to refuse
        make: Any = partial(load_reward, name, **options)
    else:
        from flowsteer.rewards.envs.environments import locate

        python, target = locate(environment, name)
        make = partial(WorkerReward, target, python=str(python), options=options, name=name)
        checks = {**CHECKS, **hosted_checks(lambda s: make(deadline_s=s, deadline_per_image_s=0.0))}
    pixels, prompts, columns = read_folder(images) if images is not None else (None, None, None)
    if prompts is not None and len(prompts) < 4:
        raise ValueError(f"--images {images} holds {len(prompts)} images; at least 4 are needed")
    given: Any = {"uses_prompt": prompt, "tolerance": tolerance, "checks": checks, "folder": images}
    with _check_told(name) as progress:
        certificate = hold_to_the_contract(
            make, name=name, images=pixels, prompts=prompts, columns=columns, golden=golden, progress=progress, **given
        )
    console.print(Text(certificate.text()), soft_wrap=True)
    if not certificate.ok:
        raise typer.Exit(REFUSED)
    if write_golden is not None:
        certificate.golden(write_golden)
        console.print(Text(f"golden scores: {write_golden}"))


@app.command()
def serve(
    name: NameArgument,
    option: OptionOption = None,
    environment: Annotated[
        str | None, typer.Option(help="Serve the scorer NAME of this managed environment instead.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free.")] = 8700,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of the pixels of a batch.")] = 2**30,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that callers must give; default $FLOWSTEER_REWARD_TOKEN.")
    ] = None,
) -> None:
    """Serve a reward to runs on other machines, which name it with `host: {url: http://...}`.

    The traffic is not encrypted: beyond this machine put it behind a tunnel, or keep it in a network of your own.

    **Example**: `flowsteer rewards serve ocr --token-file token.txt --host 0.0.0.0`
    """
    import json
    import os

    from flowsteer.rewards.hosts.remote import SERVER_FILE
    from flowsteer.rewards.registry import target_of
    from flowsteer.rl.config import parse_overrides

    python, target = sys.executable, ""
    if environment is None:
        target = target_of(name)
    else:
        from flowsteer.rewards.envs.environments import locate

        python, target = map(str, locate(environment, name))
    command = [python, str(SERVER_FILE), target, "--host", host, "--port", str(port)]
    command += ["--max-body-bytes", str(max_body_bytes), "--options", json.dumps(parse_overrides(option or []))]
    command += ["--token-file", str(token_file)] if token_file is not None else []
    os.execv(python, command)  # its output, its signals and its end are this command's


@env_app.command("list")
def env_list() -> None:
    """List the recipes: what is built, where, and on what each was tried.

    **Example**: `flowsteer rewards env list`
    """
    from flowsteer.rewards.envs.environments import list_environments

    table = Table("name", "scorers", "state", "tried", "what it is for")
    for found in list_environments():
        state = "not built"
        if found.path is not None:
            old = "" if found.current else ", of an older recipe"
            state = f"{found.path} (python {found.python}, {found.size / 1e9:.1f} GB{old})"
        tried = found.tried or "not tried"
        table.add_row(*map(Text, (found.name, ", ".join(found.scorers), state, tried, found.about)))
    console.print(table)


@env_app.command("create")
def env_create(
    name: EnvironmentArgument,
    python: Annotated[
        str | None,
        typer.Option(help="Interpreter to build it with; default: this one, or another that the recipe takes."),
    ] = None,
) -> None:
    """Build an environment. Nothing is installed into the one that this runs in.

    **Example**: `flowsteer rewards env create originals`
    """
    from flowsteer.rewards.envs.environments import create

    with _told():
        create(name, python=python, progress=_say)


@env_app.command("check")
def env_check(name: EnvironmentArgument) -> None:
    """Is a built environment still what it was: its packages, its imports, its golden scores?

    **Example**: `flowsteer rewards env check originals`
    """
    from flowsteer.rewards.envs.environments import check

    with _told():
        check(name, progress=_say)


@env_app.command("remove")
def env_remove(name: EnvironmentArgument) -> None:
    """Delete an environment.

    **Example**: `flowsteer rewards env remove originals`
    """
    from flowsteer.rewards.envs.environments import remove

    if not remove(name, progress=_say):
        raise ValueError(f"nothing is built of the recipe {name!r}")


@contextmanager
def _check_told(name: str) -> Iterator[Callable[[str], None]]:
    """Say on stderr which check begins: a line each, which a terminal overwrites. The last one stays if the process dies."""
    import faulthandler

    begin, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__, all_threads=False)

    def progress(check: str) -> None:
        print(f"{begin}certifying {name}: {check}", end=end, file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        print(begin, end="", file=sys.stderr, flush=True)


@contextmanager
def _told() -> Iterator[None]:
    """A step of a build that failed is no fault of ours: its message is enough."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _say(line: str) -> None:
    console.print(Text(line), soft_wrap=True)
