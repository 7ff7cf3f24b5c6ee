"""Several workers of one reward: the same scores in the same order, whole groups, and workers that end."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import fresh_process
from worker_tools import alive, random_images, scorer, until, within

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.contract import Shown, ask
from flowsteer.rewards.hosts.inprocess import Scorer, collect
from flowsteer.rewards.hosts.pool import Pool, joined, share, threads_each
from flowsteer.rewards.registry import load_reward
from flowsteer.rl.build_rewards import build_reward
from flowsteer.rl.checkpoint import open_run
from flowsteer.rl.config import parse_config
from flowsteer.rl.config.rewards import RewardConfig

CPU = torch.device("cpu")


class Mean:
    """The mean of an image, what it was given besides, and no score for dark images."""

    def __call__(self, images: np.ndarray, prompts: Any, **columns: Any) -> Any:
        means = [float(image.mean()) for image in images]
        return {
            "score": [None if mean < 100 else mean for mean in means],
            "length": [len(text) for text in prompts],
            "own": columns["own"],
        }


@contextmanager
def pool_of(*workers: Any, **settings: Any) -> Iterator[Pool]:
    """Closed at the end."""
    pool = Pool("pooled", workers, **settings)
    try:
        yield pool
    finally:
        pool.close()


def scored(reward: Any, batches: list[int], group: int = 1) -> list[Any]:
    """The scores of batches of those sizes, submitted together, as a step does."""
    rewards = RewardSet([("own", reward, 1.0)])
    generator = torch.Generator().manual_seed(0)
    with Scorer(rewards) as scorer_:
        pending = []
        for size in batches:
            images = torch.rand((size, 3, 4, 4), generator=generator) * 0.3 + 0.25
            rows = [f"{'x' * row}" for row in range(size)]
            pending.append(
                scorer_.submit(images, rows, {"own": list(range(size))}, [row // group for row in range(size)])
            )
        return collect(pending, 60.0)


def as_lists(scores: list[Any]) -> list[Any]:
    return [({name: part.nan_to_num(-1).tolist() for name, part in one.parts.items()}, one.failures) for one in scores]


def test_several_workers_give_the_same_scores_in_the_same_order() -> None:
    with pool_of(Mean(), Mean(), Mean()) as pool:
        several = as_lists(scored(pool, [8, 1, 5, 2, 8]))
    one = as_lists(scored(Mean(), [8, 1, 5, 2, 8]))
    assert several == one
    missing = [row for _, failures in one for row in failures]
    assert 0 < len(missing) < 24, "some scores are missing and some are not, or this says little"


def test_the_workers_score_at_the_same_time_each_one_batch() -> None:
    """Two meet inside a call, in one batch of two and in two batches of one; no worker is asked twice at a time."""
    meeting = threading.Barrier(2)

    class Meets:
        busy = False

        def __call__(self, images: np.ndarray, prompts: Any, **columns: Any) -> list[float]:
            assert not self.busy
            self.busy = True
            meeting.wait(10)
            self.busy = False
            return [1.0] * len(images)

    with within(30), pool_of(Meets(), Meets()) as pool:
        for batches in ([2], [1, 1]):
            assert [one.total.tolist() for one in scored(pool, batches)] == [[1.0] * size for size in batches]


def test_a_reward_that_compares_gets_whole_groups() -> None:
    calls: list[list[str]] = []

    class Compares:
        groupwise = True

        def __call__(self, images: np.ndarray, prompts: list[str], **columns: Any) -> list[float]:
            calls.append(prompts)
            return [float(image.mean()) - float(images.mean()) for image in images]

    with pool_of(Compares(), Compares()) as pool:
        several = as_lists(scored(pool, [6, 6], group=3))
    assert sorted(calls) == sorted([["", "x", "xx"], ["xxx", "xxxx", "xxxxx"]] * 2)
    assert several == as_lists(scored(Compares(), [6, 6], group=3))


def test_what_a_reward_says_of_itself_is_said() -> None:
    pool = build_reward("ocr", RewardConfig(workers=2), CPU)
    try:
        assert isinstance(pool, Pool)
        assert len(pool) == 2
        one: Any = load_reward("ocr")
        assert RewardSet([("ocr", pool, 1.0)]).fingerprints == RewardSet([("ocr", one, 1.0)]).fingerprints
        assert RewardSet([("ocr", pool, 1.0)]).range_of("ocr") == (0.0, 1.0)
        assert list(RewardSet([("ocr", pool, 1.0)]).unscorable(["no words", 'a "word"'])) == ["no words"]
        assert not hasattr(pool, "groupwise")
    finally:
        pool.close()


@pytest.mark.parametrize(("each", "less"), [(1, 1), (2, 0)])
def test_an_answer_of_another_length_is_refused_not_cut(each: int, less: int) -> None:
    """Two numbers for each image: a part's answer has as many as the whole batch has images."""

    class Unlike(Mean):
        def __call__(self, images: np.ndarray, prompts: Any, **columns: Any) -> Any:
            return [1.0] * (each * len(images) - less)

    said = f"'own' gave {each - less} scores, expected 1"  # the batch fails, and its images are tried one by one
    with pool_of(Unlike(), Unlike()) as pool, pytest.raises(ValueError, match=said):
        scored(pool, [8])


def test_workers_that_depend_on_unlike_things_are_refused() -> None:
    first, second = Mean(), Mean()
    first.fingerprint, second.fingerprint = {"weights": "a"}, {"weights": "b"}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="2 workers of reward 'pooled' are not alike"):
        Pool("pooled", [first, second])


def test_each_worker_has_its_part_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = set(range(16))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cores)
    assert [threads_each(workers, {}) for workers in (2, 5, 16, 64)] == [8, 3, 1, 1]
    assert threads_each(2, {"LOCAL_WORLD_SIZE": "4"}) == 2
    assert threads_each(2, {"OMP_NUM_THREADS": "3"}) == 3

    class Threads:
        def __call__(self, images: np.ndarray, prompts: Any, **columns: Any) -> list[float]:
            return [float(torch.get_num_threads())] * len(images)

    before = torch.get_num_threads()
    with pool_of(Threads(), Threads(), threads=before + 2) as pool:
        assert pool(random_images(4, 2, 2, 3), [""] * 4) == [before + 2.0] * 4
    assert torch.get_num_threads() == before
    late: list[int] = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [before], "threads that begin later are not limited"


def hosted(target: str, workers: int = 2, **host: Any) -> RewardConfig:
    return RewardConfig.model_validate(
        {"workers": workers, "host": {"python": sys.executable, "target": target, **host}}
    )


def test_hosted_workers_are_processes_that_score_as_one_does() -> None:
    with within(60):
        pool: Any = build_reward("far", hosted(scorer("digests")), CPU)
        one: Any = build_reward("far", hosted(scorer("digests"), workers=1), CPU)
    pids = [worker.pid for worker in pool._workers]
    try:
        assert len(set(pids)) == 2
        images, prompts, own = random_images(5, 3, 3, 3), list("abcde"), [{"a": row} for row in range(5)]
        assert pool(images, prompts, own=own) == one(images, prompts, own=own)
        assert pool.fingerprint == one.fingerprint
    finally:
        pool.close()
        one.close()
    with within(20):
        until(lambda: not any(alive(pid) for pid in pids))
    shown = Shown.of(torch.zeros(2, 3, 2, 2), ["a", "b"], {}, None)
    assert set(ask("far", pool, shown).failures) == {0, 1}, "asked after its end it has no scores, and does not hang"


def test_a_worker_that_died_is_named(tmp_path: Path) -> None:
    file = tmp_path / "scorers.py"
    file.write_text(
        "import os, signal\n\n\ndef dies(images, prompts, **columns):\n"
        "    if 'die' in prompts:\n        os.kill(os.getpid(), signal.SIGKILL)\n    return [1.0] * len(prompts)\n"
    )
    with within(60):
        pool: Any = build_reward("far", hosted(f"{file}:dies", max_restarts=0), CPU)
        try:
            shown = Shown.of(torch.zeros(4, 3, 2, 2), ["a", "b", "c", "die"], {}, None)
            failures = ask("far", pool, shown).failures
        finally:
            pool.close()
    assert set(failures) == {0, 1, 2, 3}
    assert re.search(r"ConnectionError: the worker of reward 'far \(worker [12] of 2\)'", failures[0])


def test_workers_of_which_one_does_not_start_leave_none_behind(tmp_path: Path) -> None:
    file = tmp_path / "scorers.py"
    file.write_text(
        "import os, pathlib\n\nhere = pathlib.Path(__file__).parent\n\n\nclass OnlyOne:\n    def __init__(self):\n"
        "        (here / 'first').touch(exist_ok=False)\n        (here / 'pid').write_text(str(os.getpid()))\n\n"
        "    def __call__(self, images, prompts, **columns):\n        return [1.0] * len(prompts)\n"
    )
    with (
        within(60),
        pytest.raises(ValueError, match=r"the reward 'far \(worker [12] of 2\)' does not start(.|\n)*FileExists"),
    ):
        build_reward("far", hosted(f"{file}:OnlyOne"), CPU)
    with within(20):
        until(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_a_server_is_one_worker() -> None:
    with pytest.raises(ValueError, match=r"workers=2 are connections to one server.*give host\.python"):
        RewardConfig.model_validate({"workers": 2, "host": {"url": "http://far:1"}})


def test_answers_are_joined_as_the_contract_reads_them() -> None:
    lists: Any = [[1.0, None], torch.tensor([3.0])]
    assert joined(lists, [2, 1]) == [1.0, None, 3.0]
    some: Any = [{"score": iter([1.0]), "part": np.array([5.0])}, [2.0, 3.0]]
    assert joined(some, [1, 2]) == {"score": [1.0, 2.0, 3.0], "part": [5.0, None, None]}


def test_shares_are_nearly_equal() -> None:
    assert share(8, 3) == [0, 2, 5, 8]
    assert share(2, 5) == [0, 1, 2]


def test_a_run_goes_on_with_more_workers(tmp_path: Path) -> None:
    base: dict[str, Any] = {"num_steps": 1, "algorithm": "diffusion_nft", "output": str(tmp_path / "run")}
    with fresh_process():
        before = parse_config(base | {"rewards": {"ocr": {}}})
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text(before.model_dump_json())
        open_run(tmp_path / "run", parse_config(base | {"rewards": {"ocr": {"workers": 4}}}), resume=True)
        other = parse_config(base | {"rewards": {"ocr": {"options": {"workers": 4}}}})
        with pytest.raises(ValueError, match=r"options\.workers"):
            open_run(tmp_path / "run", other, resume=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_reward_computes_on_a_stream_of_its_own() -> None:
    """Which the default one, the sampler's, does not wait for."""

    class Stream:
        def __call__(self, images: np.ndarray, prompts: Any, **columns: Any) -> list[float]:
            own, default = torch.cuda.current_stream(), torch.cuda.default_stream()
            return [float(own != default) + float(torch.from_numpy(images).cuda().float().mean())] * len(images)

    images = torch.full((2, 3, 4, 4), 1.0)
    with Scorer(RewardSet([("own", Stream(), 1.0)])) as scorer_:
        (scores,) = collect([scorer_.submit(images, ["a", "b"])], 60.0)
    assert scores.total.tolist() == [256.0, 256.0]
