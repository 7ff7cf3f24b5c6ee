"""Whole runs with rewards that live elsewhere: the same numbers as in this process, and the documented end when they fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Make
from inprocess import finished, fresh_process
from safetensors.torch import load_file

from flowsteer.rl.build_rewards import check_alike, visible_device
from flowsteer.rl.compare import TooFewScores
from flowsteer.rl.config import parse_config
from flowsteer.rl.metrics import read_metrics
from flowsteer.rl.run import Run
from flowsteer.rl.start import start
from flowsteer.rl.train import train

SCORERS = '''
"""Scorers of a worker, with what they remember in files beside this one: a worker that is started again has no memory."""

import os
import pathlib
import signal

here = pathlib.Path(__file__).parent


def bright(images, prompts, **columns):
    return [float(image.mean()) / 255 for image in images]


class says_where:
    def __init__(self):
        (here / "process").write_text(str(os.getpid()))

    def __call__(self, images, prompts, **columns):
        return bright(images, prompts)


def dies_once(images, prompts, **columns):
    died = here / "died"
    if not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return bright(images, prompts)


def dies_from_the_fifth_batch(images, prompts, **columns):
    calls = here / "calls"
    count = int(calls.read_text()) + 1 if calls.exists() else 1
    if count > 4 and not (here / "mended").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    calls.write_text(str(count))
    return bright(images, prompts)
'''


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with fresh_process():
        yield


@pytest.fixture
def scorers(tmp_path: Path) -> Path:
    file = tmp_path / "scorers.py"
    file.write_text(SCORERS, encoding="utf-8")
    sys.modules.pop("scorers", None)  # of the test before
    return file


def hosted(scorers: Path, function: str, **host: Any) -> dict[str, Any]:
    """The section of a reward in a worker."""
    return {"bright": {"host": {"python": sys.executable, "target": f"{scorers}:{function}", **host}}}


def assert_equal_runs(run: Run, other: Run) -> None:
    """Bit for bit, but for times and the rewards' names."""
    curves = [
        [
            {
                re.sub("^reward/.*", "reward/", key): value
                for key, value in line.items()
                if not key.startswith("seconds/")
            }
            for line in read_metrics(each.folder / "metrics.jsonl")
        ]
        for each in (run, other)
    ]
    assert curves[0] == curves[1]
    ours, theirs = (load_file(each.folder / "export" / "pytorch_lora_weights.safetensors") for each in (run, other))
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)


def test_a_worker_gives_the_same_run_also_when_it_is_killed(
    make_config: Make, tmp_path: Path, scorers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch in flight is asked again of the worker that takes its place."""
    monkeypatch.syspath_prepend(tmp_path)
    here = finished(make_config(tmp_path / "here", rewards={"scorers:bright": {}}))
    away = finished(make_config(tmp_path / "away", rewards=hosted(scorers, "dies_once")))
    assert (tmp_path / "died").exists()
    assert_equal_runs(away, here)


def test_a_worker_that_keeps_dying_stops_the_run_with_everything_saved(
    make_config: Make, tmp_path: Path, scorers: Path
) -> None:
    config = make_config(tmp_path / "run", rewards=hosted(scorers, "dies_from_the_fifth_batch", max_restarts=1))
    run = start(parse_config(config), quiet=True)
    with pytest.raises(
        TooFewScores, match=r"0\.0% of the samples.*'bright' raised ConnectionError: .*killed by signal 9"
    ):
        train(run)
    run.close()
    assert run.saving.checkpoints.steps() == [1]
    (tmp_path / "mended").touch()
    mended = finished(config, resume=True)
    assert [line["step"] for line in read_metrics(mended.folder / "metrics.jsonl")] == [0, 1, 2]

    (tmp_path / "calls").unlink()
    whole = finished(make_config(tmp_path / "whole", rewards=hosted(scorers, "dies_from_the_fifth_batch")))
    assert_equal_runs(mended, whole)


def test_a_served_reward_trains_and_a_server_that_goes_away_stops_the_run(
    make_config: Make, tmp_path: Path, scorers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token.txt"
    token.write_text("a-token", encoding="utf-8")

    def serve(port: int) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-m", "flowsteer.rl.command", "rewards", "serve", f"{scorers}:bright"]
        command += ["--port", str(port), "--token-file", str(token)]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                return process, int(found[1])
        raise AssertionError("the server ended")

    server, port = serve(0)
    try:
        host = {
            "url": f"http://127.0.0.1:{port}",
            "token_file": str(token),
            "deadline_s": 3.0,
            "deadline_per_image_s": 0.0,
        }
        config = make_config(tmp_path / "run", rewards={"bright": {"host": host}})
        run = start(parse_config(config), quiet=True)
        draw = run.worker.sample

        def draw_and_lose_the_server(step: int, **arguments: Any) -> Any:
            if step == 1:
                server.kill()
                server.wait()
            return draw(step, **arguments)

        monkeypatch.setattr(run.worker, "sample", draw_and_lose_the_server)
        with pytest.raises(TooFewScores, match="'bright' raised ConnectionError"):
            train(run)
        run.close()
        assert run.saving.checkpoints.steps() == [1]
        server, _ = serve(port)
        mended = finished(config, resume=True)
    finally:
        server.kill()
    assert [line["step"] for line in read_metrics(mended.folder / "metrics.jsonl")] == [0, 1, 2]
    assert all(line["reward_missing"] == 0 for line in read_metrics(mended.folder / "metrics.jsonl"))


def test_a_reward_that_does_not_start_is_known_before_anything_is_written(
    make_config: Make, tmp_path: Path, scorers: Path
) -> None:
    config = make_config(tmp_path / "run", rewards=hosted(scorers, "unknown"))
    with pytest.raises(ValueError, match=r"the reward 'bright' does not start: (?s:.*)no attribute .unknown"):
        start(parse_config(config), quiet=True)
    assert not (tmp_path / "run").exists()


def test_nothing_stays_behind_when_a_later_reward_cannot_be_made(
    make_config: Make, tmp_path: Path, scorers: Path
) -> None:
    rewards = {**hosted(scorers, "says_where"), "jpeg_compressibility": {"options": {"quality": 1000}}}
    with pytest.raises(ValueError, match="quality"):
        start(parse_config(make_config(tmp_path / "run", rewards=rewards)), quiet=True)
    process = int((tmp_path / "process").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_reward_may_move_and_be_given_more_time_but_not_become_another(
    make_config: Make, tmp_path: Path, scorers: Path
) -> None:
    def section(**host: Any) -> dict[str, Any]:
        return make_config(tmp_path / "run", num_steps=1, rewards=hosted(scorers, "bright", **host))

    finished(section())
    again = start(parse_config(section(deadline_s=99.0, max_restarts=9)), resume=True, quiet=True)
    again.close()
    assert again.start == 1
    with fresh_process(), pytest.raises(ValueError, match=r"rewards\.bright\.host\.target"):
        start(parse_config(section(target=f"{scorers}:dies_once")), resume=True, quiet=True)


def test_a_worker_sees_the_accelerator_of_its_process() -> None:
    two = {"CUDA_VISIBLE_DEVICES": "4, 5"}
    assert visible_device(torch.device("cuda:1"), two) == {"CUDA_VISIBLE_DEVICES": "5"}
    assert visible_device(torch.device("cuda:1"), {}) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert visible_device(torch.device("cpu"), two) == {"CUDA_VISIBLE_DEVICES": ""}


def test_processes_with_unlike_rewards_are_refused() -> None:
    numbers: list[torch.Tensor] = []

    def gather(number: torch.Tensor) -> torch.Tensor:
        numbers.append(number)
        return torch.cat(numbers)

    check_alike({"theirs": {"weights": "a"}}, gather)
    check_alike({"theirs": {"weights": "a"}}, gather)
    with pytest.raises(ValueError, match=r"differ in what their scores depend on .*\{\"weights\": \"b\"\}"):
        check_alike({"theirs": {"weights": "b"}}, gather)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"host": {}}, "a host is one of environment, python and url; none is given"),
        ({"host": {"python": "python", "url": "http://a:1"}}, "python and url is given"),
        ({"host": {"url": "http://a:1", "target": "x:y"}}, "target does nothing for a host that is given by url"),
        (
            {"host": {"python": "python", "token_file": "t"}},
            "token_file does nothing for a host that is given by python",
        ),
        (
            {"host": {"url": "http://a:1"}, "options": {"a": 1}},
            "the options of a served reward are given where it is served",
        ),
        ({"host": {"environment": "nowhere"}}, "nowhere"),
    ],
)
def test_where_a_reward_runs_is_checked(
    make_config: Make, tmp_path: Path, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(parse_config(make_config(tmp_path / "run", rewards={"bright": section})), quiet=True)
