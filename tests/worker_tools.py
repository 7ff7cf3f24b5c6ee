"""What the tests of workers share: time limits that hold, images, servers, and looking at processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from flowsteer.rewards.hosts import remote
from flowsteer.rewards.types import Reward

HERE = Path(__file__).parent
TOKEN = "a-token-for-tests"


def scorer(name: str) -> str:
    """The target of one of ``worker_scorers.py``."""
    return f"{HERE / 'worker_scorers.py'}:{name}"


def ask(reward: Reward, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> Any:
    """The answer of a reward that gives parts."""
    return reward(images, prompts, **columns)


def random_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail the test, also one that hangs, when what stands inside takes longer."""

    def late(*_: object) -> None:
        raise AssertionError(f"not within {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def until(condition: Callable[[], bool]) -> None:
    """Wait; the limit is that of `within`."""
    while not condition():
        time.sleep(0.02)


def written(file: Path) -> list[int]:
    """The process ids in a file, once it is there."""
    until(file.exists)
    return [int(word) for word in file.read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet collected does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


@contextmanager
def serving(target: str, *arguments: str, python: str = sys.executable) -> Iterator[str]:
    """The address of a server with that scorer; its token is TOKEN."""
    command = [python, str(remote.SERVER_FILE), target, "--port", "0", *arguments]
    process = subprocess.Popen(
        command, env={**os.environ, remote.TOKEN_VARIABLE: TOKEN}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if line.startswith("listening on "))
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield line.split()[-1]
    finally:
        process.kill()
        process.wait()


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[float]]]:
    """The address of a peer that gives each connection to a function; and when connections came."""
    listener = socket.create_server(("127.0.0.1", 0))
    times: list[float] = []

    def loop() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            times.append(time.monotonic())
            with connection:
                try:
                    answer(connection)
                except OSError:  # the other side has had enough
                    continue

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", times
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
