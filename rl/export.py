"""The result as weights that diffusers loads: a LoRA file, or a whole pipeline.

The LoRA is ``pytorch_lora_weights.safetensors`` in diffusers' layout, with rank and alpha as JSON in the file's header, so
that ``pipe.load_lora_weights(folder)`` is all that a user has to write (Wan 2.2, with two transformers, needs a second call:
``pipe.load_lora_weights(folder + "/transformer_2", load_into_transformer_2=True)``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from flowsteer.rl.engine.base import Engine
from flowsteer.rl.policy import Policy

LORA_FILE = "pytorch_lora_weights.safetensors"


SECOND = "transformer_2"  # of Wan 2.2; diffusers loads a LoRA for it from a file of its own, under the first one's name


def lora_state(policy: Policy, component: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The best policy's adapter of one denoiser: tensors by diffusers' keys, and what the file's header says of it."""
    denoiser = policy.denoisers[component]
    prefix = "transformer" if component == SECOND else component
    state = get_peft_model_state_dict(denoiser, adapter_name=policy.best)
    tensors = {f"{prefix}.{key}": value.detach().float().cpu().contiguous() for key, value in state.items()}
    config = denoiser.peft_config[policy.best].to_dict()  # type: ignore[union-attr, index]
    kept = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "use_rslora", "use_dora", "peft_type")
    about = {f"{prefix}.{key}": config[key] for key in kept}
    return tensors, {key: sorted(value) if isinstance(value, set) else value for key, value in about.items()}


def export_lora(policy: Policy, engine: Engine, folder: Path) -> Path:
    """Write the best policy's LoRA into ``folder``. Every process calls it; the main one writes."""
    for component in policy.denoisers:
        with engine.whole(policy.exported()):
            tensors, about = lora_state(policy, component)
        if engine.is_main:
            target = folder / SECOND if component == SECOND else folder
            target.mkdir(parents=True, exist_ok=True)
            temporary = target / f".{LORA_FILE}.part"
            metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(about, indent=2, sort_keys=True)}
            save_file(tensors, temporary, metadata=metadata)
            temporary.replace(target / LORA_FILE)
    engine.wait()
    return folder / LORA_FILE


def load_lora(pipe: Any, folder: Path) -> None:
    """``pipe.load_lora_weights`` of an exported LoRA, with the second call that a second transformer needs."""
    pipe.load_lora_weights(str(folder))
    if (folder / SECOND / LORA_FILE).exists():
        pipe.load_lora_weights(str(folder / SECOND), load_into_transformer_2=True)


@torch.no_grad()
def export_weights(policy: Policy, engine: Engine, folder: Path) -> Path:
    """Write the best policy's full weights, one diffusers folder per denoiser. For runs without a LoRA."""
    with policy.using(policy.best), engine.whole(policy.exported()):
        if engine.is_main:
            for component, denoiser in policy.denoisers.items():
                denoiser.save_pretrained(folder / component)  # type: ignore[operator]
    engine.wait()
    return folder


def merge(model: str, weights: Path, folder: Path) -> Path:
    """Write a whole pipeline into ``folder``: the base model with the run's LoRA fused in, or its full weights in place.

    Raises ValueError when ``weights`` holds neither, or ``folder`` is not empty.
    """
    from flowsteer.rollout.lifting.pipeline import load_diffusers

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"the folder {folder} is not empty; choose another one")
    pipe = load_diffusers(model)
    if (weights / LORA_FILE).exists():
        load_lora(pipe, weights)
        second = [SECOND] if (weights / SECOND / LORA_FILE).exists() else []
        pipe.fuse_lora(components=["unet" if hasattr(pipe, "unet") else "transformer", *second])
        pipe.unload_lora_weights()
    else:
        components = [path.parent.name for path in weights.glob("*/config.json")]
        if not components:
            raise ValueError(f"{weights} holds neither {LORA_FILE} nor the folder of a denoiser")
        for component in components:
            current = getattr(pipe, component)
            setattr(pipe, component, type(current).from_pretrained(weights / component))
    pipe.save_pretrained(folder)
    return folder
