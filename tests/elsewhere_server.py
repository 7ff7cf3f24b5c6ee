"""One new interpreter in which the certificates of many rewards ask again; their imports take four seconds each time.

As where ``rewards/certify/process.py`` starts one, texts hash otherwise than in the tests' process, and the clock is later
before anything is imported. Each reward is asked in a fork, and so none sees another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

IMPORTED = ("flowsteer.rewards.registry", "torch", "transformers", "cv2", "rapidocr", "PIL.Image")


@contextmanager
def one_interpreter(process: ModuleType) -> Iterator[list[str]]:
    """Inside, ``process`` (that module) asks this interpreter. Gives the files that it was asked with."""
    asked: list[str] = []
    original = process._start
    server: list[subprocess.Popen[str]] = []

    def start(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
        _, file, request, answer, shift = command
        if (environment["PYTHONHASHSEED"], float(shift)) != (str(process.SEEDS[1]), process.SHIFT_S):
            return original(command, environment)  # scores differ, and the cause is looked for
        if not server:
            program = [sys.executable, __file__, str(Path(file).parent), shift]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
            server.append(subprocess.Popen(program, env=environment, **pipes))
        said, heard = server[0].stdin, server[0].stdout
        assert said
        assert heard
        asked.append(request)
        said.write(json.dumps([request, answer]) + "\n")
        return subprocess.CompletedProcess(command, int(heard.readline()), b"", b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "_start", start)
        yield asked
    for each in server:
        each.communicate()


def serve(folder: str, shift: str) -> None:
    """Each line of standard input names a request and its answer, as files; print the exit code of the fork that answers."""
    sys.path.insert(0, folder)
    import elsewhere  # run there as a file, too, outside its package

    elsewhere.shift_clock(float(shift))
    for name in IMPORTED:
        __import__(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 1
            try:
                elsewhere.main(*json.loads(line), "0")
                code = 0
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
