"""How well an unfinished image will please: the step-aware preference model of SPO (Liang et al. 2024, arXiv 2406.04314).

A CLIP model whose vision tower is told the noise level. It is shown the *prediction of the clean image* that a diffusion or
flow model makes at a noise level, decoded to pixels, and scores it against the prompt as CLIP does. One is needed for
each base model, since predictions of different models look different; ``scripts/train_step_preference.py`` trains it.

What differs from the paper: the noise level is ``sigma`` in [0, 1] of the sampler's own schedule and not a DDPM timestep, so
that the same model serves flows; the embedding is of 1000 sigma, which is a flow's timestep.

Letters: B images, T frames, D width of the vision tower, N its blocks, P width of the joint space, L prompt tokens.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_TYPE = "flowsteer_step_preference"
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER = "config.json", "model.safetensors", "tokenizer"
FREQUENCIES = 256  # size of the sinusoidal embedding of the noise level
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # Radford et al. 2021 (arXiv 2103.00020): CLIP's training images
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class NoiseLevelModulation(nn.Module):
    """A noise level as shifts, scales and gates of each block: adaLN (Peebles & Xie 2023, arXiv 2212.09748, section 3.2).

    At the start every shift and scale is 0 and every gate 1, whatever the noise level: a pre-trained tower is left as it is.
    """

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        of_blocks, self.final = [nn.Linear(width, 6 * width) for _ in range(num_blocks)], nn.Linear(width, 2 * width)
        for layer in (*of_blocks, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            for layer in of_blocks:
                layer.bias.view(6, width)[[2, 5]] = 1.0  # the two gates
        self.blocks = nn.ModuleList(of_blocks)

    def forward(self, sigma: Tensor) -> tuple[list[Tensor], Tensor]:
        """Noise levels [B] to N times [6, B, 1, D] (shift, scale, gate of attention, then of the MLP), and [2, B, D]."""
        embedded = self.embed(sinusoids(1000 * sigma.float()).to(self.final.weight.dtype))  # [B, D]
        of_blocks = [layer(embedded).unflatten(-1, (6, 1, -1)).transpose(0, 1) for layer in self.blocks]
        return of_blocks, self.final(embedded).unflatten(-1, (2, -1)).transpose(0, 1)


def sinusoids(times: Tensor) -> Tensor:
    """Cosines and sines [B, FREQUENCIES] of times [B] in 0..1000, wave lengths from 2 pi to 20000 pi."""
    half = FREQUENCIES // 2
    rates = torch.exp(-math.log(10000) / half * torch.arange(half, device=times.device))
    angles = times[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class StepPreferenceModel(nn.Module):
    """A transformers ``CLIPModel`` with a vision tower that is told the noise level.

    Made new it scores exactly as the CLIP model that it is given. ``save`` and ``load`` use a folder with safetensors, JSON
    and the tokenizer's files.

    Args:
        clip: a ``transformers.CLIPModel``, which becomes a part of this one.
        tokenizer: of its prompts.
    """

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        super().__init__()
        vision = clip.config.vision_config
        self.clip = clip
        self.modulation = NoiseLevelModulation(vision.hidden_size, vision.num_hidden_layers)
        self.tokenizer = tokenizer
        self.image_size: int = vision.image_size
        self.max_tokens: int = min(tokenizer.model_max_length, clip.config.text_config.max_position_embeddings)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.clip.logit_scale.device

    def forward(self, images: np.ndarray, sigma: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores [B] of uint8 images [B, H, W, 3] or [B, T, H, W, 3] at noise levels [B], each against its own prompt."""
        distinct = list(dict.fromkeys(prompts))
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return self.score(self.embed_images(images, sigma), self.embed_prompts(distinct)[rows])

    def score(self, images: Tensor, prompts: Tensor) -> Tensor:
        """exp(logit_scale) times the cosine, [B], of embeddings [B, P] and [B, P]."""
        return self.clip.logit_scale.exp() * (images * prompts).sum(-1)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """B texts, cut off where they are longer than the tower allows, to unit vectors [B, P]."""
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)  # [B, L]; attention is causal, so what follows the end is not seen
        text = self.clip.text_model(input_ids=ids).pooler_output
        return F.normalize(self.clip.text_projection(text), dim=-1)

    def embed_images(self, images: np.ndarray, sigma: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] with noise levels [B] to unit vectors [B, P]; of a video [B, T, H, W, 3] their mean."""
        if images.ndim == 5:
            frames = self.embed_images(images.reshape(-1, *images.shape[2:]), sigma.repeat_interleave(images.shape[1]))
            return frames.unflatten(0, images.shape[:2]).mean(1)
        return self._embed_pixels(self.preprocess(images), sigma.to(self.device))

    def preprocess(self, images: np.ndarray) -> Tensor:
        """uint8 [B, H, W, 3] in RGB to the vision tower's input [B, 3, image_size, image_size].

        Bicubic with antialiasing as CLIP, but to a square: nothing is cut off an image that is none.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2).float() / 255
        size = (self.image_size, self.image_size)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        return ((pixels - self.pixel_mean) / self.pixel_std).to(self.clip.logit_scale.dtype)

    def _embed_pixels(self, pixels: Tensor, sigma: Tensor) -> Tensor:
        """CLIP's vision tower with adaLN in its blocks: [B, 3, image_size, image_size], [B] -> unit vectors [B, P]."""
        tower = self.clip.vision_model
        of_blocks, (final_shift, final_scale) = self.modulation(sigma)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))  # [B, tokens, D]
        for block, (shift, scale, gate, mlp_shift, mlp_scale, mlp_gate) in zip(tower.encoder.layers, of_blocks):
            normed = block.layer_norm1(hidden) * (1 + scale) + shift
            hidden = hidden + gate * block.self_attn(normed)[0]
            normed = block.layer_norm2(hidden) * (1 + mlp_scale) + mlp_shift
            hidden = hidden + mlp_gate * block.mlp(normed)
        pooled = tower.post_layernorm(hidden[:, 0]) * (1 + final_scale) + final_shift
        return F.normalize(self.clip.visual_projection(pooled), dim=-1)

    def save(self, folder: str | Path) -> None:
        """Write the folder that `load` reads. Raises ValueError where the folder is there already."""
        from safetensors.torch import save_file

        folder = Path(folder)
        if folder.exists():
            raise ValueError(f"{folder} exists already; choose another folder")
        folder.mkdir(parents=True)
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS_FILE)
        config = {"model_type": MODEL_TYPE, "clip": self.clip.config.to_dict()}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> StepPreferenceModel:
        """Read what `save` wrote. Raises ValueError where the folder is something else."""
        from safetensors.torch import load_file
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        folder = Path(folder)
        config = _read_config(folder)
        lacking = [name for name in (WEIGHTS_FILE, TOKENIZER_FOLDER) if not (folder / name).exists()]
        if lacking:
            raise ValueError(f"{folder} lacks {' and '.join(lacking)}: it was not written to its end; train it again")
        clip = CLIPModel(CLIPConfig.from_dict(config["clip"]))
        model = cls(clip, AutoTokenizer.from_pretrained(folder / TOKENIZER_FOLDER))
        state = load_file(folder / WEIGHTS_FILE)
        differing = sorted(state.keys() ^ model.state_dict().keys())
        if differing:
            raise ValueError(f"{folder / WEIGHTS_FILE} and {CONFIG_FILE} do not belong together: {differing[:3]}")
        dtype = state["clip.logit_scale"].dtype
        model.to(dtype).load_state_dict(state)
        return model.eval().requires_grad_(False)


class StepPreference:
    """How well a predicted clean image pleases, given its noise level: SPO's step-aware preference model (arXiv 2406.04314).

    The column ``sigma`` holds the noise level in [0, 1] at which each image was predicted; without it all images are
    finished ones (0). Scores are differences in log-odds: with s the scores of two images of one prompt at one noise
    level, sigmoid(s_0 - s_1) is the probability that the first is preferred; across prompts they mean little.

    Args:
        path: folder that ``scripts/train_step_preference.py`` wrote.
        device: where it runs; None: an accelerator where there is one.
        batch_size: images in one pass.

    Raises:
        ValueError: no such folder, or another kind of folder.
    """

    def __init__(self, path: str, device: str | None = None, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.model = StepPreferenceModel.load(path).to(device or found or "cpu")
        self.batch_size = batch_size
        self._prompts: OrderedDict[str, Tensor] = OrderedDict()  # text -> [P]

    @torch.no_grad()
    def __call__(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        *,
        sigma: Sequence[float] | None = None,
        **columns: Sequence[Any],
    ) -> list[float | None]:
        """uint8 [B, H, W, 3] or [B, T, H, W, 3] in RGB, B prompts and B noise levels to B scores.

        Raises ValueError for images of another kind, and for noise levels that are not B numbers in [0, 1].
        """
        if (
            images.dtype != np.uint8
            or images.ndim not in (4, 5)
            or images.shape[-1] != 3
            or len(images) != len(prompts)
        ):
            raise ValueError(
                f"step_preference scores uint8 images [B, H, W, 3] with B prompts, got {images.dtype} {images.shape} with "
                f"{len(prompts)} prompts"
            )
        levels = _noise_levels(sigma, len(images))
        scores: list[float | None] = []
        for start in range(0, len(images), self.batch_size):
            rows = slice(start, start + self.batch_size)
            embedded = self.model.embed_images(images[rows], levels[rows])
            scores += self.model.score(embedded, self._embed_prompts(prompts[rows])).float().tolist()
        return scores

    def _embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """[B, P]; each prompt by itself, so that its embedding does not depend on the others, and from memory."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._prompts:
                self._prompts[prompt] = self.model.embed_prompts([prompt])[0]
            self._prompts.move_to_end(prompt)
        embedded = torch.stack([self._prompts[prompt] for prompt in prompts])
        while len(self._prompts) > 4096:
            self._prompts.popitem(last=False)
        return embedded


def _noise_levels(sigma: Sequence[float] | None, size: int) -> Tensor:
    """[B] float32."""
    if sigma is None:
        return torch.zeros(size)
    levels = np.asarray(sigma, dtype=np.float32)
    if levels.shape != (size,):
        raise ValueError(f"step_preference wants one noise level per image: {size}, got the shape {levels.shape}")
    outside = levels[~((levels >= 0) & (levels <= 1))]  # NaN too
    if len(outside):
        raise ValueError(
            f"a noise level sigma lies between 0 (a finished image) and 1 (noise), got {outside[0]}; timesteps of a flow "
            "are 1000 sigma"
        )
    return torch.from_numpy(levels)


def _read_config(folder: Path) -> Mapping[str, Any]:
    advice = "train one with scripts/train_step_preference.py"
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} with a step-aware preference model; {advice}")
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is no step-aware preference model: it has no {CONFIG_FILE}; {advice}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != MODEL_TYPE:
        raise ValueError(
            f"{folder} holds a model of the type {kind!r}, not {MODEL_TYPE!r}; a CLIP model scores finished images only: "
            "start from it with scripts/train_step_preference.py --init"
        )
    return config


__all__ = ["NoiseLevelModulation", "StepPreference", "StepPreferenceModel"]
