"""Which algorithm learns how much: every one on the embedded pipeline, over training seeds, at equal budgets; makes a table.

    python scripts/compare_algorithms.py --root runs/compare                  # train what is not there yet, hours
    python scripts/compare_algorithms.py --root runs/compare --write          # and put the tables into docs/algorithms.md
    python scripts/compare_algorithms.py DGPO DiffusionNFT --reward dense     # some of them, one reward

Each algorithm is a shipped configuration, changed only in what its line of `ENTRIES` says. A probe step counts its network
passes (samples that go through the denoiser; one that also goes back counts three) and its time. Then every training seed runs
twice on one thread, for as many steps as the pass budget pays for and as the time budget does, with the learning rate falling
over that run. Scores are of reserved captions, four noise seeds each, without guidance; intervals are 95 % over training
seeds (Student's t). A run that is there already is not repeated, so the comparison can be interrupted and continued.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from learn import gain_over_seeds
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "algorithms.md"
Reward = Literal["composition", "dense"]
PART = {"composition": "composition/strict", "dense": "jpeg_compressibility"}
# The dense reward: every picture has one of its own, and every change of a picture changes it a little.
DENSE = ["rewards={jpeg_compressibility: {}}"]
console = Console()


@dataclass(frozen=True)
class Entry:
    """A line of the table: a shipped configuration and what is changed in it."""

    config: str
    overrides: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()  # further changes with the dense reward


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a training step costs."""

    passes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished run."""

    before: float
    after: float
    minutes: float
    steps: int
    passes: int
    agreement: float


@dataclass
class Line:
    """One algorithm at one budget: its seeds, and how they were made."""

    entry: str
    reward: str
    budget: str
    command: str
    outcomes: list[Outcome] = field(default_factory=list)


# With the dense reward every step of the trajectory has a say, so log densities have their Gaussian weight; steps are smaller.
GAUSSIAN = "rollout.kernel.log_prob_weight=gaussian"
FEWER = "rollout.prompts_per_step=12"
FEWER_FORWARD = "rollout.prompts_per_step=16"

ENTRIES: dict[str, Entry] = {
    "Flow-GRPO, SDE": Entry("embedded_flow_grpo_sde_composition", dense=(GAUSSIAN, FEWER)),
    "Flow-GRPO, CPS": Entry("embedded_flow_grpo_cps_composition", dense=(FEWER,)),
    "Flow-GRPO-Fast": Entry("embedded_flow_grpo_fast_composition", dense=(FEWER,)),
    "MixGRPO": Entry("embedded_mixgrpo_composition", dense=(GAUSSIAN, FEWER)),
    "MixGRPO-Flash": Entry("embedded_mixgrpo_flash_composition", dense=(GAUSSIAN, FEWER)),
    "DanceGRPO": Entry("embedded_dance_grpo_composition", dense=(GAUSSIAN, FEWER)),
    "G2RPO": Entry("embedded_g2rpo_composition", dense=(GAUSSIAN,)),
    "GRPO-Guard": Entry("embedded_grpo_guard_composition", dense=(FEWER,)),
    "step-aware DPO": Entry("embedded_step_dpo_composition", dense=(GAUSSIAN, "algorithm.beta=10.0")),
    "PSO": Entry("embedded_pso_composition", dense=(GAUSSIAN, "algorithm.beta=10.0")),
    "DGPO": Entry("embedded_dgpo_composition", dense=("algorithm.beta=10.0", FEWER_FORWARD)),
    "DiffusionNFT": Entry("embedded_nft_composition", dense=("optimizer.learning_rate=6.0e-4", FEWER_FORWARD)),
    "AWM": Entry("embedded_awm_composition", dense=("optimizer.learning_rate=6.0e-4", FEWER_FORWARD)),
    "Diffusion-DPO, online": Entry(
        "embedded_diffusion_dpo_composition",
        dense=("algorithm.beta=500.0", "optimizer.learning_rate=6.0e-4", FEWER_FORWARD),
    ),
    "Diffusion-DPO, offline": Entry(
        "embedded_diffusion_dpo_composition",
        ("algorithm.refresh_every=null",),
        ("algorithm.beta=500.0", "optimizer.learning_rate=6.0e-4", FEWER_FORWARD),
    ),
    "RAFT": Entry("embedded_raft_composition", dense=("optimizer.learning_rate=6.0e-4", FEWER_FORWARD)),
    "reward-weighted regression": Entry(
        "embedded_raft_composition",
        ("algorithm.weights=exponential",),
        ("optimizer.learning_rate=6.0e-4", FEWER_FORWARD),
    ),
}


def settings_of(entry: Entry, reward: Reward) -> list[str]:
    """The overrides of an entry with a reward."""
    return [*entry.overrides, *(DENSE if reward == "dense" else []), *(entry.dense if reward == "dense" else ())]


@contextmanager
def counting(run: Any) -> Iterator[list[int]]:
    """A list that gets the samples of every denoiser call: once, or three times where a gradient goes back."""
    denoisers, counted = run.policy.denoisers, []

    def note(name: str, *args: Any, **kwargs: Any) -> Any:
        sample = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        counted.append(len(sample) * (3 if torch.is_grad_enabled() else 1))
        return denoisers[name](*args, **kwargs)

    run.policy.pipeline.route(note)
    yield counted


def probe(entry: Entry, reward: Reward) -> Probe:
    """Count the network passes of a training step and time it, the second one: the first warms up."""
    from flowsteer.rl.build import start
    from flowsteer.rl.config import load_config
    from flowsteer.rl.train import train

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"output={folder}/run",
            "evaluation=null",
            "trackers=[]",
            "num_steps=1",
            *settings_of(entry, reward),
        ]
        run = start(load_config(entry.config, settings), quiet=True)
        try:
            with counting(run) as counted:
                train(run)
                passes = sum(counted)
                run.start, run.num_steps = 1, 2
                began = time.perf_counter()
                train(run)
                return Probe(passes=passes, seconds=time.perf_counter() - began)
        finally:
            run.close()


def probe_in_a_process(name: str, reward: Reward, keep: Path) -> Probe:
    """The probe of an entry, measured once and kept."""
    file = keep / f"{file_name(name)}_{reward}.json"
    if not file.exists():
        command = [sys.executable, str(Path(__file__).resolve()), name, "--reward", reward, "--probe"]
        done = subprocess.run(command, capture_output=True, text=True, env=one_thread(), check=False)
        if done.returncode:
            raise RuntimeError(f"the probe of {name} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(done.stdout.splitlines()[-1], encoding="utf-8")
    return Probe(**json.loads(file.read_text(encoding="utf-8")))


def file_name(name: str) -> str:
    """The name of a line as a file's."""
    return name.lower().replace(",", "").replace(" ", "_")


def one_thread() -> dict[str, str]:
    """The environment of a run."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def train_one(name: str, reward: Reward, steps: int, seed: int, folder: Path, captions: int) -> Path:
    """One run in a process of its own; a finished one is left as it is. Raises RuntimeError with the end of its output."""
    files = sorted((folder / "evaluations").glob("step_*.json"))
    if files and files[-1].stem == f"step_{steps:06d}":
        return folder
    entry = ENTRIES[name]
    more = [f"num_steps={steps}", f"seed={seed}", f"output={folder}", "trackers=[]"]
    more += [f"evaluation.num_prompts={captions}", "evaluation.num_seeds=4"]
    command = [
        sys.executable,
        "-m",
        "flowsteer.rl.cli",
        "train",
        entry.config,
        *settings_of(entry, reward),
        *more,
        "--quiet",
    ]
    command += ["--resume"] if (folder / "config.json").exists() else []
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread(), check=False)
    if done.returncode:
        raise RuntimeError(f"{name}, {reward}, seed {seed} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return folder


def outcome(folder: Path, reward: Reward, probed: Probe) -> Outcome:
    """Read a finished run."""
    files = sorted((folder / "evaluations").glob("step_*.json"))
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in (files[0], files[-1])]
    before, after = (float(np.nanmean(np.array(table["scores"][PART[reward]], dtype=float))) for table in tables)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    agreements = [line["gradient_agreement"] for line in lines if line.get("gradient_agreement") is not None]
    spent = sum(value for line in lines for key, value in line.items() if key.startswith("seconds/"))
    return Outcome(
        before=before,
        after=after,
        minutes=spent / 60,
        steps=len(lines),
        passes=len(lines) * probed.passes,
        agreement=float(np.mean(agreements)) if agreements else float("nan"),
    )


def table_of(lines: list[Line]) -> str:
    """A table in Markdown: a row for each line, in order."""
    rows = [
        "| algorithm | before | after | gain (95 % over seeds) | minutes | passes / 1000 | agreement | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        mean = {key: float(np.mean([asdict(o)[key] for o in line.outcomes])) for key in asdict(line.outcomes[0])}
        gain, half = gain_over_seeds([o.after - o.before for o in line.outcomes])
        rows.append(
            f"| {line.entry} | {mean['before']:.3f} | {mean['after']:.3f} | {gain:+.3f} ({gain - half:+.3f} to "
            f"{gain + half:+.3f}) | {mean['minutes']:.1f} | {mean['passes'] / 1000:.0f} | {mean['agreement']:.3f} | "
            f"{mean['steps']:.0f} |"
        )
    return "\n".join(rows)


def write_page(lines: list[Line], seeds: int) -> None:
    """Put the tables between their marks in docs/algorithms.md; a table without any line stays as it is."""
    text = PAGE.read_text(encoding="utf-8")
    for reward in ("composition", "dense"):
        for budget in ("passes", "minutes"):
            own = [line for line in lines if (line.reward, line.budget) == (reward, budget)]
            if not own:
                continue
            begin, end = f"<!-- begin {reward} {budget} -->", f"<!-- end {reward} {budget} -->"
            head, _, rest = text.partition(begin)
            _, _, tail = rest.partition(end)
            if not rest or not tail:
                raise ValueError(f"{PAGE} has no marks {begin!r} and {end!r}")
            commands = "\n".join(f"# {line.entry}\n{line.command}" for line in own)
            made = f"{seeds} training seeds, one thread each. Made by:\n\n```bash\n{commands}\n```"
            details = f"<details><summary>How each line was made</summary>\n\n{made}\n\n</details>"
            text = f"{head}{begin}\n{table_of(own)}\n\n{details}\n{end}{tail}"
    PAGE.write_text(text, encoding="utf-8")


def command_of(entry: Entry, reward: Reward, steps: int) -> str:
    """What to type for one run."""
    changes = " ".join(f"'{change}'" for change in settings_of(entry, reward))
    return f"flowsteer train {entry.config} num_steps={steps} {changes}".strip()


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Lines of the table; all of them unless given.")] = None,
    reward: Annotated[list[str] | None, typer.Option(help="composition or dense; both unless given.")] = None,
    seeds: Annotated[int, typer.Option(min=2, max=8, help="Training seeds.")] = 3,
    passes: Annotated[int, typer.Option(min=1, help="Budget of network passes of a run, in thousands.")] = 300,
    minutes: Annotated[
        float, typer.Option(min=0.01, help="Budget of training time of a run, as the probe measures it.")
    ] = 5.0,
    budget: Annotated[list[str] | None, typer.Option(help="passes or minutes; both unless given.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    captions: Annotated[int, typer.Option(min=2, help="Reserved captions to evaluate, four seeds each.")] = 264,
    root: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/compare"),
    write: Annotated[bool, typer.Option("--write", help="Put the tables into docs/algorithms.md.")] = False,
    only_probe: Annotated[bool, typer.Option("--probe", hidden=True)] = False,
) -> None:
    """Train every algorithm on the embedded pipeline at equal budgets and print what each gained."""
    unknown = sorted(set(names or ()) - set(ENTRIES))
    if unknown:
        console.print(f"unknown: {', '.join(unknown)}; there are {', '.join(ENTRIES)}")
        raise typer.Exit(2)
    rewards: list[Any] = reward or ["composition", "dense"]
    if only_probe:
        print(json.dumps(asdict(probe(ENTRIES[(names or [])[0]], rewards[0]))))
        return
    budgets = {"passes": passes * 1000.0, "minutes": minutes * 60.0}
    plans: list[tuple[Line, Callable[[], list[Outcome]]]] = []
    with ThreadPoolExecutor(parallel) as pool, Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        for of in rewards:
            for name in names or ENTRIES:
                probed = probe_in_a_process(name, of, root / "probes")
                for kind in budget or budgets:
                    each = probed.passes if kind == "passes" else probed.seconds
                    steps = max(round(budgets[kind] / each), 2)
                    line = Line(name, of, kind, command_of(ENTRIES[name], of, steps))
                    task = bar.add_task(f"{of}, {kind}: {name}", total=seeds)
                    jobs = []
                    for seed in range(seeds):
                        folder = root / of / f"{file_name(name)}_{steps}" / f"seed_{seed}"
                        jobs.append(pool.submit(train_one, name, of, steps, seed, folder, captions))
                        jobs[-1].add_done_callback(lambda _, task=task: bar.advance(task))
                    plans.append(
                        (line, lambda jobs=jobs, of=of, probed=probed: [outcome(j.result(), of, probed) for j in jobs])
                    )
        for line, collect in plans:
            line.outcomes = collect()
    lines = [line for line, _ in plans]
    for of in rewards:
        for kind in budget or budgets:
            own = [line for line in lines if (line.reward, line.budget) == (of, kind)]
            console.print(f"\n{of}, equal {kind}\n{table_of(own)}", highlight=False, soft_wrap=True)
    if write:
        write_page(lines, seeds)
    flat = [line.entry for line in lines if not lower_end(line) > 0]
    if flat:
        console.print(f"no gain beyond the interval: {', '.join(dict.fromkeys(flat))}")
        raise typer.Exit(1)


def lower_end(line: Line) -> float:
    """Of the interval of the gain over seeds."""
    gain, half = gain_over_seeds([outcome.after - outcome.before for outcome in line.outcomes])
    return gain - half


if __name__ == "__main__":
    typer.run(main)
