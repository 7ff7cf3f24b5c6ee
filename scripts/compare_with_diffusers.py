"""Before and after, drawn by plain diffusers: the base pipeline against the same with an exported LoRA.

No code of ours draws a picture here: `StableDiffusion3Pipeline.from_pretrained` and `load_lora_weights` do; the composition
reward is the judge. Reserved captions were drawn neither in pre-training nor in fine-tuning; trained ones are reported apart.

    python scripts/compare_with_diffusers.py runs/quickstart

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
from PIL import Image
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
    rows, gains, sheets = [], {}, {}
    for kind, captions in kinds.items():
        captions = captions[:: max(1, len(captions) // limit)][:limit]
        hits = {}
        for name, (pipe, guidance) in models.items():
            pictures = [
                draw(pipe, captions, seed, guidance=guidance, steps=steps, title=f"{kind}, {name}")
                for seed in range(num_seeds)
            ]
            hits[name] = np.stack([strict(p, captions) for p in pictures], axis=1)  # [P, S]
            sheets[kind, name] = pictures[0]
            mean, half = interval(hits[name])
            rows.append([kind, name, f"{mean:.3f}", f"{mean - half:.3f} to {mean + half:.3f}"])
            table.add_row(*rows[-1])
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
    picture = run / "pictures" / "before (upper) and after (lower), reserved captions, same seeds.png"
    picture.parent.mkdir(exist_ok=True)
    sheet(sheets["reserved captions", "before"], sheets["reserved captions", "after"]).save(picture)
    gain, half = gains["reserved captions", "before"]
    console.print(f"gain on reserved captions without guidance: {gain:+.3f} (95 % interval above {gain - half:+.3f})")


def sheet(before: np.ndarray, after: np.ndarray, columns: int = 12, lines: int = 4, scale: int = 2) -> Image.Image:
    """Pairs of pictures, evenly chosen: before in the upper line, after in the lower, a gap below each pair."""
    chosen = np.linspace(0, len(before) - 1, columns * lines).astype(int)
    side, gap = before.shape[1] * scale, 2
    page = np.full((lines * (2 * (side + gap) + 3 * gap), columns * (side + gap), 3), 255, dtype=np.uint8)
    for place, row in enumerate(chosen):
        top, left = (place // columns) * (2 * (side + gap) + 3 * gap), (place % columns) * (side + gap)
        for offset, pictures in ((0, before), (side + gap, after)):
            large = pictures[row].repeat(scale, axis=0).repeat(scale, axis=1)
            page[top + offset : top + offset + side, left : left + side] = large
    return Image.fromarray(page)


if __name__ == "__main__":
    typer.run(main)
