"""The engine: one policy under an optimiser on all processes. Its verbs are prepare, backward, gather, save and restore.

The rest of the project does not know on how many processes it runs, nor under which strategy. What differs between them is
behind `Backend` (plain.py, zero.py, fsdp.py); processes.py has the process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowsteer.rl.engine.agreement import GradientAgreement
from flowsteer.rl.engine.optimizer import NotFinite, OptimizerSettings, UpdateInfo, restored_state, saved_state
from flowsteer.rl.engine.plain import PlainBackend
from flowsteer.rl.engine.processes import Processes
from flowsteer.rl.engine.shares import Shares
from flowsteer.rl.engine.zero import ZeroBackend

Strategy = Literal["plain", "zero1", "zero2", "zero3", "fsdp2"]


class Backend(Protocol):
    """How gradients, the optimiser and the weights are laid out over processes."""

    @property
    def strategy(self) -> str:
        """The value of engine.strategy; under ``plain`` every process keeps everything."""
        ...

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's; their ``lr`` is set before each update."""
        ...

    def backward(self, loss: Tensor, *, boundary: bool, check: Callable[[float], None]) -> float:
        """Accumulate; at the boundary reduce over processes, ``check`` the norm, clip, step and clear. Returns the norm."""
        ...

    def masters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """The tensors that the optimiser really updates on this process, each with its state."""
        ...

    def shares(self) -> Shares | None:
        """The float32 masters by share, where the weights of the passes can be made from them; None where they cannot."""
        ...

    def full(self, parameter: Tensor) -> Tensor:
        """All values of a parameter. All processes call it at the same time."""
        ...


class Trained(Protocol):
    """What an engine asks of a policy; see `flowsteer.rl.policy.Policy`."""

    denoisers: dict[str, nn.Module]
    pipeline: Any

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def ready(self, shares: Shares | None) -> None: ...

    def updated(self, num_updates: int, /) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


def prepare(
    processes: Processes,
    policy: Trained,
    settings: OptimizerSettings,
    *,
    strategy: Strategy,
    dtype: torch.dtype,
    batch_size: int,
    batches: int,
    passes_per_batch: int,
) -> Engine:
    """Make the optimiser, lay the parameters out over processes, and send the pipeline's calls through DeepSpeed's wrapper.

    Args:
        processes: that share the run.
        policy: what is trained.
        settings: of the optimiser.
        strategy: what each process keeps a share of; see engine.strategy in docs/configuration.md.
        dtype: of the denoiser's frozen weights.
        batch_size: samples of one backward pass on this process.
        batches: rollout batches of one update on this process.
        passes_per_batch: backward passes that each of them gives.
    """
    parameters = watched = list(policy.parameters().values())
    accumulation = batches * passes_per_batch
    backend: Backend
    if strategy == "plain":
        backend = PlainBackend(processes, parameters, settings, accumulation=accumulation)
    elif strategy == "fsdp2":
        from flowsteer.rl.engine.fsdp import FsdpBackend

        backend = fsdp = FsdpBackend(
            processes, policy.denoisers, policy.parameters, settings, dtype=dtype, accumulation=accumulation
        )
        watched = list(fsdp.leaves.values())
    else:
        backend = zero = ZeroBackend(
            processes,
            policy.denoisers,
            parameters,
            settings,
            strategy=strategy,
            dtype=dtype,
            batch_size=batch_size,
            accumulation=accumulation,
        )
        policy.pipeline.route(zero.module)
    agreement = GradientAgreement(watched, batches=batches, passes_per_batch=passes_per_batch, total=processes.team_sum)
    policy.ready(backend.shares())
    return Engine(processes, policy, backend, settings, agreement, accumulation=accumulation)


class Engine:
    """A prepared policy and its optimiser; made by `prepare`.

    Args:
        processes: that share the run.
        policy: what is trained.
        backend: the layout over processes.
        settings: of the optimiser.
        agreement: watches the gradients.
        accumulation: backward passes of an update.
    """

    def __init__(
        self,
        processes: Processes,
        policy: Trained,
        backend: Backend,
        settings: OptimizerSettings,
        agreement: GradientAgreement,
        *,
        accumulation: int,
    ) -> None:
        self.processes = processes
        self.backend = backend
        self.accumulation = accumulation
        self.num_updates = 0
        self._policy = policy
        self._settings = settings
        self._agreement = agreement
        self._micro_step = 0

    @property
    def is_main(self) -> bool:
        """True on the process that writes and prints."""
        return self.processes.is_main

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate equally long tensors of all processes (of teams, their first) in their order: [n, ...] -> [N, ...]."""
        return self.processes.gather(values)

    def wait(self) -> None:
        """A barrier."""
        self.processes.wait()

    def full(self, parameter: Tensor) -> Tensor:
        """All values of a parameter, also where each process keeps a share. All processes call it at the same time."""
        return self.backend.full(parameter)

    def backward(self, loss: Tensor) -> UpdateInfo | None:
        """Accumulate one loss; at the boundary make the update and say what it was like, else None.

        Raises:
            NotFinite: the update's gradient holds NaN or infinity; the weights are as before it.
        """
        self._agreement.next_pass()
        self._micro_step = (self._micro_step + 1) % self.accumulation
        boundary = self._micro_step == 0
        rate = self._settings.rate(self.num_updates)
        if boundary:
            for group in self.backend.param_groups:
                group["lr"] = rate
        team = self.processes.team_size
        if team > 1:  # a team's gradient is the sum of its processes', of which the back-end takes the mean over all
            loss = loss * team
        norm = self.backend.backward(loss, boundary=boundary, check=self._refuse_not_finite)
        if not boundary:
            return None
        self.num_updates += 1
        self._policy.updated(self.num_updates)
        agreement = float(self.gather(self._agreement.finish().view(1)).mean())
        return UpdateInfo(grad_norm=norm, learning_rate=rate, gradient_agreement=agreement)

    def _refuse_not_finite(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise NotFinite(
                f"the gradient of update {self.num_updates + 1} is not finite ({norm}); lower optimizer.learning_rate, or use "
                "model.dtype=float32; the newest checkpoint is from before it"
            )

    # ---- save and restore

    def save(self, folder: Path) -> None:
        """Write this process's part of the optimiser and of every policy into ``folder``; safetensors only."""
        assert self._micro_step == 0, (
            "half an update is under way: an algorithm gives more or fewer batches than it says"
        )
        if self.backend.strategy == "plain" and not self.is_main:
            return
        tensors = {f"policy/{key}": value for key, value in self._policy.state().items()}
        for number, (master, state) in enumerate(self.backend.masters()):
            tensors[f"optimizer/{number}/master"] = master
            tensors |= {f"optimizer/{number}/{key}": value for key, value in saved_state(state).items()}
        detached = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
        save_file(detached, self._file(folder), metadata={"num_updates": str(self.num_updates)})

    def restore(self, folder: Path) -> None:
        """Take back what `save` wrote. Raises ValueError when it belongs to another model."""
        with safe_open(self._file(folder), framework="pt") as file:
            saved: Mapping[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            self.num_updates = int(file.metadata()["num_updates"])
        for number, (master, state) in enumerate(self.backend.masters()):
            start = f"optimizer/{number}/"
            entries = {key[len(start) :]: value for key, value in saved.items() if key.startswith(start)}
            master.data.copy_(entries.pop("master"))
            state.clear()
            state.update(restored_state(entries, master, fused=bool(self.backend.param_groups[0].get("fused"))))
        prefix = "policy/"  # after the masters, of which the current policy may be made
        self._policy.load_state({key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)})

    def _file(self, folder: Path) -> Path:
        index = 0 if self.backend.strategy == "plain" else self.processes.process_index
        return folder / f"process_{index:05d}.safetensors"

    def close(self) -> None:
        """End the process group."""
        self.processes.close()
