"""`rollout.train_batch_size`: rollouts are trained on in smaller passes, with the same gradient."""

import pytest
import torch
from toy import GROUP, STEPS, ToyRun, comparison

from flowsteer.rl.config import check_config, parse_config

ADVANTAGE = torch.linspace(-1, 1, 2 * GROUP).tolist()
PAIR = {"rollout.prompts_per_step": 2, "rollout.batch_size": 2 * GROUP}


def settings(name, parts=None, **algorithm):
    made = {"name": name, "noise_levels_per_sample": STEPS - 1, **algorithm}
    cut = {} if parts is None else {"rollout.train_batch_size": parts}
    return {"rollout.plan": {"name": "none"}, "algorithm": made, **PAIR, **cut}


def passes(given):
    """The rows of each pass of the current policy with a gradient, and the gradient of a step, after the policy has moved."""
    run = ToyRun(given)
    rollouts = run.rollouts()
    with torch.no_grad():
        run.toy.network.bias += torch.tensor([0.3, -0.1, 0.2, 0.4])
    rows = []
    seen = run.toy.network.register_forward_hook(
        lambda module, inputs, out: rows.append(len(out)) if torch.is_grad_enabled() else None
    )
    batches = list(run.algorithm.batches(rollouts, [comparison(ADVANTAGE)] * len(rollouts), 0))
    assert len(batches) == run.algorithm.passes_per_batch * len(rollouts)
    loss = sum(run.algorithm.loss(run.policy, batch)[0] for batch in batches) / len(batches)
    seen.remove()
    return rows, torch.autograd.grad(loss, run.toy.network.bias)[0]


@pytest.mark.parametrize(
    ("name", "parts", "options", "rows"),
    [
        ("diffusion_nft", GROUP // 2, {}, {GROUP // 2}),
        ("diffusion_nft", GROUP // 2 + 1, {}, {GROUP // 2}),
        ("awm", 1, {}, {1}),
        ("dgpo", GROUP, {}, {GROUP}),
        ("diffusion_dpo", GROUP, {}, {2}),
        ("weighted_sft", GROUP // 2, {"weights": "exponential"}, {GROUP // 2}),
    ],
)
def test_parts_of_a_batch_have_the_gradient_of_the_whole(name, parts, options, rows):
    """A softmax over a group is made of the whole group, although only half of it passes at a time."""
    cut, gradient = passes(settings(name, parts, **options))
    assert set(cut) == rows
    whole, expected = passes(settings(name, **options))
    assert max(whole) > max(cut)
    assert gradient.abs().max() > 1e-6
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)  # sums of float32 in another order


@pytest.mark.parametrize(
    ("algorithm", "size", "message"),
    [
        ({"name": "flow_grpo"}, 4, "trains the ratio of the steps that were drawn"),
        ({"name": "dgpo"}, 4, "set it to 16 or more"),
        ({"name": "diffusion_dpo"}, 15, "compares them within a pass"),
        ({"name": "diffusion_nft"}, 64, "cuts no batch of rollout.batch_size=64; leave it out"),
    ],
)
def test_what_cannot_be_trained_in_parts_is_refused(algorithm, size, message):
    rollout = {"group_size": 16, "batch_size": 64, "train_batch_size": size}
    with pytest.raises(ValueError, match=r"rollout\.train_batch_size") as refused:
        check_config(
            parse_config(
                {"num_steps": 1, "rewards": "jpeg_compressibility", "algorithm": algorithm, "rollout": rollout}
            ),
            1,
        )
    assert message in str(refused.value)
