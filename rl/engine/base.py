"""accelerate and DeepSpeed behind five verbs: prepare, backward, gather, save, restore.

The rest of the project does not know on how many processes it runs, nor under which ZeRO stage. `backward` accumulates; at
the boundary it reduces over processes, clips, steps and clears. DeepSpeed is imported only when a ZeRO stage is asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowsteer.rl.engine.agreement import GradientAgreement
from flowsteer.rl.policy import Denoisers, Policy


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW and its learning rate as a pure function of the number of updates made."""

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_updates: int
    total_updates: int
    betas: tuple[float, float]
    weight_decay: float
    epsilon: float

    def rate(self, update: int) -> float:
        """The learning rate of update number ``update`` (0 is the first)."""
        if update < self.warmup_updates:
            return self.learning_rate * (update + 1) / self.warmup_updates
        left = 1 - (update - self.warmup_updates) / max(self.total_updates - self.warmup_updates, 1)
        factor = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[self.schedule]
        return self.learning_rate * max(factor, 0.0)


@dataclass(frozen=True, kw_only=True)
class UpdateInfo:
    """What one optimiser update was like."""

    grad_norm: float  # before clipping, over all processes
    learning_rate: float
    gradient_agreement: float  # see rl/engine/agreement.py


class NotFinite(ValueError):
    """A gradient holds NaN or infinity: the update would destroy the weights."""


class Engine:
    """Processes, precision, ZeRO and the optimiser.

    Args:
        zero_stage: DeepSpeed's ZeRO stage, None for plain data parallelism.
        dtype: of the denoiser's frozen weights.
        cpu: stay on the CPU even where there is an accelerator.
        batch_size: samples of one backward pass on this process.
        batches: from the number of processes, the rollout batches of one update on each.
        max_grad_norm: the gradient's norm is clipped to it.
        timeout_s: a collective that waits longer ends the job.
    """

    def __init__(
        self,
        *,
        zero_stage: Literal[0, 1, 2, 3] | None,
        dtype: torch.dtype,
        cpu: bool,
        batch_size: int,
        batches: Callable[[int], int],
        max_grad_norm: float,
        timeout_s: int,
    ) -> None:
        if zero_stage == 0 and dtype != torch.float32:
            raise ValueError(
                "engine.zero_stage=0 keeps no float32 master weights; use stage 1 to 3, or model.dtype=float32"
            )
        self._batches = batches(int(os.environ.get("WORLD_SIZE", "1")))
        self.zero_stage = zero_stage
        self.accelerator = Accelerator(
            cpu=cpu or not torch.cuda.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))],
        )
        self._deepspeed_config = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_clipping": max_grad_norm,
            # shares of every parameter, however small: `policy.part` then always is where the values are kept
            "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 0},
            # the check skips an update that is not finite
            "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 62,
        }
        self.accumulation = 0  # backward passes of an update, known when the algorithm is
        self.num_updates = 0
        self._micro_step = 0
        self._max_grad_norm = max_grad_norm

    @property
    def device(self) -> torch.device:
        """Where this process's tensors live."""
        return self.accelerator.device

    @property
    def num_processes(self) -> int:
        """How many processes share the run."""
        return self.accelerator.num_processes

    @property
    def process_index(self) -> int:
        """The number of this process."""
        return self.accelerator.process_index

    @property
    def is_main(self) -> bool:
        """True on the process that writes and prints."""
        return self.accelerator.is_main_process

    # ---- prepare

    def prepare(self, policy: Policy, settings: OptimizerSettings, *, passes_per_batch: int) -> None:
        """Make the optimiser, lay the parameters out over processes, and send the pipeline's calls through the wrapper.

        ``passes_per_batch``: backward passes that each rollout batch of an update gives.
        """
        self._policy, self._settings = policy, settings
        self.accumulation = self._batches * passes_per_batch
        parameters = list(policy.parameters().values())
        optimizer = torch.optim.AdamW(
            parameters,
            lr=settings.rate(0),
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            eps=settings.epsilon,
        )
        self._optimizer: Any = optimizer  # DeepSpeed puts its own in its place
        if self.zero_stage is not None:
            self._deepspeed = self._wrap(policy, optimizer)
            self._optimizer = self._deepspeed.optimizer
            policy.pipeline.route(self._deepspeed)
        # Not cleared by ZeRO-3: a parameter that the next update's passes do not reach would get its last gradient again.
        self._uncleared: Tensor | None = self._optimizer.grad_partitions_flat_buffer if self.zero_stage == 3 else None
        self._parameters: list[nn.Parameter] = parameters
        self._agreement = GradientAgreement(parameters, batches=self._batches, passes_per_batch=passes_per_batch)
        policy.ready()

    def _wrap(self, policy: Policy, optimizer: torch.optim.Optimizer) -> Any:
        import deepspeed

        if not torch.distributed.is_initialized():
            # one process without a launcher; DeepSpeed wants a group all the same
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
            os.environ.setdefault("LOCAL_RANK", "0")
        engine, *_ = deepspeed.initialize(
            model=Denoisers(policy.denoisers),
            optimizer=optimizer,
            config={**self._deepspeed_config, "gradient_accumulation_steps": self.accumulation},
            dist_init_required=False,
        )
        return engine

    # ---- backward

    def backward(self, loss: Tensor) -> UpdateInfo | None:
        """Accumulate one loss; at the boundary make the update and say what it was like, else None."""
        self._agreement.next_pass()
        self._micro_step = (self._micro_step + 1) % self.accumulation
        boundary = self._micro_step == 0
        rate = self._settings.rate(self.num_updates)
        if boundary:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
        if self.zero_stage is None:
            (loss / self.accumulation).backward()
            if boundary:
                self._reduce_gradients()
                norm = float(nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm))
                self._refuse_not_finite(norm)
                self._optimizer.step()
                self._optimizer.zero_grad(set_to_none=True)
        else:
            self._deepspeed.backward(loss)  # divides by the accumulation
            # DeepSpeed does not report the norm at stage 0
            gradients = [p.grad for p in self._parameters if p.grad is not None] if self.zero_stage == 0 else []
            before = float(nn.utils.get_total_norm(gradients)) if boundary else 0.0
            self._refuse_not_finite(before)
            self._deepspeed.step()  # at the boundary clips, steps and clears
            if boundary and self._uncleared is not None:
                self._uncleared.zero_()
            norm = float(before or self._deepspeed.get_global_grad_norm() or 0.0)
            self._refuse_not_finite(norm)
        if not boundary:
            return None
        self.num_updates += 1
        self._policy.updated()
        agreement = float(self.gather(self._agreement.finish().view(1)).mean())
        return UpdateInfo(grad_norm=norm, learning_rate=rate, gradient_agreement=agreement)

    def _refuse_not_finite(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise NotFinite(
                f"the gradient of update {self.num_updates + 1} is not finite ({norm}); lower optimizer.learning_rate, or use "
                "model.dtype=float32; the newest checkpoint is from before it"
            )

    def _reduce_gradients(self) -> None:
        """Average over processes in one message; a parameter that no pass reached counts as zero."""
        for parameter in self._parameters:
            if parameter.grad is None:  # its momentum goes on, as under DeepSpeed
                parameter.grad = torch.zeros_like(parameter)
        if self.num_processes == 1:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in self._parameters if parameter.grad is not None])
        reduced: Any = self.accelerator.reduce(flat, reduction="mean")
        for parameter, mean in zip(self._parameters, reduced.split([p.numel() for p in self._parameters])):
            parameter.grad = mean.view_as(parameter)

    # ---- gather

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate equally long tensors of all processes in their order: [n, ...] -> [processes * n, ...]."""
        if self.num_processes == 1:
            return values
        gathered: Any = self.accelerator.gather(values.to(self.device).contiguous())
        return gathered.to(values.device)

    def wait(self) -> None:
        """Until every process has come here."""
        self.accelerator.wait_for_everyone()

    @contextmanager
    def whole(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        """Inside the context every parameter holds all its values on every process, also under ZeRO-3."""
        if self.zero_stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameters):
                yield
        else:
            yield

    # ---- save and restore

    def save(self, folder: Path) -> None:
        """Write this process's part of the optimiser and of every policy into ``folder``; safetensors only."""
        assert self._micro_step == 0, (
            "half an update is under way: an algorithm gives more or fewer batches than it says"
        )
        if self.zero_stage is None and not self.is_main:
            return
        tensors = {f"policy/{key}": value for key, value in self._policy.state().items()}
        for number, (master, state) in enumerate(self._masters()):
            tensors[f"optimizer/{number}/master"] = master
            tensors |= {f"optimizer/{number}/{key}": torch.as_tensor(value) for key, value in state.items()}
        detached = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
        save_file(detached, self._file(folder), metadata={"num_updates": str(self.num_updates)})

    def restore(self, folder: Path) -> None:
        """Take back what `save` wrote. Raises ValueError when it belongs to another model."""
        with safe_open(self._file(folder), framework="pt") as file:
            saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            self.num_updates = int(file.metadata()["num_updates"])
        prefix = "policy/"
        self._policy.load_state({key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)})
        for number, (master, state) in enumerate(self._masters()):
            start = f"optimizer/{number}/"
            entries = {key[len(start) :]: value for key, value in saved.items() if key.startswith(start)}
            master.data.copy_(entries.pop("master"))
            state.clear()
            for key, value in entries.items():
                state[key] = value if value.dim() == 0 else value.to(master.device)

    def _file(self, folder: Path) -> Path:
        return folder / f"process_{0 if self.zero_stage is None else self.process_index:05d}.safetensors"

    def _masters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The tensors that the optimiser really updates on this process, each with its state."""
        if self.zero_stage in (1, 2):
            masters, optimizer = self._optimizer.single_partition_of_fp32_groups, self._optimizer.optimizer
        elif self.zero_stage == 3:
            masters, optimizer = self._optimizer.fp32_partitioned_groups_flat, self._optimizer.optimizer
        else:
            masters, optimizer = self._parameters, self._optimizer
        return [(master, optimizer.state[master]) for master in masters]

    def close(self) -> None:
        """End the process group."""
        self.accelerator.end_training()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
