"""Prompt files, and which samples of which prompts each process draws at a training step.

Everything here is a pure function of the file and (seed, step): nothing is stored, a resumed run draws what the unbroken
one would, and neither the prompts nor the batches nor the seeds depend on the number of processes.
Letters: B samples of a batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowsteer.rollout.steps.noise import mix

logger = logging.getLogger(__name__)

_PASS_STREAM, _SAMPLE_STREAM = 1, 2  # keeps the order of the prompts and the seeds of the samples independent
_RESERVED = ("images", "prompts", "completions")  # what rewards are given under these names is not a column


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A prompt file: N prompts and what else the file says of each."""

    texts: tuple[str, ...]  # N
    columns: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # name -> N values
    num_duplicates: int = 0  # rows whose prompt stands earlier in the file too; they are drawn as often as any other

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("there are no prompts")
        for name, values in self.columns.items():
            if len(values) != len(self.texts):
                raise ValueError(f"column {name!r} has {len(values)} values for {len(self.texts)} prompts")

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """A hash of everything in it: two files with the same one are the same training data."""
        everything = json.dumps([self.texts, self.columns], sort_keys=True, default=str)
        return hashlib.sha256(everything.encode()).hexdigest()[:16]


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


def read_prompts(path: str | Path, *, warn: bool = True) -> Prompts:
    """Read a ``.txt`` file (one prompt per line) or a ``.jsonl`` file (objects with ``"prompt"`` and further columns).

    Both in UTF-8. ``path`` may also be the bare name of a file that is shipped with the project, such as
    ``shapes_train.txt``. Lines without text are left out. Prompts that stand there twice are kept and counted. Unless
    ``warn`` is false, these are warned of, and lines of a text file that begin with ``#``: they are prompts like all others.

    Raises:
        ValueError: with the file and the line: no such file, empty, not UTF-8, a line that is no JSON object, has no
            prompt, or has other columns than the first.
    """
    place = _find(path)
    if place.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{place}: a prompt file ends in .txt (one prompt per line) or .jsonl (objects with a prompt)")
    data = place.read_bytes()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{place}, line {line}: not UTF-8 ({error.reason}); save the file in UTF-8") from error
    # not splitlines(), which also cuts at characters that may stand inside a prompt
    lines = [(number, line.strip()) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{place} holds no prompt; write one per line")
    if place.suffix == ".txt":
        texts, columns = tuple(line for _, line in lines), {}
    else:
        texts, columns = _columns(place, lines)
    duplicates = sum(count - 1 for count in Counter(texts).values())
    if warn and place.suffix == ".txt" and (hashes := [number for number, line in lines if line.startswith("#")]):
        logger.warning(
            "%s: %s, line %d the first, begin with '#' and are drawn as prompts; a prompt file has no comments, remove them "
            "if they are some",
            place,
            "1 line" if len(hashes) == 1 else f"{len(hashes)} lines",
            hashes[0],
        )
    if duplicates and warn:
        logger.warning(
            "%s: %d of %d prompts stand there more than once; each row is drawn", place, duplicates, len(texts)
        )
    return Prompts(texts=texts, columns=columns, num_duplicates=duplicates)


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
) -> list[Batch]:
    """What a process draws at a training step, in order.

    The step's samples stand in one order, prompt by prompt, ``group_size`` each, and are cut into batches; every
    update takes a contiguous run of batches, and of that, process r takes every batch whose place leaves the remainder r:
    processes are at neighbouring batches at the same time. The samples of a batch and the batches of an update are
    therefore the same whatever the number of processes is.

    Prompts are drawn without replacement: each stands once in every pass over the file, in an order of the pass's own.

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
    rows = step_rows(len(prompts), step=step, seed=seed, prompts_per_step=prompts_per_step)
    num_batches = prompts_per_step * group_size // batch_size
    mine = torch.arange(num_batches).view(updates_per_rollout, -1, num_processes)[..., process_index].flatten()
    return [
        _batch(rows, range(index * batch_size, (index + 1) * batch_size), group_size, seed, step)
        for index in mine.tolist()
    ]


def step_rows(num_prompts: int, *, step: int, seed: int, prompts_per_step: int) -> list[int]:
    """The rows of a file of ``num_prompts`` prompts whose prompts all processes together draw at a training step, in order."""
    first = step * prompts_per_step
    return [_row(num_prompts, position, seed) for position in range(first, first + prompts_per_step)]


def sample_seeds(samples: Iterable[int], *, seed: int, step: int) -> Tensor:
    """Seeds of the samples at these places of a training step: [B] int64, 0 <= seed < 2**63."""
    return torch.tensor([mix(seed, _SAMPLE_STREAM, step, sample) for sample in samples], dtype=torch.int64)


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


def _find(path: str | Path) -> Path:
    place = Path(path)
    if place.is_file():
        return place
    shipped = {Path(str(item)).name: Path(str(item)) for item in files("flowsteer.configs").iterdir()}
    names = sorted(name for name in shipped if name.endswith((".txt", ".jsonl")))
    if str(path) in names:
        return shipped[str(path)]
    if place.is_dir():
        raise ValueError(f"{place} is a folder; give the prompt file itself")
    raise ValueError(
        f"there is no prompt file {place}, and none of that name is shipped ({', '.join(names) or 'none is'})"
    )


def _columns(place: Path, lines: list[tuple[int, str]]) -> tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]:
    """The prompts and the other columns of a .jsonl file, every line held to the first one's columns."""
    rows: list[dict[str, Any]] = []
    for number, line in lines:
        where = f"{place}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'{where}: not JSON ({error}); each line is an object like {{"prompt": "a red circle"}}'
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise ValueError(f'{where}: no prompt; each line is an object with a text under "prompt", got {line[:80]}')
        if rows and row.keys() != rows[0].keys():
            differing = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise ValueError(
                f"{where}: columns differ from line {lines[0][0]} in {differing}; every line needs the same ones, "
                "null where one is empty"
            )
        reserved = [name for name in _RESERVED if name in row]
        if reserved:
            raise ValueError(
                f"{where}: a column may not be called {reserved[0]!r}, a name that rewards need; rename it"
            )
        rows.append(row)
    texts = tuple(row["prompt"].strip() for row in rows)
    return texts, {name: tuple(row[name] for row in rows) for name in rows[0] if name != "prompt"}


def _row(num_prompts: int, position: int, seed: int) -> int:
    """The prompt at a position in the endless sequence of passes over the file."""
    number, place = divmod(position, num_prompts)
    return _pass_order(num_prompts, seed, number)[place]


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
