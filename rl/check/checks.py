"""What holds for every algorithm, whatever its loss. The built-in ones are tested with these functions, too.

Each check makes runs on the toy (`flowsteer.rl.check.toy`) and returns one line about what it saw. It raises `CheckFailed`
with what is wrong, or `NotApplicable` with the reason why the algorithm has no such property.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowsteer.rewards.types import Scores
from flowsteer.rl.algorithms.transitions import TransitionBatch, gaussian
from flowsteer.rl.build import batches_per_update
from flowsteer.rl.check.toy import GROUP, ToyRun, comparison
from flowsteer.rl.config import parse_config
from flowsteer.rl.engine.optimizer import NotFinite
from flowsteer.rl.types import Comparison, PolicyView
from flowsteer.rollout.steps import kernels
from flowsteer.rollout.types import Rollout

LEARNING_STEPS = 80
RISE = 0.5  # final latents deviate by about 1, and `ToyRun.value` is a mean over 192 samples of 4: no accident
FIRST_ORDER_STEP, FIRST_ORDER_RISE = 0.05, 0.01

START = {
    "ratio": 1.0,
    "ratio_deviation": 0.0,
    "clip_fraction": 0.0,
    "kl": 0.0,
    "old_distance": 0.0,
    "margin": 0.0,  # of preferences: the loss is log 2
    "group_weight": 0.5,  # of DGPO's groups
}
"""What metrics are when the policy is the one that drew, the old one and the reference at once."""


class CheckFailed(AssertionError):
    """The algorithm lacks the property; the message says what was seen instead."""


class NotApplicable(Exception):
    """The algorithm has nothing that the check is about."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An algorithm with the settings under which it is tried.

    Example: ``Trial(overrides={"algorithm": {"name": "flow_grpo", "clip_range": 0.05}})``.
    """

    overrides: Mapping[str, Any]  # of the toy's configuration, see `toy.toy_config`

    def run(self, **settings: Any) -> ToyRun:
        """A fresh run, with these settings of the algorithm changed."""
        return ToyRun({**self.overrides, "algorithm": {**self.overrides["algorithm"], **settings}})

    def moved(self) -> tuple[ToyRun, list[Rollout]]:
        """A policy away from the one that drew, from the old one and from the reference."""
        run = self.run()
        rollouts = run.rollouts()
        with torch.no_grad():
            run.toy.network.bias.add_(torch.tensor([0.05, -0.02, 0.01, 0.03]))
        return run, rollouts

    def coefficients(self) -> list[tuple[str, str]]:
        """The settings that are the weight of a distance, each with the policy that it holds the current one near to."""
        algorithm = self.run().config.algorithm
        found = []
        for name, value in algorithm:
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            off, on = (algorithm.model_copy(update={name: weight}).anchors for weight in (0.0, 10.0))
            found += [(name, anchor) for anchor in on if on[anchor] and not off.get(anchor)]
        return found

    def largest(self, coefficient: str) -> float:
        """The largest of a few weights that the setting allows. Raises CheckFailed if it allows none of them."""
        for weight in (10.0, 1.0, 0.1, 0.01):
            try:
                self.run(**{coefficient: weight})
            except ValueError:
                continue
            return weight
        raise CheckFailed(f"{coefficient} weighs a distance, but can be none of 10, 1, 0.1 and 0.01")

    def free(self) -> dict[str, float]:
        """Settings without the distances, which hold an algorithm back on purpose."""
        return {name: 0.0 for name, _ in self.coefficients()}


def learns(trial: Trial) -> str:
    """Training with the mean of the pixels as the reward raises it, without the distances."""
    run = trial.run(**trial.free())
    before = run.value()
    for step in range(LEARNING_STEPS):
        run.learn(step)
    after = run.value()
    seen = f"the mean reward went from {before:.3f} to {after:.3f} in {LEARNING_STEPS} steps"
    if not after - before > RISE:
        raise CheckFailed(f"{seen}; a rise by {RISE} is asked for")
    return seen


def first_update_rises(trial: Trial) -> str:
    """A small step along the first gradient raises the reward: no sign is swapped, which a long run can hide."""
    run = trial.run(**trial.free())
    rollouts = [rollout for step in range(20) for rollout in run.rollouts(step)]
    scores = [Scores(total=rollout.images.flatten(1).mean(1)) for rollout in rollouts]
    compared = [run.compare([rollout], [score])[0][0] for rollout, score in zip(rollouts, scores)]
    gradient = run.gradient(rollouts, compared)
    before = run.value()
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
    if norm == 0:
        raise CheckFailed("the first gradient is 0")
    with torch.no_grad():
        for parameter, g in zip(run.policy.parameters().values(), gradient):
            parameter -= FIRST_ORDER_STEP * g / norm
    rise = run.value() - before
    seen = f"a step of length {FIRST_ORDER_STEP} against the first gradient changes the mean reward by {rise:+.4f}"
    if not rise > FIRST_ORDER_RISE:
        raise CheckFailed(f"{seen}; a rise by {FIRST_ORDER_RISE} is asked for. Is a sign swapped?")
    return seen


def starts_unmoved(trial: Trial) -> str:
    """Before the first update every ratio is 1 and every distance 0, bit for bit; after a move they are not."""
    run = trial.run()
    rollouts = run.rollouts()
    compared = [comparison([1.0, -1.0] * (GROUP // 2))] * len(rollouts)

    def metrics() -> list[dict[str, float]]:
        found = [run.algorithm.loss(run.policy, batch)[1] for batch in run.algorithm.batches(rollouts, compared, 0)]
        return [{name: float(total) / count for name, (total, count) in each.items() if count} for each in found]

    start = metrics()
    known = START.keys() & start[0].keys()
    if not known:
        raise NotApplicable(f"it reports none of {', '.join(START)}")
    for each in start:
        if wrong := {name: each[name] for name in sorted(known) if each[name] != START[name]}:
            name, value = next(iter(wrong.items()))
            raise CheckFailed(f"before the first update {name} is {value:g}, not {START[name]:g}")
    with torch.no_grad():
        run.toy.network.bias.add_(torch.tensor([0.05, -0.02, 0.01, 0.03]))
    for before, after in zip(start, metrics()):
        if still := sorted(name for name in known - {"clip_fraction"} if before[name] == after[name]):
            raise CheckFailed(f"{still[0]} stays {START[still[0]]:g} although the policy has moved")
    return ", ".join(f"{name} {START[name]:g}" for name in START if name in known)


def weightless_samples_are_silent(trial: Trial) -> str:
    """A sample of weight 0 contributes nothing, whatever its advantage is, though it goes through the network."""
    run, rollouts = trial.moved()
    half = GROUP // 2
    weight = [2.0] * half + [0.0] * half
    plain, wild = [1.0, -1.0] * half, [1.0, -1.0] * (half // 2) + [-9.0, 7.0] * (half // 2)
    scores = [1.0, -1.0] * (half // 2) + [math.nan] * half  # missing scores have no weight

    def gradients(made: Comparison) -> list[Tensor]:
        return run.gradient(rollouts, [made] * len(rollouts))

    one = gradients(comparison(plain, weight, scores))
    two = gradients(comparison(wild, weight, scores))
    if not all(torch.equal(a, b) for a, b in zip(one, two)):
        raise CheckFailed("the gradient depends on the advantages of samples whose weight is 0")
    none = gradients(comparison(plain, [0.0] * GROUP, [math.nan] * GROUP))
    if not all((gradient == 0).all() for gradient in none):
        raise CheckFailed(
            "the gradient is not 0 although every sample's weight is 0; is the loss one number per sample?"
        )
    if not max(float(gradient.abs().max()) for gradient in one) > 0:
        raise CheckFailed("the gradient is 0 although half of the samples have a weight")
    return "the gradient is the same whatever their advantages are, and 0 if all samples are such"


def equal_scores_teach_nothing(trial: Trial) -> str:
    """A tied group is no pair, has no best sample and no advantage; only distances to other policies remain.

    An algorithm whose loss itself holds it near to the old policy (DiffusionNFT) is asked at the old policy.
    """
    largest = {displacement: _gradient_of_ties(trial, displacement) for displacement in (0.05, 0.0)}
    if largest[0.05] == 0:
        return "the gradient of groups with equal scores is 0"
    stays_near_old = "old" in trial.run().algorithm.compares_with
    if stays_near_old and largest[0.0] <= 1e-6:  # a difference of two equal errors, in float32
        return "the gradient of groups with equal scores is 0 at the old policy, which the loss stays near to"
    raise CheckFailed(
        f"the gradient of groups with equal scores is as large as {largest[0.05]:.2g}; it must be 0: a pull towards another "
        "policy belongs in `anchors`, not in the loss"
    )


def _gradient_of_ties(trial: Trial, displacement: float) -> float:
    """The largest component of the gradient where every group is tied, after a displacement of the velocity."""
    run = trial.run(**trial.free())
    rollouts = run.rollouts()
    tied = [Scores(total=torch.full((len(rollout),), float(place))) for place, rollout in enumerate(rollouts)]
    comparisons, _ = run.compare(rollouts, tied)
    with torch.no_grad():
        run.toy.network.bias.add_(displacement)
    return max(float(gradient.abs().max()) for gradient in run.gradient(rollouts, comparisons))


def distances_pull_back(trial: Trial) -> str:
    """Where nothing else teaches, a step along the gradient of a displaced policy brings it nearer to the anchor."""
    held = trial.coefficients()
    fixed = {name for name, weight in trial.run(**trial.free()).algorithm.anchors.items() if weight}
    if fixed:
        raise CheckFailed(f"no setting switches off the distance to {', '.join(sorted(fixed))} (`anchors`)")
    if not held:
        raise NotApplicable("no setting is the weight of a distance (`anchors`)")
    for coefficient, anchor in held:
        pulls_back(trial, coefficient, anchor)
    return "; ".join(f"{coefficient} pulls towards the {anchor} policy" for coefficient, anchor in held)


def pulls_back(trial: Trial, coefficient: str, anchor: str) -> None:
    """One distance.

    The velocity is displaced alike everywhere, by d: an algorithm of the forward process has the distance <d^2>, a mean over
    four dimensions, whose gradient is d / 2; one of transitions has that of `kernels.kl`, which has proofs of its own.
    """
    gradients_of = {}
    displacement = torch.tensor([0.3, -0.2, 0.1, 0.4])
    most = trial.largest(coefficient)
    for weight in (0.0, most):
        run = trial.run(**{**trial.free(), coefficient: weight})
        rollouts = run.rollouts()
        with torch.no_grad():
            run.toy.network.bias.add_(displacement)
        if weight and anchor not in run.policy.names:
            raise CheckFailed(f"{coefficient}={weight:g} keeps no {anchor} policy")
        nothing = [comparison([0.0] * GROUP)] * len(rollouts)
        gradients_of[weight] = run.gradient(rollouts, nothing)[1]
    pull = gradients_of[most] - gradients_of[0.0]
    factor = run.algorithm.anchors[anchor]
    expected = displacement / 2
    if run.algorithm.learns_from == "transitions":
        batches, kernel = run.algorithm.batches(rollouts, nothing, 0), run.config.rollout.kernel.name
        distances = [_kl_to_reference(run.policy, batch, kernel) for batch in batches]
        (expected,) = torch.autograd.grad(torch.cat(distances).mean(), run.toy.network.bias)
    if not torch.allclose(pull, factor * expected, rtol=1e-3, atol=1e-6 * most):
        raise CheckFailed(f"{coefficient}={most:g} pulls by {pull.tolist()}, not by {(factor * expected).tolist()}")
    cosine = torch.nn.functional.cosine_similarity(pull, displacement, dim=0)
    # the distance is quadratic in the displacement of the velocity
    if not (cosine > 0.99 and (pull * displacement).sum() > 1e-4 * most * displacement.norm() ** 2):
        raise CheckFailed(f"{coefficient} pulls in another direction than back (cosine {cosine:.3f})")


def _kl_to_reference(policy: PolicyView, batch: TransitionBatch, kernel: str) -> Tensor:
    """The KL of the current policy's step to the reference's, [R], differentiable."""
    with torch.no_grad(), policy.using("reference"):
        reference = gaussian(policy, batch, kernel)
    return kernels.kl(gaussian(policy, batch, kernel), reference)


def not_finite_ends_the_run(trial: Trial) -> str:
    """A gradient that is not finite ends the run before the weights change."""
    run = trial.run()
    run.learn(0)
    done = run.engine.num_updates
    before = {key: value.detach().clone() for key, value in run.policy.parameters().items()}
    handle = next(iter(run.policy.parameters().values())).register_hook(lambda gradient: gradient * math.nan)
    message = ""
    try:
        run.learn(1)
    except NotFinite as error:
        message = str(error)
    handle.remove()
    if f"the gradient of update {done + 1} is not finite" not in message:
        raise CheckFailed(f"a gradient that is not finite did not end the run: {message or 'it went on'}")
    if run.engine.num_updates != done or not all(
        torch.equal(value, before[key]) for key, value in run.policy.parameters().items()
    ):
        raise CheckFailed("the weights changed although the gradient was not finite")
    return "the run ends before the weights change"


def is_repeatable(trial: Trial) -> str:
    """All draws come from (seed, step, sample): a resumed run repeats what the unbroken one did."""
    gradients = []
    for seed in (0, 1):
        run, rollouts = trial.moved()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            compared = [comparison([1.0, -1.0] * (GROUP // 2))] * len(rollouts)
            gradients.append(run.gradient(rollouts, compared))
    if not all(torch.equal(a, b) for a, b in zip(*gradients)):
        raise CheckFailed(
            "the gradient depends on torch's global random state; draw from a generator of (seed, step, sample) instead"
        )
    return "the same step gives the same gradient, bit for bit, whatever torch's random state is"


def counts_its_losses(trial: Trial) -> str:
    """As many losses as `passes_per_batch` announces: the optimiser's updates are counted by it."""
    run = trial.run()
    rollouts = run.rollouts()
    compared = [comparison([1.0, -1.0] * (GROUP // 2))] * len(rollouts)
    given = len(list(run.algorithm.batches(rollouts, compared, 0)))
    updates = run.config.algorithm.updates_per_rollout
    asked = batches_per_update(run.config, 1) * updates * run.algorithm.passes_per_batch
    if given != asked:
        raise CheckFailed(f"batches() gives {given} losses of a step, but passes_per_batch announces {asked}")
    return f"{given} in a step"


def settings_are_saved(trial: Trial) -> str:
    """The settings as they are saved are read back as they were: a run can be resumed."""
    config = trial.run().config
    again = parse_config(json.loads(config.model_dump_json()))
    if again != config:
        raise CheckFailed(f"the settings {config.algorithm!r} come back as {again.algorithm!r}")
    return f"{len(type(config.algorithm).model_fields)} settings are written and read back"


Check = Callable[[Trial], str]
CHECKS: dict[str, Check] = {
    "settings": settings_are_saved,
    "losses": counts_its_losses,
    "repeatable": is_repeatable,
    "start": starts_unmoved,
    "first update": first_update_rises,
    "no weight": weightless_samples_are_silent,
    "equal scores": equal_scores_teach_nothing,
    "distances": distances_pull_back,
    "not finite": not_finite_ends_the_run,
    "learns": learns,
}
"""By the name on the page, in the order of the page."""
