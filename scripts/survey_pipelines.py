"""Ask every denoising pipeline of the installed diffusers whether it is lifted, trained and exported: docs/pipelines.md.

    python scripts/survey_pipelines.py --write          # all of them, then the page; about ten minutes on a core
    python scripts/survey_pipelines.py --only WanPipeline --only sd_pag
    python scripts/survey_pipelines.py --fresh --write  # forget earlier answers

The pipelines are the tiny ones of tests/zoo. Each answer is a line of JSON in ``--answers``; what is answered there for this
release of diffusers is not asked again, so an interrupted survey goes on where it was. A process asks some pipelines and ends,
so that memory stays bounded; if one dies, its pipelines are asked one by one, and the one that kills it is said to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: networks of this size only lose by threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import diffusers
import typer
from pipelines_page import PAGE, page
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from zoo.classes import denoising_classes
from zoo.entries import built, entries
from zoo.survey import Answer, survey_class, survey_entry

ROOT = Path(__file__).resolve().parents[1]
console = Console(stderr=True)


def main(
    only: Annotated[list[str] | None, typer.Option(help="An entry of the zoo or a class; again for more.")] = None,
    answers: Annotated[Path, typer.Option(help="The lines of JSON.")] = ROOT / "outputs" / "pipelines.jsonl",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the answers of earlier surveys.")] = False,
    write: Annotated[bool, typer.Option("--write", help=f"Write {PAGE}.")] = False,
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 1,
    each: Annotated[int, typer.Option(help="Pipelines that a process asks before it ends.")] = 25,
) -> None:
    """Ask, and keep the answers."""
    answers.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        answers.unlink(missing_ok=True)
    known = read(answers)
    chosen = [*expanded(only)] if only else []
    names = [name for name in entries() if (name in chosen if chosen else name not in known)]
    known |= asked(names, survey_entry, answers, jobs, each)
    have_one = {answer.cls for answer in known.values() if answer.name in entries()}
    bare = [name for name in denoising_classes() if name not in have_one]
    names = [name for name in chosen or bare if name not in entries() and (chosen or name not in known)]
    known |= asked(names, survey_class, answers, jobs, 10 * each)
    if chosen:
        for name in chosen:
            console.print(known[name], soft_wrap=True)
    if write:
        current = [answer for name, answer in known.items() if name in {*entries(), *bare}]
        (ROOT / PAGE).write_text(page(current, diffusers.__version__), encoding="utf-8")
        console.print(f"{PAGE} is written, of {len(current)} answers")


def expanded(only: list[str]) -> Iterator[str]:
    """Names of entries, and for a class its entries, or itself where it has none. Raises ValueError for other names."""
    of_class: dict[str, list[str]] = {}
    if any(name not in entries() for name in only):
        for name, entry in entries().items():
            of_class.setdefault(type(built(entry)).__name__, []).append(name)
    for name in only:
        if name in entries():
            yield name
        elif name in of_class or name in denoising_classes():
            yield from of_class.get(name, [name])
        else:
            raise ValueError(f"{name!r} is no entry of tests/zoo and no denoising pipeline class of diffusers")


def asked(names: list[str], ask: Callable[[str], Answer], file: Path, jobs: int, each: int) -> dict[str, Answer]:
    """The answers for some names, each written down as it comes."""
    found: dict[str, Answer] = {}
    with Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not names,
    ) as progress:
        bar = progress.add_task("", total=len(names))
        for answer in each_answer(names, ask, jobs, each):
            with file.open("a", encoding="utf-8") as lines:
                said = {"diffusers": diffusers.__version__, **dataclasses.asdict(answer)}
                lines.write(json.dumps(said) + "\n")
            found[answer.name] = answer
            progress.update(bar, advance=1, description=answer.name[:32])
    return found


def each_answer(names: list[str], ask: Callable[[str], Answer], jobs: int, each: int) -> Iterator[Answer]:
    """New processes for every ``jobs * each`` names.

    The executor's own ``max_tasks_per_child`` hangs in Python 3.11 when a process has done its tasks.
    """
    for first in range(0, len(names), jobs * each):
        left = dict.fromkeys(names[first : first + jobs * each])
        with contextlib.suppress(BrokenProcessPool), _processes(jobs) as pool:
            for done in as_completed([pool.submit(quietly, ask, name) for name in left]):
                answer = done.result()
                del left[answer.name]
                yield answer
        for name in left:  # a process died, and took what others had begun with it
            yield _alone(name, ask)


def _alone(name: str, ask: Callable[[str], Answer]) -> Answer:
    """Of a process of its own, or that it died."""
    with _processes(1) as pool:
        try:
            return pool.submit(quietly, ask, name).result()
        except BrokenProcessPool as error:
            return Answer(name=name, cls=name, kind="Other", verdict="refused", said=f"its process died: {error}")


def _processes(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))


def quietly(ask: Callable[[str], Answer], name: str) -> Answer:
    """Without what libraries say of networks this small."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    return ask(name)


def read(file: Path) -> dict[str, Answer]:
    """The newest answers to each name that were given for this release of diffusers."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    said: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {own["name"]: _answer(own) for own in said if own.pop("diffusers") == diffusers.__version__}


def _answer(fields: dict[str, Any]) -> Answer:
    """From JSON, which knows no tuples."""
    made: dict[str, Any] = {key: tuple(own) if isinstance(own, list) else own for key, own in fields.items()}
    return Answer(**made)


if __name__ == "__main__":
    typer.run(main)
