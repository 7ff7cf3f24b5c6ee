"""The rewards' own numbers, and the contract that flowsteer holds every reward to."""

from __future__ import annotations

import numpy as np
import pytest
from colourful_rewards import Colourfulness, Distinctness

from flowsteer.rewards.certify import CHECKS, certify


def plain(*color: int) -> np.ndarray:
    return np.broadcast_to(np.array(color, np.uint8), (1, 8, 8, 3))


def test_gray_has_no_colour_and_red_is_known_by_hand():
    """Of pure red the opponents are 255 and 127.5 everywhere: no deviation, and 0.3 of the length of their mean."""
    gray, red = Colourfulness()(np.concatenate([plain(90, 90, 90), plain(255, 0, 0)]), ["", ""])
    assert gray == 0
    assert red == pytest.approx(0.3 * 255 * 1.25**0.5)


def test_the_odd_one_out_is_the_most_distinct():
    """Black, black and white: each black is at 0 from one and 1 from the other, the white at 1 from both."""
    group = np.concatenate([plain(0, 0, 0), plain(0, 0, 0), plain(255, 255, 255)])
    assert Distinctness()(group, ["a"] * 3) == pytest.approx([0.5, 0.5, 1.0])
    assert Distinctness()(group[:1], ["a"]) == [None]


@pytest.fixture(scope="module", params=[Colourfulness, Distinctness])
def certificate(request):
    return certify(request.param, name=request.param.__name__)


@pytest.mark.parametrize("name", CHECKS)
def test_the_contract(certificate, name):
    assert certificate[name].status != "failed", certificate[name].message
