"""The configuration files of a model: those of a folder, those that are shipped for well-known models, or the hub's.

Shipped are ``models/NAME.json``: the class and the configuration of every component, and in ``checked`` how far they are
confirmed by published files. Weights are never read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from flowsteer.rollout.lifting.loading import SHIPPED

MODELS = Path(__file__).parent / "models"
_TOKENS = ("tokenizer", "processor", "feature_extractor", "scheduler")


@dataclass(frozen=True, kw_only=True)
class Component:
    """One network of a pipeline.

    Example: ``Component(library="diffusers", cls="AutoencoderKL", config={"latent_channels": 16})``.
    """

    library: str
    cls: str
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """What the configuration files of a pipeline say."""

    name: str
    pipeline: str  # its class
    components: Mapping[str, Component]
    defaults: Mapping[str, Any] = field(
        default_factory=dict
    )  # arguments of the call that the class itself would choose
    checked: str = "read from the model's own files"

    @property
    def denoisers(self) -> list[str]:
        """The names of the networks that the denoising loop calls."""
        return [name for name in self.components if name.startswith(("transformer", "unet"))]


@cache
def read_model(path: str) -> ModelFiles:
    """The files of a folder, of a shipped model by one of its hub ids, or of the hub.

    Raises ValueError if there are none, and says so plainly if the hub cannot be reached.
    """
    folder = Path(__file__).parents[2] / "rollout" / path if path in SHIPPED else Path(path)
    if folder.is_dir():
        return _of_folder(path, folder, dict(SHIPPED.get(path, {})))
    for file in sorted(MODELS.glob("*.json")):
        model = json.loads(file.read_text(encoding="utf-8"))
        if path in model["ids"] or path.lower() == file.stem:
            index = model["model_index"]
            return ModelFiles(
                name=path,
                pipeline=index["_class_name"],
                components={
                    name: Component(library=index[name][0], cls=index[name][1], config=config)
                    for name, config in model["components"].items()
                },
                defaults=model["defaults"],
                checked=model["checked"],
            )
    return _of_folder(path, _downloaded(path), {})


def known_models() -> list[str]:
    """The hub ids whose files are shipped."""
    return [
        name for file in sorted(MODELS.glob("*.json")) for name in json.loads(file.read_text(encoding="utf-8"))["ids"]
    ]


def _of_folder(name: str, folder: Path, defaults: dict[str, Any]) -> ModelFiles:
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise ValueError(f"model.path={name} has no model_index.json; give a folder or hub id in diffusers' layout")
    index = json.loads(index_file.read_text(encoding="utf-8"))
    components = {}
    for part, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None or part.startswith(_TOKENS):
            continue
        config = folder / part / "config.json"
        if config.is_file():
            own = json.loads(config.read_text(encoding="utf-8"))
            components[part] = Component(library=entry[0], cls=entry[1], config=own)
    return ModelFiles(name=name, pipeline=index["_class_name"], components=components, defaults=defaults)


def _downloaded(path: str) -> Path:
    """The configuration files of a repository of the hub, without weights."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["model_index.json", "*/config.json"]))
    except Exception as error:  # many kinds: no network, no such repository, no permission
        raise ValueError(
            f"the configuration files of model.path={path} are neither a folder nor shipped, and the hub cannot be asked for "
            f"them ({type(error).__name__}); give a folder, go online, or use one of {', '.join(known_models())}"
        ) from error
