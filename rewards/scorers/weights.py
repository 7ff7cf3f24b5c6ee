"""Where a reward's weights come from, and that they are the ones that were meant.

A *place* is a path on this machine, or a file or a whole repository of the hub:

=========================================  =================================================
``/models/HPS_v2.1_compressed.pt``         a file
``/models/clip-vit-large-patch14``         a folder as transformers writes it
``xswu/HPSv2:HPS_v2.1_compressed.pt``      a file of a repository
``openai/clip-vit-large-patch14@REVISION`` a repository as it was at a revision: tag, branch or commit
=========================================  =================================================

A path that exists wins. Whatever is loaded is hashed, and refused where its hash is not the expected one: the same name
may hold other weights tomorrow. Pickles are read by torch's unpickler for tensors only, which runs no code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TENSOR_FORMATS = ("*.safetensors", "*.safetensors.index.json")
PICKLE_FORMATS = ("*.bin", "*.bin.index.json")  # only of a repository that has no safetensors
SETTING_FORMATS = ("*.json", "*.txt", "*.model")  # configurations, vocabularies
_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+|[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<file>[^:]+))?")


@dataclass(frozen=True, kw_only=True)
class Found:
    """Weights on this machine."""

    path: Path  # a file, or a folder
    sha256: str  # of the file; of a folder see `folder_sha256`


def find_file(place: str, *, sha256: str | None = None) -> Found:
    """The one file at a place, from this machine or the hub.

    Args:
        place: see the module's docstring.
        sha256: what the file's hash must be, 64 hexadecimal digits; None: whatever it is.

    Raises:
        ValueError: there is no such file, it cannot be fetched, or its hash is another one.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        raise ValueError(f"{place} is a folder; give the file with the weights")
    if not path.is_file():
        path = _from_hub(place, whole=False)
    return _checked(place, path, file_sha256(path), sha256)


def find_folder(place: str, *, sha256: str | None = None, weights: bool = True) -> Found:
    """The folder of a transformers model or tokenizer at a place, from this machine or the hub.

    Args:
        place: see the module's docstring.
        sha256: what `folder_sha256` must be; None: whatever it is.
        weights: False for a tokenizer: files with weights are neither fetched nor hashed.

    Raises:
        ValueError: there is no such folder, it cannot be fetched, it lacks weights, or its hash is another one.
    """
    path = Path(place).expanduser()
    if path.is_file():
        raise ValueError(f"{place} is a file; give the folder that transformers wrote")
    if not path.is_dir():
        path = _from_hub(place, whole=True, weights=weights)
    return _checked(place, path, folder_sha256(path, weights=weights), sha256)


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def folder_sha256(path: Path, *, weights: bool = True) -> str:
    """The hash of what is loaded from a folder: of the lines ``HASH  NAME`` of its files, by name, as sha256sum writes them.

    Raises ValueError where there is nothing to load.
    """
    formats = SETTING_FORMATS
    if weights:
        formats += TENSOR_FORMATS if any(path.glob("*.safetensors")) else PICKLE_FORMATS
    files = sorted({file for form in formats for file in path.glob(form)}, key=lambda file: file.name)
    if weights and not any(file.suffix in (".safetensors", ".bin") for file in files):
        raise ValueError(f"{path} holds no weights (*.safetensors or *.bin)")
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_tensors(path: Path) -> dict[str, Any]:
    """What a .safetensors file or a torch pickle holds, on the CPU.

    Raises:
        ValueError: the file is damaged, or holds something else than tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            held = load_file(path)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers have a dozen ways to say that a file is damaged
        raise ValueError(f"{path} cannot be read as tensors ({type(error).__name__}): {_first_line(error)}") from error
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds a {type(held).__name__}, not tensors by name")
    return dict(held)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Put every tensor into the module, key for key.

    Raises:
        ValueError: a key is missing or unexpected, or a shape differs; ``name`` says which weights.
    """
    own = module.state_dict()
    for problem, keys in (("lacks", own.keys() - state.keys()), ("has the unexpected", state.keys() - own.keys())):
        if keys:
            raise ValueError(f"{name} {problem} {_some(keys)}; these are weights of another model")
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ValueError(f"{name}: {key} has the shape {tuple(value.shape)}, expected {tuple(own[key].shape)}")
    module.load_state_dict(dict(state))


def tensor(state: Mapping[str, Any], key: str, name: str) -> Tensor:
    """The tensor of that key. Raises ValueError where there is none; ``name`` says in which weights."""
    if not isinstance(state.get(key), Tensor):
        raise ValueError(f"{name} lacks {key}; these are weights of another model")
    return state[key]


def count_blocks(state: Mapping[str, Any], prefix: str) -> int:
    """How many different numbers follow the prefix in the keys."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def empty_model(cls: Any, config: Any, **options: Any) -> Any:
    """A transformers model of that configuration whose weights are still to come; drawing random ones takes half a minute."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        return cls(config, **options)


def load_pretrained(cls: Any, found: Found, *, missing: tuple[str, ...] = (), unexpected: tuple[str, ...] = ()) -> Any:
    """A transformers model of that class in float32, with every one of its weights from the folder.

    Args:
        cls: with ``from_pretrained``.
        found: its folder.
        missing: patterns of keys that no score depends on, so that the folder may lack them; matched from a key's start.
        unexpected: likewise of keys that this class has no use for.

    Raises:
        ValueError: the folder is no such model, or other keys are missing, unexpected or of another shape.
    """
    from transformers.utils import logging

    safe = any(found.path.glob("*.safetensors"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of keys is judged below
    try:
        model, info = cls.from_pretrained(
            found.path, dtype=torch.float32, use_safetensors=safe, output_loading_info=True, local_files_only=True
        )
    except (OSError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{found.path} cannot be loaded as a {cls.__name__}: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    for problem, kind, ignored in (
        ("lacks", "missing_keys", missing),
        ("has the unexpected", "unexpected_keys", unexpected),
    ):
        keys = [key for key in info[kind] if not any(re.match(pattern, key) for pattern in ignored)]
        if keys:
            raise ValueError(f"{found.path} {problem} {_some(keys)}: it is no {cls.__name__}")
    return model.eval().requires_grad_(False)


def _from_hub(place: str, *, whole: bool, weights: bool = True) -> Path:
    kind = "folder" if whole else "file"
    parts = _HUB.fullmatch(place)
    if parts is None or whole == (parts["file"] is not None):
        form = "owner/repository" if whole else "owner/repository:file"
        raise ValueError(f"there is no {kind} {place}; give the path of one, or {form} of the hub")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled

    repository, revision, file = parts["repository"], parts["revision"], parts["file"]
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, revision=revision))
        tensors = list(TENSOR_FORMATS) if weights else []
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*SETTING_FORMATS, *tensors]))
        if weights and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(PICKLE_FORMATS)))
        return folder
    except (OSError, EntryNotFoundError, HFValidationError, OfflineModeIsEnabled) as error:
        command = " ".join(["hf download", repository, *([file] if file else [])])
        if revision:
            command += f" --revision {revision}"
        raise ValueError(
            f"there is no {kind} {place} on this machine, and it cannot be fetched from the hub ({_first_line(error)}). "
            f"Where the network is, run `{command}` and bring the {kind} here; then give its path"
        ) from error


def _checked(place: str, path: Path, actual: str, expected: str | None) -> Found:
    if expected is not None and expected.lower() != actual:
        raise ValueError(f"{place} has the sha256 {actual}, expected {expected}: these are other weights")
    return Found(path=path, sha256=actual)


def _some(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


__all__ = [
    "Found",
    "count_blocks",
    "empty_model",
    "file_sha256",
    "find_file",
    "find_folder",
    "folder_sha256",
    "load_pretrained",
    "load_strictly",
    "read_tensors",
    "tensor",
]
