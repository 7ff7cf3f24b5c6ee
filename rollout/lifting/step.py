"""One denoising step of a pipeline: what it predicts, and what the pipeline's loop makes of the result.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowsteer.rollout.lifting.lift import ADAPTER_ADVICE, LiftError

Body = Generator[tuple[tuple, dict[str, Any]], "StepOutput", dict[str, Any]]  # yields scheduler.step's arguments


class StepOutput(NamedTuple):
    """What the lifted body gets back from its ``yield``: ``scheduler.step(...)[0]`` or ``.prev_sample``."""

    prev_sample: Tensor


class LiftedStep:
    """An iteration of a denoising loop that waits for the result of its step. `finish` may be called once.

    Example: with Euler steps of a rectified flow,
    ``step = pipeline.begin(latents, index, conditioning)`` and
    ``latents = step.finish(latents + (sigma[index + 1] - sigma[index]) * step.velocity)`` is one iteration.

    Args:
        velocity: what the pipeline would give to ``scheduler.step``, guidance included, [B, *X]; of an epsilon or
            v_prediction pipeline that prediction.
        finish: from the next latents [B, *X] to those that enter the next step; None where the pipeline does nothing.
    """

    def __init__(self, velocity: Tensor, finish: Callable[[Tensor], Tensor] | None = None) -> None:
        self.velocity = velocity
        self._finish = finish
        self._finished = False

    @classmethod
    def of(cls, steps: Sequence[LiftedStep]) -> LiftedStep:
        """One step for the rows of several, one after the other."""
        sizes = [len(step.velocity) for step in steps]

        def finished(next_latents: Tensor) -> Tensor:
            return torch.cat([step.finish(own) for step, own in zip(steps, next_latents.split(sizes))])

        idle = all(step._finish is None for step in steps)
        return cls(torch.cat([step.velocity for step in steps]), None if idle else finished)

    def finish(self, next_latents: Tensor) -> Tensor:
        """What enters the next step, [B, *X]: most pipelines leave ``next_latents`` as they are, some paste an inpainting
        mask or cast.

        Raises ValueError when it is called a second time: an iteration runs out once.
        """
        if self._finished:
            raise ValueError("this step is finished; begin another one")
        self._finished = True
        return next_latents if self._finish is None else self._finish(next_latents)


def run_to_step(generator: Body, name: str, index: int, states: int = 1, *, rising: bool = False) -> list[Tensor]:
    """Run a lifted body up to its step: the model output that the scheduler would have got, one for each of ``states``.

    Where the pipeline's levels are ``rising`` it predicts data minus noise: the velocity with the other sign.

    Of several states the body goes on with what it had, so it cannot be finished afterwards.
    """
    try:
        outputs = _outputs(generator, states)
    except StopIteration:
        raise ValueError(f"{name} takes no step at denoising index {index}; {ADAPTER_ADVICE}") from None
    except UnboundLocalError as error:
        raise ValueError(
            f"the loop of {name} needs a local that an earlier iteration has set ({error}), so no step can be evaluated "
            f"by itself; {ADAPTER_ADVICE}"
        ) from error
    predicted = [args[0] if args else kwargs["model_output"] for args, kwargs in outputs]
    return [-velocity for velocity in predicted] if rising else predicted


def samples(generator: Body, name: str, states: int = 1) -> list[Tensor]:
    """Run a lifted body up to its step: the samples that the scheduler would have got, one for each of ``states``."""
    try:
        return [_sample(output) for output in _outputs(generator, states)]
    except StopIteration:
        raise ValueError(f"{name} takes no step at denoising index 0; {ADAPTER_ADVICE}") from None


def _outputs(generator: Body, states: int) -> list[tuple[tuple, dict[str, Any]]]:
    outputs = [next(generator)]
    while len(outputs) < states:
        outputs.append(generator.send(StepOutput(_sample(outputs[-1]))))
    return outputs


def _sample(output: tuple[tuple, dict[str, Any]]) -> Tensor:
    args, kwargs = output
    return args[2] if len(args) > 2 else kwargs["sample"]


def finish(generator: Body, next_latents: Tensor) -> dict[str, Any]:
    """Answer a suspended body's step and let it run out: its locals."""
    try:
        generator.send(StepOutput(next_latents))
    except StopIteration as stop:
        return stop.value
    raise LiftError(f"the pipeline steps one state twice in an iteration; {ADAPTER_ADVICE}")


def join_states(states: Sequence[Tensor]) -> Tensor:
    """One state as it is, [B, *X]; several one after the other as vectors, [B, N]."""
    return states[0] if len(states) == 1 else torch.cat([state.flatten(1) for state in states], 1)


def split_state(latents: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The states that `join_states` joined; ``shapes`` are those of one sample, none for one state."""
    if not shapes:
        return [latents]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.reshape(len(latents), *shape) for part, shape in zip(latents.split(sizes, 1), shapes)]
