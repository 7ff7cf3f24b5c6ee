"""Before and after, drawn by plain diffusers: the base pipeline against the same with an exported LoRA.

No code of ours draws a picture here: `StableDiffusion3Pipeline.from_pretrained` and `load_lora_weights` do; the composition
reward is the judge. Reserved captions were drawn neither in pre-training nor in fine-tuning; trained ones are reported apart.

    python scripts/compare_with_diffusers.py runs/quickstart

writes into the run's folder: `results.json`, the table, and `pictures/`, a sheet of pairs with captions and marks. The report
shows both.

Letters: P captions, S noise seeds of each.
"""

from __future__ import annotations

import json
import math
import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging as transformers_logging

from flowsteer.rewards.scorers.composition import CompositionReward
from flowsteer.rewards.scorers.world import reserved_captions, train_captions

console = Console()


def load(lora: Path | None) -> StableDiffusion3Pipeline:
    """The embedded pipeline as any user of diffusers would load it."""
    absent = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))
    pipe = StableDiffusion3Pipeline.from_pretrained(
        str(files("flowsteer.rollout") / "embedded"), dtype=torch.float32, **absent
    )
    if lora is not None:
        pipe.load_lora_weights(str(lora))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: StableDiffusion3Pipeline, captions: list[str], seed: int, *, guidance: float, steps: int, title: str
) -> np.ndarray:
    """uint8 [P, 32, 32, 3]; caption p starts from the generator with the seed ``1000 * seed + p``."""
    pictures = []
    batches = range(0, len(captions), 64)
    for start in track(batches, description=f"{title}, noise {seed}", console=console, transient=True):
        texts = captions[start : start + 64]
        output: Any = pipe(
            prompt=texts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=12,
            generator=[torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(texts))],
            output_type="np",
        )
        pictures.append(np.round(output.images * 255).astype(np.uint8))
    return np.concatenate(pictures)


def strict(pictures: np.ndarray, captions: list[str]) -> np.ndarray:
    """1 where a picture shows exactly what its caption says, else 0: [P]."""
    return np.array(CompositionReward(score="strict")(pictures, captions)["score"], dtype=float)


def interval(hits: np.ndarray) -> tuple[float, float]:
    """Mean of [P, S] and half of its 95 % interval; a caption with all its seeds is one observation."""
    by_caption = hits.mean(1)
    return float(by_caption.mean()), 1.96 * float(by_caption.std(ddof=1)) / math.sqrt(len(by_caption))


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run; its export/ is loaded.")],
    num_seeds: Annotated[int, typer.Option(min=1, help="Noise seeds of each caption.")] = 4,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; default as in the run's evaluation.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Captions of each kind at most.")] = 264,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Measure strict accuracy before and after, and write it into the run's folder for its report."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    if steps is None:
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
        steps = int((settings["evaluation"] or settings["rollout"])["num_inference_steps"])
    began = time.perf_counter()
    base, tuned = load(None), load(run / "export")
    trained = [caption.text for caption in train_captions()]
    kinds = {
        "reserved captions": [caption.text for caption in reserved_captions()],
        "trained captions": [trained[i] for i in np.random.default_rng(0).permutation(len(trained))],
    }
    models = {"before": (base, 1.0), "before, guidance 3": (base, 3.0), "after": (tuned, 1.0)}

    table = Table(
        "captions",
        "model",
        "strict accuracy",
        "95 % interval",
        title=f"drawn by plain diffusers, {steps} denoising steps",
    )
    rows, gains, pages = [], {}, {}
    for kind, captions in kinds.items():
        captions = captions[:: max(1, len(captions) // limit)][:limit]
        hits, firsts = {}, {}
        for name, (pipe, guidance) in models.items():
            pictures = [
                draw(pipe, captions, seed, guidance=guidance, steps=steps, title=f"{kind}, {name}")
                for seed in range(num_seeds)
            ]
            hits[name] = np.stack([strict(p, captions) for p in pictures], axis=1)  # [P, S]
            firsts[name] = pictures[0]
            mean, half = interval(hits[name])
            rows.append([kind, name, f"{mean:.3f}", f"{mean - half:.3f} to {mean + half:.3f}"])
            table.add_row(*rows[-1])
        marks = [hits[name][:, 0] for name in ("before", "after")]
        pages[kind] = draw_pairs(captions, firsts["before"], firsts["after"], *marks)
        for other in ("before", "before, guidance 3"):
            mean, half = interval(hits["after"] - hits[other])
            gains[kind, other] = (mean, half)
            rows.append(
                [kind, f"gain of after over {other}", f"{mean:+.3f}", f"{mean - half:+.3f} to {mean + half:+.3f}"]
            )
            table.add_row(*rows[-1])
    console.print(table)

    note = (
        f"{num_seeds} noise seeds of each caption, {steps} denoising steps, a pass more per step with guidance; "
        f"intervals over captions. Drawn in {time.perf_counter() - began:.0f} s."
    )
    columns = ["captions", "model", "strict accuracy", "95 % interval"]
    results = {"Strict accuracy, drawn by plain diffusers": {"columns": columns, "rows": rows, "note": note}}
    (run / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    picture = run / "pictures" / "reserved captions before and after, same seeds, marked by the composition reward.png"
    picture.parent.mkdir(exist_ok=True)
    pages["reserved captions"].save(picture)
    gain, half = gains["reserved captions", "before"]
    console.print(f"gain on reserved captions without guidance: {gain:+.3f} (95 % interval above {gain - half:+.3f})")


PAIRS = 20  # on a sheet
COLUMNS = 4  # pairs in a row
SCALE = 3  # a pixel of a picture is drawn as so many squared
GAP = 8  # pixels
LINE = 16  # pixels, the height of a line of text
RIGHT, WRONG, INK = "#1a7f37", "#cf222e", "#1f2328"  # colours of the tick, the cross and the text


def draw_pairs(
    captions: list[str], before: np.ndarray, after: np.ndarray, right_before: np.ndarray, right_after: np.ndarray
) -> Image.Image:
    """A sheet of pairs, at most 20, evenly chosen: before, after, a tick or a cross under each, the caption below.

    Args:
        captions: P texts.
        before: uint8 [P, H, W, 3].
        after: uint8 [P, H, W, 3].
        right_before: [P], 1 if the picture shows exactly what its caption says, else 0.
        right_after: [P], the same of the pictures after.
    """
    chosen = np.linspace(0, len(captions) - 1, min(PAIRS, len(captions))).astype(int)
    height, width = (SCALE * side for side in before.shape[1:3])
    cell_width, cell_height = 2 * width + 3 * GAP, height + 3 * LINE + 3 * GAP
    lines = math.ceil(len(chosen) / COLUMNS)
    page = Image.new("RGB", (COLUMNS * cell_width + GAP, lines * cell_height + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for place, row in enumerate(chosen):
        top, left = GAP + place // COLUMNS * cell_height, GAP + place % COLUMNS * cell_width
        sides = (("before", before, right_before), ("after", after, right_after))
        for side, (word, pictures, right) in enumerate(sides):
            x = left + side * (width + GAP)
            page.paste(Image.fromarray(pictures[row]).resize((width, height), Image.Resampling.NEAREST), (x, top))
            pen.rectangle((x, top, x + width - 1, top + height - 1), outline="#d0d7de")
            draw_mark(pen, x, top + height + 4, right=bool(right[row]))
            pen.text((x + 16, top + height + 2), word, fill=INK, font=font)
        for line, text in enumerate(wrap(captions[row], font, 2 * width + GAP)[:2]):
            pen.text((left, top + height + (line + 1) * LINE + 2), text, fill=INK, font=font)
    return page


def draw_mark(pen: ImageDraw.ImageDraw, x: int, y: int, *, right: bool) -> None:
    """A green tick or a red cross, ten pixels wide, with its upper left corner at (x, y)."""
    if right:
        pen.line([(x + 1, y + 5), (x + 4, y + 9), (x + 10, y + 1)], fill=RIGHT, width=2)
    else:
        pen.line([(x + 1, y + 1), (x + 9, y + 9)], fill=WRONG, width=2)
        pen.line([(x + 1, y + 9), (x + 9, y + 1)], fill=WRONG, width=2)


def wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of at most ``width`` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


if __name__ == "__main__":
    typer.run(main)
