"""Commands for what a run has made: evaluate, export, sample, score, report. Imports wait until they run."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowsteer.rl.command.options import (
    DEFAULT_REWARDS,
    AdapterOption,
    CallOption,
    ColumnOption,
    DeviceOption,
    DTypeOption,
    GuidanceOption,
    HeightOption,
    InputOption,
    LoRAOption,
    ModelOption,
    NegativeOption,
    RewardOption,
    RewardOptionOption,
    RunOption,
    ScoredByOption,
    StepsOption,
    WidthOption,
    choose,
    files_as_inputs,
    named_rewards,
    read_run,
    refuse_existing,
)

console, stderr = Console(), Console(stderr=True)


UNSCORED = 1  # exit code of `score` if an image has no score, of `evaluate` if none has one
SeedsOption = Annotated[int, typer.Option("--num-seeds", min=1, help="Noise seeds of each prompt.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Samples per network pass.")]


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
    columns: ColumnOption = None,
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
        typer.Option(
            help="JSON file for the table and all single scores; the pictures go beside it as PNG, videos as WebP, too."
        ),
    ] = None,
) -> None:
    """Score a pipeline on fixed prompts and seeds with the deterministic sampler; exit code 1 if no picture has a score.

    **Example**: `flowsteer evaluate --run runs/first --num-prompts 240`
    """
    from flowsteer.rewards.columns import check_columns
    from flowsteer.rl.build import DTYPES
    from flowsteer.rl.config.data import SourceConfig, name_of, sources_of
    from flowsteer.rl.evaluate import evaluate as run_evaluation
    from flowsteer.rl.evaluate import save_grid
    from flowsteer.rl.films import save_film_grid
    from flowsteer.rl.prompt_files import frame_rate_of
    from flowsteer.rl.scoring import warn_of_single_images
    from flowsteer.rollout.data.prompts import read_prompts, with_pictures

    if output is not None:
        if output.suffix in (".png", ".webp"):
            raise ValueError(f"{output} is to be a JSON file; the pictures are written beside it as PNG")
        refuse_existing(output, output.with_suffix(".png"), output.with_suffix(".webp"))
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
    given = (SourceConfig(file=prompts),) if prompts else chosen.evaluation.prompts
    inputs, file = chosen.inputs(columns), name_of(given)
    texts = read_prompts(sources_of(given), inputs=inputs)
    check_columns(
        chosen.rewards_in_this_process(reward, option),
        {file: list(texts.columns)},
        chosen.names_of_columns(reward),
        {file: texts.media},
    )
    with closing(chosen.rewards(reward, option)) as rewards, console.status("loading") as status:
        warn_of_single_images(rewards, num_seeds=num_seeds, key="--num-seeds")
        texts = with_pictures(texts, sources_of(given), rewards.pictures, inputs=inputs)
        pipeline = chosen.load()
        rewards.frame_rate = frame_rate_of(pipeline)
        result = run_evaluation(
            pipeline,
            texts,
            rewards,
            num_prompts=num_prompts,
            num_seeds=num_seeds,
            num_inference_steps=num_inference_steps or chosen.evaluation.num_inference_steps,
            guidance_scale=chosen.evaluation.guidance_scale if guidance_scale is None else guidance_scale,
            negative_prompt=chosen.evaluation.negative_prompt if negative_prompt is None else negative_prompt,
            batch_size=batch_size,
            dtype=DTYPES[chosen.dtype],
            device=chosen.device,
            timeout_s=timeout_s,
            progress=lambda done: status.update(f"{done} images"),
        )
    table = Table("score", "mean", "95 % interval", title=f"{len(result.prompts)} prompts x {num_seeds} seeds")
    for name, (mean, low, high) in result.summary().items():
        table.add_row(Text(name), f"{mean:.4f}", f"{low:.4f} to {high:.4f}")
    console.print(table)
    if output is not None:
        output.write_text(json.dumps(result.table(), indent=1), encoding="utf-8")
        save_grid(result.images, output.with_suffix(".png"))
        if result.images.dim() == 5:
            save_film_grid(result.images, output.with_suffix(".webp"), frame_rate=result.frame_rate)
    if result.parts["total"].isnan().all():
        stderr.print("no picture has a score")
        raise typer.Exit(UNSCORED)


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    folder: Annotated[Path, typer.Argument(help="Where the result goes; must not exist or be empty.")],
    layout: Annotated[
        Literal["pipeline", "diffusers", "peft", "kohya"],
        typer.Option(
            "--format",
            help="`pipeline`: all weights, with the LoRA fused in. The others: the LoRA alone, for `load_lora_weights` of "
            "diffusers, for `PeftModel`, or with kohya's keys for ComfyUI and WebUI (diffusers reads those for few models).",
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
    if layout != "pipeline" and settings.lora is None:
        raise ValueError(f"the run in {run} trained all weights, so it has no LoRA; they are in {run / 'export'}")
    if layout == "pipeline" and settings.adapter is not None:
        how = "are in" if settings.lora is None else "can be written with --format peft, and are in"
        raise ValueError(
            f"the run's pipeline is the adapter {settings.adapter}, which diffusers cannot load as a whole; its weights {how} "
            f"{run / 'export'}"
        )
    if layout == "pipeline":
        made = merge(settings.path, run / "export", folder, dtype=DTYPES[dtype or settings.dtype])
        console.print(Text(f"pipeline: {made}"), soft_wrap=True)
    else:
        made = convert_lora(run / "export", folder, layout=layout, dtype=DTYPES[dtype or "float32"])
        console.print(Text(f"LoRA: {made}"), soft_wrap=True)


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
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A sheet of all pictures, small ones enlarged (NAME.png; NAME.webp for videos that play), or a folder that "
            "gets each picture as a file of its own size (a video as WebP, a sound as WAV), with a metadata.jsonl; that of "
            "pictures is read by `score` and `rewards certify`.",
        ),
    ] = Path("samples.png"),
    num_seeds: SeedsOption = 4,
    num_inference_steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    negative_prompt: NegativeOption = None,
    given: InputOption = None,
) -> None:
    """Draw pictures or videos, a line of seeds per prompt.

    **Example**: `flowsteer sample "a red circle left of a blue square" --run runs/first -o pictures/`
    """
    import torch

    from flowsteer.rl.build import DTYPES
    from flowsteer.rl.evaluate import save_files, save_grid
    from flowsteer.rl.films import save_film_grid, save_films
    from flowsteer.rl.prompt_files import frame_rate_of
    from flowsteer.rl.sounds import sampling_rate_of, save_sounds
    from flowsteer.rollout.data.prompts import Row
    from flowsteer.rollout.sample import prepare_rows
    from flowsteer.rollout.sample import sample as draw

    instead = output.with_name(f"{output.stem}_videos")  # a folder, where a sheet would be too large
    refuse_existing(output, *([instead] if output.suffix.lower() == ".webp" else []))
    output = output.with_suffix(output.suffix.lower())
    if output.suffix not in ("", ".png", ".webp"):
        raise ValueError(f"{output} must end in .png, for videos in .webp, or be the name of a folder")
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
    inputs = files_as_inputs(given)
    pictures = []
    with torch.no_grad():
        for prompt in prompts:
            conditioning = prepare_rows(
                pipeline,
                [Row.of(prompt, inputs)] * num_seeds,
                num_inference_steps=steps,
                guidance_scale=guidance,
                negative_prompt=chosen.evaluation.negative_prompt if negative_prompt is None else negative_prompt,
            )
            latents, _ = draw(
                pipeline,
                conditioning,
                seeds=torch.arange(num_seeds),
                noise_levels=[0.0] * conditioning.schedule.num_steps,
                dtype=DTYPES[chosen.dtype],
                device=chosen.device,
            )
            pictures.append(pipeline.decode(latents, conditioning).float().cpu())
    drawn, texts = torch.cat(pictures), [prompt for prompt in prompts for _ in range(num_seeds)]
    rate, videos = frame_rate_of(pipeline), drawn.dim() == 5
    if output.suffix == ".webp" and not videos:
        raise ValueError(f"{output}: these are no videos; write a .png, or a folder")
    if output.suffix == ".webp":
        if not save_film_grid(drawn, output, frame_rate=rate, columns=num_seeds):
            output = instead
            save_films(drawn, texts, output, frame_rate=rate)
    elif output.suffix:
        if drawn.dim() == 3:
            stderr.print("a sheet shows the loudness of sounds; -o FOLDER writes them as WAV files")
        save_grid(drawn, output, columns=num_seeds)
    elif videos:
        save_films(drawn, texts, output, frame_rate=rate)
    elif drawn.dim() == 3:
        save_sounds(drawn, texts, output, rate=sampling_rate_of(pipeline))
    else:
        save_files(drawn, texts, output)
    console.print(Text(f"{len(prompts) * num_seeds} pictures: {output}"), soft_wrap=True)


def score(
    images: Annotated[list[Path] | None, typer.Argument(help="Image files; not with --metadata.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="What they should show.")] = None,
    reward: ScoredByOption = None,
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
    from flowsteer.rl.command.score_files import (
        Pictures,
        check_columns_of_pictures,
        from_metadata,
        options_by_reward,
        score_files,
    )
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
        columns = {key: (value,) * count for key, value in parse_overrides(column or [], example="count=1").items()}
        pictures = Pictures(files=tuple(images), prompts=(prompt,) * count, columns=columns)
    check_columns_of_pictures(options_by_reward(reward or DEFAULT_REWARDS, option or []), pictures)
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


def report(run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Write (again) the one-file report of a run: curves, pictures before and after, configuration, environment.

    **Example**: `flowsteer report runs/first`
    """
    from flowsteer.rl.report.page import write_report

    console.print(Text(f"report: {write_report(run)}"), soft_wrap=True)
