"""Data parallelism without DeepSpeed: gradients of the trained parameters are averaged in one message at the boundary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowsteer.rl.engine.optimizer import OptimizerSettings
from flowsteer.rl.engine.processes import Processes


class PlainBackend:
    """Every process holds all weights and the whole optimiser.

    Args:
        processes: that share the run.
        parameters: the trained ones, in an order that all processes have.
        settings: of the optimiser.
        accumulation: backward passes of an update.
    """

    strategy = "plain"

    def __init__(
        self,
        processes: Processes,
        parameters: Sequence[nn.Parameter],
        settings: OptimizerSettings,
        *,
        accumulation: int,
    ) -> None:
        self._processes = processes
        self._parameters = list(parameters)
        self._accumulation = accumulation
        self._max_grad_norm = settings.max_grad_norm
        self._optimizer = settings.make(self._parameters)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's."""
        return self._optimizer.param_groups

    def backward(self, loss: Tensor, *, boundary: bool, check: Callable[[float], None]) -> float:
        """See `Backend`."""
        (loss / self._accumulation).backward()
        if not boundary:
            return 0.0
        self._reduce_gradients()
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
        check(norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _reduce_gradients(self) -> None:
        """Average over processes in one message; a parameter that no pass reached counts as zero."""
        for parameter in self._parameters:
            if parameter.grad is None:  # its momentum goes on, as under DeepSpeed
                parameter.grad = torch.zeros_like(parameter)
        if self._processes.num_processes == 1:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in self._parameters if parameter.grad is not None])
        reduced = self._processes.mean(flat)
        for parameter, mean in zip(self._parameters, reduced.split([p.numel() for p in self._parameters])):
            parameter.grad = mean.view_as(parameter)

    def masters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """See `Backend`."""
        return [(master, self._optimizer.state[master]) for master in self._parameters]

    def shares(self) -> None:
        """See `Backend`; every process has them all."""

    def full(self, parameter: Tensor) -> Tensor:
        """See `Backend`."""
        return parameter.detach()
