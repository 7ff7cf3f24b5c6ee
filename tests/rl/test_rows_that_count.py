"""Only samples that count pass the network; the loss and its gradient are those of the whole batch."""

import pytest
import torch
from toy import GROUP, STEPS, ToyRun, comparison

from flowsteer.rl.algorithms.weighted_sft import WeightedSFT

NONE = {"rollout.plan": {"name": "none"}}
RAFT = NONE | {"algorithm": {"name": "weighted_sft", "noise_levels_per_sample": STEPS - 1}}
HELD = NONE | {"algorithm": {"name": "weighted_sft", "noise_levels_per_sample": STEPS - 1, "kl_coef": 2.0}}
NFT = NONE | {"algorithm": {"name": "diffusion_nft", "noise_levels_per_sample": STEPS - 1}}
DPO = NONE | {"algorithm": {"name": "diffusion_dpo", "noise_levels_per_sample": STEPS - 1}}
FLOW = {"algorithm": {"name": "flow_grpo", "clip_range": 0.2, "updates_per_rollout": 1, "kl_coef": 0.1}}
ADVANTAGE = torch.linspace(-1, 1, GROUP).tolist()
SOME = [0.0, 0.0, *[1.0] * (GROUP - 2)]  # the first two have no score
NOTHING = [0.0] * GROUP


def passed(settings, weight):
    """The rows of each network pass of a batch's first loss, the loss, and its gradient, after the policy has moved."""
    run = ToyRun(settings)
    rollout, *_ = run.rollouts()
    with torch.no_grad():
        run.toy.network.bias += torch.tensor([0.3, -0.1, 0.2, 0.4])
    batch, *_ = run.algorithm.batches([rollout], [comparison(ADVANTAGE, weight)], 0)
    rows = []
    seen = run.toy.network.register_forward_hook(lambda module, given, out: rows.append(len(out)))
    loss, metrics = run.algorithm.loss(run.policy, batch)
    seen.remove()
    return rows, loss.detach(), torch.autograd.grad(loss, run.toy.network.bias)[0], metrics


@pytest.mark.parametrize(
    ("settings", "weight", "rows"),
    [
        (RAFT, SOME, 1),
        (RAFT, NOTHING, 1),
        (HELD, SOME, GROUP - 2),
        (NFT, SOME, GROUP - 2),
        (NFT, NOTHING, 1),
        (DPO, NOTHING, 2),
        (FLOW, SOME, GROUP),
        (FLOW, NOTHING, 1),
    ],
    ids=["best", "best of nothing", "held", "nft", "nft of nothing", "no pair", "ratios keep all", "ratios of nothing"],
)
def test_only_samples_that_count_pass(monkeypatch, settings, weight, rows):
    seen, loss, gradient, _ = passed(settings, weight)
    assert set(seen) == {rows}
    monkeypatch.setattr("flowsteer.rl.algorithms.forward.rows_that_count", lambda counts: None)
    monkeypatch.setattr("flowsteer.rl.algorithms.pairs.rows_that_count", lambda counts: None)
    full, whole_loss, whole, _ = passed(settings, weight)
    if settings is not FLOW:
        assert min(full) >= min(GROUP, 2) >= min(rows, 2)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-5, atol=1e-7)  # sums of float32 in another order
    torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-7)
    if weight is NOTHING:
        assert gradient.abs().max() == 0
    else:
        assert gradient.abs().max() > 0


def test_metrics_keep_their_counts():
    """The loss is reported as a mean over all samples of the batch."""
    _, loss, _, metrics = passed(NFT, SOME)
    assert metrics["loss"].count == GROUP
    assert float(metrics["loss"].total) == pytest.approx(GROUP * float(loss), rel=1e-6)
    assert metrics["kl"].count == GROUP - 2


def test_what_a_pull_holds_passes():
    """A KL acts on samples of no share, too: leaving them out would let them go."""
    run = ToyRun(HELD)
    assert isinstance(run.algorithm, WeightedSFT)
    rollout, *_ = run.rollouts()
    batch, *_ = run.algorithm.batches([rollout], [comparison(ADVANTAGE)], 0)
    assert run.algorithm.counting(batch).rows is None
