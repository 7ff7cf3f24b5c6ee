"""The whole of training on one page: sample, score, compare, improve.

What each verb does is in the file of its name: `rollout/worker.py`, `rewards/hosts/`, `rl/compare.py`, `rl/algorithms/`.
`rl/start.py` makes the run's parts from its configuration.
"""

from __future__ import annotations

from flowsteer.rl.run import Run


def train(run: Run) -> None:
    """Go through the training steps that are left.

    Raises:
        TooFewScores: the rewards failed on too many samples of a step; the state before that step is saved.
    """
    policy, engine, worker, scorer, algorithm, meter = (
        run.policy, run.engine, run.worker, run.scorer, run.algorithm, run.meter,
    )  # fmt: skip
    run.evaluate(step=run.start)

    for step in range(run.start, run.num_steps):
        # 1. sample: the acting policy draws; each finished batch is scored while the next is drawn
        with meter.timing("sample"), policy.using(algorithm.acting):
            rollouts = worker.sample(step, policy_version=engine.num_updates, done=scorer.submit)

        # 2. score: what each sample is worth, or that nobody could tell
        with meter.timing("score"):
            scores = scorer.collect()

        # 3. compare: each sample with the others of its prompt, across all processes
        with meter.timing("compare"), run.saving.before_failing(step):
            comparisons, statistics = run.compare(rollouts, scores, engine.gather)

        # 4. improve: one or more optimiser updates
        with meter.timing("improve"):
            for batch in algorithm.batches(rollouts, comparisons, step):
                loss, metrics = algorithm.loss(policy, batch)
                meter.add(metrics)
                meter.add_update(engine.backward(loss))
            policy.follow_old(algorithm.old_decay(engine.num_updates))

        # then: report, save and evaluate when due
        run.report(step, statistics)
        if run.saving.when_due(step + 1):
            break  # SIGTERM or Ctrl-C
        run.evaluate(step=step + 1)
