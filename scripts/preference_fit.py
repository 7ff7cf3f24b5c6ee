"""The model of `train_step_preference.py`: how it begins, what it is fitted to, how often it is right at each noise level.

Letters: B images, G images of one prompt, P prompts of a step.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from preference_pairs import HELD_OUT, Base, Group, bar, console
from rich.table import Table
from torch import Tensor

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.scorers.step_preference import StepPreferenceModel
from flowsteer.rollout.steps.noise import mix

MAX_FRESH_SIZE = 64  # pixels that a new vision tower sees; a larger one is not learnt from nothing
Scorer = Callable[[np.ndarray, list[str], float], Tensor]
"""(uint8 [B, H, W, 3], B prompts, noise level) -> scores [B], NaN where missing"""


def new_model(
    base: Base, *, image_size: int | None, patch_size: int, width: int, num_blocks: int, projection: int
) -> StepPreferenceModel:
    """A small CLIP with fresh weights whose text tower begins as the pipeline's own, if that is a CLIP text model."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

    pipe = base.pipeline.pipe
    encoder, tokenizer = getattr(pipe, "text_encoder", None), getattr(pipe, "tokenizer", None)
    if not isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection):
        raise ValueError(
            f"the pipeline's text_encoder is a {type(encoder).__name__}, and a new model begins with a CLIP text model: give a "
            "CLIP checkpoint with --init"
        )
    size = image_size or min(*base.image_shape, MAX_FRESH_SIZE)
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": max(1, width // 32),
        "image_size": max(1, round(size / patch_size)) * patch_size,
        "patch_size": patch_size,
    }
    text: Any = encoder.config
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision, projection_dim=projection))
    tower = encoder.text_model if isinstance(encoder, CLIPTextModelWithProjection) else encoder
    clip.text_model.load_state_dict(tower.state_dict())
    return StepPreferenceModel(clip.float(), tokenizer)


def pretrained_model(path: str) -> StepPreferenceModel:
    """A published CLIP, such as PickScore_v1. Only safetensors are read."""
    from transformers import AutoTokenizer, CLIPModel

    try:
        clip: Any = CLIPModel.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        return StepPreferenceModel(clip, AutoTokenizer.from_pretrained(path))
    except OSError as error:
        raise ValueError(f"--init {path}: no CLIP checkpoint with safetensors and a tokenizer ({error})") from None


def split_by_level(
    groups: Sequence[Group], indices: Sequence[int], clean_share: float, generator: torch.Generator
) -> dict[int | None, list[Group]]:
    """Give each group a noise level, evenly over all of them; None stands for finished images, a share of the groups."""
    count = len(groups)
    places = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count  # in [0, 1)
    split: dict[int | None, list[Group]] = {}
    for group, place in zip(groups, places.tolist()):
        noised = (place - clean_share) / (1 - clean_share) if clean_share < 1 else -1.0
        index = indices[min(int(noised * len(indices)), len(indices) - 1)] if noised >= 0 and indices else None
        split.setdefault(index, []).append(group)
    return split


def show(base: Base, groups: Sequence[Group], index: int | None, generator: torch.Generator) -> np.ndarray:
    """The predictions of all images of some groups at one level, with the same noise within a group: uint8 [B, H, W, 3]."""
    texts = [group.prompt for group in groups for _ in group.latents]
    noise = [torch.randn(base.latent_shape, generator=generator).expand_as(group.latents) for group in groups]
    return base.predict(texts, torch.cat([group.latents for group in groups]), torch.cat(noise), index)


def pair_loss(scores: Tensor, groups: Sequence[Group]) -> tuple[Tensor, float]:
    """Binary cross-entropy of softmax over each pair, and the share of pairs in the order of their labels.

    ``scores`` [B] of all images of the groups, one group after another. The mean over a group's pairs, then over groups.
    """
    losses, weights, right, count = [], [], 0.0, 0
    for own, group in zip(scores.split([len(group.latents) for group in groups]), groups):
        known = ~group.preference.isnan()
        difference = (own[:, None] - own[None])[known.to(own.device)]
        label = group.preference[known].to(own.device)
        losses.append(F.binary_cross_entropy_with_logits(difference, label))
        weights.append(group.weight)
        clear = label != 0.5
        right += ((difference > 0) == (label > 0.5))[clear].sum().item()
        count += int(clear.sum())
    weight = torch.tensor(weights, device=scores.device)
    return (torch.stack(losses) * weight).sum() / weight.sum(), right / max(count, 1)


def step_loss(
    model: StepPreferenceModel,
    base: Base,
    groups: Sequence[Group],
    *,
    clean_share: float,
    contrastive: float,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """The loss on some groups, each at a level of its own, and the share of pairs that are ordered as their labels say."""
    by_level = split_by_level(groups, base.indices, clean_share, generator)
    groups = [group for some in by_level.values() for group in some]
    images = [show(base, some, index, generator) for index, some in by_level.items()]
    sigma = torch.tensor([base.sigma(index) for (index, _), shown in zip(by_level.items(), images) for _ in shown])
    texts = list(dict.fromkeys(group.prompt for group in groups))
    own = torch.tensor([texts.index(group.prompt) for group in groups for _ in group.latents])  # [B]
    embedded, prompts = model.embed_images(np.concatenate(images), sigma), model.embed_prompts(texts)
    loss, right = pair_loss(model.score(embedded, prompts[own]), groups)
    if contrastive:
        logits = model.clip.logit_scale.exp() * embedded @ prompts.T  # [B, P]
        loss = loss + contrastive * F.cross_entropy(logits, own.to(logits.device))
    return loss, right


def train(
    model: StepPreferenceModel,
    loss: Callable[[int], tuple[Tensor, float]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
) -> None:
    """Fit the model to ``loss(step)`` by AdamW; the learning rate rises linearly, then falls along a cosine."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_decay(step, steps, warmup_steps))
    losses: list[float] = []
    order: list[float] = []
    with bar() as progress:
        task = progress.add_task("training", total=steps, note="")
        for step in range(steps):
            value, right = loss(step)
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(value.item())
            order.append(right)
            note = f"loss {np.mean(losses[-20:]):.3f}, pairs in order {np.mean(order[-20:]):.1%}"
            progress.update(task, advance=1, note=note)
    model.eval().requires_grad_(False)


def warmup_then_decay(step: int, steps: int, warmup: int) -> float:
    """A learning rate's factor: linearly up, then along a cosine down to one fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def expected_minutes(model: StepPreferenceModel, loss: Callable[[int], tuple[Tensor, float]], steps: int) -> float:
    """How long training takes, from two passes whose gradients are dropped; the first pays for preparations."""
    model.train().requires_grad_(True)
    loss(0)[0].backward()
    began = time.perf_counter()
    loss(1)[0].backward()
    model.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) * steps / 60


def accuracy_by_level(
    base: Base, groups: Sequence[Group], scorers: dict[str, Scorer], *, seed: int, batch_size: int
) -> list[dict[str, float]]:
    """For each noise level, finished images last, the share of pairs that each scorer orders as people or the reward did.

    Equal and missing scores count half; ties among the labels are left out. The noise is the same for all scorers.
    """
    table = []
    per_batch = max(1, batch_size // max(len(group.latents) for group in groups))
    with bar() as progress:
        task = progress.add_task("accuracy", total=(len(base.indices) + 1) * len(groups), note="")
        for index in (*base.indices, None):
            generator = torch.Generator().manual_seed(mix(seed, HELD_OUT, -1 if index is None else index))
            right, count = dict.fromkeys(scorers, 0.0), 0
            for start in range(0, len(groups), per_batch):
                some = groups[start : start + per_batch]
                images = show(base, some, index, generator)
                texts = [group.prompt for group in some for _ in group.latents]
                for name, scorer in scorers.items():
                    right[name] += pairs_in_order(scorer(images, texts, base.sigma(index)), some)
                count += sum(int((group.preference > 0.5).sum()) for group in some)
                progress.advance(task, len(some))
            row: dict[str, float] = {"sigma": round(base.sigma(index), 4), "pairs": count}
            table.append({**row, **{name: value / max(count, 1) for name, value in right.items()}})
    return table


def pairs_in_order(scores: Tensor, groups: Sequence[Group]) -> float:
    """How many of the pairs have the better image's score above the other's; half for those that are equal or missing."""
    right = 0.0
    for own, group in zip(scores.split([len(group.latents) for group in groups]), groups):
        difference = (own[:, None] - own[None])[group.preference > 0.5]
        right += ((difference > 0).double() + 0.5 * (~(difference > 0) & ~(difference < 0)).double()).sum().item()
    return right


def model_scorer(model: StepPreferenceModel) -> Scorer:
    """The model as it is now; later training does not change it."""
    kept = copy.deepcopy(model).eval()

    @torch.no_grad()
    def score(images: np.ndarray, prompts: list[str], sigma: float) -> Tensor:
        return kept(images, torch.full((len(images),), sigma), prompts).float().cpu()

    return score


def reward_scorer(rewards: RewardSet) -> Scorer:
    """The reward on the predictions: what a preference model has to be better than."""

    def score(images: np.ndarray, prompts: list[str], sigma: float) -> Tensor:
        return rewards.score(torch.from_numpy(images).movedim(-1, -3).float() / 255, prompts).total

    return score


def show_table(table: list[dict[str, float]], title: str) -> None:
    """Print accuracy by noise level."""
    shares = [name for name in table[0] if name not in ("sigma", "pairs")]
    printed = Table("sigma", "pairs", *shares, title=title)
    for row in table:
        printed.add_row(f"{row['sigma']:.3f}", str(row["pairs"]), *(f"{row[name]:.1%}" for name in shares))
    console.print(printed)
