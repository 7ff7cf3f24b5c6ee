"""How a reward behaves in its process: inputs and surroundings left alone, no gradients kept, threads, and its speed.

Letters: B images of the trial.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowsteer.rewards.certify.trial import (
    Pair,
    Refused,
    Trial,
    error_text,
    largest_difference,
    process_settings,
)

CheckFunction = Callable[[Trial], str]


class _Saved:
    """A tensor that a graph keeps for its way back; lives as long as the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def inputs_untouched(trial: Trial) -> str:
    """The images and lists that it is given are as before."""
    given, before = trial.arguments(trial.rows), trial.arguments(trial.rows)
    trial.ask(*given)
    changed = ["prompts"] if given[1] != before[1] else []
    changed += ["columns"] if not _same_columns(given[2], before[2]) else []
    changed += [] if np.array_equal(given[0], before[0]) else ["images"]
    if changed:
        raise Refused(f"changes the {' and '.join(changed)} that it is given; work on a copy")
    return "images, prompts and columns are as before"


def _same_columns(first: Mapping[str, Sequence[Any]], second: Mapping[str, Sequence[Any]]) -> bool:
    def same(one: Any, other: Any) -> bool:
        pixels = isinstance(one, np.ndarray) and isinstance(other, np.ndarray)
        return np.array_equal(one, other) if pixels else one is other or bool(one == other)

    return first.keys() == second.keys() and all(
        len(own) == len(second[name]) and all(map(same, own, second[name])) for name, own in first.items()
    )


def surroundings(trial: Trial) -> str:
    """No call changed the working folder, torch's settings, or a random state that others draw from."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    device = torch.get_device_module() if torch.accelerator.is_available() else None
    device_state = device.get_rng_state() if device else None
    try:  # a reward that seeds them has done so before: away from where it leaves them
        torch.rand(1)
        if device:
            torch.rand(1, device=torch.accelerator.current_accelerator())
        np.random.random()
        random.random()
        before = _random_states()
        trial.score(trial.rows)
        changed = changes(trial.settings, process_settings()) + changes(before, _random_states())
    finally:
        torch.set_rng_state(torch_state)
        if device:
            device.set_rng_state(device_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    if changed:
        raise Refused(f"a call changes {', '.join(changed)}, on which the training beside it depends; put it back")
    return f"as before: {', '.join([*trial.settings, *before])}"


def no_gradient(trial: Trial) -> str:
    """Called with gradients enabled it gives plain numbers and keeps no graph."""
    images, prompts, columns = trial.arguments(trial.rows)
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved.add(kept := _Saved(tensor))
        return kept

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        given = trial.reward(images, prompts, **columns)
    for values in given.values() if isinstance(given, Mapping) else [given]:
        if any(isinstance(value, Tensor) and value.requires_grad for value in (values, *values)):
            raise Refused("its scores carry an autograd graph; score under torch.no_grad() and give numbers")
    del given, values
    if len(saved):
        gc.collect()  # what only a circle holds is not kept
    if len(saved):
        raise Refused("keeps an autograd graph after the call, and with it the memory; score under torch.no_grad()")
    return "plain numbers, no graph is kept"


def threads(trial: Trial) -> str:
    """Asked from four threads at once it gives the scores that it gives alone."""
    size = len(trial.rows)
    calls = [[trial.rows[(4 * thread + place) % size] for place in range(4)] for thread in range(4)]
    expected = [trial.score(pairs) for pairs in calls]
    start = threading.Barrier(len(calls))

    def ask(pairs: Sequence[Pair]) -> list[np.ndarray]:
        start.wait()
        return [trial.score(pairs) for _ in range(4)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds; the usual 5 ms are longer than a call of a quick reward
    try:
        with ThreadPoolExecutor(len(calls)) as pool:
            answers = [answer.result() for answer in [pool.submit(ask, pairs) for pairs in calls]]
    except Exception as error:
        raise Refused(f"called from four threads at once it fails: {error_text(error)}") from error
    finally:
        sys.setswitchinterval(interval)
    for alone, scores in ((alone, scores) for alone, found in zip(expected, answers) for scores in found):
        if not trial.same(scores, alone):
            raise Refused(
                f"four threads at once get other scores: {largest_difference(scores, alone)}; keep what belongs to a call in "
                "local variables, or take a lock"
            )
    return "four threads at once get the scores of one"


def speed(trial: Trial) -> str:
    """Reported, never refused."""
    one = trial.rows[:2] if trial.groupwise else trial.samples[:1]
    many = [trial.rows[place % len(trial.rows)] for place in range(16)]
    latency = statistics.median(_seconds(lambda: trial.score(one)) for _ in range(3))
    whole = _seconds(lambda: trial.score(many))
    what = "a group of two" if trial.groupwise else "one image"
    return f"{what} {1000 * latency:.3g} ms; 16 at once {16 / whole:.4g} images/s"


def _random_states() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    device = {}
    if torch.accelerator.is_available():
        device["the accelerator's random state"] = torch.get_device_module().get_rng_state().numpy().tobytes()
    return device | {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "numpy's random state": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "python's random state": random.getstate(),
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The names of the settings that are not as before."""
    return [name for name, value in before.items() if after[name] != value]


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
