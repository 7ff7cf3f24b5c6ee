"""The ``flowsteer`` command. Every command ends a user's mistake with one message and exit code 2.

What a command needs is imported when it runs: ``flowsteer --help`` shall not wait for torch.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import metadata
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from flowsteer.rl.command import models, planning, results, training
from flowsteer.rl.command.algorithms import app as algorithms_app
from flowsteer.rl.command.rewards import app as rewards_app

app = typer.Typer(
    name="flowsteer",
    help="Reinforcement-learning fine-tuning of flow and diffusion models, for diffusers pipelines.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(rewards_app, name="rewards")
app.add_typer(algorithms_app, name="algorithms")
config_app = typer.Typer(help="The configuration of a run: its keys.", no_args_is_help=True)
app.add_typer(config_app, name="config")
console, stderr = Console(), Console(stderr=True)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"flowsteer {metadata.version('flowsteer')}")
    except metadata.PackageNotFoundError:
        raise ValueError("flowsteer is not installed here, so it has no version: pip install -e .") from None
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself; without a docstring of its own for users, who read the app's help."""


for command in (training.train, planning.plan, results.evaluate, results.export, results.sample, results.score):
    # an unknown option of `train` is most likely a setting with dashes: `train` itself says so
    unknown = {"ignore_unknown_options": True} if command is training.train else {}
    app.command(context_settings=unknown)(command)
app.command("check-model")(models.check_model)
app.command("show-loop")(models.show_loop)
app.command()(results.report)
config_app.command("list")(models.config_list)
config_app.command("show")(models.config_show)
config_app.command("keys")(models.config_keys)


_NO_NEWS = {  # by logger, what its messages hold that are no news
    # our LoRAs are for denoisers: they hold nothing for the text encoders
    "diffusers.loaders.lora_base": "No LoRA keys associated to",
    # said at each start where the extra `quantization` is installed, of kernels and classes that are not used here
    "torchao": "Failed to load",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "torch.utils._pytree": "is an Enum subclass",
}


def _tells_something(record: logging.LogRecord) -> bool:
    return _NO_NEWS[record.name] not in record.getMessage()


def main() -> None:
    """Run the command; a user's mistake is one message, without a traceback unless FLOWSTEER_TRACEBACK=1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in _NO_NEWS:
        logging.getLogger(name).addFilter(_tells_something)
    try:
        app(prog_name="flowsteer")
    except Exception as error:
        from flowsteer.rewards.doors import is_for_users

        # any other error keeps its traceback: it is a fault of ours or of a plug-in, and somebody has to find it
        if os.environ.get("FLOWSTEER_TRACEBACK") or not is_for_users(error):
            raise
        message = Text.assemble(("error:", "bold red"), f" {error}")
        Console(stderr=True).print(message, soft_wrap=True, highlight=False)
        sys.exit(2)
