"""A reward in a worker is certified with its process killed and stopped; one that forgets itself over that is refused."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

from flowsteer.rewards.certify.certificate import certify
from flowsteer.rewards.certify.checks import CHECKS
from flowsteer.rewards.certify.hosted import hosted_checks
from flowsteer.rewards.hosts.child import WorkerReward

SCORERS = '''
import os


def sound(images, prompts, **columns):
    return [float(image.mean()) + len(prompt) for image, prompt in zip(images, prompts)]


def of_its_process(images, prompts, **columns):
    """Its scores depend on which process gives them: what is kept in memory only is lost with a worker."""
    return [score + os.getpid() % 1009 for score in sound(images, prompts)]
'''


@pytest.fixture
def scorers(tmp_path: Path) -> Path:
    file = tmp_path / "scorers.py"
    file.write_text(SCORERS, encoding="utf-8")
    return file


def checks_of(target: str) -> dict:
    first = {name: CHECKS[name] for name in ("load", "call", "answer", "order")}
    made = functools.partial(WorkerReward, target, python=sys.executable)
    return {**first, **hosted_checks(lambda seconds: made(deadline_s=seconds, deadline_per_image_s=0.0))}


def test_a_sound_one_is_certified(scorers: Path) -> None:
    target = f"{scorers}:sound"
    certificate = certify(functools.partial(WorkerReward, target), name="sound", checks=checks_of(target))
    assert certificate.ok, certificate.text()
    assert certificate["worker killed"].message == "a new worker gives the same scores"
    assert certificate["worker stopped"].message.startswith("the call ended after ")


def test_scores_that_die_with_their_process_are_refused(scorers: Path) -> None:
    target = f"{scorers}:of_its_process"
    certificate = certify(functools.partial(WorkerReward, target), name="forgets", checks=checks_of(target))
    assert certificate.refused == ("worker killed", "worker stopped"), certificate.text()
    assert "started again gives other scores" in certificate["worker killed"].message
