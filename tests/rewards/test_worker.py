"""A reward in another process and over HTTP: what goes there and what comes back. Real processes, tiny scorers."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from worker_scorers import digest, digests
from worker_tools import HERE, TOKEN, ask, random_images, scorer, serving, within

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.contract import is_groupwise
from flowsteer.rewards.hosts import child, remote, server, wire, worker
from flowsteer.rewards.hosts.child import WorkerReward
from flowsteer.rewards.hosts.remote import HTTPReward
from flowsteer.rewards.types import Reward

START_S = 30.0  # of a worker with a tiny scorer, on a machine with other things to do
TEXTS = ["plain", "", "ひと 🟥", 'quote " and \\', "null \0 and \n", "lone \ud800 surrogate", "x" * 20000]


def pythons() -> list[str]:
    """Every Python from 3.8 on that can be found and runs."""
    found = [path for minor in range(8, 15) if (path := shutil.which(f"python3.{minor}"))]
    return [path for path in found if subprocess.run([path, "-V"], capture_output=True).returncode == 0]


@pytest.fixture(scope="module", params=["process", "http"])
def reward(request: pytest.FixtureRequest) -> Iterator[Reward]:
    """The digests, by both ways."""
    if request.param == "process":
        with WorkerReward(scorer("digests"), start_timeout_s=START_S) as reward:
            yield reward
    else:
        with serving(scorer("digests")) as url, pytest.MonkeyPatch.context() as patch:
            patch.setenv(remote.TOKEN_VARIABLE, TOKEN)
            yield HTTPReward(url)


class TestWhatArrives:
    @pytest.mark.parametrize("shape", [(7, 5, 9, 3), (7, 4, 6, 5, 3), (7, 1, 1, 3), (7, 200, 300, 3)])
    def test_pixels_prompts_columns_and_their_order(self, reward, shape):
        images = random_images(*shape)
        columns = {"number": list(range(7)), "nested": [{"a": [row, None, 0.1]} for row in range(7)], "text": TEXTS}
        with within(20):
            answer = reward(images, TEXTS, **columns)
        assert answer == digests(images, TEXTS, **columns)
        assert answer["score"] == [digest(image.tobytes()) for image in images]
        assert answer["frames"] == [shape[1] if len(shape) == 5 else 0] * 7

    def test_a_view_arrives_as_it_looks(self, reward):
        images = random_images(6, 8, 10, 3)[::-2, :, ::2]
        with within(20):
            assert ask(reward, images, ["a"] * 3)["score"] == [digest(image.tobytes()) for image in images]

    def test_no_images(self, reward):
        with within(20):
            assert ask(reward, random_images(0, 8, 8, 3), [])["score"] == []

    def test_in_a_set_of_rewards(self, reward):
        images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with within(20):
            scores = RewardSet([("digest", reward, 1.0)]).score(images, TEXTS[:3], {"color": ["red", "blue", None]})
        assert not scores.missing.any()
        rounded = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        expected = torch.tensor([digest(image.tobytes()) for image in rounded], dtype=torch.float64)
        assert torch.equal(scores.total, expected.float())

    def test_from_several_threads_each_gets_its_own(self, reward):
        batches = [random_images(4, 16, 16, 3, seed=seed) for seed in range(8)]
        answers: dict[int, object] = {}

        def score(place: int) -> None:
            answers[place] = ask(reward, batches[place], TEXTS[:4])["score"]

        threads = [threading.Thread(target=score, args=[place]) for place in range(8)]
        with within(30):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert answers == {place: [digest(image.tobytes()) for image in batch] for place, batch in enumerate(batches)}

    @pytest.mark.parametrize(
        ("images", "prompts", "columns", "message"),
        [
            (random_images(2, 4, 4, 3).astype(np.float32), ["a", "b"], {}, r"got float32 \(2, 4, 4, 3\)"),
            (random_images(2, 3, 4, 4), ["a", "b"], {}, r"got uint8 \(2, 3, 4, 4\)"),
            (random_images(2, 4, 4, 3), ["a"], {}, "prompts: 1 values for 2 images"),
            (random_images(2, 4, 4, 3), ["a", "b"], {"color": [1]}, "color: 1 values for 2 images"),
            (random_images(2, 4, 4, 3), ["a", "b"], {"color": [1, np.nan]}, "sent as JSON, which cannot hold them"),
            (random_images(2, 4, 4, 3), ["a", "b"], {"color": [1, {2}]}, "sent as JSON, which cannot hold them"),
            (random_images(1, 1, 1, 3), ["x" * (wire.MAX_HEADER_BYTES + 1)], {}, "allowed are 16777216; send fewer"),
        ],
    )
    def test_what_cannot_be_sent_is_refused_and_the_next_batch_is_fine(self, reward, images, prompts, columns, message):
        with within(20):
            with pytest.raises(ValueError, match=message):
                reward(images, prompts, **columns)
            assert ask(reward, random_images(1, 4, 4, 3), ["a"])["prompt"] == [digest(b"a")]


class TestWhatComesBack:
    def test_numbers_are_exact_and_what_is_not_finite_is_none(self, caplog):
        values = [0.1, 1 / 3, -2.5e-300, None, "nan", "inf", 7]
        with WorkerReward(scorer("constants"), options={"values": values}) as reward, within(20):
            assert reward(random_images(7, 2, 2, 3), [""] * 7) == [0.1, 1 / 3, -2.5e-300, None, None, None, 7.0]
        assert "{'4': 'score is nan', '5': 'score is inf'}" in caplog.text

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ([1.0], "ValueError: the scorer gave 1 values for 'score', expected 2, one per image"),
            ([1.0, "2"], "ValueError: the scorer gave '2' for image 1, expected a number or None"),
            ("12", "ValueError: the scorer gave a str for 'score', expected 2 numbers"),
            ([1.0, {}], "TypeError: float"),
            ({"other": [1.0, 2.0]}, r"ValueError: the scorer gave the parts \['other'\]"),
        ],
    )
    def test_nonsense_is_an_error_of_the_scorer(self, values, message):
        with (
            WorkerReward(scorer("constants"), options={"values": values}, max_restarts=0) as reward,
            within(20),
            pytest.raises(RuntimeError, match=message),
        ):
            reward(random_images(2, 2, 2, 3), ["", ""])

    def test_an_exception_comes_with_its_type_and_text_and_costs_one_image(self):
        with WorkerReward(scorer("raises"), max_restarts=0) as reward, within(20):
            with pytest.raises(RuntimeError, match=r"^KeyError: 'cannot read bad'$"):
                reward(random_images(2, 4, 4, 3), ["good", "bad"])
            scores = RewardSet([("x", reward, 1.0)]).score(torch.zeros(3, 3, 4, 4), ["good", "bad", "better"])
        assert scores.total[[0, 2]].tolist() == [4, 6]
        assert scores.failures == {1: "reward 'x' raised RuntimeError: KeyError: 'cannot read bad'"}

    def test_what_a_scorer_prints_is_not_taken_for_an_answer(self):
        with WorkerReward(scorer("prints"), max_restarts=0) as reward, within(20):
            for _ in range(20):  # more than a pipe holds
                assert reward(random_images(2, 4, 4, 3), ["a", "b"]) == [1.0, 1.0]


class TestHandshake:
    def test_what_a_scorer_says_of_itself(self):
        with WorkerReward(scorer("Described"), options={"factor": 3}) as reward:
            fingerprint = reward.fingerprint
            assert reward(random_images(2, 4, 4, 3), ["a", "b"]) == [0, 3]
            assert is_groupwise(reward)
            assert reward.video is True
            assert not reward.uses_prompt
        assert fingerprint["target"] == "worker_scorers.py:Described"
        assert fingerprint["version"] == "7"
        assert fingerprint["options"] == '{"factor": 3}'
        assert fingerprint["weights_sha256"] == "ab" * 32
        assert fingerprint["antialias"] is False
        assert fingerprint["python"] == ".".join(map(str, sys.version_info[:2]))
        assert fingerprint["numpy"] == np.__version__
        assert fingerprint["torch"] == torch.__version__
        assert "torchvision" not in fingerprint

    def test_both_ways_say_the_same_and_options_and_code_change_it(self, tmp_path, monkeypatch):
        monkeypatch.setenv(remote.TOKEN_VARIABLE, TOKEN)
        options = {"factor": 3}
        with WorkerReward(scorer("Described"), options=options) as reward:
            first = reward.hello
        with serving(scorer("Described"), "--options", json.dumps(options)) as url:
            far = HTTPReward(url)
            assert far.hello == first
            assert (far.groupwise, far.video, far.uses_prompt) == (True, True, False)
        with WorkerReward(scorer("Described"), options={"factor": 4}) as reward:
            assert reward.hello.identity != first.identity
        file = tmp_path / "mine.py"
        versions = []
        for value in (1, 22):  # of unequal length, or Python would take what it compiled in the same second for current
            file.write_text(f"def one(images, prompts, **columns):\n    return [{value}.0] * len(prompts)\n")
            with WorkerReward(f"{file}:one") as reward:
                versions.append(reward.fingerprint["version"])
                assert reward(random_images(1, 2, 2, 3), [""]) == [value]
        assert versions[0] != versions[1]

    def test_where_the_scorer_lies_changes_nothing(self, tmp_path):
        copy = shutil.copy(HERE / "worker_scorers.py", tmp_path)
        with WorkerReward(scorer("digests")) as here, WorkerReward(f"{copy}:digests") as there:
            assert there.hello == here.hello

    def test_a_scorer_that_says_nothing_of_itself(self):
        with WorkerReward(scorer("Undescribed")) as reward:
            assert reward(random_images(2, 4, 4, 3), ["a", "b"]) == [1, 1]
            assert (reward.groupwise, reward.video, reward.uses_prompt) == (False, False, True)

    @pytest.mark.parametrize(("name", "takes"), [("of_trl", "prompts, completions, columns"), ("OfTRL", "completions")])
    def test_a_function_of_trl_would_get_images_for_prompts(self, name, takes):
        message = rf"ValueError: .*:{name} takes \({takes}.*TRL knows them.* run in the trainer's process only"
        with pytest.raises(ConnectionError, match=message):
            WorkerReward(scorer(name))

    def test_a_module_of_the_current_folder_or_of_a_package(self, tmp_path, monkeypatch):
        (tmp_path / "here.py").write_text("def two(images, prompts, **columns):\n    return [2.0] * len(prompts)\n")
        monkeypatch.chdir(tmp_path)
        with WorkerReward("here:two") as reward:
            assert reward(random_images(1, 2, 2, 3), [""]) == [2]

    def test_one_of_ours(self):
        images = random_images(2, 16, 16, 3)
        expected = [-kilobytes for kilobytes in jpeg_kilobytes(images)]
        with WorkerReward("flowsteer.rewards.scorers.jpeg:JPEGCompressibility", options={"quality": 50}) as reward:
            assert reward(images, ["", ""]) == expected


def jpeg_kilobytes(images: np.ndarray) -> list[float]:
    import io

    from PIL import Image

    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=50)
        sizes.append(len(buffer.getvalue()) / 1000)
    return sizes


class TestWhatAWorkerSees:
    def test_its_environment_is_its_own(self, monkeypatch):
        for name in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "1")
        names = ["PATH", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "MINE", "PYTHONPATH", "AWS_SECRET_ACCESS_KEY"]
        with WorkerReward(scorer("environment"), env={"MINE": "1"}) as reward:
            answer = ask(reward, random_images(6, 2, 2, 3), names)
        assert answer["score"] == [1, 1, 1, 1, 0, 0]
        assert answer["pid"][0] != os.getpid()

    def test_a_relative_file_is_found_again_after_the_folder_changed(self, tmp_path, monkeypatch):
        (tmp_path / "mine.py").write_text("def score(images, prompts, **columns):\n    return [1.0] * len(prompts)\n")
        monkeypatch.chdir(tmp_path)
        with within(60), WorkerReward("mine.py:score", start_timeout_s=START_S) as reward:
            assert reward(random_images(1, 2, 2, 3), TEXTS[:1]) == [1.0]
            monkeypatch.chdir("/")  # as a reward in this process may do
            assert reward.pid is not None
            os.kill(reward.pid, signal.SIGKILL)
            assert reward(random_images(1, 2, 2, 3), TEXTS[:1]) == [1.0]

    @pytest.mark.parametrize("name", ["paths", "spawned_paths"])
    def test_our_modules_hide_none_of_its_own(self, name, monkeypatch):
        names = ["worker_scorers", "wire", "remote", "worker", "inprocess"]
        # the last is a neighbour of the scorer's file, tests/inprocess.py; ours are neighbours of worker.py
        images, found = random_images(5, 2, 2, 3), [1, 0, 0, 0, 1]
        with within(60), WorkerReward(scorer(name), start_timeout_s=START_S) as reward:
            assert reward(images, names) == found
        monkeypatch.setenv(remote.TOKEN_VARIABLE, TOKEN)
        with within(60), serving(scorer(name)) as url:
            assert HTTPReward(url)(images, names) == found


class TestOtherPythons:
    @pytest.mark.parametrize(("file", "other"), [(child.WORKER_FILE, "numpy"), (remote.SERVER_FILE, "worker")])
    def test_they_are_files_of_the_standard_library_for_python_3_8(self, file, other):
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source, feature_version=(3, 8))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in imported} - sys.stdlib_module_names == {other}
        assert not any(isinstance(node, (ast.Match, ast.NamedExpr)) for node in ast.walk(tree))

    @pytest.mark.parametrize("python", pythons())
    def test_every_python_here(self, python, monkeypatch):
        images = random_images(3, 5, 4, 3)
        with within(60), WorkerReward(scorer("digests"), python=python, start_timeout_s=START_S) as reward:
            assert reward(images, TEXTS[:3], number=[1, 2, 3]) == digests(images, TEXTS[:3], number=[1, 2, 3])
            assert ask(reward, images[:0], [])["score"] == []
            video = images[:, None]
            assert ask(reward, video, TEXTS[:3])["frames"] == [1, 1, 1]
        monkeypatch.setenv(remote.TOKEN_VARIABLE, TOKEN)
        with within(60), serving(scorer("digests"), python=python) as url:
            assert HTTPReward(url)(images, TEXTS[:3]) == digests(images, TEXTS[:3])

    def test_without_numpy(self, tmp_path):
        # the same python, in an environment that has nothing but the standard library
        bare = tmp_path / "bare"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
        images = random_images(3, 5, 4, 3)
        with within(30), WorkerReward(scorer("digests"), python=str(bare / "bin" / "python")) as reward:
            assert "numpy" not in reward.fingerprint
            assert reward(images, TEXTS[:3]) == digests(images, TEXTS[:3])
            assert ask(reward, images[:0], [])["score"] == []


def test_both_sides_have_the_same_frame():
    assert (wire.MAGIC, wire.PREFIX.format) == (worker.MAGIC, worker.PREFIX.format)
    assert (wire.MAX_HEADER_BYTES, wire.LAYOUTS) == (worker.MAX_HEADER_BYTES, worker.LAYOUTS)
    assert (wire.MAX_BODY_BYTES, remote.TOKEN_VARIABLE) == (worker.MAX_BODY_BYTES, server.TOKEN_VARIABLE)
    low, high = worker.PROTO_RANGE
    assert low <= wire.PROTO <= high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"python": "/nowhere/python"}, "there is no python '/nowhere/python'; give the path"),
        ({"deadline_s": 0}, "deadline_s must be a number of seconds above 0, got 0"),
        ({"start_timeout_s": float("inf")}, "start_timeout_s must be a number of seconds above 0, got inf"),
        ({"max_restarts": -1}, "must be at least 0"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        WorkerReward(scorer("digests"), **options)


def test_addresses_and_tokens_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.delenv(remote.TOKEN_VARIABLE, raising=False)
    empty, good = tmp_path / "empty", tmp_path / "good"
    empty.write_text(" \n")
    good.write_text(f"{TOKEN}\n")
    for url in ("host:8700", "ftp://host", "http://user:secret@host", "http://"):
        with pytest.raises(ValueError, match="url must be like http://host:port"):
            HTTPReward(url, token_file=str(good))
    for file in (None, str(empty)):
        with pytest.raises(ValueError, match="a token is one word"):
            HTTPReward("http://127.0.0.1:1", token_file=file)
    with serving(scorer("digests")) as url:
        assert ask(HTTPReward(url + "/", token_file=str(good)), random_images(1, 2, 2, 3), ["a"])["prompt"] == [
            digest(b"a")
        ]
