"""What the self-check of a pipeline said is kept, so that it is not asked again at every start.

The check takes some fifteen network passes: seconds for pictures, minutes for long videos. A verdict is for one set of
weights, settings, versions and device; whatever of these changes, the check runs again. Only a good verdict is kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from flowsteer.rewards.caches import cache_folder
from flowsteer.rl.checkpoint import write_whole
from flowsteer.rollout.lifting.selfcheck import Report

logger = logging.getLogger(__name__)

Asked = Literal["cached", "always", "never"]
_PACKAGES = (
    "flowsteer",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "torchao",
    "bitsandbytes",
    "flash-attn",
    "kernels",
)


def verdict_file(about: Mapping[str, Any], device: torch.device) -> Path:
    """Where the verdict on a pipeline is kept; ``about`` says which pipeline this is and what is done with it."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # used from its folder
            versions[package] = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    text = json.dumps({"about": about, "versions": versions, "device": name}, sort_keys=True, default=str)
    return cache_folder("selfcheck") / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.txt"


def checked(asked: Asked, file: Path, check: Callable[[], Report]) -> None:
    """Make the check, unless it is not asked for or its good verdict is kept.

    Args:
        asked: as ``model.selfcheck``.
        file: from `verdict_file`.
        check: makes the check.

    Raises:
        ValueError: the pipeline must not be trained; the whole report is the message.
    """
    if asked == "never":
        logger.warning(
            "the self-check is left out (model.selfcheck=never): a loop that keeps a state would go unnoticed"
        )
        return
    if asked == "cached" and file.is_file():
        return
    report = check()
    if not report.ok:
        raise ValueError(report.text())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, report.text() + "\n")
    except OSError as error:  # a home that cannot be written only costs time
        logger.info("the verdict of the self-check is not kept in %s (%s)", file, error)
