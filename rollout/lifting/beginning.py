"""What a pipeline starts its denoising loop with: ``base + gain * noise``.

A pipeline that draws from nothing starts with noise alone: base 0, gain 1. One that starts from a picture mixes it with noise,
one that continues a video leaves its first frame free of noise. Nothing is known of any of them: the prologue is run again with
its random draws replaced by zeros, which leaves the base, and by ones, which shows the gain.

Letters: X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flowsteer.rollout.lifting.lift import ADAPTER_ADVICE, LiftError
from flowsteer.rollout.types import Schedule

_RANDOM = (torch.randn, torch.randn_like)


class Draws(TorchFunctionMode):
    """Records the normal draws inside the context; those numbered in ``replaced`` become ``value`` everywhere.

    The generator moves on as if nothing had been replaced.
    """

    def __init__(self, replaced: frozenset[int] = frozenset(), value: float = 0.0) -> None:
        super().__init__()
        self.replaced, self.value = replaced, value
        self.drawn: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each of its functions."""
        result = func(*args, **(kwargs or {}))
        if func in _RANDOM:
            if len(self.drawn) in self.replaced:
                result = torch.full_like(result, self.value)
            self.drawn.append(result.detach().cpu())
        return result


@dataclass(frozen=True, kw_only=True)
class Prologue:
    """What one run of a prologue left."""

    state: Tensor  # [B, *X], what the loop would have started with
    values: Mapping[Any, Any]  # the other locals that are read later
    schedule: Schedule
    drawn: tuple[Tensor, ...]  # its normal draws, in order


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """How the start of a row follows from noise."""

    draws: frozenset[int] = (
        frozenset()
    )  # numbers of the prologue's draws that are this noise; not needed where it is plain
    gain: Tensor | float = 1.0  # [*X] where it differs from place to place
    noise_names: frozenset[Any] = frozenset()  # locals that are the noise, for the loop to use again
    start_names: frozenset[Any] = frozenset()  # locals that are the start itself, likewise
    plain: bool = True  # the base is 0 and the gain is 1


def find_beginning(run: Callable[[frozenset[int], float], Prologue], name: str) -> Beginning:
    """How a pipeline's start follows from noise.

    Args:
        run: runs the prologue for one row, its draws of these numbers replaced by a value.
        name: the pipeline's class, for messages.

    Raises:
        LiftError: the start does not come from normal noise, or the loop uses something that was made of this noise.
    """
    once = run(frozenset(), 0.0)
    size = once.state.numel()
    if once.drawn and _same_numbers(once.state, torch.cat([draw.flatten() for draw in once.drawn])):
        return Beginning(noise_names=_noise_names(once.values, once.state, name))
    found = [
        number
        for number, draw in enumerate(once.drawn)
        if draw.numel() <= size and _level_of(run(frozenset({number}), 0.0), run(frozenset({number}), 1.0)) is not None
    ]
    if not found:
        raise LiftError(
            f"what {name} starts its loop with is not made of normal noise ({len(once.drawn)} draws before the loop); "
            f"{ADAPTER_ADVICE}"
        )
    draws = frozenset(found)
    return beginning_of(draws, run(draws, 0.0), run(draws, 1.0), name)


def beginning_of(draws: frozenset[int], zeros: Prologue, ones: Prologue, name: str) -> Beginning:
    """How a row's start follows from noise, from its prologue with these draws replaced by zeros and by ones.

    Raises LiftError where it does not, or where the loop uses something that was made of this noise.
    """
    level = _level_of(zeros, ones)
    if level is None:
        raise LiftError(f"what {name} starts its loop with is not base + gain * noise; {ADAPTER_ADVICE}")
    names, starts = set(), set()
    for key, made in ones.values.items():
        if not _differ(made, zeros.values.get(key)):
            continue
        if isinstance(made, Tensor) and made.shape == ones.state.shape and bool((made == 1).all()):
            names.add(key)
        elif not _differ(made, ones.state) and not _differ(zeros.values[key], zeros.state):
            starts.add(key)
        else:
            raise LiftError(
                f"the loop of {name} uses {key}, which is made of the noise that it starts with; {ADAPTER_ADVICE}"
            )
    gain = ones.state[0] - zeros.state[0]
    level = _near(level, (1.0, float(ones.schedule.sigma[0])))
    moved = gain.abs() > level / 2
    uniform = bool(moved.all())
    return Beginning(
        draws=draws,
        gain=level if uniform else level * moved.to(gain.dtype),
        noise_names=frozenset(names),
        start_names=frozenset(starts),
        plain=not bool(zeros.state.any()) and uniform and level == 1,
    )


def _level_of(zeros: Prologue, ones: Prologue) -> float | None:
    """The one number that the gain is where it is not 0; None where it is 0 everywhere or not one number.

    A difference of two numbers of type ``dtype`` is known to a few units in their last place.
    """
    gain = (ones.state.float() - zeros.state.float()).flatten()
    rounding = 4 * torch.finfo(ones.state.dtype).eps * max(ones.state.float().abs().max().item(), 1.0)
    moved = gain[gain.abs() > max(2 * rounding, 1e-6)]
    if len(moved) == 0 or not bool(torch.isfinite(moved).all()):
        return None
    level = moved.median().item()
    return level if level > 0 and (moved - level).abs().max().item() <= max(1e-2 * level, rounding) else None


def _near(value: float, exact: tuple[float, ...]) -> float:
    """The exact number that was measured with the rounding of a difference."""
    return min(
        (other for other in exact if abs(other - value) <= 1e-2 * value), default=value, key=lambda x: abs(x - value)
    )


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    """Equal but for their order: packing latents moves them about."""
    if a.numel() != b.numel():
        return False
    one, other = a.detach().cpu().flatten(), b.detach().cpu().flatten().to(a.dtype)
    return torch.equal(one.float().sort().values, other.float().sort().values)


def _noise_names(values: Mapping[Any, Any], noise: Tensor, name: str) -> frozenset[Any]:
    names = {key for key, value in values.items() if isinstance(value, Tensor) and _same_numbers(value, noise)}
    for key in names:
        if values[key].shape != noise.shape:
            raise LiftError(f"the loop of {name} uses {key}, the noise in another shape; {ADAPTER_ADVICE}")
    return frozenset(names)


def _differ(a: Any, b: Any) -> bool:
    """Whether two values contain different tensors."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape != b.shape or not torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) != len(b) or any(_differ(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return any(_differ(a[key], b.get(key)) for key in a)
    return False
