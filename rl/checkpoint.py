"""What a restart needs, written so that a kill at any moment leaves the previous checkpoint whole.

A checkpoint is a folder ``checkpoints/step_000010`` of safetensors and JSON: it is written under a temporary name, synced and
renamed. Randomness needs no state, because every draw comes from (seed, step, sample). Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from flowsteer.rl.config import Config, parse_config
from flowsteer.rl.config.messages import renamed_stage
from flowsteer.rl.engine.base import Engine
from flowsteer.rollout.lifting.quantize import stored

FORMAT = 3

_FREE_TO_CHANGE = {
    "output", "num_steps", "save_every", "save_every_s", "keep", "trackers", "evaluation", "engine.timeout_s",
    "advantage.min_scored",
    "prompts.pictures.cache", "model.selfcheck",
    "model.path", "prompts.train",  # where they lie; what they hold is compared by `Checkpoints.restore`
}  # fmt: skip
_WHAT_IT_IS = {  # of what a checkpoint belongs to, in a user's words
    "num_processes": "the number of processes",
    "strategy": "engine.strategy",
    "model": "the model of model.path",
    "prompts": "the content of prompts.train",
}
_FREE_OF_A_HOST = {  # a reward may move and be given more time; which one it is, its fingerprint says
    "url", "python", "token_file", "start_timeout_s", "deadline_s", "deadline_per_image_s", "max_restarts", "max_body_bytes",
}  # fmt: skip


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run.
        engine: whose state is kept.
        model: fingerprint of the base weights, from `fingerprint`.
        prompts: fingerprint of the training prompts.
        rewards: what the scores depend on, from `RewardSet.fingerprints`.
        keep: how many stay on disk.
        plugins: hashes of the code of an algorithm and an adapter from outside, by what they are.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        *,
        model: str,
        prompts: str,
        rewards: Mapping[str, Any],
        keep: int,
        plugins: Mapping[str, str | None] = MappingProxyType({}),
    ) -> None:
        self.root = folder / "checkpoints"
        self.engine = engine
        self.keep = keep
        self._belongs_to = {
            "format": FORMAT,
            "num_processes": engine.processes.num_processes,
            "strategy": engine.backend.strategy,
            "model": model,
            "prompts": prompts,
            "rewards": dict(rewards),
            "plugins": dict(plugins),
        }

    def save(self, step: int) -> Path:
        """Keep the state after ``step`` training steps. Every process calls it; the folder appears whole or not at all."""
        final, temporary = self.root / f"step_{step:06d}", self.root / f".step_{step:06d}.part"
        if self.engine.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.engine.wait()
        self.engine.save(temporary)
        self.engine.wait()
        if self.engine.is_main:
            about = {"step": step, "num_updates": self.engine.num_updates, **self._belongs_to}
            (temporary / "checkpoint.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            for file in temporary.iterdir():
                _sync(file)
            _sync(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _sync(self.root)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.root / f"step_{old:06d}")
        self.engine.wait()
        return final

    def steps(self) -> list[int]:
        """The training steps that whole checkpoints exist for, ascending."""
        return sorted(int(path.parent.name.split("_")[1]) for path in self.root.glob("step_*/checkpoint.json"))

    def restore(self) -> int:
        """Load the newest checkpoint, if there is one; returns the training step to go on with.

        Raises ValueError for a checkpoint of another model, other prompts, rewards whose scores may differ, another number of
        processes or another engine.strategy.
        """
        steps = self.steps()
        if not steps:
            return 0
        folder = self.root / f"step_{steps[-1]:06d}"
        about = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        then, now = _flat({key: about.get(key) for key in self._belongs_to}), _flat(self._belongs_to)
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key):
                what = _WHAT_IT_IS.get(key, key.removeprefix("plugins."))
                raise ValueError(
                    f"{what} has changed since {folder} was written ({then.get(key)} then, {now.get(key)} now); resume with "
                    "what the run was started with, or start a new one in another output folder"
                )
        self.engine.restore(folder)
        return int(about["step"])


def open_run(folder: Path, config: Config, *, resume: bool) -> None:
    """Refuse a folder that another run uses, and a resumption with other settings. Changes nothing on disk.

    Raises ValueError that says which settings differ.
    """
    saved = folder / "config.json"
    if not saved.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"the output folder {folder} is not empty; choose another with output=FOLDER")
        return
    if not resume:
        raise ValueError(
            f"the output folder {folder} holds a run already; continue it with --resume, or choose another with output=FOLDER"
        )
    try:
        then = json.loads(saved.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{saved} is damaged ({error}); start a new run with output=FOLDER") from None
    if "zero_stage" in (earlier := then.get("engine", {})):
        raise ValueError(
            f"the run in {folder} was started by an earlier version and cannot go on with this one, whose checkpoints are laid "
            f"out in another way (engine.zero_stage: {renamed_stage(earlier['zero_stage'])}); finish it with the version that "
            "began it, or start a new one with output=FOLDER"
        )
    with suppress(ValueError):  # keys that came into being since then have their defaults
        then = json.loads(parse_config(then).model_dump_json())
    before = _flat(then)
    now = _flat(json.loads(config.model_dump_json()))
    changed = [
        f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in _FREE_TO_CHANGE)
        and not _is_free_of_a_reward(key)
    ]
    if changed:
        raise ValueError(f"the run in {folder} was started with other settings:\n  " + "\n  ".join(changed))


def _is_free_of_a_reward(key: str) -> bool:
    """Whether a key says where a reward is, what time it has, or how many of it there are; its options are none of these."""
    section, _, last = key.rpartition(".")
    if section.startswith("rewards.") and last == "workers":
        return not section.endswith(".options") and ".options." not in section
    is_host = section.startswith("rewards.") and section.endswith(".host") and not section.endswith(".options.host")
    return is_host and last in _FREE_OF_A_HOST


def fingerprint(denoisers: dict[str, nn.Module]) -> str:
    """Which model this is: a hash over the names, shapes and first values of the denoisers' weights."""
    digest = hashlib.sha256()
    for component, denoiser in sorted(denoisers.items()):
        for key, value in denoiser.state_dict().items():
            digest.update(f"{component}.{key}{tuple(value.shape)}".encode())
            for part in stored(value):
                digest.update(part.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill at any moment leaves either the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # several processes may write the same
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
