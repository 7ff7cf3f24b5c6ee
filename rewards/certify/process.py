"""The check of a certificate that asks a reward in a process of its own, with another seed of hashes and another time of day.

That process is in ``elsewhere.py``. Texts hash otherwise in each process
(``PYTHONHASHSEED``), and within one minute nobody sees that a score depends on the clock. The reward travels as a pickle of
what makes it, from this process to its own child: it must be importable there.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flowsteer.rewards.certify.sight import Picture, alike, remembered
from flowsteer.rewards.certify.trial import NotApplicable, Refused, Suspected, Trial, error_text, largest_difference

SHIFT_S = 34_567_891.5  # about 400 days and 2 hours: another year, weekday, hour, minute and second
TIMEOUT_S = 600.0
SEEDS = (1, 2)  # of PYTHONHASHSEED
ELSEWHERE = Path(__file__).with_name("elsewhere.py")


def another_process(trial: Trial) -> str:
    """A second process, with another PYTHONHASHSEED and a shifted clock, gives the same scores."""
    images, prompts, columns = trial.arguments(trial.rows)
    pairs = [] if trial.groupwise else list(alike(trial))
    calls: list[Any] = [(images, prompts, columns)]
    calls += [_one(picture) for _, first, second in pairs for picture in (second, first)]
    try:
        request = pickle.dumps((trial.make, calls))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise NotApplicable(f"it cannot be made in another process: {error_text(error)}") from None
    whole = trial.score(trial.rows)
    answers = _ask(request, seed=SEEDS[1], shift=SHIFT_S)
    own = trial.read(answers[0], len(prompts))
    if not trial.same(whole, own):
        raise _cause(trial, request, whole, own)
    for place, (kind, first, second) in enumerate(pairs):
        theirs = [trial.read(answer, 1)[0] for answer in answers[1 + 2 * place : 3 + 2 * place]][::-1]
        ours = [trial.ask(*_one(picture))[0] for picture in (first, second)]
        if not trial.same(ours, theirs):
            raise Refused(remembered(kind))
    return f"the same scores with PYTHONHASHSEED={SEEDS[1]} and the clock {SHIFT_S / 86400:.0f} days later"


def _cause(trial: Trial, request: bytes, here: np.ndarray, there: np.ndarray) -> Exception:
    """Which difference between the processes the scores depend on. The seed here is not known, so two others are compared."""
    plain, shifted = (trial.read(_ask(request, seed=SEEDS[0], shift=shift)[0], len(here)) for shift in (0.0, SHIFT_S))
    causes = []
    if not trial.same(plain, shifted):
        causes.append(f"on the clock ({largest_difference(plain, shifted)})")
    if not trial.same(shifted, there):
        causes.append(
            f"on PYTHONHASHSEED, which differs in each process ({largest_difference(shifted, there)}): hash() of a text, or "
            "the order of a set; use hashlib, or sort"
        )
    if causes:
        return Refused(f"scores depend {' and '.join(causes)}")
    return Suspected(
        f"another process gives other scores, whatever its clock: {largest_difference(here, there)}. Does it depend on "
        "settings of this process, such as torch's precision?"
    )


def _ask(request: bytes, *, seed: int, shift: float) -> list[Any]:
    """The answers of a new process to all calls."""
    paths = [path or os.getcwd() for path in sys.path]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.pathsep.join(paths)}
    environment["PYTHONSAFEPATH"] = "1"  # the folder it runs in comes first only if it does so here
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request", Path(folder) / "answer.json"
        asked.write_bytes(request)
        command = [sys.executable, str(ELSEWHERE), str(asked), str(answered), str(shift)]
        try:
            done = _start(command, environment)
        except subprocess.TimeoutExpired:
            raise Suspected(f"another process has not answered after {TIMEOUT_S:.0f} s") from None
        if not answered.is_file():
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise Suspected(
                f"another process ends with {done.returncode} without an answer: {(said or ['silent'])[-1]}"
            )
        answer = json.loads(answered.read_text(encoding="utf-8"))
    states: dict[Literal["absent", "raised"], type[Exception]] = {"absent": NotApplicable, "raised": Suspected}
    for state, kind in states.items():
        if state in answer:
            raise kind(f"in another process it {answer[state]}")
    return answer["scores"]


def _start(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """Run a new interpreter to its end. Raises subprocess.TimeoutExpired."""
    return subprocess.run(
        command, env=environment, capture_output=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
    )


def _one(picture: Picture) -> tuple[np.ndarray, list[str], dict[str, list[Any]]]:
    image, prompt, columns = picture
    return image[None].copy(), [prompt], {name: [value] for name, value in columns.items()}


__all__ = ["another_process"]
