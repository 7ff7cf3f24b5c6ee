"""Which denoising steps are stochastic, and how much, at each training step.

A plan is data: the sets of steps that it goes through, and the order in which it does. What it says is a pure function
of (seed, training step), so every process says the same, and so does a run that was resumed. All sets have one size, so
every training step has the same number of transitions, and every step that a plan advertises gets its turn.

Letters: T denoising steps, K stochastic ones.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from flowsteer.rollout.noise import mix

Strategy = Literal["fixed", "progressive", "random"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Built by the functions below.

    Example: ``window(4, .7, size=2, strategy="progressive", iterations=10)`` has the choices (0, 1) and (1, 2), ten
    training steps each, over and over; at training step 12 its noise levels are (0, .7, .7, 0).
    """

    levels: tuple[float, ...]  # T, the noise level that a step has when it is stochastic
    choices: tuple[tuple[int, ...], ...]  # sets of K increasing indices
    durations: tuple[int, ...] = (1,)  # training steps that each choice lasts; of no account when `random`
    repeat: bool = True  # begin again after the last choice, or stay with it
    random: bool = False  # draw a choice for every training step, uniformly
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """T, how many denoising steps there are."""
        return len(self.levels)

    @property
    def num_transitions(self) -> int:
        """K, how many of them are stochastic; the same at every training step."""
        return len(self.choices[0])

    @property
    def covered(self) -> tuple[int, ...]:
        """Every denoising index that is stochastic at some training step."""
        return tuple(sorted({index for choice in self.choices for index in choice}))

    @property
    def covered_levels(self) -> tuple[float, ...]:
        """T noise levels: 0 only where the denoising step is deterministic at every training step."""
        return tuple(level if index in self.covered else 0.0 for index, level in enumerate(self.levels))

    def indices(self, step: int) -> tuple[int, ...]:
        """The K stochastic denoising indices at training step ``step``, increasing."""
        if step < 0:
            raise ValueError(f"training steps count from 0, got {step}")
        if self.random:
            return self.choices[mix(self.seed, step) % len(self.choices)]
        ends = list(accumulate(self.durations))
        if self.repeat:
            step %= ends[-1]
        return self.choices[min(bisect_right(ends, step), len(ends) - 1)]

    def noise_levels(self, step: int) -> tuple[float, ...]:
        """T noise levels at training step ``step``: 0 where the denoising step is deterministic."""
        stochastic = self.indices(step)
        return tuple(level if index in stochastic else 0.0 for index, level in enumerate(self.levels))


def no_steps(num_steps: int) -> Plan:
    """A deterministic rollout: K = 0."""
    _check_count(num_steps)
    return Plan(levels=(0.0,) * num_steps, choices=((),))


def all_steps(num_steps: int, noise_level: float | Sequence[float], *, include_last: bool = False) -> Plan:
    """Every step but the last, which would leave its noise on the picture (flow SDEs) or has none (CPS).

    ``include_last`` is for DDIM, whose last step has a small deviation of its own.
    """
    _check_count(num_steps)
    if num_steps == 1 and not include_last:
        raise ValueError("a schedule of 1 step has no step before its last; use 2 steps or more, or include_last=True")
    return fixed_steps(num_steps, noise_level, range(num_steps if include_last else num_steps - 1))


def fixed_steps(num_steps: int, noise_level: float | Sequence[float], steps: Sequence[int]) -> Plan:
    """The same given denoising indices at every training step."""
    _check_count(num_steps)
    given = list(steps)
    if not given or len(set(given)) != len(given) or not all(0 <= index < num_steps for index in given):
        raise ValueError(
            f"steps must be different indices between 0 and {num_steps - 1}, at least one of them; got {given}"
        )
    return Plan(levels=_levels(num_steps, noise_level, given), choices=(tuple(sorted(given)),))


def window(
    num_steps: int,
    noise_level: float | Sequence[float],
    *,
    size: int,
    strategy: Strategy = "random",
    low: int = 0,
    high: int | None = None,
    stride: int = 1,
    iterations: int | Sequence[int] = 25,
    roll_back: bool = True,
    seed: int = 0,
) -> Plan:
    """``size`` consecutive stochastic steps among ``low <= index < high``, deterministic steps outside.

    ``fixed`` stays at ``low`` (Flow-GRPO-Fast with one window, MixGRPO-Flash*). ``random`` draws the start of every
    training step uniformly from ``low .. high - size`` (Flow-GRPO-Fast). ``progressive`` moves by ``stride`` after
    ``iterations`` training steps (MixGRPO, arXiv 2507.21802), and after the last place begins again, or stays there if
    not ``roll_back``; ``iterations`` may be a sequence, one number for each place.

    ``high`` is T - 1 unless given, which leaves the last step out. Where ``stride`` does not lead to the last place,
    the last move is shorter, so that each step up to ``high`` has its turn. MixGRPO's own code differs at the end: it
    walks on to T - 2 with windows that shrink, the last one being empty.

    Raises:
        ValueError: for sizes that do not fit.
    """
    _check_count(num_steps)
    high = num_steps - 1 if high is None else high
    if not 0 <= low < high <= num_steps:
        raise ValueError(
            f"a window's steps must be a range within 0..{num_steps}, got low={low} and high={high}; "
            f"the default is low=0 and high={num_steps - 1}, which needs at least 2 denoising steps"
        )
    if not 1 <= size <= high - low:
        raise ValueError(f"a window in the steps {low}..{high - 1} has a size from 1 to {high - low}, got {size}")
    levels = _levels(num_steps, noise_level, range(low, low + size) if strategy == "fixed" else range(low, high))
    last = high - size

    def at(starts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(start, start + size)) for start in starts)

    if strategy == "fixed":
        return Plan(levels=levels, choices=at([low]))
    if strategy == "random":
        return Plan(levels=levels, choices=at(range(low, last + 1)), random=True, seed=seed)
    if strategy != "progressive":
        raise ValueError(f"window strategy {strategy!r} is unknown; use 'fixed', 'progressive' or 'random'")
    if not 1 <= stride <= size:
        raise ValueError(
            f"a window of size {size} must move by a stride from 1 to {size} to skip no step, got {stride}"
        )
    starts = [*range(low, last, stride), last]
    durations = (iterations,) * len(starts) if isinstance(iterations, int) else tuple(iterations)
    if len(durations) != len(starts) or min(durations) < 1:
        raise ValueError(
            f"the window has {len(starts)} places, each needs 1 or more iterations; give one number or {len(starts)}, "
            f"got {iterations}"
        )
    return Plan(levels=levels, choices=at(starts), durations=durations, repeat=roll_back)


def linear_decay(noise_level: float, num_steps: int) -> tuple[float, ...]:
    """T noise levels that fall from ``noise_level`` to 0 at the last step, for `all_steps` or `window`.

    Noise at early steps changes what is drawn, at late ones only its grain; HiCoGen (arXiv 2511.19965) reports more
    diverse samples when it is concentrated early. Its formula is not published; this line is our choice.
    """
    _check_count(num_steps)
    return tuple(noise_level * (1 - index / max(num_steps - 1, 1)) for index in range(num_steps))


def _check_count(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"a plan needs 1 or more denoising steps, got {num_steps}")


def _levels(num_steps: int, noise_level: float | Sequence[float], covered: Sequence[int]) -> tuple[float, ...]:
    """One noise level for each step; those that may be stochastic are above 0."""
    levels = (float(noise_level),) * num_steps if isinstance(noise_level, int | float) else tuple(noise_level)
    if len(levels) != num_steps:
        raise ValueError(f"got {len(levels)} noise levels for {num_steps} denoising steps; give one number or one each")
    for index in covered:
        if not 0 < levels[index] < math.inf:
            raise ValueError(
                f"stochastic step {index} has the noise level {levels[index]}; it must be above 0 and finite "
                "(for a deterministic rollout use no_steps)"
            )
    return levels
