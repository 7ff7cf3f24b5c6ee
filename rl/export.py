"""The result as weights that diffusers loads: a LoRA file, or a whole pipeline.

The LoRA is ``pytorch_lora_weights.safetensors`` in diffusers' layout, with rank and alpha as JSON in the file's header, so
that ``pipe.load_lora_weights(folder)`` is all that a user has to write.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from flowsteer.rl.engine import Engine
from flowsteer.rl.policy import Policy

LORA_FILE = "pytorch_lora_weights.safetensors"


def lora_state(policy: Policy) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The best policy's adapter: tensors by diffusers' keys, and its rank and alpha by component."""
    tensors: dict[str, Tensor] = {}
    about: dict[str, object] = {}
    for component, denoiser in policy.denoisers.items():
        state = get_peft_model_state_dict(denoiser, adapter_name=policy.best)
        tensors |= {f"{component}.{key}": value.detach().float().cpu().contiguous() for key, value in state.items()}
        config = denoiser.peft_config[policy.best].to_dict()  # type: ignore[union-attr, index]
        config = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in config.items()
            if key
            in ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "use_rslora", "use_dora", "peft_type")
        }
        about |= {f"{component}.{key}": value for key, value in config.items()}
    return tensors, about


def export_lora(policy: Policy, engine: Engine, folder: Path) -> Path:
    """Write the best policy's LoRA into ``folder``. Every process calls it; the main one writes."""
    with engine.whole(policy.all_parameters()):
        tensors, about = lora_state(policy)
    if engine.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{LORA_FILE}.part"
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(about, indent=2, sort_keys=True)}
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(folder / LORA_FILE)
    engine.wait()
    return folder / LORA_FILE


@torch.no_grad()
def export_weights(policy: Policy, engine: Engine, folder: Path) -> Path:
    """Write the best policy's full weights, one diffusers folder per denoiser. For runs without a LoRA."""
    with policy.using(policy.best), engine.whole(policy.all_parameters()):
        if engine.is_main:
            for component, denoiser in policy.denoisers.items():
                denoiser.save_pretrained(folder / component)  # type: ignore[operator]
    engine.wait()
    return folder


def merge(model: str, weights: Path, folder: Path) -> Path:
    """Write a whole pipeline into ``folder``: the base model with the run's LoRA fused in, or its full weights in place.

    Raises ValueError when ``weights`` holds neither, or ``folder`` is not empty.
    """
    from flowsteer.rollout.pipeline import load_diffusers

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"the folder {folder} is not empty; choose another one")
    pipe = load_diffusers(model)
    if (weights / LORA_FILE).exists():
        pipe.load_lora_weights(str(weights))
        pipe.fuse_lora()
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
