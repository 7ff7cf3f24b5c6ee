"""The editing version of the embedded pipeline: what `scripts/pretrain_embedded.py` does with ``--edit``.

The autoencoder is the one of rollout/embedded. Sources, their edited pictures and instructions are drawn from
flowsteer.rewards.scorers.edits, which reserves one meaning in ten; the transformer and its text encoders are trained by flow
matching, and written as a FluxKontextPipeline.

Letters: N cases, B samples, L prompt tokens, C latent channels.
"""

# diffusers' own hints are narrower than what it takes and gives
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import io
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from diffusers.models import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from edit_networks import EDIT_LENGTH, EditDenoiser, build_edit_tokenizers, build_flux
from embedded_networks import build_vae
from embedded_training import Ema, console, train_denoiser
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from flowsteer.rewards.scorers.edit_composition import EditCompositionReward
from flowsteer.rewards.scorers.edits import KINDS, Case, sample_case, spoiled
from flowsteer.rewards.scorers.world import SIZE

ROOT = Path(__file__).resolve().parent.parent
CALL = {"max_sequence_length": EDIT_LENGTH, "max_area": SIZE * SIZE, "_auto_resize": False}
# How many pairs of the base model's training are wrong. Pairs that models made are, too; so the base often makes a
# mistake where it could also do it right, which is what a reward can mend.
SPOILED_SHARE = 0.35
# Prompt files: their names, how many rows, whether their meanings are reserved, and the seed that draws them.
FILES = (("edits_train.parquet", 1024, False, 1), ("edits_reserved.parquet", 264, True, 2))


def draw_cases(count: int, *, reserved: bool, seed: int) -> list[Case]:
    """Cases whose meanings are reserved, or are not; the four kinds take turns."""
    rng = np.random.default_rng(seed)
    return [sample_case(rng, reserved=reserved, kind=KINDS[i % len(KINDS)]) for i in range(count)]


def write_files(folder: Path) -> None:
    """Write edits_train.parquet and edits_reserved.parquet: prompt, source, expected and kind of each row."""
    for name, count, reserved, seed in FILES:
        rows = []
        for case in draw_cases(count, reserved=reserved, seed=seed):
            picture = io.BytesIO()
            Image.fromarray(case.source.draw()).save(picture, "WEBP", lossless=True)
            rows.append(
                {
                    "prompt": case.edit.text,
                    "source": {"bytes": picture.getvalue(), "path": None},
                    "expected": case.expected,
                    "kind": case.edit.kind,
                }
            )
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name, compression="zstd")
        console.print(f"{folder / name}: {count} edits, {(folder / name).stat().st_size / 1e3:.0f} kB")


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What the transformer learns from."""

    sources: Tensor  # [N, C, 8, 8], scaled latents
    targets: Tensor  # [N, C, 8, 8]
    clip_ids: Tensor  # [N, L]
    t5_ids: Tensor  # [N, L]

    def loss(self, denoiser: EditDenoiser, size: int, generator: torch.Generator) -> Tensor:
        """Mean squared error of the velocity, noise minus data, of a batch (Esser et al. 2024, arXiv 2403.03206, eq. 13-15)."""
        rows = torch.randint(len(self.sources), (size,), generator=generator)
        targets = self.targets[rows].float()
        noise = torch.randn(targets.shape, generator=generator)
        # logit-normal, eq. 19 with m = 0, s = 1; drawn evenly over its quantiles
        quantile = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        sigma = torch.sigmoid(torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)))
        level = sigma[:, None, None, None]
        velocity = denoiser(
            (1 - level) * targets + level * noise,
            self.sources[rows].float(),
            sigma,
            self.clip_ids[rows],
            self.t5_ids[rows],
        )
        return (velocity - (noise - targets)).square().mean()


def tokenize(tokenizer: CLIPTokenizer | T5Tokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids [N, L] as the pipeline makes them."""
    return tokenizer(
        [*texts], padding="max_length", max_length=EDIT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures [32, 32, 3], N of them, to scaled latents [N, C, 8, 8] in float16."""
    chunks = []
    for start in range(0, len(pictures), 256):
        pixels = torch.from_numpy(np.stack(pictures[start : start + 256])).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = vae.encode(pixels).latent_dist.mean
        chunks.append(((latents - vae.config.shift_factor) * vae.config.scaling_factor).half())
    return torch.cat(chunks)


def prepare(work: Path, vae: AutoencoderKL, pool: int, seed: int) -> Edits:
    """Draw and encode the cases, or take them from the working folder."""
    file = work / f"edits_{SPOILED_SHARE:g}.safetensors"  # of another share they are other pairs
    if not file.exists():
        with console.status(f"drawing and encoding {pool} edits"):
            cases = draw_cases(pool, reserved=False, seed=seed + 10)
            rng = np.random.default_rng(seed + 20)
            targets = [spoiled(case, rng) if rng.random() < SPOILED_SHARE else case.target for case in cases]
            texts = [case.edit.text for case in cases]
            clip, t5 = build_edit_tokenizers()
            data = {
                "sources": encode(vae, [case.source.draw() for case in cases]),
                "targets": encode(vae, [target.draw() for target in targets]),
                "clip_ids": tokenize(clip, texts),
                "t5_ids": tokenize(t5, texts),
            }
        save_file({name: value.contiguous() for name, value in data.items()}, file)
    return Edits(**load_file(file))


def save_pipeline(
    denoiser: EditDenoiser, vae: AutoencoderKL, clip: CLIPTokenizer, t5: T5Tokenizer, folder: Path
) -> None:
    """Write a FluxKontextPipeline; replaces the folder.

    Transformer and autoencoder are stored as float16, which diffusers loads as float32; the text encoders stay float32, because
    transformers loads what is stored.
    """
    transformer, half_vae = build_flux(), build_vae()
    transformer.load_state_dict(denoiser.transformer.state_dict())
    half_vae.load_state_dict(vae.state_dict())
    half_vae.register_to_config(shift_factor=vae.config.shift_factor, scaling_factor=vae.config.scaling_factor)
    pipeline = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=half_vae.half(),
        text_encoder=denoiser.text_encoder,
        tokenizer=clip,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=t5,
        transformer=transformer.half(),
    )
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


def load_pipeline(folder: Path) -> FluxKontextPipeline:
    """The pipeline in float32."""
    pipeline = FluxKontextPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train_edit(
    out: Path, work: Path, *, steps: int, batch: int, rate: float, pool: int, save_every: int, seed: int, smoke: bool
) -> None:
    """Train everything but the autoencoder, and write the pipeline."""
    work.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(ROOT / "rollout" / "embedded" / "vae", torch_dtype=torch.float32).eval()
    edits = prepare(work, vae, pool, seed)
    torch.manual_seed(seed)  # here: the same start whether or not the cases were there
    clip, t5 = build_edit_tokenizers()
    denoiser, averaged = EditDenoiser(clip, t5), EditDenoiser(clip, t5)
    began = time.perf_counter(), time.process_time()
    checked = {
        name: draw_cases(4 if smoke else 132, reserved=name == "reserved", seed=3) for name in ("reserved", "trained")
    }

    def publish(step: int, ema: Ema, loss: float) -> None:
        averaged.load_state_dict(ema.weights, strict=False)
        save_pipeline(averaged, vae, clip, t5, out)
        pipeline = load_pipeline(out)
        entry: dict[str, float] = {"step": step, "loss": loss}
        entry |= {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
        for name, cases in checked.items():
            entry[f"strict, {name}"] = strict_accuracy(pipeline, cases, seed=0, steps=6).mean()
        with (work / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        console.print(entry)

    blocks = [*denoiser.transformer.transformer_blocks, *denoiser.transformer.single_transformer_blocks]
    train_denoiser(
        denoiser, lambda generator: edits.loss(denoiser, batch, generator), blocks=blocks, steps=steps, rate=rate,
        seed=seed, work=work, save_every=save_every, publish=publish,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- evaluation


def strict_accuracy(pipeline: FluxKontextPipeline, cases: Sequence[Case], *, seed: int, steps: int) -> np.ndarray:
    """1 or 0 for each case [N]: whether one picture, drawn from this noise seed, is edited as asked and not otherwise."""
    reward, hits = EditCompositionReward(score="strict"), []
    for start in range(0, len(cases), 66):
        chunk = cases[start : start + 66]
        pictures = pipeline(
            image=[Image.fromarray(case.source.draw()) for case in chunk],
            prompt=[case.edit.text for case in chunk],
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed * 10**5 + start + i) for i in range(len(chunk))],
            output_type="np",
            **CALL,
        ).images
        prompts = [case.edit.text for case in chunk]
        found = reward(np.round(pictures * 255).astype(np.uint8), prompts, [case.expected for case in chunk])
        hits += found["strict"]
    return np.array(hits)


def evaluate_edit(folder: Path, *, seeds: int, steps: int) -> None:
    """Strict accuracy by kind of edit, on the shipped reserved edits and on as many trained ones."""
    pipeline = load_pipeline(folder)
    for name, reserved, seed in (("reserved", True, FILES[1][3]), ("trained", False, FILES[0][3])):
        cases = draw_cases(FILES[1][1], reserved=reserved, seed=seed)
        hits = np.stack([strict_accuracy(pipeline, cases, seed=i, steps=steps) for i in range(seeds)])
        error = hits.mean(0).std(ddof=1) / math.sqrt(len(cases))  # over cases, each the mean of its seeds
        kinds = {kind: hits[:, [c.edit.kind == kind for c in cases]].mean().round(3).item() for kind in KINDS}
        console.print(
            f"{name:9}: strict {hits.mean():.3f} +- {1.96 * error:.3f} (95 %), by seed {hits.mean(1).round(3).tolist()}, "
            f"by kind {kinds}"
        )
