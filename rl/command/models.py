"""Commands about a pipeline and a configuration: check-model, show-loop, config keys. Imports wait until they run."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowsteer.rl.command.options import (
    AdapterOption,
    CallOption,
    DeviceOption,
    DTypeOption,
    HeightOption,
    InputOption,
    WidthOption,
    choose,
    files_as_inputs,
)

console, stderr = Console(), Console(stderr=True)


def check_model(
    path: Annotated[
        str | None, typer.Argument(help="Folder or hub id in diffusers' layout, `embedded` or `embedded_edit`.")
    ] = None,
    config_name: Annotated[
        str | None,
        typer.Option(
            "--config", help="Instead of PATH: the pipeline of a configuration, with its settings and inputs."
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="LoRA targets, separated by commas, or `auto`; default: those of the configuration, else `auto`."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", help="1 is without guidance; default: the configuration's, else 1."),
    ] = None,
    adapter: AdapterOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    call: CallOption = None,
    given: InputOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Say on one screen whether a pipeline can be trained: lifted, inputs, axes, purity, parity, LoRA targets, gradients.

    With a configuration it also says which inputs are mapped to which columns, and which are not; inputs are those of
    the first row of its prompts. A LoRA is tried also where all weights are to be trained. Ends with exit code 1 when it
    cannot be trained.

    **Example**: `flowsteer check-model stabilityai/stable-diffusion-3.5-medium --height 256 --width 256`, or
    `flowsteer check-model --config embedded_edit_nft_edit_composition`
    """
    from flowsteer.rl.command.check_model import (
        RANK,
        encoding_findings,
        first_inputs,
        input_findings,
        trainable_findings,
    )
    from flowsteer.rl.config import load_config
    from flowsteer.rollout.lifting.selfcheck import PROMPTS, check

    if (path is None) == (config_name is None):
        raise ValueError(
            "give either a pipeline or --config with a configuration, such as `flowsteer check-model embedded`"
        )
    if config_name is not None and adapter is not None:
        raise ValueError("--config brings its own adapter; leave out --adapter")
    config = None if config_name is None else load_config(config_name)
    inputs = (first_inputs(config) if config is not None else {}) | files_as_inputs(given)
    pipeline = choose(
        config=config, model=path, adapter=adapter, height=height, width=width, call=call, dtype=dtype, device=device
    ).load()
    lora = config.model.lora if config is not None else None
    if targets is None:
        targets = "auto" if lora is None or lora.targets == "auto" else ",".join(lora.targets)
    if guidance_scale is None:
        guidance_scale = 1.0 if config is None else config.rollout.guidance_scale
    settings: dict[str, Any] = {"guidance_scale": guidance_scale}
    if config is not None:
        settings["negative_prompt"] = config.rollout.negative_prompt
        if inputs:  # of a start from a picture, few steps might leave none
            settings["num_inference_steps"] = config.rollout.num_inference_steps
    report = check(pipeline, inputs=[inputs] * len(PROMPTS) if inputs else None, **settings)
    if config is not None:
        report = report.with_findings(input_findings(config, pipeline))
    if report.ok:
        report = report.with_findings(
            encoding_findings(pipeline, inputs=inputs, **{"num_inference_steps": 3} | settings)
        )
        rank = RANK if lora is None else lora.rank
        found = trainable_findings(pipeline, targets, rank=rank, inputs=inputs, **settings)
        report = report.with_findings(found)
    console.print(report.text(), markup=False, highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


def show_loop(
    path: Annotated[
        str, typer.Argument(help="Folder or hub id in diffusers' layout, or the name of a pipeline class.")
    ],
) -> None:
    """Print the denoising loop that is lifted out of a pipeline: diffusers' own code, as it is trained and sampled.

    **Example**: `flowsteer show-loop FluxPipeline`
    """
    import diffusers

    from flowsteer.rollout.lifting.lift import show_loop as source_of
    from flowsteer.rollout.lifting.loading import load_diffusers

    known = path.isidentifier() and path.endswith("Pipeline")
    cls = getattr(diffusers, path, None) if known else type(load_diffusers(path))
    if cls is None:
        raise ValueError(f"diffusers has no pipeline class {path!r}")
    console.print(source_of(cls), markup=False, highlight=False, soft_wrap=True)


def config_list() -> None:
    """List the configurations that are shipped, each with the first line of its header.

    **Example**: `flowsteer config list`
    """
    from flowsteer.rl.config import shipped_configs
    from flowsteer.rl.config.yaml import read_text

    table = Table("name", "about")
    for file in shipped_configs():
        header = read_text(file).splitlines()[0].removeprefix("# ")
        table.add_row(Text(file.removesuffix(".yaml")), Text(header))
    console.print(table)


def config_show(
    name: Annotated[str, typer.Argument(help="One of `flowsteer config list`, or a YAML file.")],
) -> None:
    """Print a configuration as it is written; its header says what it needs and what to expect of it.

    **Example**: `flowsteer config show embedded_nft_composition`
    """
    from flowsteer.rl.config.yaml import read_text

    typer.echo(read_text(name), nl=False)


def config_keys(
    pattern: Annotated[
        str | None, typer.Argument(help="Part of a key, or a whole one with `*`, such as `optimizer.*`; default: all.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="A page of tables, as in `docs/configuration.md`.")
    ] = False,
) -> None:
    """Print the keys of a configuration with their types, defaults and meanings.

    **Example**: `flowsteer config keys guidance`
    """
    from flowsteer.rl.config.keys import find_keys
    from flowsteer.rl.config.reference import markdown

    if as_markdown:
        typer.echo(markdown(find_keys(pattern)), nl=False)
        return
    for key in find_keys(pattern, installed=True):
        console.print(Text(key.text()), soft_wrap=True)
