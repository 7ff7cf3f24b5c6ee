"""Processes that share samples (``engine.context_parallel``): how many teams they are, and what they cannot do."""

from __future__ import annotations

from collections.abc import Iterator

from flowsteer.rl.config.schema import Config


def sharers(config: Config, num_processes: int) -> int:
    """Among how many a training step's samples are shared: processes, or teams of them that have the same samples."""
    return max(num_processes // config.engine.context_parallel, 1)


def among(config: Config, num_processes: int) -> str:
    """`sharers` in words."""
    size = config.engine.context_parallel
    return f"{num_processes} processes" if size == 1 else f"{sharers(config, num_processes)} teams of {size} processes"


def context_faults(config: Config, num_processes: int) -> Iterator[str]:
    """Settings with which no sequence can be split over processes."""
    size, model = config.engine.context_parallel, config.model
    if size == 1:
        return
    if num_processes % size:
        yield (
            f"engine.context_parallel={size} makes teams of so many processes, but the run has {num_processes}; start a "
            f"multiple of {size}, or set engine.context_parallel to a number that divides them"
        )
    if model.attention not in (None, "native"):
        yield (
            f"engine.context_parallel={size} splits the attention of model.attention=native, not of {model.attention}; leave "
            "model.attention out"
        )
    if model.compile:
        yield f"engine.context_parallel={size} does not go together with model.compile; leave one of them out"
