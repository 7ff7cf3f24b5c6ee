"""The ``flowsteer`` command. Every command ends a user's mistake with one message and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="flowsteer",
    help="Reinforcement-learning fine-tuning of flow and diffusion models, for any diffusers pipeline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
rewards_app = typer.Typer(help="The installed rewards.", no_args_is_help=True)
app.add_typer(rewards_app, name="rewards")
console = Console()

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Overrides such as `rollout.group_size=8 optimizer.learning_rate=1e-4`."
    ),
]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Folder or hub id in diffusers' layout, or `embedded`.")
]
LoRAOption = Annotated[Path | None, typer.Option("--lora", help="Folder with an exported LoRA to load first.")]
StepsOption = Annotated[int, typer.Option("--num-inference-steps", min=1, help="Denoising steps.")]
GuidanceOption = Annotated[float, typer.Option("--guidance-scale", help="1 is without guidance.")]
SeedsOption = Annotated[int, typer.Option("--num-seeds", min=1, help="Noise seeds of each prompt.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per network pass.")]


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of one that is shipped, such as `embedded_nft`.")
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

    **Example**: `flowsteer train embedded_nft output=runs/first num_steps=20`
    """
    from flowsteer.rl.build import start
    from flowsteer.rl.config import load_config
    from flowsteer.rl.report import write_report
    from flowsteer.rl.train import train as train_run

    run = start(load_config(config, overrides or []), resume=resume, quiet=quiet)
    try:
        train_run(run)
        exported = run.export()
        if run.engine.is_main:
            report = write_report(run.folder)
            run.screen.print(f"weights: {exported}\nreport:  {report}")
    finally:
        run.close()


@app.command()
def evaluate(
    prompts: Annotated[str, typer.Argument(help="Prompt file, or the name of a shipped one.")] = "shapes_reserved.txt",
    model: ModelOption = "embedded",
    lora: LoRAOption = None,
    reward: Annotated[
        list[str] | None, typer.Option("--reward", "-r", help="Name of a reward; may be repeated.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts, spread evenly over the file.")] = 48,
    num_seeds: SeedsOption = 4,
    num_inference_steps: StepsOption = 10,
    guidance_scale: GuidanceOption = 1.0,
    batch_size: BatchOption = 64,
    output: Annotated[
        Path | None, typer.Option(help="Write the table here as JSON and the pictures beside it.")
    ] = None,
) -> None:
    """Score a pipeline on fixed prompts and seeds with the deterministic sampler.

    **Example**: `flowsteer evaluate --lora runs/first/export --num-prompts 240`
    """
    import torch

    from flowsteer.rl.evaluate import evaluate as run_evaluation
    from flowsteer.rl.evaluate import save_grid
    from flowsteer.rollout.prompts import read_prompts

    _refuse_existing(output)
    pipeline = _load(model, lora)
    result = run_evaluation(
        pipeline,
        read_prompts(prompts),
        _reward_set(reward or ["composition"]),
        num_prompts=num_prompts,
        num_seeds=num_seeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        dtype=torch.float32,
        device="cpu",
    )
    table = Table("score", "mean", "95 % interval", title=f"{len(result.prompts)} prompts x {num_seeds} seeds")
    for name, (mean, half) in result.summary().items():
        table.add_row(name, f"{mean:.4f}", f"{mean - half:.4f} to {mean + half:.4f}")
    console.print(table)
    if output is not None:
        summary = {name: {"mean": mean, "interval": half} for name, (mean, half) in result.summary().items()}
        output.write_text(json.dumps({"prompts": result.prompts, "summary": summary}, indent=1), encoding="utf-8")
        save_grid(result.images, output.with_suffix(".png"))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    folder: Annotated[Path, typer.Argument(help="Where the merged pipeline goes; must not exist or be empty.")],
) -> None:
    """Write a run's result as a whole diffusers pipeline, with the LoRA fused in.

    The LoRA itself lies in `RUN/export` already; `pipe.load_lora_weights("RUN/export")` loads it.

    **Example**: `flowsteer export runs/first tuned-pipeline`
    """
    from flowsteer.rl.export import merge

    config = run / "config.json"
    if not config.exists():
        raise ValueError(f"{run} is not the folder of a run: it has no config.json")
    model = json.loads(config.read_text(encoding="utf-8"))["model"]["path"]
    console.print(f"pipeline: {merge(model, run / 'export', folder)}")


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts, each in quotes.")],
    model: ModelOption = "embedded",
    lora: LoRAOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write.")] = Path("samples.png"),
    num_seeds: SeedsOption = 4,
    num_inference_steps: StepsOption = 10,
    guidance_scale: GuidanceOption = 1.0,
) -> None:
    """Draw pictures, a line of seeds per prompt.

    **Example**: `flowsteer sample "a red circle left of a blue square" -o picture.png`
    """
    import torch

    from flowsteer.rl.evaluate import image_grid
    from flowsteer.rollout.sample import sample as draw

    _refuse_existing(output)
    pipeline = _load(model, lora)
    conditioning = pipeline.prepare(
        list(dict.fromkeys(prompts)), num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
    )
    rows = [list(dict.fromkeys(prompts)).index(prompt) for prompt in prompts for _ in range(num_seeds)]
    conditioning = conditioning.take(rows)
    latents, _ = draw(
        pipeline,
        conditioning,
        seeds=torch.arange(num_seeds).repeat(len(prompts)),
        noise_levels=[0.0] * num_inference_steps,
    )
    images = pipeline.decode(latents, conditioning).float()
    image_grid([images], scale=max(1, 128 // images.shape[-1]), columns=num_seeds).save(output)
    console.print(f"{len(rows)} pictures: {output}")


@app.command()
def score(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What they should show.")],
    reward: Annotated[
        list[str] | None, typer.Option("--reward", "-r", help="Name of a reward; may be repeated.")
    ] = None,
) -> None:
    """Score image files with rewards.

    **Example**: `flowsteer score picture.png -p "a red circle" -r composition -r jpeg_compressibility`
    """
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    rewards = _reward_set(reward or ["composition"])
    table = Table("image", "reward", "score")
    for path in images:
        try:
            pixels = np.asarray(Image.open(path).convert("RGB"))
        except (FileNotFoundError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} is not an image that can be read: {error}") from None
        batch = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        scores = rewards.score(batch, [prompt], {})
        for name, value in scores.parts.items():
            number = float(value[0])
            reason = scores.failures.get(0, "missing")
            table.add_row(path.name, name, f"{number:.4f}" if number == number else reason)
    console.print(table)


@app.command("check-model")
def check_model(
    path: Annotated[str, typer.Argument(help="Folder or hub id in diffusers' layout, or `embedded`.")],
    targets: Annotated[str, typer.Option(help="LoRA targets, separated by commas.")] = "to_q,to_k,to_v,to_out.0",
    guidance_scale: GuidanceOption = 1.0,
) -> None:
    """Say on one screen whether a pipeline can be trained: lifted, axes, purity, parity, LoRA targets, gradients.

    Ends with exit code 1 when it cannot.
    """
    from flowsteer.rl.policy import trainable_findings
    from flowsteer.rollout.pipeline import FlowPipeline
    from flowsteer.rollout.selfcheck import check

    pipeline = FlowPipeline.load(path)
    report = check(pipeline, guidance_scale=guidance_scale)
    if report.ok:
        report = report.with_findings(trainable_findings(pipeline, targets.split(","), guidance_scale=guidance_scale))
    console.print(report.text(), markup=False, highlight=False)
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

    from flowsteer.rollout.lift import show_loop as source_of
    from flowsteer.rollout.pipeline import load_diffusers

    known = path.isidentifier() and path.endswith("Pipeline")
    cls = getattr(diffusers, path, None) if known else type(load_diffusers(path))
    if cls is None:
        raise ValueError(f"diffusers has no pipeline class {path!r}")
    console.print(source_of(cls), markup=False, highlight=False)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Write (again) the one-file report of a run: curves, pictures before and after, configuration, environment."""
    from flowsteer.rl.report import write_report

    console.print(f"report: {write_report(run)}")


@rewards_app.command("list")
def rewards_list() -> None:
    """List the installed rewards: their names, where they come from, what they score."""
    from flowsteer.rewards.registry import list_rewards

    table = Table("name", "what it scores", "package")
    for entry in list_rewards():
        table.add_row(entry.name, entry.summary, entry.distribution)
    console.print(table)


def _load(model: str, lora: Path | None):
    from flowsteer.rollout.pipeline import FlowPipeline, load_diffusers

    if lora is None:
        return FlowPipeline.load(model)
    if not (lora / "pytorch_lora_weights.safetensors").exists():
        raise ValueError(f"{lora} holds no pytorch_lora_weights.safetensors")
    pipe = load_diffusers(model)
    pipe.load_lora_weights(str(lora))
    return FlowPipeline(pipe)


def _reward_set(names: list[str]):
    from flowsteer.rewards.combine import RewardSet
    from flowsteer.rewards.registry import load_reward

    return RewardSet([(name, load_reward(name), 1.0) for name in names])


def _refuse_existing(path: Path | None) -> None:
    if path is not None and path.exists():
        raise ValueError(f"{path} exists already; choose another file")


def main() -> None:
    """Run the command; a user's mistake is one message, without a traceback unless FLOWSTEER_TRACEBACK=1."""
    try:
        app()
    except ValueError as error:
        if os.environ.get("FLOWSTEER_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/bold red] {error}", markup=True, highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
