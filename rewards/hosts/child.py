"""A reward in a child process, which may have another python and other packages. POSIX only.

`WorkerReward` starts ``worker.py`` and speaks to it over a private socket. It is used as any reward:

=====================================  ===============================================================================
over there                             here
=====================================  ===============================================================================
a score is None, NaN or infinite       None (and a warning with what it was)
the scorer raises, or gives nonsense   RuntimeError("TYPE: text"), never asked again
the deadline passes                    the process is killed and TimeoutError raised; the next call starts a new one
the process dies, or breaks the        a new one is started and given the batch once more; then ConnectionError
protocol
`close`, also in the middle of a call  the process is killed at once; that call and all later ones ConnectionError
=====================================  ===============================================================================

`flowsteer.rewards.combine` makes the scores of a whole batch missing after a ConnectionError or TimeoutError.

Letters: B samples, T frames.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowsteer.rewards.hosts.wire import (
    MAX_BODY_BYTES,
    PROTO,
    Hello,
    ProtocolError,
    check_seconds,
    exchange,
    frame_head,
    read_hello,
    read_scores,
    score_request,
)
from flowsteer.rewards.types import Values

logger = logging.getLogger(__name__)

WORKER_FILE = Path(__file__).with_name("worker.py")
RESTART_WINDOW_S = 3600.0
DYING_S = 1.0  # a process that has closed its socket is given so long to end by itself, for its exit code
LOG_LINES, LOG_LINE_BYTES = 12, 1000  # of the worker's output, kept for error messages

# What a worker may see of this process's environment. No PYTHONPATH: its packages are its own.
HANDED_ON = (
    "PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TZ", "LANG", "LD_LIBRARY_PATH", "XDG_CACHE_HOME", "TORCH_HOME",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRANSFORMERS_OFFLINE", "SSL_CERT_FILE",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
HANDED_ON_PREFIXES = ("HF_", "LC_")


class WorkerReward:
    """A scorer in a child process, with the packages of another python.

    The constructor starts the process and waits for its handshake. A call ends within ``deadline_s +
    deadline_per_image_s * B`` seconds, to which comes the time of a start, ``start_timeout_s`` at most, where the worker has
    to be started again. Calls from several threads take turns, and each one's time begins with its turn. The process ends
    with `close`, and with this one however this one ends.

    Args:
        target: ``module:attribute`` or ``path/to/file.py:attribute`` over there; see ``worker.py``.
        python: the interpreter of the other environment; default this one.
        options: arguments of the scorer's constructor, or of the function; what JSON holds.
        name: in messages; default the target.
        env: variables for the process, besides those of ``HANDED_ON``.
        start_timeout_s: from the start to the handshake, in which the scorer loads its model.
        max_restarts: within an hour; then every call raises until the hour is over.
        max_body_bytes: largest batch of pixels that the process accepts.

    Raises:
        ValueError: there is no such python, or a number that cannot be.
        ConnectionError, TimeoutError: it ended or was not ready in time; with the last lines that it wrote.
    """

    def __init__(
        self,
        target: str,
        *,
        python: str = sys.executable,
        options: Mapping[str, Any] | None = None,
        name: str | None = None,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 600.0,
        deadline_s: float = 30.0,
        deadline_per_image_s: float = 2.0,
        max_restarts: int = 3,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        check_seconds(start_timeout_s, deadline_s, deadline_per_image_s)
        if max_restarts < 0 or max_body_bytes < 1:
            raise ValueError(
                f"max_restarts must be at least 0 and max_body_bytes at least 1, got {max_restarts} and {max_body_bytes}"
            )
        if shutil.which(python) is None:
            raise ValueError(f"there is no python {python!r}; give the path of an environment's bin/python")
        self.name = name or target
        self._command = [
            python, str(WORKER_FILE), target, "--options", json.dumps(dict(options or {}), allow_nan=False),
            "--max-body-bytes", str(max_body_bytes),
        ]  # fmt: skip
        self._folder = os.getcwd()  # relative paths stay those of now, also when it is started again
        self._env = {**handed_on(os.environ), **(env or {})}
        self._start_timeout_s = start_timeout_s
        self._deadline = (deadline_s, deadline_per_image_s)
        self._max_restarts = max_restarts
        self._restarts: deque[float] = deque()  # when, within the last hour
        self._ending = ""  # how the last worker ended
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._closed = False
        self._worker: WorkerProcess | None = None
        self.hello: Hello = self._start()
        self.groupwise, self.video, self.uses_prompt = self.hello.groupwise, self.hello.video, self.hello.uses_prompt
        self.pictures = self.hello.pictures

    @property
    def pid(self) -> int | None:
        """Of the worker's process; None between its end and the next call."""
        worker = self._worker
        return None if worker is None else worker.pid

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the scores: target, version, options, packages, platform, and the scorer's own fingerprint."""
        return self.hello.fingerprint

    def __call__(
        self, images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]
    ) -> Values | Mapping[str, Values]:
        """Score uint8 [B, H, W, 3] or [B, T, H, W, 3].

        Raises:
            ValueError: a batch that cannot be sent.
            RuntimeError: what the scorer raised.
            ConnectionError, TimeoutError: no answer; see the module's text.
        """
        number, size = next(self._numbers), len(images)
        seconds = self._deadline[0] + self._deadline[1] * size
        limit, pictures = self.hello.max_body_bytes, self.pictures
        head, body = score_request(images, prompts, columns, number, seconds, limit, pictures)
        with self._lock:
            deadline = time.monotonic() + seconds
            for last_try in (False, True):
                if self._worker is None:
                    begin = time.monotonic()
                    self._restart()
                    deadline += time.monotonic() - begin
                assert self._worker is not None
                try:
                    answer = exchange(self._worker.connection, head, body, deadline)
                    return read_scores(answer, size, number, self.hello)
                except OSError as error:
                    failure = self._failed(error, "did not answer in time")
                    if last_try or self._closed or isinstance(error, TimeoutError):
                        raise failure from error
                    logger.warning("%s; the batch is given to a new worker", failure)
        raise AssertionError("the second try returns or raises")

    def close(self) -> None:
        """End the process for good, also in the middle of a call, which raises ConnectionError as every later one does."""
        self._closed = True
        worker = self._worker
        if worker is not None:
            worker.kill()  # before the lock: who holds it waits for an answer, and now gets none
        with self._lock:
            if self._worker is not None:
                self._worker.end()
            self._worker = None

    def __enter__(self) -> WorkerReward:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _restart(self) -> None:
        if self._closed:
            raise ConnectionError(f"the worker of reward {self.name!r} was closed")
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - RESTART_WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_restarts:
            raise ConnectionError(
                f"the worker of reward {self.name!r} was started again {len(self._restarts)} times within the hour, which "
                f"is all that max_restarts allows; it stays down. The last one {self._ending}"
            )
        self._restarts.append(now)
        self._start()

    def _start(self) -> Hello:
        head = frame_head({"proto": PROTO, "op": "hello"}, 0)
        try:
            self._worker = WorkerProcess(self._command, self._env, self._folder)
            if self._closed:  # by another thread, which may have looked for a process before there was this one
                raise ConnectionError
            answer = exchange(self._worker.connection, head, memoryview(b""), time.monotonic() + self._start_timeout_s)
            return read_hello(answer)
        except OSError as error:
            raise self._failed(error, f"was not ready after {self._start_timeout_s:g} s") from error

    def _failed(self, error: OSError, late: str) -> OSError:
        """The exception to raise, after the worker has been killed."""
        worker, self._worker = self._worker, None
        if worker is None:
            kind, self._ending = ConnectionError, f"could not be started: {error}"
        elif isinstance(error, TimeoutError):
            worker.end()
            kind, self._ending = TimeoutError, f"{late} and was killed"
        elif isinstance(error, ProtocolError):
            worker.end()
            kind, self._ending = ProtocolError, f"was ended: {error}"
        else:
            worker.end(DYING_S)
            kind, self._ending = ConnectionError, worker.how_it_ended()
        lines = worker.last_lines() if worker else ""
        if self._closed:  # which is why, whatever it looks like
            kind, self._ending, lines = ConnectionError, "was closed", ""
        return kind(f"the worker of reward {self.name!r} {self._ending}{lines}")


class WorkerProcess:
    """A worker's process with its socket and the last lines of its output."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], folder: str) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())],
                env=env,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,  # reward packages print; the answers have a socket of their own
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a process group, so that what the scorer starts is killed with it
            )
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._reader = threading.Thread(target=_keep_lines, args=[self._process.stdout, self._lines], daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def kill(self) -> None:
        """Kill the process and all that it started, and end an exchange that is under way."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: no permission for what has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):  # closed; not to be closed here, where another thread may be waiting on it
            self.connection.shutdown(socket.SHUT_RDWR)

    def end(self, grace_s: float = 0.0) -> None:
        """Kill the process and all that it started, after so long, and wait for it."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: it is left behind
            self._process.wait(DYING_S)
        self._reader.join(DYING_S)

    def how_it_ended(self) -> str:
        """With its exit code or signal, once it has been ended."""
        code = self._process.returncode
        if code is not None and code < 0:
            return f"was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"ended with exit code {code}"

    def last_lines(self) -> str:
        """What it wrote last, for the end of a message."""
        return "; it wrote last:\n" + "\n".join(self._lines) if self._lines else ""


def _keep_lines(stream: Any, lines: deque[str]) -> None:
    with stream:
        for line in iter(lambda: stream.readline(LOG_LINE_BYTES), b""):
            lines.append(line.decode(errors="replace").rstrip())
            logger.debug("worker: %s", lines[-1])


def handed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a worker gets of this process's environment, and those that it always gets."""
    kept = {
        name: value for name, value in environment.items() if name in HANDED_ON or name.startswith(HANDED_ON_PREFIXES)
    }
    return {**kept, "PYTHONUNBUFFERED": "1"}  # what it wrote last is here, however it ends


__all__ = ["WorkerReward"]
