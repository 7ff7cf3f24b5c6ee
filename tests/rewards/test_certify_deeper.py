"""Subtly wrong rewards, each found by the check that is meant to find it; what is found may be meant is a warning only."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import numpy as np
import planted_rewards as planted
import pytest

from flowsteer.rewards.certify.certificate import CHECKS, certify
from flowsteer.rewards.certify.inputs import built_in_inputs

pytestmark = pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")

SLOW = ("another process", "many pictures")  # a few seconds each
QUICK = {name: check for name, check in CHECKS.items() if name not in SLOW}

REFUSED = {
    planted.HashOfThePrompt: ("another process", "depend on PYTHONHASHSEED, .* use hashlib"),
    planted.DependsOnTheHour: ("another process", r"^scores depend on the clock \(image \d+ has [^)]*\)$"),
    planted.DependsOnTheDate: ("another process", r"^scores depend on the clock"),
    planted.CachesForAllInstances: (
        "another process",
        "equal in the top half get scores that depend on which was asked",
    ),
    planted.HasAQuota: (
        "many pictures",
        "after 4096 further pictures it gives other scores: image .* has .* against 0$",
    ),
}
REFUSED_QUICKLY = {
    planted.CachesByFirstBytes: ("remembers", "two pictures that are equal in the top half .* which was asked first"),
}
WARNED = {
    planted.SeesTheTopLeft: ("whole picture", "no difference: top centre, .*bottom right. Does it see"),
    planted.WrapsAround: ("levels", "from level 0 to 255 of grey .* jumps back, as uint8 does"),
    planted.WrapsBelowZero: ("levels", "from level 0 to 255 of red .* jumps back, as uint8 does"),
    planted.HeightAndWidthSwapped: (
        "other shapes",
        "of a wide picture of 384x192 .*right.* height and width are swapped",
    ),
    planted.ReadsWidthByHeight: ("other shapes", "97x96 is scored as if its pixels were read as 96x97"),
    planted.Saturates: ("levels", "may be cut off, and teaches nothing"),
    planted.ManyHaveTheHighest: ("levels", "exactly the highest score, 1: the score may be cut off"),
    planted.CountsThePromptsLength: ("words of the prompt", "it may count the length of a prompt only"),
}


@pytest.mark.parametrize("reward", REFUSED | REFUSED_QUICKLY, ids=lambda reward: reward.__name__)
def test_a_subtle_fault_is_refused(reward):
    name, message = (REFUSED | REFUSED_QUICKLY)[reward]
    planted.CachesForAllInstances.shared.clear()
    certificate = certify(reward, name="planted", checks=CHECKS if reward in REFUSED else QUICK)
    assert certificate.refused == (name,), certificate.text()
    assert re.search(message, certificate[name].message), certificate[name].message


@pytest.mark.parametrize("reward", WARNED, ids=lambda reward: reward.__name__)
def test_what_may_be_meant_is_a_warning(reward):
    name, message = WARNED[reward]
    certificate = certify(reward, name="planted", checks=QUICK)
    assert certificate.ok, certificate.text()
    assert certificate.warned == (name,), certificate.text()
    assert re.search(message, certificate[name].message), certificate[name].message
    assert certificate.text().startswith(f"reward 'planted': certified; look at the warnings of: {name}\n")


def test_a_key_without_the_prompt_is_named():
    only = {name: CHECKS[name] for name in ("answer", "remembers")}
    message = certify(planted.CachesByPicture, name="cache", checks=only)["remembers"].message
    assert message.startswith("two prompts for one picture get scores that depend on which was asked first")


def test_a_quota_that_raises_is_named():
    only = {name: CHECKS[name] for name in ("answer", "many pictures")}
    certificate = certify(planted.FailsAfterItsQuota, name="quota", checks=only)
    message = r"after 2[89]\d\d tiny pictures it fails: RuntimeError: quota exceeded"  # and some before them
    assert re.match(message, certificate["many pictures"].message), certificate["many pictures"].message


def test_memory_that_grows_is_a_warning():
    certificate = certify(
        planted.KeepsPictures, name="keeps", checks={n: CHECKS[n] for n in ("answer", "many pictures")}
    )
    assert certificate.warned == ("many pictures",), certificate.text()
    grown = re.search(r"memory grows by (\d+) kB a picture", certificate["many pictures"].message)
    assert grown, certificate["many pictures"].message
    assert (
        64 * 64 * 3 / 1000 - 2 < int(grown[1]) < 2 * 64 * 64 * 3 / 1000
    )  # a picture's bytes, and what the allocator adds


def test_columns_are_moved_and_changed():
    images, prompts = built_in_inputs()
    only = {name: CHECKS[name] for name in ("answer", "sees the columns")}
    given = {"images": images, "prompts": prompts, "checks": only}
    for values in (np.linspace(1, 2, 16).tolist(), [1.0] * 16, ["a"] * 16, [True] * 16):
        certificate = certify(planted.IgnoresItsColumn, name="ignores", columns={"factor": values}, **given)
        assert certificate.warned == ("sees the columns",), certificate.text()
        assert "requires the column 'factor', but neither" in certificate["sees the columns"].message
    columns = {"factor": [1.0] * 16, "note": ["x"] * 16}
    certificate = certify(planted.ZeroWithoutFactor, name="factor", columns=columns, **given)
    assert certificate["sees the columns"].message == "change scores: factor; not among its arguments: note"
    assert certify(planted.Sound, name="sound", checks=only)["sees the columns"].message == "no columns are given"


def test_another_process_needs_a_reward_that_can_be_imported():
    class Local(planted.Sound):
        pass

    only = {name: CHECKS[name] for name in ("answer", "another process")}
    certificate = certify(Local, name="local", checks=only)
    assert certificate["another process"].status == "not applicable"
    assert certificate["another process"].message.startswith("it cannot be made in another process: ")
    main = (
        "from planted_rewards import *; from flowsteer.rewards.certify.certificate import *\nclass Mine(Sound): pass\n"
    )
    main += "print(certify(Mine, name='mine', checks={n: CHECKS[n] for n in ('answer', 'another process')}).text())"
    environment = {**os.environ, "PYTHONPATH": ":".join(path or "." for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", main], env=environment, capture_output=True, text=True, check=True)
    assert re.search("not applicable another process .*cannot be imported: AttributeError", done.stdout), done.stdout


def test_a_process_that_fails_is_a_warning():
    """Where the reward works here, the fault may be the second process's: no memory left for a second model."""
    make = functools.partial(planted.EndsElsewhere, os.getpid())
    only = {name: CHECKS[name] for name in ("answer", "another process")}
    certificate = certify(make, name="elsewhere", checks=only)
    assert certificate.warned == ("another process",)
    assert certificate["another process"].message == "in another process it raised MemoryError: no room"


def test_a_slow_reward_is_not_asked_thousands_of_pictures():
    only = {name: CHECKS[name] for name in ("answer", "many pictures")}
    certificate = certify(planted.Slow, name="slow", checks=only)
    assert certificate["many pictures"].status == "not applicable"
    assert re.match(r"4096 pictures would take \d+ s", certificate["many pictures"].message)


def test_the_page_says_what_it_cannot_find():
    text = certify(planted.Sound, name="sound", checks={"load": CHECKS["load"]}).text()
    assert "not found by any check: whether the score measures what you mean" in text


def test_a_shifted_clock_is_later_everywhere():
    code = """
import time, datetime
before = time.time(), datetime.datetime.now(), datetime.date.today(), time.localtime()
kept = datetime.datetime(2020, 1, 1)
from flowsteer.rewards.certify.elsewhere import shift_clock
shift_clock(400 * 86400.0)
from datetime import date, datetime, timezone
from time import time as now
assert 400 * 86400 <= now() - before[0] < 400 * 86400 + 600
for later in (datetime.now(), datetime.today(), datetime.now(timezone.utc).astimezone().replace(tzinfo=None)):
    assert abs((later - before[1]).days - 400) <= 1, later
assert abs((date.today() - before[2]).days - 400) <= 1
assert time.localtime().tm_year > before[3].tm_year
assert isinstance(kept, datetime) and isinstance(datetime(2020, 1, 1), datetime) and not isinstance(1, date)
assert time.strftime("%Y") == str(time.localtime().tm_year) == time.ctime()[-4:]
"""
    environment = {**os.environ, "PYTHONPATH": ":".join(path or "." for path in sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
