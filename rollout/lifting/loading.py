"""A diffusers pipeline from a folder, the hub, or this package."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError

from flowsteer.rollout.imports import importing

EMBEDDED = "embedded"
EMBEDDED_EDIT = "embedded_edit"
# The pipelines that come with this package, and the arguments of ``__call__`` that they were trained with.
SHIPPED: dict[str, dict[str, Any]] = {
    # diffusers' 256 zeros for the missing T5 would make each pass six times slower
    EMBEDDED: {"max_sequence_length": 12},
    # the source at its own size, and not at one of those that the published model was trained with
    EMBEDDED_EDIT: {"max_sequence_length": 12, "max_area": 32 * 32, "_auto_resize": False},
}


def load_diffusers(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    vae_dtype: torch.dtype | None = None,
) -> DiffusionPipeline:
    """A diffusers pipeline from a folder, a hub id, or one of the tiny ones that come with this package (`SHIPPED`).

    Components that ``model_index.json`` leaves out or lists as [null, null] are None, so that Stable Diffusion 3
    without T5 loads. ``vae_dtype`` is the type of its autoencoders, None for that of all. Processes that share a machine read
    the weights one after the other (`in_turn`). Raises ValueError where there is no such pipeline.
    """
    folder = str(Path(__file__).parents[1] / path) if path in SHIPPED else path
    try:
        if not Path(folder).is_dir():
            folder = str(DiffusionPipeline.download(folder))  # its progress is worth seeing, that of loading is not
        index: Any = DiffusionPipeline.load_config(folder)
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"there is no diffusers pipeline {path!r}: give a folder with a model_index.json, the id of a repository on the "
            f"hub, or {' or '.join(map(repr, SHIPPED))} ({type(error).__name__}: {reason})"
        ) from error
    with importing():
        cls = getattr(diffusers, index["_class_name"], None)  # None: a class that comes with the checkpoint
        for part in index.values():  # [library, class] of a component, which loading it would import
            if isinstance(part, list) and part[:1] in (["diffusers"], ["transformers"]):
                getattr({"diffusers": diffusers, "transformers": transformers}[part[0]], part[1], None)
    expected = cls._get_signature_keys(cls)[0] if cls is not None else ()
    absent = {name: None for name in expected if (index.get(name) or [None])[0] is None}
    types: Any = (
        dtype  # autoencoders are read in their own type: float32 weights would lose their last digits in another
    )
    if vae_dtype is not None:
        types = {"default": dtype, **{name: vae_dtype for name in _autoencoders(index)}}
    with _without_progress_bars(), in_turn(torch.device(device)):
        return DiffusionPipeline.from_pretrained(folder, dtype=types, **absent).to(device)


@contextmanager
def in_turn(device: torch.device) -> Iterator[None]:
    """Only one of the processes on this machine is inside the context, where they bring weights to accelerators.

    A pipeline goes through the memory of the host on its way. Eight processes at once would need room for eight of it.
    """
    if device.type == "cpu" or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1:
        yield
        return
    with (Path(tempfile.gettempdir()) / f"flowsteer-loading-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a process that dies
        yield


def _autoencoders(index: dict[str, Any]) -> list[str]:
    """The names of the autoencoders in a ``model_index.json``. Raises ValueError where there is none."""
    classes = {name: getattr(diffusers, str(own[1]), None) for name, own in index.items() if isinstance(own, list)}
    found = [name for name, cls in classes.items() if callable(getattr(cls, "encode", None)) and hasattr(cls, "decode")]
    if not found:
        raise ValueError(f"model.vae.dtype: {index['_class_name']} has no autoencoder; leave it out")
    return found


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """No bars of diffusers and transformers while parts are loaded; afterwards as before."""
    shown = [
        library
        for library in (diffusers.utils.logging, transformers.utils.logging)
        if library.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
