"""Checks of a reward that runs in a worker: what happens to its process may cost scores, never change them, never hang.

They are added to the others with ``certify(..., checks={**CHECKS, **hosted_checks(make)})``. What a worker that answers
garbage does is a matter of the host and not of the reward: ``tests/rewards/test_worker_faults.py``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import numpy as np

from flowsteer.rewards.certify.checks import CheckFunction
from flowsteer.rewards.certify.trial import Refused, Trial
from flowsteer.rewards.hosts.child import WorkerReward

LEAST_DEADLINE_S = 2.0
PATIENCE = 10.0  # times that a call of a sound worker may take longer than the one before


def hosted_checks(make: Callable[[float], WorkerReward]) -> dict[str, CheckFunction]:
    """The checks, for workers that ``make`` starts with a deadline of so many seconds a call."""

    def killed(trial: Trial) -> str:
        """Kill -9 between two calls: the next one starts the worker again and gives the same scores."""
        return _after(trial, make, signal.SIGKILL)

    def stopped(trial: Trial) -> str:
        """A worker that hangs: the call ends at its deadline without a score, the next one has all of them."""
        return _after(trial, make, signal.SIGSTOP)

    return {"worker killed": killed, "worker stopped": stopped}


def _after(trial: Trial, make: Callable[[float], WorkerReward], fault: signal.Signals) -> str:
    began = time.monotonic()
    trial.score(trial.rows)
    deadline = max(PATIENCE * (time.monotonic() - began), LEAST_DEADLINE_S)
    reward = make(deadline)
    try:
        before = trial.score(trial.rows, reward)
        assert reward.pid is not None
        os.kill(reward.pid, fault)
        said = ""
        if fault is signal.SIGSTOP:
            began = time.monotonic()
            try:
                answer = trial.score(trial.rows, reward)
            except TimeoutError:
                said = f"the call ended after {time.monotonic() - began:.1f} s of {deadline:.1f} s, and "
            else:
                raise Refused(f"a stopped worker gave scores: {np.array2string(answer, threshold=4)}")
        after = trial.score(trial.rows, reward)
    finally:
        reward.close()
    if not trial.same(before, after):
        raise Refused("the worker that was started again gives other scores than the one before")
    return f"{said}a new worker gives the same scores"


__all__ = ["hosted_checks"]
