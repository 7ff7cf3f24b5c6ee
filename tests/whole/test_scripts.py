"""Every script runs, on a few samples; what it prints is checked, not how good the numbers are."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import launch
import numpy as np
import pytest
from benchmark import rollout_once
from compare_with_diffusers import draw_pairs
from PIL import Image

from flowsteer.rl.config import load_config
from flowsteer.rl.start import start
from flowsteer.rollout.lifting.company import TOGETHER

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["num_steps=2", "rollout.prompts_per_step=4", "rollout.group_size=6", "rollout.batch_size=6"]
SMALL += ["algorithm.updates_per_rollout=1", "optimizer.warmup_updates=0"]


def script(*arguments: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    """What a command prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = launch.python(*arguments, cwd=ROOT, environment=environment)
    assert done.returncode in codes, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_is_compared_by_plain_diffusers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    script(
        "-m", "flowsteer.rl.command", "train", "embedded_nft_composition", f"output={run}", "evaluation=null", *SMALL
    )
    few = ["--num-seeds", "2", "--steps", "2", "--limit", "8", "--threads", "1"]
    text = script("scripts/compare_with_diffusers.py", run, *few)
    assert "gain on reserved captions without guidance" in text
    (table,) = json.loads((run / "results.json").read_text()).values()
    assert len(table["rows"]) == 2 * (3 + 2)  # reserved and trained captions: three models, two differences
    (sheet,) = (run / "pictures").glob("*.png")
    assert Image.open(sheet).size == (4 * (2 * 96 + 3 * 8) + 8, 2 * (96 + 3 * 16 + 3 * 8) + 8), "8 captions, 4 a row"
    script("-m", "flowsteer.rl.command", "report", run)
    assert "drawn by plain diffusers" in (run / "report.html").read_text()


def test_pairs_have_a_caption_and_marks():
    """Under each picture a green tick or a red cross, by the reward; below both the caption, in as many lines as it takes."""
    plain = np.full((3, 32, 32, 3), 128, np.uint8)
    captions = [
        "a circle",
        "a red circle",
        "a very long caption that does not fit into one line below two small pictures",
    ]
    page = np.asarray(draw_pairs(captions, plain, plain, np.array([0, 1, 1]), np.array([1, 0, 1])))
    rows = slice(8 + 96 + 4, 8 + 96 + 16)  # those of the marks
    for caption, marks in enumerate(["wr", "rw", "rr"]):
        for side, mark in enumerate(marks):
            left = 8 + caption * (2 * 96 + 3 * 8) + side * (96 + 8)
            found = {tuple(pixel) for pixel in page[rows, left : left + 12].reshape(-1, 3).tolist()}
            assert ((26, 127, 55) in found, (207, 34, 46) in found) == (mark == "r", mark == "w")
    first, second = (page[8 + 96 + line * 16 + 4 : 8 + 96 + (line + 1) * 16] for line in (1, 2))
    of_third = slice(8 + 2 * (2 * 96 + 3 * 8), None)
    assert first[:, :200].min() < 100, "the first caption is one line"
    assert second[:, :200].min() == 255
    assert second[:, of_third].min() < 100, "the third has two lines"


def test_the_comparison_imports_nothing_of_training() -> None:
    """What measures "after" knows diffusers, the captions and the judge."""
    program = "import runpy, sys; runpy.run_path('scripts/compare_with_diffusers.py', run_name='imported'); "
    program += (
        "print(sorted(name for name in sys.modules if name.startswith(('flowsteer.', 'deepspeed', 'peft.tuners'))))"
    )
    names = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "flowsteer.rewards.scorers.composition" in names
    assert "flowsteer.rl" not in names
    assert "flowsteer.rollout" not in names
    assert "deepspeed" not in names


@pytest.mark.slow
def test_learning_is_measured_over_seeds(tmp_path: Path) -> None:
    settings = ["evaluation.num_prompts=6", "evaluation.num_seeds=2", "evaluation.num_inference_steps=2"]
    arguments = ["scripts/learn.py", "embedded_nft_composition", *SMALL, *settings, "--seeds", "2", "--root", tmp_path]
    text = script(*arguments, codes=(0, 1))  # 1: the interval reaches zero, as it should after two steps
    assert "95 % interval over seeds" in text


@pytest.mark.slow
def test_the_benchmark_measures_both_acts() -> None:
    overrides = [f"--override={setting}" for setting in SMALL]
    text = script("scripts/benchmark.py", "embedded_flow_grpo_cps_composition", "--repeats", "1", *overrides)
    rows = [line for line in text.splitlines() if "embedded_flow_grpo_cps" in line]
    assert len(rows) == 2
    for row, act in zip(rows, ("rollout", "update")):
        cells = [cell.strip() for cell in row.strip("│ ").split("│")]
        assert cells[1] == act
        assert float(cells[-1]) > 0.1  # the overhead; what it is on a quiet machine is in docs/benchmarks.md


def test_every_timed_draw_prepares_its_prompts(tmp_path: Path) -> None:
    """Training draws new prompts at each step; a benchmark that draws a step twice must not find them prepared."""
    config = load_config(
        "embedded_nft_composition", [f"output={tmp_path}/run", "evaluation=null", "trackers=[]", *SMALL]
    )
    run = start(config, quiet=True)
    encoded: list[int] = []
    encoder = run.policy.pipeline.pipe.text_encoder  # type: ignore[attr-defined]
    encoder.register_forward_hook(lambda *_: encoded.append(1))
    counts = []
    for _ in range(3):
        encoded.clear()
        rollout_once(run, 1)
        counts.append(len(encoded))
    run.close()
    # one pass of the encoder for each few prompts, without guidance
    assert counts == [math.ceil(config.rollout.prompts_per_step / TOGETHER)] * 3


@pytest.mark.slow
def test_the_benchmark_of_rewards_measures_all_three() -> None:
    overrides = [f"--override={setting}" for setting in SMALL]
    text = script("scripts/benchmark_rewards.py", "--repeats", "1", *overrides)
    for what in ("worker", "slow reward"):
        (row,) = [line for line in text.splitlines() if f" {what} " in line]
        cells = [cell.strip() for cell in row.strip("│ ").split("│")]
        assert float(cells[3]) > 0.1  # what it is on a quiet machine is in docs/benchmarks.md
    assert " ms " in text


@pytest.mark.slow
def test_the_benchmark_of_workers_gives_equal_scores() -> None:
    text = script("scripts/benchmark_workers.py", "--images", "3", "--workers", "2")
    (row,) = [line for line in text.splitlines() if line.startswith("│ 2 ")]
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells[3:] == ["1.000", "True"]


@pytest.mark.slow
def test_algorithms_are_compared_and_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    arguments = [
        "scripts/compare_algorithms.py",
        "DGPO",
        "--table",
        "dense",
        "--passes",
        "1",
        "--minutes",
        "0.01",
        "--steps",
        "1",
    ]
    arguments += ["--seeds", "2", "--captions", "6", "--root", str(tmp_path)]
    times = []
    for _ in range(2):
        text = script(*arguments, codes=(0, 1))  # 1: no gain beyond the interval, in one step
        assert "| DGPO |" in text
        times.append({file: file.stat().st_mtime for file in tmp_path.rglob("metrics.jsonl")})
    assert len(times[0]) == 2
    assert times[0] == times[1]
    # 16 * 12 pictures; 6 passes draw one, at 2 levels it has one with a gradient and one of either other policy
    passes = 16 * 12 * (6 + 2 * (3 + 1 + 1))
    made = [json.loads(file.read_text("utf-8")) for file in tmp_path.rglob("outcome.json")]
    assert [outcome["readings"]["end"]["passes"] for outcome in made] == [passes] * 2


def test_a_run_that_ends_before_a_budget_keeps_its_line() -> None:
    program = (
        "import runpy, sys; sys.path.insert(0, 'scripts'); made = runpy.run_path('scripts/compare_algorithms.py')\n"
    )
    program += "at = lambda score: made['Reading'](score=score, steps=1, passes=9, minutes=0.1, agreement=None)\n"
    program += "runs = [{'start': at(0.1), 'passes': at(0.2), 'end': at(0.3 + seed)} for seed in (0, 0.2)]\n"
    program += "print(made['table_of']({'DGPO': runs}, {'passes': 8, 'minutes': 5.0}))"
    cells = script("-c", program).splitlines()[-1].split(" | ")
    assert cells[2:5] == ["+0.100 (+0.100 to +0.100)", "ended before", "+0.300 (-0.971 to +1.571)"]


def test_each_table_of_the_comparison_has_its_place_on_the_page(tmp_path: Path) -> None:
    program = "import runpy, sys; from pathlib import Path; sys.path.insert(0, 'scripts')\n"
    program += "made = runpy.run_path('scripts/compare_algorithms.py'); page = Path(sys.argv[1])\n"
    program += (
        "page.write_text(made['PAGE'].read_text('utf-8'), 'utf-8'); made['write_page'].__globals__['PAGE'] = page\n"
    )
    program += "for name in made['TABLES']: made['write_page'](name, f'| rows of {name} |', ['DGPO', 'RAFT'], 3)\n"
    program += "for name in made['TABLES']: made['write_page'](name, f'| rows of {name} again |', ['DGPO'], 3)\n"
    page = tmp_path / "page.md"
    script("-c", program, str(page))
    before, after = (ROOT / "docs" / "algorithms.md").read_text("utf-8"), page.read_text("utf-8")
    for name in ("dense", "composition", "changes"):
        assert f"<!-- begin {name} -->\n| rows of {name} again |\n\n<details>" in after
    assert after.count("'seed=0' 'evaluation.num_prompts=264' 'evaluation.num_seeds=4'") == 2
    assert "RAFT\nflowsteer train" not in after
    assert after.startswith(before.partition("<!-- begin")[0])
    assert after.count("<!--") == before.count("<!--") == 6


def test_every_line_of_the_comparison_can_run() -> None:
    program = "import runpy; from flowsteer.rl.config import check_config, load_config\n"
    program += "import sys; sys.path.insert(0, 'scripts'); made = runpy.run_path('scripts/compare_algorithms.py')\n"
    program += "for reward, lines in made['TABLES'].values():\n"
    program += "    for line in lines:\n"
    program += "        entry = made['ENTRIES'][line]\n"
    program += "        check_config(load_config(entry.config, made['settings_of'](entry, reward, 0, 9)), 1)\n"
    program += "        print(line)"
    assert len(set(script("-c", program).splitlines())) >= 25
