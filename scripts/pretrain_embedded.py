"""Pre-train the tiny Stable Diffusion 3 pipeline that ships in rollout/embedded, from nothing, on one CPU thread.

    python scripts/pretrain_embedded.py captions                    # writes configs/shapes_train.txt and shapes_reserved.txt
    python scripts/pretrain_embedded.py train --out rollout/embedded
    python scripts/pretrain_embedded.py evaluate rollout/embedded

The same with ``--edit`` is for rollout/embedded_edit, which edits a picture (`scripts/pretrain_edit.py`).

``train`` has three stages, each kept in the working folder and skipped when it is already there: an autoencoder (AutoencoderKL,
8 latent channels at a quarter of the size), the latents of a pool of drawn pictures, and the transformer together with
its two text encoders by flow matching. Reserved captions (flowsteer.rewards.scorers.world) are never drawn.

Letters: B samples, L prompt tokens, C latent channels, D width of the prompt's embedding.
"""

# diffusers' own hints are narrower than what it takes and gives
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers.models import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from embedded_networks import (
    PROMPT_LENGTH,
    Denoiser,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from embedded_training import Ema, bar, console, train_denoiser, warmup_then_decay
from pretrain_edit import evaluate_edit, train_edit, write_files
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from flowsteer.rewards.scorers.composition import CompositionReward
from flowsteer.rewards.scorers.world import TASKS, Caption, draw, reserved_captions, train_captions

ROOT = Path(__file__).resolve().parent.parent
# How often each task is drawn: the ones with two objects are the hard ones.
TASK_WEIGHTS = {
    "single_object": 0.06,
    "two_object": 0.18,
    "counting": 0.18,
    "colors": 0.10,
    "position": 0.26,
    "color_attr": 0.22,
}
CAPTION_DROPOUT = 0.1
# The pipeline appends as many zero "T5" tokens as ``max_sequence_length`` says: 12 is what flowsteer's configurations
# ask for, 256 is what diffusers does when nobody says anything. The model is trained to work with both.
ZERO_TOKENS, ZERO_TOKENS_SHARE = (PROMPT_LENGTH, 256), (0.85, 0.15)

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


# ---------------------------------------------------------------------------------------------------- stage 1: pictures


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Drawn pictures, or their latents, with the caption of each."""

    pictures: Tensor  # [N, 3, 32, 32] uint8
    captions: Tensor  # [N] int64, an index into train_captions()


def draw_pool(size: int, seed: int, captions: tuple[Caption, ...]) -> Pool:
    """Draw ``size`` pictures, the tasks in the shares of TASK_WEIGHTS, the captions of a task evenly."""
    rng = np.random.default_rng(seed)
    by_task = {task: [i for i, caption in enumerate(captions) if caption.task == task] for task in TASKS}
    tasks = rng.choice(TASKS, size, p=[TASK_WEIGHTS[task] for task in TASKS])
    chosen = np.array([rng.choice(by_task[task]) for task in tasks])
    pictures = np.stack([draw(captions[i], rng) for i in chosen])
    return Pool(pictures=torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), captions=torch.from_numpy(chosen))


def to_model(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to the autoencoder's range [-1, 1]."""
    return pictures.float() / 127.5 - 1


def train_vae(pool: Pool, *, steps: int, batch: int, rate: float, seed: int) -> AutoencoderKL:
    """Fit the autoencoder; its latents are scaled to mean 0 and deviation 1 by its own configuration."""
    vae = build_vae().train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_decay(step, steps, 50))
    with bar() as progress:
        task = progress.add_task("autoencoder", total=steps, note="")
        for step in range(steps):
            x = to_model(pool.pictures[torch.randint(len(pool.pictures), (batch,), generator=generator)])
            posterior = vae.encode(x).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            error = vae.decode(latents).sample - x
            kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
            loss = error.square().mean() + 0.2 * error.abs().mean() + 2e-4 * kl
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                psnr = 10 * math.log10(4 / error.detach().square().mean().item())
                progress.update(task, note=f"psnr {psnr:.1f} dB")
            progress.advance(task)
    vae.eval()
    latents = encode_pictures(vae, pool.pictures[:2000])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """uint8 [N, 3, 32, 32] to latents [N, C, 8, 8] as the encoder gives them, not yet scaled."""
    return torch.cat([vae.encode(to_model(chunk)).latent_dist.mean for chunk in pictures.split(256)])


# -------------------------------------------------------------------------------------------------- stage 2: transformer


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the transformer learns from."""

    latents: Tensor  # [N, C, 8, 8], scaled
    captions: Tensor  # [N] int64, a row of ids
    ids: Tensor  # [captions + 1, L], the last row is the empty prompt

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Data, noise [B, C, 8, 8], sigma [B], ids [B, L] with some prompts dropped, number of zero tokens [B]."""
        chosen = torch.randint(len(self.latents), (size,), generator=generator)
        captions = self.captions[chosen].clone()
        captions[torch.rand(size, generator=generator) < CAPTION_DROPOUT] = len(self.ids) - 1
        noise = torch.randn(size, *self.latents.shape[1:], generator=generator)
        # logit-normal, eq. 19 of Esser et al. 2024 (arXiv 2403.03206) with m = 0, s = 1; drawn evenly over its quantiles
        quantile = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        sigma = torch.sigmoid(torch.special.ndtri(quantile.clamp(1e-4, 1 - 1e-4)))
        kind = torch.multinomial(torch.tensor(ZERO_TOKENS_SHARE), size, replacement=True, generator=generator)
        return self.latents[chosen], noise, sigma, self.ids[captions], torch.tensor(ZERO_TOKENS)[kind]


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids [B, L] as the pipeline makes them."""
    return tokenizer(
        texts, padding="max_length", max_length=PROMPT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def flow_matching_loss(denoiser: Denoiser, batch: tuple[Tensor, ...]) -> Tensor:
    """Mean squared error of the velocity, noise minus data (Esser et al. 2024, eq. 13 to 15 for rectified flow)."""
    latents, noise, sigma, ids, num_zero_tokens = batch
    level = sigma[:, None, None, None]
    velocity = denoiser((1 - level) * latents + level * noise, sigma, ids, num_zero_tokens)
    return (velocity.float() - (noise - latents)).square().mean()


# ------------------------------------------------------------------------------------------- stage 3: a pipeline folder


def save_pipeline(denoiser: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, shift: float, folder: Path) -> None:
    """Write a StableDiffusion3Pipeline without T5; replaces the folder.

    Transformer and autoencoder are stored as float16, which diffusers loads as float32; the text encoders stay float32, because
    transformers loads what is stored. Only the weights of the copies change: the given modules stay as they are.
    """
    transformer = build_transformer()
    transformer.load_state_dict(denoiser.transformer.state_dict())
    half_vae = build_vae()
    half_vae.load_state_dict(vae.state_dict())
    half_vae.register_to_config(shift_factor=vae.config.shift_factor, scaling_factor=vae.config.scaling_factor)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=half_vae.half(),
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipeline.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """The pipeline in float32; without the arguments that are None diffusers refuses a Stable Diffusion 3 without T5."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder,
        text_encoder_3=None,
        tokenizer_3=None,
        image_encoder=None,
        feature_extractor=None,
        torch_dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def strict_accuracy(
    pipeline: StableDiffusion3Pipeline, captions: tuple[Caption, ...], *, guidance: float, seed: int, steps: int = 10
) -> np.ndarray:
    """1 or 0 for each caption [N]: whether one picture, drawn from this noise seed, shows exactly what it says."""
    reward = CompositionReward(score="strict")
    hits: list[float] = []
    for start in range(0, len(captions), 66):
        texts = [caption.text for caption in captions[start : start + 66]]
        pictures = pipeline(
            prompt=texts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=PROMPT_LENGTH,
            generator=[torch.Generator().manual_seed(seed * 10**5 + start + i) for i in range(len(texts))],
            output_type="np",
        ).images
        hits += reward(np.round(pictures * 255).astype(np.uint8), texts)["strict"]
    return np.array(hits)


# ------------------------------------------------------------------------------------------------------------- commands


@app.command()
def captions(
    folder: Annotated[Path, typer.Option(help="where the two prompt files go")] = ROOT / "configs",
    edit: Annotated[bool, typer.Option("--edit", help="edits instead of captions")] = False,
) -> None:
    """Write shapes_train.txt and shapes_reserved.txt, one caption a line; or edits_train.parquet and edits_reserved.parquet."""
    if edit:
        return write_files(folder)
    for name, chosen in (("shapes_train.txt", train_captions()), ("shapes_reserved.txt", reserved_captions())):
        (folder / name).write_text("".join(f"{caption.text}\n" for caption in chosen))
        console.print(f"{folder / name}: {len(chosen)} captions")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="the pipeline folder to write; refreshed at every snapshot")],
    edit: Annotated[bool, typer.Option("--edit", help="the pipeline that edits a picture")] = False,
    work: Annotated[Path | None, typer.Option(help="what a restart needs; default: in runs/")] = None,
    steps: Annotated[int, typer.Option(help="steps of the transformer")] = 10000,
    batch: Annotated[int, typer.Option(help="pictures in each of them")] = 96,
    rate: Annotated[float, typer.Option(help="their highest learning rate")] = 2e-3,
    vae_steps: Annotated[int, typer.Option(help="steps of the autoencoder, 8 pictures each")] = 8000,
    pool: Annotated[int, typer.Option(help="how many pictures are drawn")] = 60000,
    shift: Annotated[float, typer.Option(help="of the sampler's noise levels")] = 1.0,
    save_every: Annotated[int, typer.Option(help="steps between snapshots")] = 1000,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option()] = 1,
    smoke: Annotated[bool, typer.Option(help="a few steps of everything, to see that it runs")] = False,
) -> None:
    """Train everything and write the pipeline."""
    if smoke:
        steps, batch, vae_steps, pool, save_every = 4, 8, 3, 64, 2
    torch.set_num_threads(threads)
    work = work or ROOT / "runs" / ("embedded_edit" if edit else "embedded")
    if edit:
        return train_edit(
            out, work, steps=steps, batch=batch, rate=rate, pool=pool, save_every=save_every, seed=seed, smoke=smoke
        )
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    vae, data = prepare(work, pool, vae_steps, seed)
    torch.manual_seed(seed)  # again: the same start whether or not the autoencoder was there
    tokenizer = build_tokenizer()
    ids = tokenize(tokenizer, [caption.text for caption in train_captions()] + [""])
    denoiser, averaged = Denoiser(tokenizer), Denoiser(tokenizer)
    began = time.perf_counter()

    def publish(step: int, ema: Ema, loss: float) -> None:
        averaged.load_state_dict(ema.weights, strict=False)
        save_pipeline(averaged, vae, tokenizer, shift, out)
        pipeline, entry = load_pipeline(out), {"step": step, "loss": loss, "seconds": time.perf_counter() - began}
        chosen = reserved_captions()[:: 8 if smoke else 1]
        for guidance in (1.0, 3.0):
            entry[f"strict at guidance {guidance:g}"] = strict_accuracy(
                pipeline, chosen, guidance=guidance, seed=0
            ).mean()
        with (work / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        console.print(entry)

    examples = Data(ids=ids, **data)
    train_denoiser(
        denoiser, lambda generator: flow_matching_loss(denoiser, examples.batch(batch, generator)),
        blocks=[*denoiser.transformer.transformer_blocks], steps=steps, rate=rate, seed=seed, work=work,
        save_every=save_every, publish=publish,
    )  # fmt: skip


def prepare(work: Path, pool_size: int, vae_steps: int, seed: int) -> tuple[AutoencoderKL, dict[str, Tensor]]:
    """The autoencoder and the scaled latents of the pool, from the working folder where they are there."""
    if (work / "latents.safetensors").exists():
        return AutoencoderKL.from_pretrained(work / "vae").eval(), load_file(work / "latents.safetensors")
    with console.status(f"drawing {pool_size} pictures"):
        pool = draw_pool(pool_size, seed, train_captions())
    if (work / "vae").exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    else:
        vae = train_vae(pool, steps=vae_steps, batch=8, rate=4e-3, seed=seed)
        vae.save_pretrained(work / "vae")
    with console.status("encoding them"):
        latents = (encode_pictures(vae, pool.pictures) - vae.config.shift_factor) * vae.config.scaling_factor
    data = {"latents": latents.contiguous(), "captions": pool.captions}
    save_file(data, work / "latents.safetensors")
    return vae, data


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="a pipeline folder")] = ROOT / "rollout" / "embedded",
    seeds: Annotated[int, typer.Option(help="how many noise seeds")] = 4,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 10,
    threads: Annotated[int, typer.Option()] = 1,
    edit: Annotated[bool, typer.Option("--edit", help="a pipeline that edits a picture, by kind of edit")] = False,
) -> None:
    """Strict accuracy by task, on reserved captions and on as many trained ones, with and without guidance."""
    torch.set_num_threads(threads)
    if edit:
        return evaluate_edit(folder, seeds=seeds, steps=steps)
    pipeline = load_pipeline(folder)
    trained = train_captions()
    stride = np.random.default_rng(0).permutation(len(trained))
    spread = tuple(trained[i] for i in stride)
    wanted = Counter(caption.task for caption in reserved_captions())
    seen = tuple(c for task in TASKS for c in [c for c in spread if c.task == task][: wanted[task]])
    for name, chosen in (("reserved", reserved_captions()), ("trained", seen)):
        for guidance in (1.0, 3.0):
            hits = np.stack(
                [strict_accuracy(pipeline, chosen, guidance=guidance, seed=i, steps=steps) for i in range(seeds)]
            )
            error = hits.mean(0).std(ddof=1) / math.sqrt(len(chosen))  # over captions, each the mean of its seeds
            tasks = {task: hits[:, [c.task == task for c in chosen]].mean().round(3).item() for task in TASKS}
            console.print(
                f"{name:9} guidance {guidance:g}: strict {hits.mean():.3f} +- {1.96 * error:.3f} (95 %), "
                f"by seed {hits.mean(1).round(3).tolist()}, by task {tasks}"
            )


if __name__ == "__main__":
    app()
