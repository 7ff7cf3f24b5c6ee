"""Which algorithm learns how much: every one on the embedded pipeline, over training seeds, at equal costs; makes three tables.

    python scripts/compare_algorithms.py --root runs/compare                  # train what is not there yet: hours
    python scripts/compare_algorithms.py --root runs/compare --table dense --table composition --write  # and to the page
    python scripts/compare_algorithms.py --root runs/compare --table changes --seeds 6 --write  # which has six seeds there
    python scripts/compare_algorithms.py DGPO DiffusionNFT --table dense      # some of them, one table

Each algorithm is a shipped configuration, changed only in what its line of `ENTRIES` says; the table `changes` sets single
changes of the policy gradient's rollouts beside what they change, and beside AWM. Every training seed is one run on one
thread. Its score is read before the first step, after the first step that used up the network passes that all are given,
after the first that used up their minutes, and at its own end. Passes are samples that go through the denoiser while
training; one that also goes back counts three. Minutes are those of the processor, so that runs side by side do not disturb
each other's. Scores are of reserved captions, four noise seeds each, without guidance; intervals are 95 % over training
seeds (Student's t). A run that is finished with the same settings is not repeated, so the comparison can be interrupted and
continued; after a change of what the code computes, remove its folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from learn import gain_over_seeds
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from flowsteer.rl.config import Config, load_config, parse_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "algorithms.md"
Reward = str  # "composition" or "dense"
PART = {"composition": "composition/strict", "dense": "jpeg_compressibility"}
PASSES: dict[Reward, int] = {"composition": 100, "dense": 30}  # thousands
MINUTES: dict[Reward, float] = {"composition": 2.0, "dense": 0.5}
CAPTIONS = {"composition": 264, "dense": 66}
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
class Reading:
    """The score at a moment of a run, and what the run had cost until then."""

    score: float
    steps: int
    passes: int
    minutes: float
    agreement: float | None  # mean gradient_agreement of the steps so far


Outcome = dict[str, Reading]  # of a run, at "start", "passes", "minutes", "end"


# With the dense reward every step of the trajectory has a say, so log densities have their Gaussian weight; steps are smaller.
GAUSSIAN = "rollout.kernel.log_prob_weight=gaussian"
FEWER = ("rollout.prompts_per_step=12", "rollout.batch_size=48", "num_steps=20")
FEWER_FORWARD = ("rollout.prompts_per_step=16", "num_steps=20")

ENTRIES: dict[str, Entry] = {
    "Flow-GRPO, SDE": Entry("embedded_flow_grpo_sde_composition", dense=(GAUSSIAN, *FEWER)),
    "Flow-GRPO, SDE on all steps": Entry(
        "embedded_flow_grpo_sde_composition", ("rollout.plan={name: all}", "num_steps=40"), (GAUSSIAN, *FEWER)
    ),
    "Flow-GRPO, CPS": Entry("embedded_flow_grpo_cps_composition", dense=FEWER),
    "Flow-GRPO-Fast": Entry("embedded_flow_grpo_fast_composition", dense=FEWER),
    "MixGRPO": Entry("embedded_mixgrpo_composition", dense=(GAUSSIAN, *FEWER)),
    "MixGRPO-Flash": Entry("embedded_mixgrpo_flash_composition", dense=(GAUSSIAN, *FEWER)),
    "DanceGRPO": Entry(
        "embedded_dance_grpo_composition",
        dense=(
            "rollout.plan={name: all}",
            "rollout.kernel.noise_level=0.7",
            "algorithm.transitions_per_sample=3",
            GAUSSIAN,
            *FEWER,
        ),
    ),
    "G2RPO": Entry("embedded_g2rpo_composition", dense=(GAUSSIAN, "num_steps=20")),
    "GRPO-Guard": Entry("embedded_grpo_guard_composition", dense=FEWER),
    "step-aware DPO": Entry("embedded_step_dpo_composition", dense=(GAUSSIAN, "algorithm.beta=10.0", *FEWER)),
    "PSO": Entry("embedded_pso_composition", dense=(GAUSSIAN, "algorithm.beta=10.0", "rollout.group_size=8", *FEWER)),
    "DGPO": Entry("embedded_dgpo_composition", dense=("algorithm.beta=10.0", *FEWER_FORWARD)),
    "DiffusionNFT": Entry(
        "embedded_nft_composition", ("num_steps=20",), ("optimizer.learning_rate=6.0e-4", *FEWER_FORWARD)
    ),
    "DiffusionNFT, all weights": Entry("embedded_nft_full_composition", dense=FEWER_FORWARD),
    "AWM": Entry("embedded_awm_composition", dense=FEWER_FORWARD),
    "Diffusion-DPO, online": Entry(
        "embedded_diffusion_dpo_composition", dense=("algorithm.beta=500.0", *FEWER_FORWARD)
    ),
    "Diffusion-DPO, offline": Entry(
        "embedded_diffusion_dpo_composition",
        ("algorithm.refresh_every=null",),
        ("algorithm.beta=500.0", *FEWER_FORWARD),
    ),
    "RAFT": Entry("embedded_raft_composition", dense=("rollout.prompts_per_step=40",)),
    "reward-weighted regression": Entry(
        "embedded_raft_composition",
        ("algorithm.weights=exponential",),
        ("rollout.prompts_per_step=40",),
    ),
}
ALGORITHMS = tuple(ENTRIES)
SDE, ANCHORS = "embedded_flow_grpo_sde_composition", "embedded_g2rpo_composition"
ENTRIES |= {
    # The gap to close. Both end after as many passes as "Flow-GRPO, SDE", each having gone through its schedule.
    "Flow-GRPO, SDE on all steps, 17 steps": Entry(SDE, ("rollout.plan={name: all}", "num_steps=17")),
    "AWM, 20 steps": Entry("embedded_awm_composition", ("num_steps=20",)),
    # The single changes.
    "Flow-GRPO, each group's own deviation": Entry(SDE, ("advantage.deviation=group",)),
    "Flow-GRPO, groups of 8": Entry(SDE, ("rollout.group_size=8", "rollout.prompts_per_step=48")),
    "Flow-GRPO, groups of 32": Entry(SDE, ("rollout.group_size=32", "rollout.prompts_per_step=12")),
    "Flow-GRPO, shared noise": Entry(SDE, ("rollout.shared_noise=true",)),
    "G2RPO, one granularity": Entry(ANCHORS, ("rollout.branching.granularities=[1]",)),
    "G2RPO, three granularities": Entry(ANCHORS, ("rollout.branching.granularities=[1,2,3]",)),
}
UNCHANGED = ("Flow-GRPO, SDE", "MixGRPO", "G2RPO")
CHANGES = (*UNCHANGED, *(name for name in ENTRIES if name not in ALGORITHMS))
TABLES: dict[str, tuple[Reward, tuple[str, ...]]] = {
    "dense": ("dense", ALGORITHMS),
    "composition": ("composition", ALGORITHMS),
    "changes": ("composition", CHANGES),
}


def settings_of(entry: Entry, reward: Reward, seed: int, captions: int) -> list[str]:
    """The overrides of a run: how it is measured, and what its line changes."""
    measured = [f"seed={seed}", f"evaluation.num_prompts={captions}", "evaluation.num_seeds=4"]
    settings = [*measured, *entry.overrides, *((*DENSE, *entry.dense) if reward == "dense" else ())]
    return list({setting.partition("=")[0]: setting for setting in settings}.values())  # the last of each key counts


def configuration(name: str, reward: Reward, seed: int, folder: Path, captions: int, steps: int | None) -> Config:
    """Of one run."""
    settings = [f"output={folder}", "trackers=[]", "evaluation.every=1"]
    settings += settings_of(ENTRIES[name], reward, seed, captions)
    return load_config(ENTRIES[name].config, [*settings, *([f"num_steps={steps}"] if steps else [])])


def train_one(config: Config, reward: Reward, budgets: dict[str, float]) -> Outcome:
    """One run in this process, read where each of ``budgets`` ("passes", "minutes") is used up, if it comes to that."""
    from flowsteer.rl.start import start
    from flowsteer.rl.train import train

    folder = Path(config.output)
    torch.set_num_threads(1)
    run = start(config, quiet=True)
    evaluate, denoisers = run.evaluate, run.policy.denoisers
    readings: Outcome = {}
    passes, minutes, began = 0, 0.0, time.process_time()

    def count(denoiser: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        sample = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        passes += len(sample) * (3 if torch.is_grad_enabled() else 1)
        return denoisers[denoiser](*args, **kwargs)

    def read(step: int) -> None:
        """In the place of the run's own evaluation: `train` asks for one before the first step and after each."""
        nonlocal passes, minutes, began
        minutes += (time.process_time() - began) / 60
        spent = {"passes": passes, "minutes": minutes}
        due = [kind for kind, budget in budgets.items() if kind not in readings and spent[kind] >= budget]
        due += ["start"] * (step == 0) + ["end"] * (step == run.num_steps)
        if due:
            evaluate(step)
            score, agreement = score_of(folder, step, reward), agreement_of(folder)
            now = Reading(score=score, steps=step, passes=spent["passes"], minutes=minutes, agreement=agreement)
            readings.update(dict.fromkeys(due, now))
        passes, began = spent["passes"], time.process_time()

    run.evaluate = read
    run.policy.pipeline.route(count)
    try:
        train(run)
    finally:
        run.close()
    return readings


def score_of(folder: Path, step: int, reward: Reward) -> float:
    """The mean score of an evaluation."""
    table = json.loads((folder / "evaluations" / f"step_{step:06d}.json").read_text(encoding="utf-8"))
    return float(np.nanmean(np.array(table["scores"][PART[reward]], dtype=float)))


def agreement_of(folder: Path) -> float | None:
    """The mean agreement of the steps so far; None where there is none."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    values = [json.loads(line).get("gradient_agreement") for line in lines]
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def train_in_a_process(config: Config, reward: Reward, budgets: dict[str, float]) -> Outcome:
    """One run in a process of its own, unless it is finished. Raises RuntimeError with the end of its output."""
    folder = Path(config.output)
    finished, asked = folder / "outcome.json", folder.with_suffix(".json")
    made = {"config": json.loads(config.model_dump_json()), "budgets": budgets}
    kept = json.loads(finished.read_text(encoding="utf-8")) if finished.exists() else {}
    if not is_made_so(kept, config, budgets):
        shutil.rmtree(folder, ignore_errors=True)  # of other settings, or of an interrupted run
        folder.parent.mkdir(parents=True, exist_ok=True)
        asked.write_text(json.dumps({**made, "reward": reward}), encoding="utf-8")
        command = [sys.executable, __file__, "--one", str(asked)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{folder} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        kept = {"made": made, "readings": json.loads((folder / "readings.json").read_text(encoding="utf-8"))}
        finished.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return {moment: Reading(**values) for moment, values in kept["readings"].items()}


def is_made_so(kept: dict[str, Any], config: Config, budgets: dict[str, float]) -> bool:
    """Whether an outcome is that of a configuration; keys that came into being since then have their defaults."""
    try:
        return parse_config(kept["made"]["config"]) == config and kept["made"]["budgets"] == budgets
    except (KeyError, ValueError):
        return False


def train_as_asked(asked: Path) -> None:
    """What `train_in_a_process` lets that process do."""
    job = json.loads(asked.read_text(encoding="utf-8"))
    config = parse_config(job["config"])
    readings = train_one(config, job["reward"], job["budgets"])
    text = json.dumps({moment: asdict(now) for moment, now in readings.items()}, indent=1)
    (Path(config.output) / "readings.json").write_text(text, encoding="utf-8")


def gain(outcomes: list[Outcome], moment: str) -> tuple[float, float]:
    """Mean gain until a moment and half of its interval over seeds."""
    return gain_over_seeds([outcome[moment].score - outcome["start"].score for outcome in outcomes])


def table_of(lines: dict[str, list[Outcome]], budgets: dict[str, float]) -> str:
    """A table in Markdown: a row for each algorithm, the greatest gain first."""

    def mean(outcomes: list[Outcome], moment: str, field: str, form: str) -> str:
        values = [value for value in (getattr(outcome[moment], field) for outcome in outcomes) if value is not None]
        return format(float(np.mean(values)), form) if values else "-"

    def cell(outcomes: list[Outcome], moment: str) -> str:
        if not all(moment in outcome for outcome in outcomes):
            return "ended before"
        middle, half = gain(outcomes, moment)
        return f"{middle:+.3f} ({middle - half:+.3f} to {middle + half:+.3f})"

    rows = [
        f"| algorithm | before | gain after {budgets['passes']:,} passes | gain after {budgets['minutes']:g} min | "
        "gain at the end | after, by seed | steps | passes | minutes | agreement |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, outcomes in sorted(lines.items(), key=lambda line: -gain(line[1], "end")[0]):
        cells = [name, mean(outcomes, "start", "score", ".3f")]
        cells += [cell(outcomes, moment) for moment in ("passes", "minutes", "end")]
        cells.append(", ".join(format(outcome["end"].score, ".3f") for outcome in outcomes))
        fields = {"steps": ".0f", "passes": ",.0f", "minutes": ".1f", "agreement": ".3f"}
        cells += [mean(outcomes, "end", field, form) for field, form in fields.items()]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def write_page(name: str, rows: str, lines: list[str], seeds: int) -> None:
    """Put a table, and how it was made, between its marks in docs/algorithms.md."""
    head, tail = around(name)
    commands = "\n".join(f"# {line}\n{command_of(ENTRIES[line], TABLES[name][0])}" for line in lines)
    made = f"Here with training seed 0 of 0 to {seeds - 1}; one thread each:\n\n```bash\n{commands}\n```"
    details = f"<details><summary>How each line was made</summary>\n\n{made}\n\n</details>"
    PAGE.write_text(f"{head}\n{rows}\n\n{details}\n{tail}", encoding="utf-8")


def around(name: str) -> tuple[str, str]:
    """The page up to the mark that begins a table, and from the one that ends it. Raises ValueError where they are missing."""
    found = re.fullmatch(f"(.*<!-- begin {name} -->).*(<!-- end {name} -->.*)", PAGE.read_text("utf-8"), re.DOTALL)
    if found is None:
        raise ValueError(f"{PAGE} has no <!-- begin {name} --> and <!-- end {name} -->")
    return found[1], found[2]


def command_of(entry: Entry, reward: Reward) -> str:
    """What to type for one run."""
    changes = " ".join(f"'{change}'" for change in settings_of(entry, reward, 0, CAPTIONS[reward]))
    return f"flowsteer train {entry.config} {changes}"


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Lines of the tables; all of them unless given.")] = None,
    table: Annotated[list[str] | None, typer.Option(help="dense, composition or changes; all unless given.")] = None,
    seeds: Annotated[int, typer.Option(min=2, max=8, help="Training seeds.")] = 3,
    passes: Annotated[int | None, typer.Option(min=1, help="Thousands of passes to compare at; 100, dense 30.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.001, help="Minutes to compare at; 2, dense 0.5.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    captions: Annotated[int | None, typer.Option(min=2, help="Reserved captions to evaluate; 264, dense 66.")] = None,
    root: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/compare"),
    steps: Annotated[int | None, typer.Option(min=1, help="End each run after so many steps, for a trial.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Put the tables into docs/algorithms.md.")] = False,
    one: Annotated[Path | None, typer.Option(hidden=True, help="Train this one, in this process.")] = None,
) -> None:
    """Train every algorithm on the embedded pipeline and print what each gained at equal costs and at its end."""
    if one is not None:
        train_as_asked(one)
        return
    wrong = [*sorted(set(names or ()) - set(ENTRIES)), *sorted(set(table or ()) - set(TABLES))]
    if wrong:
        console.print(f"unknown: {'; '.join(wrong)}. Lines: {'; '.join(ENTRIES)}. Tables: {'; '.join(TABLES)}")
        raise typer.Exit(2)
    if write:
        if names or steps or captions or passes or minutes:
            console.print(
                "--write puts whole tables into the page; leave names, steps, captions, passes and minutes out"
            )
            raise typer.Exit(2)
        for name in table or TABLES:
            around(name)
    chosen = names or ENTRIES
    tables = {name: (TABLES[name][0], [line for line in TABLES[name][1] if line in chosen]) for name in table or TABLES}
    jobs = {(reward, line): list[Future[Outcome]]() for reward, lines in tables.values() for line in lines}
    budgets = {of: {"passes": (passes or PASSES[of]) * 1000, "minutes": minutes or MINUTES[of]} for of in PASSES}
    with ThreadPoolExecutor(parallel) as pool, Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        for (reward, line), own in jobs.items():
            task = bar.add_task(f"{reward}: {line}", total=seeds)
            for seed in range(seeds):
                folder = root / reward / re.sub(r"[^\w-]+", "_", line.lower().replace("'", "")) / f"seed_{seed}"
                config = configuration(line, reward, seed, folder, captions or CAPTIONS[reward], steps)
                own.append(pool.submit(train_in_a_process, config, reward, budgets[reward]))
                own[-1].add_done_callback(lambda _, task=task: bar.advance(task))
    flat = []
    for name, (reward, lines) in tables.items():
        if not lines:
            continue
        outcomes = {line: [job.result() for job in jobs[reward, line]] for line in lines}
        rows = table_of(outcomes, budgets[reward])
        console.print(f"\n{name}\n{rows}", highlight=False, soft_wrap=True)
        if write:
            write_page(name, rows, lines, seeds)
        for line in lines if name != "changes" else []:
            middle, half = gain(outcomes[line], "end")
            flat += [f"{line} ({name})"] * (not middle - half > 0)
    if flat:
        console.print(f"no gain beyond the interval: {'; '.join(flat)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
