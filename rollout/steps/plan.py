"""Which denoising steps are stochastic, and how much, at each training step.

A plan is data: the sets of steps that it goes through, and the order in which it does. What it says is a pure function
of (seed, training step), so every process says the same, and so does a run that was resumed. All sets have one size, so
every training step has the same number of transitions, and every step that a plan advertises gets its turn.

Letters: T denoising steps, K stochastic ones.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from flowsteer.rollout.steps.noise import mix

Strategy = Literal["fixed", "progressive", "random", "linear_decay", "exponential_decay"]
Decay = Literal["constant", "linear", "power", "cosine", "exponential"]


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
    iterations: int = 25,
    roll_back: bool = True,
    min_iterations: int = 1,
    decay_start: int = 0,
    decay_rate: float = 0.1,
    seed: int = 0,
) -> Plan:
    """``size`` consecutive stochastic steps among ``low <= index < high``, deterministic steps outside.

    ``fixed`` stays at ``low`` (Flow-GRPO-Fast with one window, MixGRPO-Flash*). ``random`` draws the start of every
    training step uniformly from ``low .. high - size`` (Flow-GRPO-Fast). ``progressive`` moves by ``stride`` after
    ``iterations`` training steps (MixGRPO, arXiv 2507.21802), and after the last place begins again, or stays there if
    not ``roll_back``. ``linear_decay`` and ``exponential_decay`` do too, but stay less long at later places, see
    `linear_durations` and `exponential_durations`.

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
    if strategy not in ("progressive", "linear_decay", "exponential_decay"):
        raise ValueError(
            f"window strategy {strategy!r} is unknown; use fixed, random, progressive, linear_decay or exponential_decay"
        )
    if not 1 <= min_iterations <= iterations or not decay_rate > 0:
        raise ValueError(
            "a window stays 1 or more training steps at each place and no longer at later ones, with a decay rate above 0; got "
            f"iterations={iterations}, min_iterations={min_iterations}, decay_rate={decay_rate}"
        )
    if not 1 <= stride <= size:
        raise ValueError(
            f"a window of size {size} must move by a stride from 1 to {size} to skip no step, got {stride}"
        )
    starts = [*range(low, last, stride), last]
    durations = (iterations,) * len(starts)
    if strategy == "linear_decay":
        durations = linear_durations(starts, iterations, min_iterations)
    elif strategy == "exponential_decay":
        durations = exponential_durations(starts, iterations, decay_start, decay_rate)
    return Plan(levels=levels, choices=at(starts), durations=durations, repeat=roll_back)


def decay(noise_level: float, num_steps: int, *, shape: Decay = "constant", rate: float = 1.0) -> tuple[float, ...]:
    """T noise levels that fall from ``noise_level`` along the denoising, for the plans above.

    Noise at early steps changes what is drawn, at late ones only its grain; HiCoGen (arXiv 2511.19965) reports more
    diverse samples when it is concentrated early. Its formula is not published; with u = index / (T - 1) ours are

    - ``linear``: 1 - u; ``power``: (1 - u)^rate; ``cosine``: (1 + cos(pi u)) / 2, all 0 at the last step;
    - ``exponential``: exp(-rate index).
    """
    _check_count(num_steps)
    if not rate > 0:
        raise ValueError(f"the rate of a decay is above 0, got {rate}")
    last = max(num_steps - 1, 1)
    factor: dict[str, Callable[[int], float]] = {
        "constant": lambda index: 1.0,
        "linear": lambda index: 1 - index / last,
        "power": lambda index: (1 - index / last) ** rate,
        "cosine": lambda index: (1 + math.cos(math.pi * index / last)) / 2,
        "exponential": lambda index: math.exp(-rate * index),
    }
    if shape not in factor:
        raise ValueError(f"decay {shape!r} is unknown; use {', '.join(factor)}")
    return tuple(noise_level * factor[shape](index) for index in range(num_steps))


def compressed_path(num_steps: int, last: int, fraction: float) -> tuple[int, ...]:
    """The denoising indices that are visited when the steps after ``last`` are taken in fewer, longer ones.

    MixGRPO-Flash (arXiv 2507.21802): int(fraction (T - last)) steps, at least one, lead from step ``last + 1`` to the end,
    evenly spaced over the schedule's own levels (the published code places them between these, and spends one network call
    less: its last point is not a step). Where ``last`` is T - 1 nothing is left to compress.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"the part of the last steps that is taken lies in (0, 1], got {fraction}")
    rest = num_steps - 1 - last
    count = min(max(int(fraction * (num_steps - last)), 1), rest) if fraction < 1 else rest
    return (*range(last + 1), *(last + 1 + place * rest // count for place in range(count)))


def strided_path(num_steps: int, last: int, stride: int) -> tuple[int, ...]:
    """The denoising indices that are visited when every ``stride``-th step is taken after the one behind ``last``.

    G2RPO's granularity (arXiv 2510.01982): up to ``last + 1`` as ever, then ``last + 2 :: stride``, then the end.
    """
    if stride < 1:
        raise ValueError(f"a granularity is 1 or more denoising steps in one, got {stride}")
    return (*range(min(last + 2, num_steps)), *range(last + 2, num_steps, stride))


def linear_durations(starts: Sequence[int], iterations: int, min_iterations: int) -> tuple[int, ...]:
    """Training steps that a window spends at each place: from ``iterations`` at the first to ``min_iterations`` at the last.

    MixGRPO's code interpolates over T - 2 places, of which the last windows are cut short or empty.
    """
    slope = (iterations - min_iterations) / max(len(starts) - 1, 1)
    return tuple(round(iterations - slope * place) for place in range(len(starts)))


def exponential_durations(starts: Sequence[int], iterations: int, decay_start: int, rate: float) -> tuple[int, ...]:
    """MixGRPO's progressive-exponential window: ceil(iterations exp(-rate max(0, start - decay_start))) at each place."""
    return tuple(math.ceil(iterations * math.exp(-rate * max(0, start - decay_start))) for start in starts)


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
