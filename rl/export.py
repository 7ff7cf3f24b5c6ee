"""The result as weights that other tools load: a LoRA file, or a whole pipeline.

A run writes its LoRA as ``pytorch_lora_weights.safetensors`` in diffusers' layout; ``pipe.load_lora_weights(folder)`` is all
that a user has to write (Wan 2.2, with two transformers, needs a second call:
``pipe.load_lora_weights(folder + "/transformer_2", load_into_transformer_2=True)``). `convert_lora` rewrites it for PEFT, or
for tools that read kohya's layout.

Loaders differ in where they look for alpha: the header of the file, a tensor ``.alpha``, or nowhere, and then they take it to
be equal to the rank. So alpha / rank is multiplied into ``lora_B``, and every file says alpha = rank: all loaders agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flowsteer.rl.engine.base import Engine
from flowsteer.rl.policy import Policy

LORA_FILE = "pytorch_lora_weights.safetensors"


WEIGHTS_FILE = "model.safetensors"  # of a network that is no model of diffusers
SECOND = "transformer_2"  # of Wan 2.2; diffusers loads a LoRA for it from a file of its own, under the first one's name

Layout = Literal["diffusers", "peft", "kohya"]

_HEADER = "lora_adapter_metadata"  # the key in the file's header under which diffusers looks for rank and alpha


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """The adapter of one denoiser, with alpha = rank.

    Attributes:
        prefix: ``unet`` or ``transformer``, where pipelines keep the denoiser.
        tensors: ``{layer}.lora_A.weight`` [rank, in] and ``{layer}.lora_B.weight`` [out, rank] of every adapted layer (of
            a convolution: [rank, in, height, width] and [out, rank, 1, 1]).
        settings: rank, alpha, target names and the like, as in a ``peft.LoraConfig``.

    Example:
        ``LoRA(prefix="unet", tensors={"mid.to_q.lora_A.weight": ..., "mid.to_q.lora_B.weight": ...},
        settings={"r": 4, "lora_alpha": 4, "target_modules": ["to_q"], "peft_type": "LORA"})``
    """

    prefix: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    def layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``lora_A`` and ``lora_B`` of every adapted layer, by the layer's path in the denoiser."""
        ending = ".lora_A.weight"
        paths = [key.removesuffix(ending) for key in self.tensors if key.endswith(ending)]
        return {path: (self.tensors[path + ending], self.tensors[f"{path}.lora_B.weight"]) for path in paths}


def folded(lora: LoRA) -> LoRA:
    """The same adapter with alpha = rank: ``lora_B`` is multiplied by alpha / rank.

    A power of two only changes the exponents: the layer gives the same bits as in training. Any other ratio rounds each
    element of ``lora_B`` once, to half a unit in the last place of float32, a relative error of 6e-8.
    """
    rank, alpha = lora.settings["r"], lora.settings["lora_alpha"]
    tensors = {key: value * (alpha / rank) if ".lora_B." in key else value for key, value in lora.tensors.items()}
    return replace(lora, tensors=tensors, settings={**lora.settings, "lora_alpha": rank})


def lora_state(policy: Policy, component: str, full: Callable[[Tensor], Tensor] = Tensor.detach) -> LoRA:
    """The best policy's adapter of one denoiser, in float32; ``full`` gives all values of a parameter."""
    denoiser = policy.denoisers[component]
    adapters = {key: value for key, value in denoiser.named_parameters() if ".lora_" in key}
    state = get_peft_model_state_dict(denoiser, adapters, adapter_name=policy.best)
    tensors = {key: full(value).float().cpu().contiguous() for key, value in state.items()}
    config = denoiser.peft_config[policy.best].to_dict()  # type: ignore[union-attr, index]
    kept = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "use_rslora", "use_dora", "peft_type")
    settings = {key: sorted(config[key]) if isinstance(config[key], set) else config[key] for key in kept}
    return folded(LoRA(prefix="transformer" if component == SECOND else component, tensors=tensors, settings=settings))


def read_lora(file: Path) -> LoRA:
    """A LoRA that a run has exported, with alpha = rank.

    Raises ValueError for any other file: one without rank and alpha in its header, or with more than one model's layers.
    """
    with safe_open(file, framework="pt") as opened:
        header = (opened.metadata() or {}).get(_HEADER)
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  (no mapping)
    prefix, *others = sorted({key.partition(".")[0] for key in tensors})
    if header is None or others:
        reason = (
            f"its header holds no {_HEADER}" if header is None else f"it holds layers of {prefix}, {', '.join(others)}"
        )
        raise ValueError(f"{file} was not written by flowsteer: {reason}; give the export folder of a run")
    return folded(  # runs of earlier versions wrote lora_B as trained, and alpha beside it
        LoRA(
            prefix=prefix,
            tensors={key.removeprefix(f"{prefix}."): value for key, value in tensors.items()},
            settings={key.removeprefix(f"{prefix}."): value for key, value in json.loads(header).items()},
        )
    )


def write_lora(lora: LoRA, folder: Path, layout: Layout = "diffusers") -> Path:
    """Write the files of a layout into ``folder``, which is made; returns the file with the tensors.

    - ``diffusers``: ``pytorch_lora_weights.safetensors``, keys ``transformer.{layer}.lora_A.weight``.
    - ``peft``: ``adapter_config.json`` and ``adapter_model.safetensors``, for ``PeftModel.from_pretrained(denoiser, folder)``.
    - ``kohya``: ``pytorch_lora_weights.safetensors``, keys ``lora_unet_{layer}.lora_down.weight``, ``.lora_up.weight`` and
      ``.alpha``, the layer's dots as underscores. A transformer's keys start with ``lora_transformer_``, as OneTrainer
      writes and ComfyUI reads them for Stable Diffusion 3 and Flux: diffusers' layer names, not the original model's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "peft":
        LoraConfig(**{**lora.settings, "inference_mode": True}).save_pretrained(str(folder))
        tensors = {f"base_model.model.{key}": value for key, value in lora.tensors.items()}
        return _write_whole(folder / "adapter_model.safetensors", tensors, {})
    if layout == "kohya":
        rank, tensors = lora.settings["r"], {}
        for path, (down, up) in lora.layers().items():
            name = f"lora_{lora.prefix}_{path.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(float(rank))
        return _write_whole(folder / LORA_FILE, tensors, {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)})
    tensors = {f"{lora.prefix}.{key}": value for key, value in lora.tensors.items()}
    about = {f"{lora.prefix}.{key}": value for key, value in lora.settings.items()}
    return _write_whole(folder / LORA_FILE, tensors, {_HEADER: json.dumps(about, indent=2, sort_keys=True)})


def _write_whole(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    temporary = file.with_name(f".{file.name}.part")
    save_file(dict(tensors), temporary, metadata={"format": "pt", **header})
    return temporary.replace(file)


def export_lora(policy: Policy, engine: Engine, folder: Path) -> Path:
    """Write the best policy's LoRA into ``folder``. Every process calls it; the main one writes."""
    for component in policy.denoisers:
        lora = lora_state(policy, component, engine.full)
        if engine.is_main:
            write_lora(lora, folder_of(component, policy.denoisers, folder))
    engine.wait()
    return folder / LORA_FILE


def load_lora(pipe: Any, folder: Path) -> None:
    """Load an exported LoRA: ``pipe.load_lora_weights`` or what stands in for it, and a call for each further denoiser.

    Raises ValueError if diffusers finds no layer of the pipeline in the file, where it would go on with the base model.
    """
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        component = next(iter(file.keys())).partition(".")[0]
    network = getattr(pipe, component, None)
    if hasattr(pipe, "load_lora_weights") if network is None else _pipeline_loads(pipe, network):
        pipe.load_lora_weights(str(folder))
        if not any(getattr(part, "peft_config", None) for part in pipe.components.values()):
            raise ValueError(
                f"{folder / LORA_FILE} holds nothing that diffusers can load into {type(pipe).__name__}; give the LoRA of a "
                "run with this model in diffusers' format (RUN/export, or `flowsteer export --format diffusers`)"
            )
    else:
        _load_adapter(pipe, component, folder)
    for further in sorted(folder.glob(f"*/{LORA_FILE}")):
        component = further.parent.name
        if component == SECOND:
            pipe.load_lora_weights(str(further.parent), load_into_transformer_2=True)
        else:
            _load_adapter(pipe, component, further.parent)


def _pipeline_loads(pipe: Any, network: Any) -> bool:
    """Whether ``pipe.load_lora_weights`` works.

    Some classes inherit it and lack what it asks for: Kolors has no second text encoder, Kandinsky 3's UNet no method.
    """
    encoders = [name for name in getattr(pipe, "_lora_loadable_modules", ()) if name.startswith("text_encoder")]
    able = hasattr(pipe, "load_lora_weights") and hasattr(network, "load_lora_adapter")
    return able and all(hasattr(pipe, name) for name in encoders)


def _load_adapter(pipe: Any, component: str, folder: Path) -> None:
    """A LoRA of one network, by the network's own method, or fused in where it has none."""
    network = getattr(pipe, component)
    if hasattr(network, "load_lora_adapter"):
        network.load_lora_adapter(str(folder), prefix=component, weight_name=LORA_FILE)
    else:
        _fuse(network, read_lora(folder / LORA_FILE))


def how_to_load(pipe: Any, denoisers: Mapping[str, Any]) -> str:
    """What a user of diffusers writes to load a LoRA of this pipeline: a call for each denoiser."""
    calls = []
    for component, network in denoisers.items():
        place = folder_of(component, denoisers, Path("export"))
        if component == SECOND:
            calls.append(f'pipe.load_lora_weights("{place}", load_into_transformer_2=True)')
        elif _pipeline_loads(pipe, network) and place == Path("export"):
            calls.append(f'pipe.load_lora_weights("{place}")')
        elif hasattr(network, "load_lora_adapter"):
            calls.append(
                f'pipe.{component}.load_lora_adapter("{place}", prefix="{component}", weight_name="{LORA_FILE}")'
            )
        else:
            return "only as a whole pipeline: `flowsteer export RUN FOLDER`"
    return "; ".join(calls)


def folder_of(component: str, denoisers: Mapping[str, Any], folder: Path) -> Path:
    """Where the LoRA of a denoiser is written: the first one's into ``folder``, each other one's into a folder of its name."""
    first = min(denoisers, key=lambda name: name == SECOND)
    return folder if component == first else folder / component


@torch.no_grad()
def export_weights(policy: Policy, engine: Engine, folder: Path) -> Path:
    """Write the best policy's full weights, one diffusers folder per denoiser. For runs without a LoRA.

    Where each process keeps a share, one parameter after the other is gathered and goes to the main process's memory.
    """
    with policy.using(policy.best):
        for component, denoiser in policy.denoisers.items():
            state = {}
            for key, value in denoiser.state_dict(keep_vars=True).items():
                whole = engine.full(value)
                if engine.is_main:
                    state[key] = whole.cpu().contiguous()
            if not engine.is_main:
                continue
            if isinstance(denoiser, ModelMixin):
                _with_weights(denoiser, state).save_pretrained(folder / component)
            else:  # of an adapter
                (folder / component).mkdir(parents=True, exist_ok=True)
                _write_whole(folder / component / WEIGHTS_FILE, state, {})
    engine.wait()
    return folder


def _with_weights(denoiser: ModelMixin, state: Mapping[str, Tensor]) -> ModelMixin:
    """Another network with these weights, which are not copied; of diffusers' class, not of the one that FSDP made of it."""
    cls: Any = type(denoiser).__bases__[-1] if isinstance(denoiser, FSDPModule) else type(denoiser)
    with init_empty_weights():
        network = cls.from_config(denoiser.config)
    network.load_state_dict(state, assign=True)
    return network


def convert_lora(weights: Path, folder: Path, *, layout: Layout, dtype: torch.dtype = torch.float32) -> Path:
    """Write the LoRA of a run's export in another layout (see `write_lora`); a second transformer's in a sub-folder.

    Args:
        weights: the folder ``RUN/export``.
        folder: where the files go; must not exist or be empty.
        layout: ``diffusers``, ``peft`` or ``kohya``.
        dtype: of the tensors. Adapters are trained in float32, whatever the dtype of the model.

    Returns:
        The file with the tensors (of the first denoiser).

    Raises:
        ValueError: the layout is unknown, ``weights`` holds no LoRA, or ``folder`` is not empty.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"there is no layout {layout!r} of a LoRA, only {', '.join(get_args(Layout))}")
    _refuse_full(folder)
    if not (weights / LORA_FILE).exists():
        raise ValueError(
            f"{weights} holds no {LORA_FILE}, so there is nothing to write in the format {layout!r}: a run writes it when it "
            "ends, if it trains a LoRA; if it trains all weights, use the format 'pipeline'"
        )
    files = []
    for part in ("", SECOND) if (weights / SECOND / LORA_FILE).exists() else ("",):
        lora = read_lora(weights / part / LORA_FILE)
        tensors = {key: value.to(dtype) for key, value in lora.tensors.items()}
        files.append(write_lora(replace(lora, tensors=tensors), folder / part, layout))
    return files[0]


def merge(model: str, weights: Path, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a whole pipeline into ``folder``: the base model with the run's LoRA fused in, or its full weights in place.

    A Stable Diffusion 3 without T5 gets an encoder that gives zeros in its place (rl/placeholder.py).

    Args:
        model: folder or hub id of the base model.
        weights: the folder ``RUN/export``.
        folder: where the pipeline goes; must not exist or be empty.
        dtype: of the weights that are written. With a LoRA, each sum is taken in float32 and rounded once.

    Raises:
        ValueError: ``weights`` holds neither, or ``folder`` is not empty.
    """
    from flowsteer.rl.placeholder import fill_absent
    from flowsteer.rollout.lifting.loading import load_diffusers

    _refuse_full(folder)
    pipe = load_diffusers(model, dtype=dtype)
    if (weights / LORA_FILE).exists():
        lora = read_lora(weights / LORA_FILE)
        _fuse(getattr(pipe, lora.prefix), lora)
        if (weights / SECOND / LORA_FILE).exists():
            _fuse(getattr(pipe, SECOND), read_lora(weights / SECOND / LORA_FILE))
    else:
        components = [path.parent.name for path in weights.glob("*/config.json")]
        if not components:
            raise ValueError(f"{weights} holds neither {LORA_FILE} nor the folder of a denoiser")
        for component in components:
            current = getattr(pipe, component)
            setattr(pipe, component, type(current).from_pretrained(weights / component, dtype=dtype))
    fill_absent(pipe)  # so that plain from_pretrained(folder) loads it
    pipe.save_pretrained(folder)
    return folder


@torch.no_grad()
def load_into(denoisers: Mapping[str, nn.Module], folder: Path) -> None:
    """Put the result of a run into the networks of an adapter: its LoRA is fused in, or its full weights replace theirs.

    Raises ValueError if the folder holds nothing of a network.
    """
    for component, denoiser in denoisers.items():
        lora, own = (folder / SECOND if component == SECOND else folder) / LORA_FILE, folder / component
        if lora.is_file():
            _fuse(denoiser, read_lora(lora))
        elif (own / WEIGHTS_FILE).is_file():
            denoiser.load_state_dict(load_file(own / WEIGHTS_FILE))
        elif isinstance(denoiser, ModelMixin) and own.is_dir():
            denoiser.load_state_dict(type(denoiser).from_pretrained(own).state_dict())
        else:
            raise ValueError(f"{folder} holds nothing of the network {component}; a run writes it when it ends")


@torch.no_grad()
def _fuse(denoiser: nn.Module, lora: LoRA) -> None:
    """``W + B A`` in every adapted layer. In bfloat16, PEFT's own merging would round ``A``, ``B`` and ``B A`` as well."""
    for path, (down, up) in lora.layers().items():
        weight = denoiser.get_submodule(path).get_parameter("weight")
        product = up.float().flatten(1) @ down.float().flatten(1)
        weight.copy_(weight.float() + product.reshape(weight.shape).to(weight.device))


def _refuse_full(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"the folder {folder} is not empty; choose another one")
