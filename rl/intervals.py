"""Means of an evaluation and their 95 % intervals, over prompts.

Letters: P prompts, S noise seeds of each. All seeds of a prompt are one observation: they share what is hard about it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

Z = 1.96  # the normal distribution's quantile at 97.5 %
SHARE = (0.0, 1.0)
_ROUNDING = 1e-6  # of float32 scores beyond the range that a reward states


class Estimate(NamedTuple):
    """A mean and its 95 % interval; NaN where there is none.

    Example: 2 of 8 pictures right, a seed each, is ``Estimate(0.25, 0.071, 0.591)``.
    """

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    def table(self) -> dict[str, float | None]:
        """For JSON, which has no NaN: ``mean``, ``low``, ``high``, and ``interval``, half of the width."""
        numbers = {"mean": self.mean, "low": self.low, "high": self.high, "interval": self.half}
        return {name: None if math.isnan(value) else value for name, value in numbers.items()}


def mean_and_interval(values: Tensor) -> tuple[float, float]:
    """The mean of [P, S] and half of its 95 % interval; a prompt's seeds are one observation. NaN entries are left out."""
    by_prompt = values.double().nanmean(1)
    by_prompt = by_prompt[~by_prompt.isnan()]
    count = len(by_prompt)
    if count == 0:
        return float("nan"), float("nan")
    half = Z * float(by_prompt.std()) / math.sqrt(count) if count > 1 else float("nan")
    return float(by_prompt.mean()), half


def estimate(values: Tensor, score_range: tuple[float, float] | None = None) -> Estimate:
    """The mean of [P, S] with its interval. NaN entries are left out.

    Scores that are all 0 or 1 get Wilson's interval. Scores that are all equal count as such a share only where the range
    is known to be 0 to 1: of another reward, a constant 0 says nothing about what else it may give. Otherwise the interval
    is normal, cut off at ``score_range``, the lowest and the highest score that there can be.
    """
    scores = values[~values.isnan()].double()
    mean, half = mean_and_interval(values)
    binary = bool(((scores == 0) | (scores == 1)).all())
    if len(scores) and binary and (score_range == SHARE or 0 < mean < 1):
        return wilson(values)
    low, high = mean - half, mean + half
    if score_range is not None and len(scores):
        least, most = score_range
        if float(scores.min()) >= least - _ROUNDING and float(scores.max()) <= most + _ROUNDING:
            low, high = max(low, least), min(high, most)  # NaN stays: it is the first argument
    return Estimate(mean, low, high)


def wilson(values: Tensor) -> Estimate:
    """Wilson's interval (1927) of a share, of [P, S] values that are 0, 1 or NaN (missing), at least one not NaN.

    Its number of observations n is the effective one, ``p (1 - p) / Var(p)`` with the variance of the mean over prompts
    (Korn and Graubard 1998): n is P with a seed each, P where all seeds of a prompt agree, and at most the number of
    scores. Where p is 0 or 1 the variance says nothing, and n is P.
    """
    by_prompt = values.double().nanmean(1)
    by_prompt = by_prompt[~by_prompt.isnan()]
    prompts, scores = len(by_prompt), int((~values.isnan()).sum())
    share = float(by_prompt.mean())
    spread = float(by_prompt.var(unbiased=False))
    alike = share * (1 - share)  # the variance over prompts if all seeds of a prompt agree
    if prompts == 1 or not alike:
        n = float(prompts)
    else:
        n = min(prompts * alike / spread, float(scores)) if spread else float(scores)
    scale = 1 + Z**2 / n
    middle = (share + Z**2 / (2 * n)) / scale
    half = Z / scale * math.sqrt(alike / n + Z**2 / (4 * n**2))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


__all__ = ["SHARE", "Estimate", "estimate", "mean_and_interval", "wilson"]
