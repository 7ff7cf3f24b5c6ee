"""Numbers of many samples, batches and processes become one line per step."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from flowsteer.rl.engine.optimizer import UpdateInfo
from flowsteer.rl.metrics import Log, Meter, all_names, read_metrics
from flowsteer.rl.types import Last, Max, Mean


class Processes:
    """What a meter asks of an engine, with given answers in the place of the other processes."""

    device = torch.device("cpu")

    def __init__(self, gather: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        self.gather = gather


def meter_of(*metrics) -> Meter:
    meter = Meter()
    for entry in metrics:
        meter.add(entry)
    return meter


# --- the meter


def test_a_mean_is_over_samples_not_over_batches():
    """3 samples with the mean 1 and 1 sample with the value 5: the mean is 2, that of the batches' means is 3."""
    meter = meter_of({"kl": Mean(torch.tensor(3.0), 3)}, {"kl": Mean(5.0, 1.0)})
    assert meter.finish(Processes())["kl"] == 2.0


def finished_together(*meters: Meter) -> list[dict[str, float]]:
    """What each of several processes makes of its meter: threads whose `gather` waits for all of them."""
    barrier = threading.Barrier(len(meters), timeout=60)
    given: list[Tensor] = [torch.empty(0)] * len(meters)

    def finish(place: int) -> dict[str, float]:
        def gather(values: Tensor) -> Tensor:
            given[place] = values
            barrier.wait()
            together = torch.cat(given)
            barrier.wait()
            return together

        return meters[place].finish(Processes(gather))

    with ThreadPoolExecutor(len(meters)) as pool:
        return list(pool.map(finish, range(len(meters))))


def test_and_not_over_processes_either():
    """Here are 2 samples that sum to 4; on the other process 6 that sum to 0, and the only one of a loss that both report."""
    here = meter_of({"loss": Mean(0.0, 0.0), "kl": Mean(4.0, 2.0)})
    there = meter_of({"loss": Mean(1.5, 1.0), "kl": Mean(0.0, 6.0)})
    assert finished_together(here, there) == [{"kl": 0.5, "loss": 1.5}] * 2


def test_numbers_are_added_by_name_also_where_a_process_lacks_one():
    """A metric that an algorithm reports now and then: by place, the loss of one would be added to it."""
    here = meter_of({"a": Mean(1.0, 1.0), "loss": Mean(3.0, 1.0), "low": Max(-2.0)})
    there = meter_of({"b": Mean(5.0, 1.0), "loss": Mean(1.0, 1.0), "top": Max(2.0)})
    expected = {"a": 1.0, "b": 5.0, "loss": 2.0, "low": -2.0, "top": 2.0}
    assert finished_together(here, there) == [expected] * 2
    assert finished_together(Meter(), meter_of({"a": Mean(1.0, 1.0)})) == [{"a": 1.0}] * 2


def test_without_a_sample_there_is_no_number():
    """A step whose groups are all equal carries no comparison: the name is left out, not reported as 0."""
    assert meter_of({"kl": Mean(0.0, 0.0)}).finish(Processes()) == {}


def test_sums_keep_their_precision():
    """In float32 a hundred million small numbers would stop to count."""
    meter = meter_of({"kl": Mean(2.0**25, 1.0)}, *[{"kl": Mean(1.0, 0.0)} for _ in range(3)])
    assert meter.finish(Processes())["kl"] == 2.0**25 + 3


def test_the_largest_is_over_processes_and_the_last_is_the_last():
    meter = meter_of({"peak": Max(3.0), "rate": Last(0.3)}, {"peak": Max(torch.tensor(5.0)), "rate": Last(0.2)})
    assert meter.finish(Processes()) == {"peak": 5.0, "rate": 0.2}
    here, there = meter_of({"peak": Max(3.0)}, {"peak": Max(2.0)}), meter_of({"peak": Max(7.0)})
    assert finished_together(here, there) == [{"peak": 7.0}] * 2


def test_updates_and_times():
    meter = Meter()
    for norm, agreement in ((1.0, math.nan), (3.0, 0.5)):
        meter.add_update(None)  # a pass between two updates
        meter.add_update(UpdateInfo(grad_norm=norm, learning_rate=norm / 10, gradient_agreement=agreement))
    for _ in range(2):
        with meter.timing("sample"):
            time.sleep(0.01)
    with pytest.raises(KeyError), meter.timing("score"):
        raise KeyError
    values = meter.finish(Processes())
    assert values["grad_norm"] == 2.0
    assert values["learning_rate"] == 0.3, "of the last update"
    assert values["gradient_agreement"] == 0.5, "where there is one"
    assert 0.02 <= values["seconds/sample"] < 1
    assert "seconds/score" in values, "also of an act that failed"
    assert meter.finish(Processes()) == {}, "the next step begins at nothing"


def test_names_of_all_processes():
    """A reward that failed on one process gave no parts there; the table has columns for them all the same."""
    theirs = ["score", "a/ü", "b" * 70]
    mine = ["score", "c"]
    waiting: list[Tensor] = []

    def gather(values: Tensor) -> Tensor:  # the other process, played by hand: first the widths, then the rows
        if not waiting:
            waiting.append(values)
            return torch.cat([values, torch.tensor([len("\n".join(sorted(theirs)).encode())])])
        row = torch.zeros_like(values)
        text = "\n".join(sorted(theirs)).encode()
        row[0, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        return torch.cat([values, row])

    assert all_names(mine, gather) == sorted({*mine, *theirs})
    assert all_names([], lambda values: values) == []


# --- the log


def log_of(folder, *, trackers=(), start=0, is_main=True) -> Log:
    return Log(folder, trackers=trackers, start=start, is_main=is_main, config={"seed": 1})


def test_lines(tmp_path):
    log = log_of(tmp_path)
    log.write(0, {"reward_mean": 0.5, "kl": math.nan, "loss": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 0, "reward_mean": 0.5, "kl": null, "loss": null}\n', "at once, and JSON that all can read"
    log.write(1, {"reward_mean": 0.75})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {"step": 1, "reward_mean": 0.75}


def test_a_resumed_run_drops_what_it_makes_again(tmp_path):
    """The checkpoint is of step 2, the run was killed in step 4 while it wrote the line of step 3."""
    lines = [json.dumps({"step": step, "try": 1}) for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines)[:-5])
    log = log_of(tmp_path, start=2)
    for step in (2, 3):
        log.write(step, {"try": 2})
    log.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["try"]) for line in lines] == [(0, 1), (1, 1), (2, 2), (3, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "no temporary file stays"


def test_a_kill_while_resuming_leaves_the_old_lines(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        log_of(tmp_path, start=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_a_line_that_was_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "rew')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0}]
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_only_the_main_process_writes(tmp_path):
    log = log_of(tmp_path, is_main=False, trackers=("tensorboard", "wandb"))
    log.write(0, {"loss": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    log = log_of(tmp_path, trackers=("tensorboard", "wandb"))
    assert log.missing_trackers == ["tensorboard", "wandb"]
    log.write(0, {"loss": 1.0})
    log.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1, "the run goes on"


def test_tensorboard(tmp_path):
    """Events can be read back; those of steps that are made again are purged."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, value in ((0, 1.0), (1, 2.0)):  # the second is a resumption after step 1
        log = log_of(tmp_path, trackers=("tensorboard",), start=start)
        assert log.missing_trackers == []
        for step in range(start, 3):
            log.write(step, {"loss": value + step, "seconds/sample": 0.5, "kl": math.nan})
        log.close()
    folder = tmp_path / "tensorboard"
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "seconds/sample"}, "a number that is none is left out"
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.0), (1, 3.0), (2, 4.0)]
