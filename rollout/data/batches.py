"""Which samples of which prompts each process draws at a training step.

Everything here is a pure function of the prompts and (seed, step): nothing is stored, a resumed run draws what the unbroken
one would, and neither the prompts nor the batches nor the seeds depend on the number of processes.
Letters: B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.steps.noise import mix

# They keep orders and seeds independent of one another; 4 is that of rollout/offline.py.
_PASS_STREAM = 1
_SAMPLE_STREAM = 2
_SOURCE_STREAM = 3
_UPDATE_STREAM = 5


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples that one network pass draws.

    Example: two prompts with groups of two in batches of four have, at every step, the one batch
    ``group = [0, 0, 1, 1]``, ``sample = [0, 1, 2, 3]``, with rows like ``(1, 1, 0, 0)``.
    """

    rows: tuple[int, ...]  # B, each sample's prompt as its place in the file
    group: Tensor  # [B] int64, the place of the prompt in the step: two draws of one prompt are two groups
    sample: Tensor  # [B] int64, the sample's place in the whole step, over all processes
    seeds: Tensor  # [B] int64, from (seed, step, sample), 0 <= seed < 2**63

    def __len__(self) -> int:
        return len(self.rows)


def step_batches(
    prompts: Prompts,
    *,
    step: int,
    seed: int,
    prompts_per_step: int,
    group_size: int,
    batch_size: int,
    num_processes: int,
    process_index: int,
    updates_per_rollout: int = 1,
    mixed: bool = False,
) -> list[Batch]:
    """What a process draws at a training step, in order.

    The step's samples stand in one order, prompt by prompt, ``group_size`` each, and are cut into batches; every
    update takes a contiguous run of batches (``mixed``: a random part of them, in order), and of that,
    process r takes every batch whose place leaves the remainder r:
    processes are at neighbouring batches at the same time. The samples of a batch and the batches of an update are
    therefore the same whatever the number of processes is.

    Prompts are drawn without replacement: each stands once in every pass over its file, in an order of the pass's own. Of
    several sources, each round of as many draws as their weights add up to takes from each as many as its weight, shuffled.

    ``step`` counts from 0; ``updates_per_rollout`` is among how many optimiser updates the step's samples are shared.

    Raises:
        ValueError: as `check_divisible`; a step or a process that cannot be.
    """
    check_divisible(
        prompts_per_step=prompts_per_step,
        group_size=group_size,
        batch_size=batch_size,
        num_processes=num_processes,
        updates_per_rollout=updates_per_rollout,
    )
    if step < 0 or not 0 <= process_index < num_processes:
        raise ValueError(
            f"step {step} of process {process_index}: steps begin at 0, processes are 0 to {num_processes - 1}"
        )
    rows = step_rows(prompts, step=step, seed=seed, prompts_per_step=prompts_per_step)
    num_batches = prompts_per_step * group_size // batch_size
    places = range(num_batches)
    if mixed:
        places = sorted(places, key=lambda place: mix(seed, _UPDATE_STREAM, step, place))
    of_updates = torch.tensor(places).view(updates_per_rollout, -1).sort().values
    mine = of_updates.view(updates_per_rollout, -1, num_processes)[..., process_index].flatten()
    return [
        _batch(rows, range(index * batch_size, (index + 1) * batch_size), group_size, seed, step)
        for index in mine.tolist()
    ]


def step_rows(prompts: Prompts, *, step: int, seed: int, prompts_per_step: int) -> list[int]:
    """The rows whose prompts all processes together draw at a training step, in order."""
    first = step * prompts_per_step
    return [_draw(prompts, position, seed)[0] for position in range(first, first + prompts_per_step)]


def step_passes(prompts: Prompts, *, step: int, seed: int, prompts_per_step: int) -> list[int]:
    """How often each of `step_rows` was drawn before this training step's draw of it, by passes over its file."""
    first = step * prompts_per_step
    return [_draw(prompts, position, seed)[1] for position in range(first, first + prompts_per_step)]


def sample_seeds(samples: Iterable[int], *, seed: int, step: int) -> Tensor:
    """Seeds of the samples at these places of a training step: [B] int64, 0 <= seed < 2**63."""
    return torch.tensor([mix(seed, _SAMPLE_STREAM, step, sample) for sample in samples], dtype=torch.int64)


def batch_sizes(
    *, prompts_per_step: int, group_size: int, batch_size: int, num_processes: int, updates_per_rollout: int = 1
) -> list[int]:
    """The batch sizes up to ``batch_size`` with which a training step divides evenly, the largest first."""
    sizes = {
        "prompts_per_step": prompts_per_step,
        "group_size": group_size,
        "num_processes": num_processes,
        "updates_per_rollout": updates_per_rollout,
    }
    most = min(batch_size, prompts_per_step * group_size)
    return [size for size in range(most, 0, -1) if _indivisible(**sizes, batch_size=size) is None]


def check_divisible(
    *, prompts_per_step: int, group_size: int, batch_size: int, num_processes: int, updates_per_rollout: int = 1
) -> None:
    """Whether a training step divides evenly into batches, over processes and updates.

    Raises:
        ValueError: it does not; the message says why and which numbers near the given ones work.
    """
    sizes = {
        "prompts_per_step": prompts_per_step,
        "group_size": group_size,
        "batch_size": batch_size,
        "num_processes": num_processes,
        "updates_per_rollout": updates_per_rollout,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    reason = _indivisible(**sizes)
    if reason is None:
        return
    proposals = [
        f"{name}={' or '.join(map(str, near))}"
        for name in ("prompts_per_step", "batch_size", "group_size")
        if (near := _near(sizes, name))
    ]
    given = ", ".join(f"{name}={value}" for name, value in sizes.items())
    advice = f"With the others as they are, one of these works: {'; '.join(proposals)}"
    raise ValueError(f"{given} do not go together: {reason}. {advice if proposals else 'Change more than one of them'}")


def _indivisible(
    *, prompts_per_step: int, group_size: int, batch_size: int, num_processes: int, updates_per_rollout: int
) -> str | None:
    """Why a step does not divide evenly, or None if it does."""
    samples = prompts_per_step * group_size
    if batch_size % group_size and group_size % batch_size:
        return f"a batch of {batch_size} neither holds whole groups of {group_size} nor is a whole part of one"
    if samples % batch_size:
        return f"{samples} samples per step ({prompts_per_step} x {group_size}) do not fill batches of {batch_size}"
    parts = num_processes * updates_per_rollout
    if samples // batch_size % parts:
        return (
            f"{samples // batch_size} batches per step cannot be shared evenly among {num_processes} processes "
            f"x {updates_per_rollout} updates"
        )
    return None


def _near(sizes: dict[str, int], name: str) -> list[int]:
    """The nearest smaller and the nearest larger value of one size that works with the others."""
    value = sizes[name]
    if name == "batch_size":
        limit = sizes["prompts_per_step"] * sizes["group_size"]
    else:  # a multiple of this always works
        limit = value + sizes["batch_size"] * sizes["num_processes"] * sizes["updates_per_rollout"]
    smaller = (other for other in range(value - 1, 0, -1) if _indivisible(**{**sizes, name: other}) is None)
    larger = (other for other in range(value + 1, limit + 1) if _indivisible(**{**sizes, name: other}) is None)
    return [found for found in (next(smaller, None), next(larger, None)) if found is not None]


def _draw(prompts: Prompts, position: int, seed: int) -> tuple[int, int]:
    """The row at a position in the endless sequence of draws, and the number of its source's pass, from 0."""
    weights = tuple(weight for _, weight in prompts.sources)
    rounds, place = divmod(position, sum(weights))
    order = _round_order(weights, seed, rounds)
    source = order[place]
    drawn = rounds * weights[source] + order[:place].count(source)  # of this source, before
    size = prompts.sources[source][0]
    number, place = divmod(drawn, size)
    own = mix(seed, _SOURCE_STREAM, source) if source else seed  # each source in orders of its own
    before = [0, *accumulate(rows for rows, _ in prompts.sources)][source]
    return before + _pass_order(size, own, number)[place], number


@lru_cache(maxsize=64)
def _round_order(weights: tuple[int, ...], seed: int, number: int) -> tuple[int, ...]:
    """The sources of a round's draws, each as often as its weight."""
    sources = [source for source, weight in enumerate(weights) for _ in range(weight)]
    places = sorted(range(len(sources)), key=lambda place: mix(seed, _SOURCE_STREAM, number, place))
    return tuple(sources[place] for place in places)


@lru_cache(maxsize=8)
def _pass_order(num_prompts: int, seed: int, number: int) -> tuple[int, ...]:
    """A permutation of the file's rows. Sorted by hashes, it is the same in every version of numpy and torch."""
    return tuple(sorted(range(num_prompts), key=lambda row: mix(seed, _PASS_STREAM, number, row)))


def _batch(rows: list[int], samples: range, group_size: int, seed: int, step: int) -> Batch:
    groups = [sample // group_size for sample in samples]
    return Batch(
        rows=tuple(rows[group] for group in groups),
        group=torch.tensor(groups, dtype=torch.int64),
        sample=torch.tensor(list(samples), dtype=torch.int64),
        seeds=sample_seeds(samples, seed=seed, step=step),
    )
