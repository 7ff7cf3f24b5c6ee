"""The ``flowsteer`` command. Every command ends a user's mistake with one message and exit code 2.

What a command needs is imported when it runs: ``flowsteer --help`` shall not wait for torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowsteer.rl.command.algorithms import app as algorithms_app
from flowsteer.rl.command.options import (
    AdapterOption,
    CallOption,
    DeviceOption,
    DTypeOption,
    GuidanceOption,
    HeightOption,
    LoRAOption,
    ModelOption,
    NegativeOption,
    RewardOption,
    RewardOptionOption,
    RunOption,
    StepsOption,
    WidthOption,
    choose,
    named_rewards,
    read_run,
    refuse_existing,
)
from flowsteer.rl.command.rewards import app as rewards_app

app = typer.Typer(
    name="flowsteer",
    help="Reinforcement-learning fine-tuning of flow and diffusion models, for any diffusers pipeline.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(rewards_app, name="rewards")
app.add_typer(algorithms_app, name="algorithms")
config_app = typer.Typer(help="The configuration of a run: its keys.", no_args_is_help=True)
app.add_typer(config_app, name="config")
console, stderr = Console(), Console(stderr=True)

UNSCORED = 1  # exit code of `score` where an image has no score
STOPPED = 128  # plus the signal's number: the exit code of a run that SIGTERM (143) or Ctrl-C (130) ended

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides such as `rollout.group_size=8 optimizer.learning_rate=1e-4`; `flowsteer config keys` lists all.",
    ),
]
SeedsOption = Annotated[int, typer.Option("--num-seeds", min=1, help="Noise seeds of each prompt.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per network pass.")]


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


@app.command()
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
    from flowsteer.rl.compare import TooFewScores
    from flowsteer.rl.config import load_config
    from flowsteer.rl.report.page import write_report
    from flowsteer.rl.start import start
    from flowsteer.rl.train import train as train_run

    run = start(load_config(config, overrides or []), resume=resume, quiet=quiet)
    try:
        train_run(run)
        done = max(run.saving.checkpoints.steps())
        if done < run.num_steps:
            run.screen.print(f"stopped after {done} of {run.num_steps} steps; the same command with --resume goes on")
            raise typer.Exit(STOPPED + run.saving.stopped_by)
        exported = run.export()
        if run.engine.is_main:
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


@app.command()
def evaluate(
    prompts: Annotated[
        str | None,
        typer.Argument(help="Prompt file, or the name of a shipped one; default `shapes_reserved.txt`, or the run's."),
    ] = None,
    run: RunOption = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    lora: LoRAOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    call: CallOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = "auto",
    reward: RewardOption = None,
    option: RewardOptionOption = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts, spread evenly over the file.")] = 48,
    num_seeds: SeedsOption = 4,
    num_inference_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    negative_prompt: NegativeOption = None,
    batch_size: BatchOption = 64,
    timeout_s: Annotated[
        float, typer.Option(min=0, help="After the last picture, so long scores are waited for.")
    ] = 900.0,
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file for the table and all single scores; the pictures go beside it as PNG."),
    ] = None,
) -> None:
    """Score a pipeline on fixed prompts and seeds with the deterministic sampler.

    **Example**: `flowsteer evaluate --run runs/first --num-prompts 240`
    """
    from flowsteer.rl.build import DTYPES
    from flowsteer.rl.evaluate import evaluate as run_evaluation
    from flowsteer.rl.evaluate import save_grid
    from flowsteer.rl.scoring import warn_of_single_images
    from flowsteer.rollout.data.prompts import read_prompts

    if output is not None:
        if output.suffix == ".png":
            raise ValueError(f"{output} is to be a JSON file; the pictures are written beside it as PNG")
        refuse_existing(output, output.with_suffix(".png"))
    chosen = choose(
        run=run,
        model=model,
        adapter=adapter,
        lora=lora,
        height=height,
        width=width,
        call=call,
        dtype=dtype,
        device=device,
    )
    texts = read_prompts(prompts or chosen.evaluation.prompts)
    with closing(chosen.rewards(reward, option)) as rewards, console.status("loading") as status:
        warn_of_single_images(rewards, num_seeds=num_seeds, key="--num-seeds")
        result = run_evaluation(
            chosen.load(),
            texts,
            rewards,
            num_prompts=num_prompts,
            num_seeds=num_seeds,
            num_inference_steps=num_inference_steps or chosen.evaluation.num_inference_steps,
            guidance_scale=chosen.evaluation.guidance_scale if guidance_scale is None else guidance_scale,
            negative_prompt=negative_prompt or chosen.evaluation.negative_prompt,
            batch_size=batch_size,
            dtype=DTYPES[chosen.dtype],
            device=chosen.device,
            timeout_s=timeout_s,
            progress=lambda done: status.update(f"{done} images"),
        )
    summary = result.summary()
    table = Table("score", "mean", "95 % interval", title=f"{len(result.prompts)} prompts x {num_seeds} seeds")
    for name, (mean, low, high) in summary.items():
        table.add_row(Text(name), f"{mean:.4f}", f"{low:.4f} to {high:.4f}")
    console.print(table)
    if output is not None:
        output.write_text(json.dumps(result.table(), indent=1), encoding="utf-8")
        save_grid(result.images, output.with_suffix(".png"))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    folder: Annotated[Path, typer.Argument(help="Where the result goes; must not exist or be empty.")],
    layout: Annotated[
        Literal["pipeline", "diffusers", "peft", "kohya"],
        typer.Option(
            "--format",
            help="`pipeline`: all weights, with the LoRA fused in. The others: the LoRA alone, for `load_lora_weights` of "
            "diffusers, for `PeftModel`, or with kohya's keys.",
        ),
    ] = "pipeline",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            "--dtype", help="Of the weights; default as trained: a pipeline's `model.dtype`, a LoRA's float32."
        ),
    ] = None,
) -> None:
    """Write a run's result as a whole diffusers pipeline with the LoRA fused in, or its LoRA in another format.

    The LoRA in diffusers' format lies in `RUN/export` already; `pipe.load_lora_weights("RUN/export")` loads it.

    **Example**: `flowsteer export runs/first tuned-pipeline`
    """
    from flowsteer.rl.build import DTYPES
    from flowsteer.rl.export import convert_lora, merge

    settings = read_run(run).model
    if layout == "pipeline" and settings.adapter is not None:
        raise ValueError(
            f"the run's pipeline is the adapter {settings.adapter}, not one that diffusers loads; write its LoRA with --format "
            f"peft, or take the weights in {run / 'export'}"
        )
    if layout == "pipeline":
        made = merge(settings.path, run / "export", folder, dtype=DTYPES[dtype or settings.dtype])
        console.print(Text(f"pipeline: {made}"), soft_wrap=True)
    else:
        made = convert_lora(run / "export", folder, layout=layout, dtype=DTYPES[dtype or "float32"])
        console.print(Text(f"LoRA: {made}"), soft_wrap=True)


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts, each in quotes.")],
    run: RunOption = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    lora: LoRAOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    call: CallOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = "auto",
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")] = Path("samples.png"),
    num_seeds: SeedsOption = 4,
    num_inference_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    negative_prompt: NegativeOption = None,
) -> None:
    """Draw pictures, a line of seeds per prompt; of a video the first frame.

    **Example**: `flowsteer sample "a red circle left of a blue square" --run runs/first -o picture.png`
    """
    import torch

    from flowsteer.rl.build import DTYPES
    from flowsteer.rl.evaluate import save_grid
    from flowsteer.rollout.sample import sample as draw

    refuse_existing(output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output} must end in .png")
    chosen = choose(
        run=run,
        model=model,
        adapter=adapter,
        lora=lora,
        height=height,
        width=width,
        call=call,
        dtype=dtype,
        device=device,
    )
    pipeline = chosen.load()
    steps = num_inference_steps or chosen.evaluation.num_inference_steps
    guidance = chosen.evaluation.guidance_scale if guidance_scale is None else guidance_scale
    pictures = []
    with torch.no_grad():
        for prompt in prompts:
            conditioning = pipeline.prepare(
                [prompt],
                num_inference_steps=steps,
                guidance_scale=guidance,
                negative_prompt=negative_prompt or chosen.evaluation.negative_prompt,
            )
            conditioning = conditioning.take([0] * num_seeds)
            latents, _ = draw(
                pipeline,
                conditioning,
                seeds=torch.arange(num_seeds),
                noise_levels=[0.0] * steps,
                dtype=DTYPES[chosen.dtype],
                device=chosen.device,
            )
            pictures.append(pipeline.decode(latents, conditioning).float().cpu())
    save_grid(torch.cat(pictures), output, columns=num_seeds)
    console.print(Text(f"{len(prompts) * num_seeds} pictures: {output}"), soft_wrap=True)


@app.command()
def score(
    images: Annotated[list[Path] | None, typer.Argument(help="Image files; not with --metadata.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What they should show.")] = None,
    reward: RewardOption = None,
    option: RewardOptionOption = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What the reward gets of each image besides the prompt; repeatable."),
    ] = None,
    metadata_file: Annotated[
        Path | None,
        typer.Option(
            "--metadata", help="JSON lines instead of images: `file_name`, `prompt` and any columns of each image."
        ),
    ] = None,
) -> None:
    """Score image files with rewards. Ends with exit code 1 and the reasons if an image has no score.

    Rewards that compare images, such as `diversity`, get all images of a prompt together.

    **Example**: `flowsteer score picture.png -p "a red circle" -r composition -r jpeg_compressibility`
    """
    from flowsteer.rl.command.score_files import Pictures, from_metadata, score_files
    from flowsteer.rl.config import parse_overrides

    if metadata_file is not None:
        if images or prompt is not None or column:
            raise ValueError(
                "--metadata names the images, prompts and columns itself; leave out the images, -p and --column"
            )
        pictures = from_metadata(metadata_file)
    elif not images or prompt is None:
        raise ValueError("give image files and their prompt with -p, or a file with both as --metadata")
    else:
        count = len(images)
        columns = {key: (value,) * count for key, value in parse_overrides(column or []).items()}
        pictures = Pictures(files=tuple(images), prompts=(prompt,) * count, columns=columns)
    with closing(named_rewards(reward, option)) as rewards:
        scores = score_files(pictures, rewards)
    table = Table("image", "reward", "score")
    for place, path in enumerate(pictures.files):
        for name, values in scores.parts.items():
            number = values[place]
            table.add_row(*map(Text, (path.name, name, f"{number:.4f}" if number == number else "none")))
    console.print(table)
    for place, reason in scores.failures.items():
        stderr.print(Text(f"{pictures.files[place]} has no score: {reason}"), soft_wrap=True)
    if scores.failures:
        raise typer.Exit(UNSCORED)


@app.command("check-model")
def check_model(
    path: Annotated[str, typer.Argument(help="Folder or hub id in diffusers' layout, or `embedded`.")],
    targets: Annotated[str, typer.Option(help="LoRA targets, separated by commas.")] = "to_q,to_k,to_v,to_out.0",
    guidance_scale: Annotated[float, typer.Option("--guidance-scale", help="1 is without guidance.")] = 1.0,
    adapter: AdapterOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    call: CallOption = None,
    dtype: DTypeOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Say on one screen whether a pipeline can be trained: lifted, axes, purity, parity, LoRA targets, gradients.

    Ends with exit code 1 when it cannot.

    **Example**: `flowsteer check-model stabilityai/stable-diffusion-3.5-medium --height 256 --width 256`
    """
    from flowsteer.rl.command.check_model import trainable_findings
    from flowsteer.rollout.lifting.selfcheck import check

    pipeline = choose(
        model=path, adapter=adapter, height=height, width=width, call=call, dtype=dtype, device=device
    ).load()
    report = check(pipeline, guidance_scale=guidance_scale)
    if report.ok:
        report = report.with_findings(trainable_findings(pipeline, targets.split(","), guidance_scale))
    console.print(report.text(), markup=False, highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


@app.command("show-loop")
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
    from flowsteer.rollout.lifting.pipeline import load_diffusers

    known = path.isidentifier() and path.endswith("Pipeline")
    cls = getattr(diffusers, path, None) if known else type(load_diffusers(path))
    if cls is None:
        raise ValueError(f"diffusers has no pipeline class {path!r}")
    console.print(source_of(cls), markup=False, highlight=False, soft_wrap=True)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Write (again) the one-file report of a run: curves, pictures before and after, configuration, environment.

    **Example**: `flowsteer report runs/first`
    """
    from flowsteer.rl.report.page import write_report

    console.print(Text(f"report: {write_report(run)}"), soft_wrap=True)


@config_app.command("keys")
def config_keys(
    pattern: Annotated[
        str | None, typer.Argument(help="Part of a key, or a whole one with `*`, such as `optimizer.*`; default: all.")
    ] = None,
) -> None:
    """Print the keys of a configuration with their types, defaults and meanings.

    **Example**: `flowsteer config keys guidance`
    """
    from flowsteer.rl.config.keys import find_keys

    for key in find_keys(pattern):
        console.print(Text(key.text()), soft_wrap=True)


def _ended_now(saved: list[int]) -> str:
    """What is left of a run that a second Ctrl-C ended: ``saved`` are the steps with a checkpoint, ascending."""
    if not saved:
        return "ended in the middle of a step, before the first checkpoint"
    return f"ended in the middle of a step; the same command with --resume goes on after step {saved[-1]}"


def _is_for_the_user(error: Exception) -> bool:
    """Was the message written for a user: by our own code, or by the system about a file?

    Any other error keeps its traceback: it is a fault of ours or of a plug-in, and somebody has to find it.
    """
    if isinstance(error, OSError):
        return error.filename is not None
    frames = list(traceback.walk_tb(error.__traceback__))
    return isinstance(error, ValueError) and frames[-1][0].f_globals["__name__"].startswith("flowsteer.")


def _tells_something(record: logging.LogRecord) -> bool:
    """Our LoRAs are for denoisers: that they hold nothing for the text encoders is no news."""
    return not record.getMessage().startswith("No LoRA keys associated to")


def main() -> None:
    """Run the command; a user's mistake is one message, without a traceback unless FLOWSTEER_TRACEBACK=1."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("diffusers.loaders.lora_base").addFilter(_tells_something)
    try:
        app(prog_name="flowsteer")
    except Exception as error:
        if os.environ.get("FLOWSTEER_TRACEBACK") or not _is_for_the_user(error):
            raise
        message = Text.assemble(("error:", "bold red"), f" {error}")
        Console(stderr=True).print(message, soft_wrap=True, highlight=False)
        sys.exit(2)
