"""DeepSpeed's ZeRO, stages 0 to 3. Every attribute of DeepSpeed that its documentation does not name is touched here alone.

DeepSpeed is initialised directly, because accelerate's own path leaves CPUs out. It is imported when a run asks for a stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowsteer.rl.engine.optimizer import OptimizerSettings
from flowsteer.rl.engine.processes import Processes

WRITTEN_FOR = "0.19"
"""The DeepSpeed release whose private attributes are used below."""


def kept(parameter: Tensor) -> Tensor:
    """The values of a parameter that this process keeps: all of them, or its share under ZeRO-3."""
    return getattr(parameter, "ds_tensor", parameter.data)


def whole_size(parameter: Tensor) -> int:
    """The number of elements of a parameter, also where this process keeps a share of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


class Denoisers(nn.Module):
    """All denoisers behind one ``forward``, so that DeepSpeed can wrap them as one module."""

    def __init__(self, denoisers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.modules_by_name = nn.ModuleDict(denoisers)

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser of that name."""
        return self.modules_by_name[name](*args, **kwargs)


class ZeroBackend:
    """The optimiser's state, the gradients or the weights themselves are spread over the processes.

    Args:
        processes: that share the run.
        denoisers: the networks by name; DeepSpeed sees them as one.
        parameters: the trained ones, in an order that all processes have.
        settings: of the optimiser.
        stage: 0 spreads nothing, 1 the optimiser, 2 gradients too, 3 weights too.
        dtype: of the weights in the passes; float32 masters are kept from stage 1 on.
        batch_size: samples of one backward pass on this process.
        accumulation: backward passes of an update.

    Raises:
        ValueError: another release of DeepSpeed than the one that this file was written for.
    """

    def __init__(
        self,
        processes: Processes,
        denoisers: Mapping[str, nn.Module],
        parameters: Sequence[nn.Parameter],
        settings: OptimizerSettings,
        *,
        stage: Literal[0, 1, 2, 3],
        dtype: torch.dtype,
        batch_size: int,
        accumulation: int,
    ) -> None:
        import deepspeed

        check_release(deepspeed.__version__)
        _one_process_is_a_group(processes.device)
        self.zero_stage = stage
        self._parameters = list(parameters)
        self.module: Any
        self._optimizer: Any
        self.module, self._optimizer, *_ = deepspeed.initialize(
            model=Denoisers(denoisers),
            optimizer=settings.adamw(self._parameters),
            config=deepspeed_config(
                settings, stage=stage, dtype=dtype, batch_size=batch_size, accumulation=accumulation
            ),
            dist_init_required=False,
        )
        # What DeepSpeed makes of stage 1 in bfloat16 with float32 gradients, under other names.
        self._is_bf16_optimizer = stage == 1 and dtype == torch.bfloat16
        # Not cleared by ZeRO-3: a parameter that the next update's passes do not reach would get its last gradient again.
        self._uncleared: Tensor | None = self._optimizer.grad_partitions_flat_buffer if stage == 3 else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's."""
        return self._optimizer.param_groups

    def backward(self, loss: Tensor, *, boundary: bool, check: Callable[[float], None]) -> float:
        """See `Backend`."""
        self.module.backward(loss)  # divides by the accumulation
        # DeepSpeed does not report the norm at stage 0
        gradients = [p.grad for p in self._parameters if p.grad is not None] if self.zero_stage == 0 else []
        before = float(nn.utils.get_total_norm(gradients)) if boundary else 0.0
        check(before)
        self.module.step()  # at the boundary clips, steps and clears
        if boundary and self._uncleared is not None:
            self._uncleared.zero_()
        norm = float(before or self.module.get_global_grad_norm() or 0.0)
        check(norm)
        return norm

    def masters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """See `Backend`."""
        if self.zero_stage == 0:
            return [(master, self._optimizer.state[master]) for master in self._parameters]
        wrapped = self._optimizer
        if self.zero_stage == 3:
            masters = wrapped.fp32_partitioned_groups_flat
        elif self._is_bf16_optimizer:
            masters = wrapped.fp32_groups_flat_partition
        else:
            masters = wrapped.single_partition_of_fp32_groups
        return [(master, wrapped.optimizer.state[master]) for master in masters]

    def whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """See `Backend`."""
        if self.zero_stage != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)  # type: ignore[return-value]


def deepspeed_config(
    settings: OptimizerSettings, *, stage: int, dtype: torch.dtype, batch_size: int, accumulation: int
) -> dict[str, Any]:
    """What DeepSpeed is told; the arguments are those of `ZeroBackend`."""
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.max_grad_norm,
        # shares of every parameter, however small: `kept` then always is where the values are
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        # the check skips an update that is not finite
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        # in bfloat16 the sum of 36 passes is off by 0.7 %
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }


def check_release(version: str) -> None:
    """Raises ValueError for another release of DeepSpeed than the one whose private attributes are known."""
    if not version.startswith(f"{WRITTEN_FOR}."):
        raise ValueError(
            f"flowsteer reads the float32 weights of DeepSpeed's optimisers, which it knows of release {WRITTEN_FOR}; "
            f"{version} is installed. Install deepspeed=={WRITTEN_FOR}.*, or leave engine.zero_stage out"
        )


def _one_process_is_a_group(device: torch.device) -> None:
    """DeepSpeed wants a process group also of one process that no launcher has started."""
    if torch.distributed.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")
