"""The algorithm's own numbers, and the proofs that flowsteer holds every algorithm to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from asymmetric_grpo import AsymmetricGRPO

from flowsteer.rl.check.checks import CHECKS, NotApplicable, Trial

# On a toy of four numbers a step changes the ratio more than on an image.
TRIAL = Trial(overrides={"algorithm": {"name": "asymmetric_grpo", "clip_low": 0.02, "clip_high": 0.05, "kl_coef": 0.1}})


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [
        (1.04, 1.0, True),
        (1.06, 1.0, False),
        (0.99, -1.0, True),
        (0.97, -1.0, False),
        (1.06, -1.0, True),
        (0.9, 1.0, True),
    ],
)
def test_who_still_gets_a_gradient(ratio: float, advantage: float, gradient: bool) -> None:
    """A good sample up to 1.05, a bad one down to 0.98; what went the wrong way is brought back in any case."""
    log_prob = torch.tensor([ratio]).log().requires_grad_()
    step = SimpleNamespace(log_prob=log_prob, old_log_prob=torch.zeros(1), advantage=torch.tensor([advantage]))
    AsymmetricGRPO(clip_low=0.02, clip_high=0.05).per_sample(step).loss.sum().backward()
    assert (log_prob.grad != 0).item() == gradient


def test_a_narrower_upper_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"algorithm.clip_high=0.01 is below clip_low=0.02; widen the upper end"):
        TRIAL.run(clip_high=0.01)


@pytest.mark.parametrize("name", CHECKS)
def test_the_proofs(name: str) -> None:
    try:
        CHECKS[name](TRIAL)
    except NotApplicable as reason:
        pytest.skip(str(reason))
