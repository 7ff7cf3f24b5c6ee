"""torch's FSDP2: each process keeps a share of every weight and of the optimiser, and gathers one block at a time.

FSDP moves the weights here, and nothing else. They stay in the types that the pipeline gave them, so a pass computes what it
computes on one process; the float32 masters are this file's own, as under ZeRO. Gradients of a pass are added up in float32
on each process, and meet once per update: FSDP itself would round their sum to the type of the weights. The price is one
whole float32 gradient of what is trained on every process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial

from flowsteer.rl.engine.optimizer import OptimizerSettings
from flowsteer.rl.engine.processes import Processes
from flowsteer.rl.engine.shares import Shares, kept


class FsdpBackend:
    """Weights and the optimiser's state are spread over the processes.

    Args:
        processes: that share the run.
        denoisers: the networks by name; their class becomes one of FSDP's, and their weights shares.
        parameters: gives the trained ones by name, in an order that all processes have. They are other objects before the
            networks are shared out, after it, and inside a pass.
        settings: of the optimiser.
        dtype: of trained weights that are part of the model; adapters stay in float32.
        accumulation: backward passes of an update.
    """

    strategy = "fsdp2"

    def __init__(
        self,
        processes: Processes,
        denoisers: Mapping[str, nn.Module],
        parameters: Callable[[], Mapping[str, nn.Parameter]],
        settings: OptimizerSettings,
        *,
        dtype: torch.dtype,
        accumulation: int,
    ) -> None:
        processes.join()
        self._processes = processes
        self._accumulation = accumulation
        self._max_grad_norm = settings.max_grad_norm
        before = list(parameters().values())
        if len({parameter.dtype for parameter in before}) > 1:  # some models keep norms in float32; FSDP wants one type
            for parameter in before:
                parameter.data = parameter.data.to(dtype)
        mesh = init_device_mesh(processes.device.type, (processes.num_processes,))
        for denoiser in denoisers.values():
            share_out(denoiser, mesh)
        self.leaves = _inside_a_pass(denoisers, parameters)
        self._sums: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            leaf.register_post_accumulate_grad_hook(lambda leaf, name=name: self._add(name, leaf))
        self._parameters: dict[str, DTensor] = dict(parameters())  # type: ignore[arg-type]
        self._kept = [kept(parameter) for parameter in self._parameters.values()]
        self._masters = [own if own.dtype == torch.float32 else own.float() for own in self._kept]
        self._optimizer = settings.make(self._masters)  # type: ignore[arg-type]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's."""
        return self._optimizer.param_groups

    def _add(self, name: str, leaf: Tensor) -> None:
        """A pass has given a gradient: into the float32 sum, before FSDP sees it."""
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient.float()

    def backward(self, loss: Tensor, *, boundary: bool, check: Callable[[float], None]) -> float:
        """See `Backend`."""
        (loss / self._accumulation).backward()
        if not boundary:
            return 0.0
        for (name, parameter), master in zip(self._parameters.items(), self._masters):
            whole = self._sums.pop(name, None)
            if whole is None:  # no pass of this process reached it: it counts as zero, and its momentum goes on
                whole = torch.zeros(parameter.shape, dtype=torch.float32, device=master.device)
            master.grad = self._own_share(whole, parameter)  # all processes exchange each parameter
        own = nn.utils.get_total_norm([master.grad for master in self._masters if master.grad is not None])
        norm = (self._processes.mean(own.square()) * self._processes.num_processes).sqrt()
        check(float(norm))
        nn.utils.clip_grads_with_norm_(self._masters, self._max_grad_norm, norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._publish(self._masters)
        return float(norm)

    def _own_share(self, whole: Tensor, parameter: DTensor) -> Tensor:
        """The share that this process keeps of the mean over processes."""
        summed = DTensor.from_local(whole, parameter.device_mesh, [Partial("sum")], run_check=False)
        return summed.redistribute(placements=parameter.placements).to_local() / self._processes.num_processes

    @torch.no_grad()
    def _publish(self, values: Sequence[Tensor]) -> None:
        for own, value in zip(self._kept, values):
            if own is not value:
                own.copy_(value)

    def masters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """See `Backend`."""
        return [(master, self._optimizer.state[master]) for master in self._masters]

    def shares(self) -> Shares | None:
        """See `Backend`; the next pass gathers what is published. Shares in float32 are themselves what a pass gathers."""
        if any(own is master for own, master in zip(self._kept, self._masters)):
            return None
        return Shares(values=list(self._masters), dtypes=[own.dtype for own in self._kept], publish=self._publish)

    def full(self, parameter: Tensor) -> Tensor:
        """See `Backend`."""
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def share_out(denoiser: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a network over the processes, each of its repeated blocks by itself, and the rest of it together."""
    # gathered weights are freed after every pass: policies change their shares between two passes
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in outermost_blocks(denoiser):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    root = fully_shard(denoiser, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    root.set_requires_gradient_sync(False)


def outermost_blocks(denoiser: nn.Module) -> Iterator[nn.Module]:
    """The members of its outermost lists of modules of one class."""
    for child in denoiser.children():
        blocks = list(child) if isinstance(child, nn.ModuleList) else []
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1:
            yield from (block for block in blocks if next(block.parameters(), None) is not None)
        else:
            yield from outermost_blocks(child)


def _inside_a_pass(
    denoisers: Mapping[str, nn.Module], parameters: Callable[[], Mapping[str, nn.Parameter]]
) -> dict[str, nn.Parameter]:
    """The trained parameters as a pass sees them: whole, and the ones that gradients reach. FSDP keeps these objects."""
    found: dict[str, nn.Parameter] = {}
    for denoiser in denoisers.values():
        for module in denoiser.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                found |= {name: own for name, own in parameters().items() if not isinstance(own, DTensor)}
                module.reshard()
    return {name: found[name] for name in parameters()}
