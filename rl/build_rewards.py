"""From a configuration's rewards to the rewards of a run: in this process, in processes of their own, on other machines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import torch

from flowsteer.rewards.combine import Normalise, RewardSet, check_names_and_weights
from flowsteer.rewards.envs.environments import locate
from flowsteer.rewards.frames import Frames
from flowsteer.rewards.hosts.child import WorkerReward
from flowsteer.rewards.hosts.pool import THREAD_VARIABLES, Pool, make_all, threads_each
from flowsteer.rewards.hosts.remote import HTTPReward
from flowsteer.rewards.registry import label_of, load_reward
from flowsteer.rewards.types import Reward
from flowsteer.rl.config import Config
from flowsteer.rl.config.rewards import RewardConfig


def build_rewards(config: Config, device: torch.device) -> RewardSet:
    """The rewards by their entry points, or where their hosts say. Closes what was started when one of them fails."""
    check_names_and_weights([(label_of(name), section.weight) for name, section in config.rewards.items()])
    with ExitStack() as undo:
        entries = []
        for name, section in config.rewards.items():
            reward = build_reward(name, section, device)
            undo.callback(getattr(reward, "close", lambda: None))
            entries.append((label_of(name), reward, section.weight))
        constants = {
            label_of(name): Normalise(scale=section.scale, offset=section.offset)
            for name, section in config.rewards.items()
        }
        columns = {label_of(name): section.columns for name, section in config.rewards.items()}
        frames = {label_of(name): frames_of(section) for name, section in config.rewards.items() if section.frames}
        rewards = RewardSet(entries, normalise=constants, columns=columns, frames=frames)
        undo.pop_all()
    return rewards


def frames_of(section: RewardConfig) -> Frames:
    """Which frames of a video a reward of images scores."""
    given = section.frames
    return Frames(**given) if isinstance(given, dict) else Frames(limit=1 if given == "first" else None)


def build_reward(name: str, section: RewardConfig, device: torch.device) -> Reward:
    """A reward in this process, in one of its own, or on another machine; or several workers of it, as one."""
    if section.workers == 1:
        return _one_reward(name, section, device)
    threads = threads_each(section.workers)
    if section.host is None:  # one after another: what loads a model changes settings that all threads share
        return Pool(name, [load_reward(name, **section.options) for _ in range(section.workers)], threads=threads)

    def make(number: int) -> Reward:
        label = f"{name} (worker {number + 1} of {section.workers})"
        return _one_reward(name, section, device, label=label, env=dict.fromkeys(THREAD_VARIABLES, str(threads)))

    return Pool(name, make_all(make, section.workers))


def _one_reward(
    name: str,
    section: RewardConfig,
    device: torch.device,
    *,
    label: str = "",
    env: Mapping[str, str] = MappingProxyType({}),
) -> Reward:
    """One worker of a reward. ``label`` is its name in messages, ``env`` are further variables of its process."""
    host, label = section.host, label or name
    if host is None:
        return load_reward(name, **section.options)
    times = {
        "name": label,
        "start_timeout_s": host.start_timeout_s,
        "deadline_s": host.deadline_s,
        "deadline_per_image_s": host.deadline_per_image_s,
    }
    target, python = host.target or name, host.python
    if host.environment is not None:
        python, target = locate(host.environment, target)
    try:
        if host.url is not None:
            return HTTPReward(host.url, token_file=host.token_file, **times)
        return WorkerReward(
            target,
            python=str(python),
            options=section.options,
            env={**visible_device(device, os.environ), **env},
            max_restarts=host.max_restarts,
            max_body_bytes=host.max_body_bytes,
            **times,
        )
    except (ConnectionError, TimeoutError) as error:
        raise ValueError(f"the reward {label!r} does not start: {error}") from error


def visible_device(device: torch.device, environment: Mapping[str, str]) -> dict[str, str]:
    """What makes a worker's only accelerator the one of this process: each process has a worker and a device of its own."""
    if device.type != "cuda":
        return {"CUDA_VISIBLE_DEVICES": ""}
    index = device.index or 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[index].strip() if visible else str(index)}


def check_alike(fingerprints: Mapping[str, Any], gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """All processes must score alike, or groups would be compared across unlike judges. Raises ValueError on each of them."""
    text = json.dumps(fingerprints, sort_keys=True)
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    if len(gather(torch.tensor([number])).unique()) > 1:
        raise ValueError(
            "the processes' rewards differ in what their scores depend on (weights, packages, preprocessing); make the nodes "
            f"alike. On this process: {text}"
        )


def without(fingerprints: dict[str, dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """A run may go on on another machine, as long as what scores depend on is the same."""
    return {name: {own: value for own, value in said.items() if own != key} for name, said in fingerprints.items()}
