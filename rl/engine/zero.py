"""DeepSpeed's ZeRO, stages 1 to 3. Every attribute of DeepSpeed that its documentation does not name is touched here alone.

DeepSpeed is initialised directly, because accelerate's own path leaves CPUs out. It is imported when a run asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowsteer.rl.engine.optimizer import OptimizerSettings
from flowsteer.rl.engine.processes import Processes
from flowsteer.rl.engine.shares import Shares

WRITTEN_FOR = "0.19"
"""The DeepSpeed release whose private attributes are used below."""

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


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
        strategy: ``zero1`` spreads the optimiser, ``zero2`` gradients too, ``zero3`` weights too.
        dtype: of the weights in the passes; the optimiser works on float32 masters.
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
        strategy: Literal["zero1", "zero2", "zero3"],
        dtype: torch.dtype,
        batch_size: int,
        accumulation: int,
    ) -> None:
        import deepspeed

        check_release(deepspeed.__version__)
        processes.join()
        self.strategy = strategy
        self._processes = processes
        self.module: Any
        self._optimizer: Any
        self.module, self._optimizer, *_ = deepspeed.initialize(
            model=Denoisers(denoisers),
            optimizer=settings.make(parameters),
            config=deepspeed_config(
                settings, strategy=strategy, dtype=dtype, batch_size=batch_size, accumulation=accumulation
            ),
            dist_init_required=False,
        )
        # What DeepSpeed makes of stage 1 in bfloat16 with float32 gradients, under other names.
        self._is_bf16_optimizer = strategy == "zero1" and dtype == torch.bfloat16
        # Not cleared by ZeRO-3: a parameter that the next update's passes do not reach would get its last gradient again.
        self._uncleared: Tensor | None = self._optimizer.grad_partitions_flat_buffer if strategy == "zero3" else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's."""
        return self._optimizer.param_groups

    def backward(self, loss: Tensor, *, boundary: bool, check: Callable[[float], None]) -> float:
        """See `Backend`."""
        self.module.backward(loss)  # divides by the accumulation
        self.module.step()  # at the boundary clips, steps and clears
        if boundary and self._uncleared is not None:
            self._uncleared.zero_()
        norm = float(self.module.get_global_grad_norm() or 0.0)
        check(norm)
        return norm

    def masters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """See `Backend`."""
        wrapped = self._optimizer
        if self.strategy == "zero3":
            masters = wrapped.fp32_partitioned_groups_flat
        elif self._is_bf16_optimizer:
            masters = wrapped.fp32_groups_flat_partition
        else:
            masters = wrapped.single_partition_of_fp32_groups
        return [(master, wrapped.optimizer.state[master]) for master in masters]

    def shares(self) -> Shares | None:
        """See `Backend`. Under ZeRO-3 a share of every weight is all that a process keeps, and is copied as such."""
        if self.strategy == "zero3":
            return None
        masters = [master for master, _ in self.masters()]
        dtypes = [flat.dtype for flat in self._flat()]
        return Shares(values=[master.detach() for master in masters], dtypes=dtypes, publish=self._publish)

    def _flat(self) -> list[Tensor]:
        """All trained weights of the passes in one tensor per group; each process updates a slice of it."""
        return self._optimizer.bf16_groups_flat if self._is_bf16_optimizer else self._optimizer.bit16_groups_flat

    @torch.no_grad()
    def _publish(self, values: Sequence[Tensor]) -> None:
        for flat, value in zip(self._flat(), values):
            if self._processes.num_processes == 1:
                flat.copy_(value)
            else:  # into its place, so that there is never a second copy of all weights
                torch.distributed.all_gather_into_tensor(flat, value.to(flat.dtype))

    def full(self, parameter: Tensor) -> Tensor:
        """See `Backend`."""
        if getattr(parameter, "ds_tensor", None) is None:
            return parameter.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()


def deepspeed_config(
    settings: OptimizerSettings, *, strategy: str, dtype: torch.dtype, batch_size: int, accumulation: int
) -> dict[str, Any]:
    """What DeepSpeed is told; the arguments are those of `ZeroBackend`."""
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.max_grad_norm,
        # shares of every parameter, however small: `kept` then always is where the values are
        "zero_optimization": {"stage": STAGES[strategy], "stage3_param_persistence_threshold": 0},
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
            f"{version} is installed. Install deepspeed=={WRITTEN_FOR}.*, or set engine.strategy to plain or fsdp2"
        )
