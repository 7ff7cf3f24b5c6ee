"""What goes wrong with a reward that runs elsewhere, and how it ends: never with a zero, never past its deadline.

Every test states its own deadline (`within`); what hangs here would hang for ten minutes.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest
import torch
from worker_scorers import digest
from worker_tools import (
    HERE,
    TOKEN,
    alive,
    answering,
    ask,
    random_images,
    scorer,
    serving,
    until,
    within,
    written,
)

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.hosts import child, remote, wire, worker
from flowsteer.rewards.hosts.child import WorkerReward
from flowsteer.rewards.hosts.remote import HTTPReward

IMAGES = random_images(2, 4, 4, 3)
PROMPTS = ["a", "b"]
TOP_LEFT = [float(image[0, 0, 0]) for image in IMAGES]


def kill_when(file: Path) -> threading.Thread:
    """On a thread: once a scorer has written its process's id, kill it with signal 9."""
    thread = threading.Thread(target=lambda: os.kill(written(file)[0], signal.SIGKILL))
    thread.start()
    return thread


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """For how long a reward waited between its tries."""
    seconds, sleep = [], time.sleep
    monkeypatch.setattr(remote.time, "sleep", lambda wait: seconds.append(wait) or sleep(wait))
    return seconds


def kill(reward: WorkerReward) -> None:
    """With signal 9, while it is idle."""
    assert reward._worker is not None
    os.kill(reward._worker._process.pid, signal.SIGKILL)


class TestAWorkerThatDies:
    def test_killed_in_the_middle_of_a_batch_it_is_started_again_and_gives_the_scores(self, tmp_path):
        file = tmp_path / "pid"
        with within(30), WorkerReward(scorer("Waits"), options={"file": str(file)}) as reward:
            killer = kill_when(file)
            assert reward(IMAGES, PROMPTS) == TOP_LEFT
            killer.join()
            assert not alive(written(file)[0])
            assert reward(IMAGES[::-1], PROMPTS) == TOP_LEFT[::-1]

    def test_killed_between_batches_likewise(self, tmp_path):
        with within(30), WorkerReward(scorer("environment")) as reward:
            first = ask(reward, IMAGES, PROMPTS)["pid"][0]
            os.kill(int(first), signal.SIGKILL)
            until(lambda: not alive(int(first)))
            assert ask(reward, IMAGES, PROMPTS)["pid"][0] != first

    def test_killed_alone_it_is_missed_at_once_and_what_it_started_goes_too(self, tmp_path):
        file = tmp_path / "pids"
        with within(20), WorkerReward(scorer("Parent"), options={"file": str(file)}, max_restarts=0) as reward:
            killer = kill_when(file)
            with pytest.raises(ConnectionError, match="again 0 times within the hour"):
                reward(IMAGES, PROMPTS)
            killer.join()
            until(lambda: not alive(written(file)[1]))

    def test_the_batch_is_given_to_one_new_worker_and_restarts_are_counted(self, monkeypatch):
        starts, start = [], child.WorkerProcess
        monkeypatch.setattr(child, "WorkerProcess", lambda *arguments: starts.append(arguments) or start(*arguments))
        with within(30), WorkerReward(scorer("Dies"), name="fragile", max_restarts=3) as reward:
            # died, restarted, died; then each call begins with a restart, and its batch is given once more
            with pytest.raises(ConnectionError, match=r"(?s)'fragile' was killed by signal 9.*about to die"):
                reward(IMAGES, PROMPTS)
            with pytest.raises(ConnectionError, match="'fragile' was killed by signal 9"):
                reward(IMAGES, PROMPTS)
            for _ in range(2):
                with pytest.raises(
                    ConnectionError, match=r"again 3 times within the hour.* last one was killed by signal 9"
                ):
                    reward(IMAGES, PROMPTS)
            assert len(starts) == 1 + 3, "nothing is started any more"

    def test_after_an_hour_it_may_be_started_again(self, monkeypatch):
        with within(30), WorkerReward(scorer("environment"), max_restarts=1) as reward:
            kill(reward)
            assert reward(IMAGES, PROMPTS)
            kill(reward)
            with pytest.raises(
                ConnectionError, match=r"again 1 times within the hour.* last one was killed by signal 9"
            ):
                reward(IMAGES, PROMPTS)
            monkeypatch.setattr(child, "RESTART_WINDOW_S", 0.0)  # as if the hour were over
            assert reward(IMAGES, PROMPTS)

    def test_a_python_that_is_gone_when_it_is_started_again(self, tmp_path):
        python = tmp_path / "python"
        python.symlink_to(sys.executable)
        with within(30), WorkerReward(scorer("environment"), python=str(python), max_restarts=1) as reward:
            python.unlink()
            kill(reward)
            with pytest.raises(ConnectionError, match=r"could not be started: .*No such file"):
                reward(IMAGES, PROMPTS)
            with pytest.raises(ConnectionError, match="stays down"):
                reward(IMAGES, PROMPTS)

    def test_its_scores_are_missing_with_the_reason_and_never_zero(self):
        with within(30), WorkerReward(scorer("Dies"), max_restarts=1) as reward:
            scores = RewardSet([("fragile", reward, 1.0)]).score(torch.zeros(3, 3, 4, 4), ["a", "b", "c"])
        assert scores.missing.all()
        assert all("killed by signal 9" in reason for reason in scores.failures.values())
        assert list(scores.failures) == [0, 1, 2]


class TestAWorkerThatHangs:
    def test_a_batch_that_takes_too_long_ends_at_the_deadline_and_the_next_one_is_scored(self, tmp_path):
        file = tmp_path / "pid"
        limits = {"deadline_s": 1.0, "deadline_per_image_s": 0.25, "max_restarts": 1}
        slow = WorkerReward(scorer("Waits"), name="slow", options={"file": str(file)}, **limits)
        with within(30), slow as reward:
            begin = time.monotonic()
            with pytest.raises(TimeoutError, match="'slow' did not answer in time and was killed"):
                reward(IMAGES, PROMPTS)
            # 1 s and 0.25 s for each of 2 images; then the process and the reader of its output are waited for
            assert 1.5 <= time.monotonic() - begin < 1.5 + 2 * child.DYING_S
            assert not alive(written(file)[0])
            assert reward(IMAGES, PROMPTS) == TOP_LEFT, "the one restart is for this batch"

    def test_what_it_started_is_killed_with_it(self, tmp_path):
        file = tmp_path / "pids"
        with (
            within(30),
            WorkerReward(
                scorer("Parent"), options={"file": str(file)}, deadline_s=1.5, deadline_per_image_s=0.0
            ) as reward,
        ):
            with pytest.raises(TimeoutError):
                reward(IMAGES, PROMPTS)
            pids = written(file)
            assert len(pids) == 2
            until(lambda: not any(map(alive, pids)))

    def test_a_start_that_never_answers(self):
        message = r"(?s)'late' was not ready after 5 s and was killed; it wrote last:\nloading the model"
        with within(20), pytest.raises(TimeoutError, match=message):  # enough time for a slow machine to write the line
            WorkerReward(scorer("Unready"), name="late", start_timeout_s=5.0)

    def test_a_start_that_fails_says_why(self):
        with within(10), pytest.raises(ConnectionError, match=r"(?s)exit code 1; .*OSError: no weights at hand"):
            WorkerReward(scorer("Unloadable"))
        with within(10), pytest.raises(ConnectionError, match=r"unexpected keyword argument 'facter'"):
            WorkerReward(scorer("Described"), options={"facter": 3})
        with within(10), pytest.raises(ConnectionError, match=r"has no attribute 'Nobody'"):
            WorkerReward(scorer("Nobody"))

    def test_a_start_in_the_middle_of_a_run_has_its_own_time(self, tmp_path):
        # a restart of a worker that needs longer to start than a call may take
        slow = tmp_path / "slow.py"
        slow.write_text(
            "import time\ntime.sleep(1.2)\ndef one(images, prompts, **columns):\n    return [1.0] * len(prompts)\n"
        )
        with within(30), WorkerReward(f"{slow}:one", deadline_s=1.0, deadline_per_image_s=0.0) as reward:
            kill(reward)
            assert reward(IMAGES, PROMPTS) == [1.0, 1.0]


class TestClosing:
    """In the middle of something, from another thread. A call alone would take 34 s, a start ten minutes."""

    def test_a_call_in_flight_ends_at_once_and_no_other_begins(self, tmp_path):
        file = tmp_path / "pid"
        with within(20):
            reward = WorkerReward(scorer("Waits"), name="done", options={"file": str(file)})
            closer = threading.Thread(target=lambda: written(file) and reward.close())
            closer.start()
            with pytest.raises(ConnectionError, match=r"'done' was closed$"):
                reward(IMAGES, PROMPTS)
            closer.join()
            assert not alive(written(file)[0])
            with pytest.raises(ConnectionError, match=r"'done' was closed$"):
                reward(IMAGES, PROMPTS)
            reward.close()

    def test_a_worker_that_is_being_started_again_ends_too(self, tmp_path):
        again, starting, slow = tmp_path / "again", tmp_path / "starting", tmp_path / "slow.py"
        slow.write_text(
            "import os, time\n"
            f"if os.path.exists({str(again)!r}):\n    open({str(starting)!r}, 'w').close()\n    time.sleep(600)\n"
            "def one(images, prompts, **columns):\n    return [1.0] * len(prompts)\n"
        )
        with within(20):
            reward = WorkerReward(f"{slow}:one")
            again.touch()
            kill(reward)
            closer = threading.Thread(target=lambda: until(starting.exists) or reward.close())
            closer.start()
            with pytest.raises(ConnectionError, match=r"was closed$"):
                reward(IMAGES, PROMPTS)
            closer.join()

    def test_closed_just_before_its_process_is_there(self, monkeypatch):
        start = child.WorkerProcess

        def close_and_start(*arguments: Any) -> child.WorkerProcess:
            closer.start()
            until(lambda: reward._closed)
            return start(*arguments)

        with within(20):
            reward = WorkerReward(scorer("digests"))
            closer = threading.Thread(target=reward.close)
            monkeypatch.setattr(child, "WorkerProcess", close_and_start)
            kill(reward)
            with pytest.raises(ConnectionError, match=r"was closed$"):
                reward(IMAGES, PROMPTS)
            closer.join()


class TestTheEndOfTheParent:
    PROGRAM = (
        "import sys, numpy as np\n"
        "from flowsteer.rewards.hosts.child import WorkerReward\n"
        "reward = WorkerReward(sys.argv[1], options={'file': sys.argv[2]})\n"
        "print('started', flush=True)\n"
        "if sys.argv[3] == 'busy': reward(np.zeros((1, 2, 2, 3), np.uint8), ['a'])\n"
        "sys.stdin.read()\n"
    )

    def start(self, name: str, file: Path, state: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", self.PROGRAM, scorer(name), str(file), state]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @pytest.mark.parametrize("name", ["Waits", "Parent"])
    def test_killed_while_a_batch_is_scored_the_worker_and_all_it_started_end_at_once(self, name, tmp_path):
        file = tmp_path / "pids"
        with within(30):
            parent = self.start(name, file, "busy")
            pids = written(file)
            assert all(map(alive, pids))
            parent.kill()
            parent.wait()
        with within(3):
            until(lambda: not any(map(alive, pids)))

    @pytest.mark.parametrize("ending", ["kill", "finish"])
    def test_also_while_it_is_idle(self, ending, tmp_path):
        with within(30):
            parent = self.start("Waits", tmp_path / "pids", "idle")
            assert parent.stdout is not None
            parent.stdout.readline()
            (worker_id,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
            assert alive(int(worker_id))
            if ending == "kill":
                parent.kill()
            else:
                parent.communicate("")
            parent.wait()
        with within(3):
            until(lambda: not alive(int(worker_id)))

    def test_a_scheduler_that_signals_all_processes_of_a_job_does_not_end_it(self, tmp_path):
        file = tmp_path / "pid"

        def signal_and_go() -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(written(file)[0], number)
            (tmp_path / "pid.go").touch()

        with within(30), WorkerReward(scorer("Helped"), options={"file": str(file)}, max_restarts=0) as reward:
            scheduler = threading.Thread(target=signal_and_go)
            scheduler.start()
            ended = -float(signal.SIGTERM)  # how the scorer ends what it starts itself: not deaf to signals too
            assert reward(IMAGES, PROMPTS) == [ended, ended]
            scheduler.join()

    def test_closing_ends_it_and_a_thread_that_ends_does_not(self):
        answers = []
        with within(30), WorkerReward(scorer("environment"), max_restarts=0) as reward:
            for _ in range(2):  # Linux's parent-death signal would go off at the end of the thread
                thread = threading.Thread(target=lambda: answers.append(ask(reward, IMAGES, PROMPTS)["pid"][0]))
                thread.start()
                thread.join()
            assert answers[0] == answers[1]
            assert alive(int(answers[0]))
        assert not alive(int(answers[0]))


class TestAWorkerThatBreaksTheProtocol:
    @pytest.fixture
    def faulty(self, monkeypatch) -> Callable[..., WorkerReward]:
        monkeypatch.setattr(child, "WORKER_FILE", HERE / "faulty_worker.py")
        return lambda fault, **options: WorkerReward(fault, name="faulty", max_restarts=1, **options)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("garbage", r"begins with b'HTTP'; a frame begins with b'FSR1'"),
            ("oversize header", "announces a header of 4294967295 bytes"),
            ("oversize body", "and a body of 9223372036854775808; allowed are 16777216 and none"),
            ("short", "has 1 values for 'score', expected 2, one per image"),
            ("long", "has 3 values for 'score', expected 2, one per image"),
            ("no list", "has no list of values for 'score'"),
            ("no score", "scores were asked for and answered by"),
            ("short part", "has 1 values for 'other', expected 2"),
            ("nan", "NaN is no JSON"),
            ("infinite", "'score' holds something that is no finite number"),
            ("text", "'score' holds something that is no finite number"),
            ("truth", "'score' holds something that is no finite number"),
            ("another request", "belongs to the request 0, expected 1"),
            ("another scorer", "weights, options or packages have changed"),
            ("no json", "the answer is no JSON"),
            ("deep json", "the answer is no JSON"),
            ("no object", "the answer is a JSON list, expected an object"),
        ],
    )
    def test_an_answer_that_is_none(self, faulty, fault, message):
        with within(20), faulty(fault) as reward, pytest.raises(ConnectionError, match=f"'faulty' .*{message}"):
            reward(IMAGES, PROMPTS)

    @pytest.mark.parametrize("fault", ["half a frame", "trickle"])
    def test_an_answer_that_does_not_end(self, faulty, fault):
        # the trickle's whole answer would take about ten seconds, a byte every tenth of a second
        with within(20), faulty(fault, deadline_s=1.0, deadline_per_image_s=0.0) as reward:
            begin = time.monotonic()
            with pytest.raises(TimeoutError, match="did not answer in time"):
                reward(IMAGES, PROMPTS)
            assert time.monotonic() - begin < 6.0

    def test_a_handshake_that_is_none(self, faulty):
        with within(20), pytest.raises(ConnectionError, match="speaks the protocol 7 to 9, this side 1"):
            faulty("another protocol")
        with within(20), pytest.raises(ConnectionError, match="the handshake was answered by"):
            faulty("half a hello")

    @pytest.mark.parametrize("limit", [95, 96])
    def test_a_batch_that_is_too_large(self, limit):
        with within(20), WorkerReward(scorer("digests"), max_body_bytes=limit, max_restarts=0) as reward:
            if limit == 96:
                assert ask(reward, IMAGES, PROMPTS)["score"] == [digest(image.tobytes()) for image in IMAGES]
                return
            with pytest.raises(ValueError, match="take 96 bytes, the worker accepts 95: raise its max_body_bytes"):
                reward(IMAGES, PROMPTS)
            assert ask(reward, IMAGES[:1], PROMPTS[:1])["score"] == [digest(IMAGES[0].tobytes())]


class TestWhatTheWorkerRefuses:
    """The same worker with a client that is not ours."""

    def ends(self, sent: bytes, *arguments: str) -> str:
        """What a worker writes that was sent this and ends by it."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [sys.executable, str(child.WORKER_FILE), scorer("digests"), "--fd", str(theirs.fileno())]
            process = subprocess.Popen(
                [*command, *arguments], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
            ours.sendall(sent)
            _, text = process.communicate()
        assert process.returncode == 1
        return text

    @pytest.mark.parametrize(
        ("sent", "message"),
        [
            (b"GET / HTTP/1.1\r\n\r\n", "this is no frame: it begins with b'GET '"),
            (worker.PREFIX.pack(b"FSR1", 2**32 - 1, 0), "a header of 4294967295 bytes and a body of 0 is larger"),
            (worker.PREFIX.pack(b"FSR1", 2, 2**63), "a header of 2 bytes and a body of 9223372036854775808 is larger"),
            (worker.PREFIX.pack(b"FSR1", 2, 1001), "is larger than the allowed 16777216 and 1000"),
            (worker.PREFIX.pack(b"FSR1", 1, 0) + b"{", "the header is no JSON"),
            (worker.PREFIX.pack(b"FSR1", 2, 0) + b"[]", "the header is no JSON object"),
            (wire.frame_head({"op": "shell"}, 0), "there is no request 'shell'"),
        ],
    )
    def test_what_is_no_frame_ends_it(self, sent, message):
        with within(20):
            assert message in self.ends(sent, "--max-body-bytes", "1000")

    GOOD: ClassVar = {
        "op": "score", "proto": 1, "id": 1, "dtype": "uint8", "layout": "NHWC", "shape": [2, 1, 1, 3], "prompts": ["", ""],
        "columns": {}, "seconds": 30.0,
    }  # fmt: skip

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"proto": 2}, "this side speaks the protocol 1 to 1, the other side 2"),
            ({"shape": [2, 1, 1, 4]}, r"uint8 NHWC of the shape \[2, 1, 1, 4\] in 6 bytes are no images"),
            ({"shape": [2, 1, 2, 3]}, "in 6 bytes are no images"),
            ({"shape": [-2, -1, 1, 3]}, "is no list of sizes"),
            ({"shape": []}, "are no images"),
            ({"shape": [2, 1, 3], "layout": None}, "are no images"),
            ({"id": float("nan")}, "id is no number: nan"),
            ({"id": None}, "id is no number: None"),
            ({"dtype": "float32"}, "float32 NHWC"),
            ({"layout": "NTHWC"}, "uint8 NTHWC"),
            ({"prompts": [""]}, "prompts is no list of 2 values"),
            ({"columns": {"color": ["red"]}}, "color is no list of 2 values"),
            ({"columns": []}, "columns are no JSON object"),
            ({"seconds": None}, "seconds is None, expected a number above 0"),
            ({"seconds": float("nan")}, "seconds is nan, expected a number above 0"),
        ],
    )
    def test_a_request_that_does_not_fit_together(self, change, message):
        worker.check_request(self.GOOD, 6)
        with pytest.raises(worker.Refused, match=message):
            worker.check_request({**self.GOOD, **change}, 6)


class TestAServer:
    @pytest.fixture(autouse=True)
    def token(self, monkeypatch) -> None:
        monkeypatch.setenv(remote.TOKEN_VARIABLE, TOKEN)

    def test_nobody_there_is_told_within_seconds(self, monkeypatch, slept):
        monkeypatch.setattr(remote._jitter, "uniform", lambda low, high: 1.0)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        message = (
            r"'http://127.0.0.1:\d+' after 3 tries: .*refused; start the server before the run, and look at the address"
        )
        with within(10), pytest.raises(ConnectionError, match=message):
            HTTPReward(f"http://127.0.0.1:{port}")  # which may take 600 s to start
        assert slept == pytest.approx([0.5, 1.0])

    def test_an_unknown_host_is_told_within_seconds(self, monkeypatch, slept):
        def unknown(*_: object, **__: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(remote.socket, "getaddrinfo", unknown)
        with within(10), pytest.raises(ConnectionError, match=r"after 3 tries: .*not known; start the server"):
            HTTPReward("http://no-such-host:8700")
        assert len(slept) == 2

    def test_a_busy_server_is_asked_until_the_start_is_over(self, monkeypatch, slept):
        def busy(connection: socket.socket) -> None:
            TestAPeerThatIsNoServer.read_request(connection)
            connection.sendall(b"HTTP/1.0 503 Busy\r\n\r\n")

        monkeypatch.setattr(remote._jitter, "uniform", lambda low, high: 1.0)
        monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.1)
        failed = pytest.raises(ConnectionError, match="after 5 tries: the server answers 503 Busy")
        with within(20), answering(busy) as (url, _), failed:
            HTTPReward(url, start_timeout_s=3.0)
        assert slept == pytest.approx([0.1, 0.2, 0.4, 0.8])  # and 1.6 more would be past the 3 s

    def test_a_server_that_goes_away_is_asked_three_times(self, monkeypatch):
        monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.05)
        with within(30):
            with serving(scorer("digests")) as url:
                reward = HTTPReward(url, name="far")
            with pytest.raises(ConnectionError, match=r"'far' after 3 tries: .*refused"):
                reward(IMAGES, PROMPTS)
            scores = RewardSet([("far", reward, 1.0)]).score(torch.zeros(2, 3, 4, 4), PROMPTS)
            assert scores.missing.all()

    def test_a_server_that_comes_back_gives_the_scores(self, monkeypatch):
        refused, back = threading.Event(), threading.Event()
        with within(30):
            with serving(scorer("digests")) as url:
                reward = HTTPReward(url)
            monkeypatch.setattr(remote.time, "sleep", lambda seconds: refused.set() or back.wait())
            answers = []
            asking = threading.Thread(target=lambda: answers.append(reward(IMAGES, PROMPTS)))
            asking.start()
            refused.wait()
            with serving(scorer("digests"), "--port", url.rpartition(":")[2]):
                back.set()
                asking.join()
        assert answers[0]["score"] == [digest(image.tobytes()) for image in IMAGES]

    def test_packets_that_the_system_gives_up_on_are_sent_again(self, monkeypatch):
        monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.05)
        connect, times_lost = remote._connect, 2

        def lose(*arguments: Any) -> socket.socket:
            nonlocal times_lost
            times_lost -= 1
            if times_lost >= 0:
                raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")  # long before the deadline
            return connect(*arguments)

        with within(20), serving(scorer("digests")) as url:
            monkeypatch.setattr(remote, "_connect", lose)
            reward = HTTPReward(url, name="far")
            times_lost = 2
            assert ask(reward, IMAGES, PROMPTS)["score"] == [digest(image.tobytes()) for image in IMAGES]
            times_lost = 3
            with pytest.raises(ConnectionError, match=r"'far' after 3 tries: .*timed out"):
                reward(IMAGES, PROMPTS)

    def test_another_scorer_in_its_place_is_noticed(self):
        with within(30):
            with serving(scorer("digests")) as url:
                reward = HTTPReward(url)
            changed = pytest.raises(ConnectionError, match="weights, options or packages have changed")
            with serving(scorer("raises"), "--port", url.rpartition(":")[2]), changed:
                reward(IMAGES, PROMPTS)

    def test_a_wrong_token_is_refused_and_not_tried_again(self, monkeypatch):
        with within(20), serving(scorer("digests")) as url:
            reward = HTTPReward(url)
            for wrong in (b"wrong", b"", TOKEN.encode() + b"x", TOKEN[:-1].encode(), "tøken".encode()):
                reward._token = wrong
                with pytest.raises(
                    wire.ProtocolError, match=r"401 Unauthorized: .*the token is wrong.*give the server"
                ):
                    reward(IMAGES, PROMPTS)
            monkeypatch.setenv(remote.TOKEN_VARIABLE, "wrong")
            with pytest.raises(wire.ProtocolError, match="the token is wrong"):
                HTTPReward(url)

    def test_a_server_without_a_token_does_not_start(self, monkeypatch):
        monkeypatch.delenv(remote.TOKEN_VARIABLE)
        command = [sys.executable, str(remote.SERVER_FILE), scorer("digests"), "--port", "0"]
        with within(20):
            done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert "a server needs a token" in done.stderr

    def test_what_is_too_large_or_no_frame_is_refused_before_it_is_read(self):
        def status(length: str | None, body: bytes = b"", path: str = "/v1/score") -> int:
            connection = http.client.HTTPConnection(address, timeout=10)
            connection.putrequest("POST", path)
            connection.putheader("Authorization", f"Bearer {TOKEN}")
            if length is not None:
                connection.putheader("Content-Length", length)
            connection.endheaders(body)
            try:
                return connection.getresponse().status
            finally:
                connection.close()

        with within(20), serving(scorer("digests"), "--max-body-bytes", "1000") as url:
            address = url.removeprefix("http://")
            assert status(str(10**12)) == 413  # and none of it was sent
            assert status(None) == 411
            assert status("-5") == 411
            assert status("16", b"GET / HTTP/1.1\r\n") == 400
            assert status("18", worker.PREFIX.pack(b"FSR1", 2, 2**40) + b"{}") == 400
            assert status("18", worker.PREFIX.pack(b"FSR1", 2, 8) + b"{}") == 400  # lengths that contradict each other
            assert status("18", path="/v2/score") == 404
            reward = HTTPReward(url)
            with pytest.raises(ValueError, match="take 1200 bytes, the worker accepts 1000"):
                reward(random_images(1, 20, 20, 3), ["a"])
            assert ask(reward, IMAGES, PROMPTS)["score"] == [digest(image.tobytes()) for image in IMAGES]

    def test_what_the_scorer_raises_is_not_asked_again(self, monkeypatch):
        with within(20), serving(scorer("raises")) as url:
            reward = HTTPReward(url)
            requests, request = [], reward._request
            monkeypatch.setattr(reward, "_request", lambda *arguments: requests.append(1) or request(*arguments))
            with pytest.raises(RuntimeError, match=r"^KeyError: 'cannot read bad'$"):
                reward(IMAGES, ["good", "bad"])
            assert len(requests) == 1
            scores = RewardSet([("x", reward, 1.0)]).score(torch.zeros(2, 3, 4, 4), ["good", "bad"])
        assert scores.missing.tolist() == [False, True]

    def test_a_scorer_gets_one_batch_at_a_time(self):
        answers = []
        with within(20), serving(scorer("Alone")) as url:
            reward = HTTPReward(url)
            threads = [threading.Thread(target=lambda: answers.extend(reward(IMAGES, PROMPTS))) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert answers == [1.0] * 8

    def test_a_batch_whose_time_is_over_before_its_turn_is_not_scored(self, tmp_path):
        file = tmp_path / "notes"
        with within(20), serving(scorer("Notes"), "--options", json.dumps({"file": str(file)})) as url:
            reward = HTTPReward(url)

            def request(prompts: list[str], seconds: float) -> dict[str, Any]:
                frame = wire.score_request(IMAGES, prompts, {}, 5, seconds, 1000)
                return reward._request("POST", "score", frame, time.monotonic() + 10)

            late = request(["too", "late"], 1e-9)  # it waits longer than that even for a lock that is free
            assert late == {"id": 5, "op": "expired"}
            with pytest.raises(TimeoutError, match="turn came after its time was over"):
                wire.read_scores(late, 2, 5, reward.hello)
            assert request(["in", "time"], 10.0)["parts"] == {"score": [1.0, 1.0]}
        assert file.read_text() == "in time\n"

    def test_the_wait_for_a_turn_counts(self, tmp_path):
        options = {"file": str(tmp_path / "notes")}
        answerer, answers = worker.Answerer(scorer("Notes"), options, 1000), []
        header = {**TestWhatTheWorkerRefuses.GOOD, "seconds": 0.3}
        begin = time.monotonic()
        asking = threading.Thread(target=lambda: answers.append(answerer.answer(header, bytearray(6), begin)))
        with within(20):
            with answerer._lock:  # as if another batch were scored
                asking.start()
                until(lambda: time.monotonic() > begin + 0.3)
            asking.join()
        assert answers == [{"id": 1, "op": "expired"}]

    def test_it_listens_on_this_machine_only(self):
        with within(20), serving(scorer("digests")) as url:
            port = int(url.rpartition(":")[2])
            sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            listening = {fields[1] for fields in sockets if fields[3] == "0A" and fields[1].endswith(f":{port:04X}")}
            assert listening == {f"0100007F:{port:04X}"}


class TestAPeerThatIsNoServer:
    """Whatever answers at the address; a handshake as it should be first, for the calls."""

    @pytest.fixture(autouse=True)
    def token(self, monkeypatch) -> None:
        monkeypatch.setenv(remote.TOKEN_VARIABLE, TOKEN)

    @pytest.fixture(scope="class")
    def make(self) -> Iterator[Callable[..., HTTPReward]]:
        """Rewards that have met a real server and then find something else at an address."""
        with serving(scorer("digests")) as server, pytest.MonkeyPatch.context() as patch:
            patch.setenv(remote.TOKEN_VARIABLE, TOKEN)

            def make(url: str, **options: Any) -> HTTPReward:
                reward = HTTPReward(server, name="far", **options)
                reward._parts = urlsplit(url)
                reward._port = reward._parts.port or 0
                return reward

            yield make

    @staticmethod
    def read_request(connection: socket.socket) -> bytes:
        """To its end: a connection that is closed on unread bytes is reset."""
        text = b""
        while b"\r\n\r\n" not in text:
            text += connection.recv(65536)
        head, _, body = text.partition(b"\r\n\r\n")
        length = next(int(line.split()[1]) for line in head.splitlines() if line.startswith(b"Content-Length:"))
        while len(body) < length:
            body += connection.recv(65536)
        return head + b"\r\n\r\n" + body

    @pytest.mark.parametrize(
        ("answer", "message", "tries"),
        [
            (b"HTTP/1.0 503 Busy\r\n\r\n", "after 3 tries: the server answers 503 Busy", 3),
            (b"", "after 3 tries", 3),  # closed without a word
            (b"SSH-2.0-OpenSSH_9.6\r\n", "this is no server of rewards: BadStatusLine", 1),
            (b"HTTP/1.0 500 Broken\r\n\r\nsorry", "the server answers 500 Broken: sorry", 1),
            (b"HTTP/1.0 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "answers 302 Found", 1),
            (b"HTTP/1.0 200 OK\r\n\r\nhello", "the answer is no JSON", 1),
            (b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{}", "belongs to the request None, expected 1", 1),
        ],
    )
    def test_an_answer_that_is_none(self, make, answer, message, tries, monkeypatch):
        monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.05)

        def speak(connection: socket.socket) -> None:
            self.read_request(connection)
            connection.sendall(answer)

        with within(20), answering(speak) as (url, times):
            with pytest.raises(ConnectionError, match=f"'far'.*{message}"):
                make(url)(IMAGES, PROMPTS)
            assert len(times) == tries

    def test_each_try_says_how_many_seconds_are_left(self, make, monkeypatch):
        monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.05)
        seconds = []

        def speak(connection: socket.socket) -> None:
            body = self.read_request(connection).partition(b"\r\n\r\n")[2]
            _, header_bytes, _ = worker.PREFIX.unpack(body[: worker.PREFIX.size])
            header = json.loads(body[worker.PREFIX.size : worker.PREFIX.size + header_bytes])
            seconds.append(header["seconds"])

        with within(20), answering(speak) as (url, _), pytest.raises(ConnectionError, match="after 3 tries"):
            make(url, deadline_s=15.0, deadline_per_image_s=1.0)(IMAGES, PROMPTS)
        first, second, third = seconds
        assert first <= 15.0 + 2 * 1.0
        assert first - second >= 0.05 * 0.5  # the wait between them, with the smallest jitter
        assert second - third >= 0.1 * 0.5

    def test_the_waits_between_tries_grow(self, make, monkeypatch, slept):
        jitters = []
        monkeypatch.setattr(remote._jitter, "uniform", lambda low, high: jitters.append((low, high)) or 1.0)
        monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.1)
        failing = pytest.raises(ConnectionError, match="after 3 tries")
        with within(20), answering(lambda connection: None) as (url, times), failing:
            make(url)(IMAGES, PROMPTS)
        assert slept == pytest.approx([0.1, 0.2])
        waits = [after - before for before, after in pairwise(times)]
        assert waits[0] >= 0.1
        assert waits[1] >= 0.2
        assert set(jitters) == {(0.5, 1.5)}

    @pytest.mark.parametrize(
        "start",
        [b"", b"HTTP/1.0 200 OK\r\nX: ", b"HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{"],
        ids=["status", "headers", "body"],
    )
    @pytest.mark.parametrize("trickle", [False, True])
    def test_an_answer_that_does_not_end(self, make, start, trickle):
        over = threading.Event()

        def speak(connection: socket.socket) -> None:
            self.read_request(connection)
            connection.sendall(start)
            while not over.wait(0.1):
                if trickle:
                    connection.sendall(b" ")

        with within(20), answering(speak) as (url, times):
            reward = make(url, deadline_s=1.0, deadline_per_image_s=0.0)
            begin = time.monotonic()
            with pytest.raises(TimeoutError, match="'far': no answer within the deadline"):
                reward(IMAGES, PROMPTS)
            assert 1.0 <= time.monotonic() - begin < 6.0
            assert len(times) == 1, "it is not asked again"
            over.set()

    def test_what_failed_before_the_deadline_is_told(self, monkeypatch):
        monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.05)
        over = threading.Event()

        def refuse_then_hang(connection: socket.socket) -> None:
            self.read_request(connection)
            if len(times) == 1:
                connection.sendall(b"HTTP/1.0 503 Busy\r\n\r\n")
            else:
                over.wait()

        message = "no answer within the deadline; the try before: the server answers 503 Busy"
        with within(20), answering(refuse_then_hang) as (url, times):
            with pytest.raises(TimeoutError, match=message):
                HTTPReward(url, start_timeout_s=3.0)
            over.set()

    def test_a_peer_that_does_not_read(self, make):
        over = threading.Event()

        def wait(connection: socket.socket) -> None:
            over.wait()

        large = random_images(1, 2000, 2000, 3)  # more than the buffers of a connection hold
        with within(20), answering(wait) as (url, _):
            reward = make(url, deadline_s=1.0, deadline_per_image_s=0.0)
            with pytest.raises(TimeoutError, match="'far': no answer within the deadline"):
                reward(large, ["a"])
            over.set()

    @pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
    def test_https_and_a_certificate_that_nobody_vouches_for(self, tmp_path, monkeypatch):
        key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
                *("-days", "1", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", str(key), "-out", str(certificate)),
            ],
            check=True,
            capture_output=True,
        )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        with within(20), serving(scorer("digests")) as server:

            def forward(connection: socket.socket) -> None:
                inside = urlsplit(server)
                with (
                    context.wrap_socket(connection, server_side=True) as outer,
                    socket.create_connection((inside.hostname, inside.port)) as inner,
                ):
                    inner.sendall(self.read_request(outer))
                    while data := inner.recv(65536):
                        outer.sendall(data)

            with answering(forward) as (url, _):
                url = url.replace("http:", "https:")
                with pytest.raises(ConnectionError, match="certificate verify failed"):
                    HTTPReward(url)
                monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
                answer = ask(HTTPReward(url), IMAGES, PROMPTS)
        assert answer["score"] == [digest(image.tobytes()) for image in IMAGES]

    def test_https_with_a_peer_that_says_nothing(self):
        over = threading.Event()

        def wait(connection: socket.socket) -> None:
            over.wait()

        with within(20), answering(wait) as (url, _):
            with pytest.raises(TimeoutError, match="no answer within the deadline"):
                HTTPReward(url.replace("http:", "https:"), start_timeout_s=0.5)
            over.set()

    def test_another_protocol(self):
        hello = b'{"op": "hello", "proto": [7, 9]}'

        def speak(connection: socket.socket) -> None:
            self.read_request(connection)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + hello)

        differing = pytest.raises(ConnectionError, match="speaks the protocol 7 to 9, this side 1")
        with within(20), answering(speak) as (url, _), differing:
            HTTPReward(url)
