"""flowsteer as a library: one Flow-GRPO update without a configuration file, for reading and for changing.

    python examples/minimal.py

It draws groups of pictures with the tiny pipeline that comes with the package, scores them, compares each picture with the
others of its prompt, makes one optimiser update, and evaluates the same samples under the changed policy. Before the update
the ratio of the densities is 1 and the KL to the reference is 0; after it the loss is lower: samples above their group's mean
have become likelier. Takes seconds on a CPU; uses a GPU if there is one.

Letters: B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flowsteer.rewards.combine import RewardSet
from flowsteer.rl.algorithms import FlowGRPO
from flowsteer.rl.compare import compare
from flowsteer.rl.engine.base import Engine, prepare
from flowsteer.rl.engine.optimizer import OptimizerSettings
from flowsteer.rl.engine.processes import Processes
from flowsteer.rl.metrics import Meter
from flowsteer.rl.policy import Policy
from flowsteer.rl.scoring import StepScorer
from flowsteer.rl.types import Facts
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.steps.plan import fixed_steps
from flowsteer.rollout.worker import RolloutWorker

PROMPTS = Prompts(texts=("a red circle", "a blue square", "a green triangle", "a yellow circle"))
STEPS, GROUP, SEED = 6, 8, 0
LORA = (16, 32, ["to_q", "to_k", "to_v", "to_out.0"])  # rank, alpha, the layers that get an adapter
KERNEL, WEIGHT = "cps", "variance"  # how stochastic steps draw, and the convention of their log densities
BATCH, BATCHES = 2 * GROUP, len(PROMPTS) // 2  # two whole groups pass the network together


def redness(images: np.ndarray, prompts: Sequence[str], **columns: Sequence[Any]) -> list[float]:
    """A reward of one's own: uint8 pictures [B, H, W, 3] to B scores, the red channel beyond the other two in [-1, 1]."""
    pixels = images.astype(np.float32) / 255
    return (pixels[..., 0] - pixels[..., 1:].mean(-1)).mean((1, 2)).tolist()


def load(processes: Processes) -> tuple[FlowGRPO, Policy, Engine, RolloutWorker]:
    """The parts of a run: what to learn by, what learns, what updates it, and what draws pictures with it."""
    pipeline = FlowPipeline.load("embedded", device=processes.device)
    plan = fixed_steps(STEPS, 0.7, [0, 1, 2])  # the first three of six steps are stochastic

    # the algorithm: its settings, and what it has to know of the run
    facts = Facts(
        kernel=KERNEL,
        log_prob_weight=WEIGHT,
        num_inference_steps=STEPS,
        num_transitions=plan.num_transitions,
        group_size=GROUP,
        advantage_clip=5.0,
        seed=SEED,
        common_indices=False,
        gather=processes.gather,
    )
    algorithm = FlowGRPO(clip_range=0.2, kl_coef=0.01, updates_per_rollout=1).bind(facts)
    policy = Policy(pipeline, lora=LORA, variants=algorithm.variants, seed=SEED)
    optimizer = OptimizerSettings(
        learning_rate=1e-3,
        schedule="constant",
        warmup_updates=0,
        total_updates=1,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        epsilon=1e-8,
        max_grad_norm=1.0,
    )
    engine = prepare(
        processes,
        policy,
        optimizer,
        strategy="plain",
        dtype=torch.float32,
        batch_size=BATCH,
        batches=BATCHES // processes.num_processes,
        passes_per_batch=algorithm.passes_per_batch,
    )
    worker = RolloutWorker(
        pipeline,
        PROMPTS,
        plan=plan,
        kernel=KERNEL,
        log_prob_weight=WEIGHT,
        solver="euler",
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        prompts_per_step=len(PROMPTS),
        group_size=GROUP,
        batch_size=BATCH,
        shared_noise=False,
        updates_per_rollout=algorithm.updates_per_rollout,
        seed=SEED,
        num_processes=processes.num_processes,
        process_index=processes.process_index,
        dtype=torch.float32,
        device=processes.device,
    )
    return algorithm, policy, engine, worker


def main() -> None:
    """Sample, score, compare, improve; once."""
    algorithm, policy, engine, worker = load(Processes(cpu=False, timeout_s=600))
    scorer = StepScorer(RewardSet([("redness", redness, 1.0)]))

    # 1. sample and 2. score: each finished batch is scored while the next is drawn
    with policy.using(algorithm.acting):
        rollouts = worker.sample(0, done=scorer.submit)
    scores = scorer.collect()

    # 3. compare each picture with the others of its prompt
    comparisons, statistics = compare(
        rollouts, scores, engine.gather, weights={"redness": 1.0}, deviation="group", clip=5.0, min_scored=1.0
    )
    print(f"redness of {len(rollouts) * BATCH} pictures: {statistics['reward/redness']:.3f}")

    # 4. improve: the losses of all stochastic steps make one update
    def measured() -> dict[str, float]:
        """Means over all samples and their stochastic steps, under the current policy."""
        meter = Meter()
        for batch in algorithm.batches(rollouts, comparisons, 0):
            with torch.no_grad():
                meter.add(algorithm.loss(policy, batch)[1])
        return meter.finish(engine)

    before = measured()
    updates = []
    for batch in algorithm.batches(rollouts, comparisons, 0):
        updates.append(engine.backward(algorithm.loss(policy, batch)[0]))
    (update,) = [made for made in updates if made is not None]  # the other passes accumulate
    after = measured()
    print(f"one update of {len(updates)} passes, gradient norm {update.grad_norm:.4f}")
    for name in ("ratio", "kl", "loss"):
        print(f"{name:>5}: before {before[name]:.8f}, after {after[name]:.8f}")
    scorer.close()
    engine.close()


if __name__ == "__main__":
    main()
