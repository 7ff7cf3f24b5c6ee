"""The processes that share a run: who this one is, and how they exchange tensors. accelerate is behind it."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor


class Processes:
    """The process group of a run, from torchrun, accelerate launch or a single process.

    Args:
        cpu: stay on the CPU even where there is an accelerator.
        timeout_s: a collective that waits longer ends the job.
        team_size: so many consecutive processes are a team: they have the same samples (context.py).
    """

    def __init__(self, *, cpu: bool, timeout_s: int, team_size: int = 1) -> None:
        self._accelerator = Accelerator(
            cpu=cpu or not torch.cuda.is_available(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout_s))],
        )
        self.team_size = team_size
        assert self.num_processes % team_size == 0, "the configuration is held to it"
        self._team: Any = None
        if team_size > 1:
            self._team, _ = torch.distributed.new_subgroups(team_size)

    @property
    def device(self) -> torch.device:
        """Where this process's tensors live."""
        return self._accelerator.device

    @property
    def num_processes(self) -> int:
        """How many processes share the run."""
        return self._accelerator.num_processes

    @property
    def process_index(self) -> int:
        """The number of this process."""
        return self._accelerator.process_index

    @property
    def num_teams(self) -> int:
        """Among how many the samples are shared."""
        return self.num_processes // self.team_size

    @property
    def team_index(self) -> int:
        """The number of this process's team."""
        return self.process_index // self.team_size

    @property
    def leads(self) -> bool:
        """True on the first process of a team."""
        return self.process_index % self.team_size == 0

    @property
    def is_main(self) -> bool:
        """True on the process that writes and prints."""
        return self._accelerator.is_main_process

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate equally long tensors of all teams in their order: [n, ...] -> [teams * n, ...].

        A team's is that of its first process, so what it shares counts once. Every process calls it and gets the result.
        """
        everywhere = self.gather_all(values)
        return everywhere if self.team_size == 1 else torch.cat(everywhere.split(len(values))[:: self.team_size])

    def gather_all(self, values: Tensor) -> Tensor:
        """Concatenate equally long tensors of all processes in their order: [n, ...] -> [processes * n, ...]."""
        if self.num_processes == 1:
            return values
        gathered: Any = self._accelerator.gather(values.to(self.device).contiguous())
        return gathered.to(values.device)

    def to_main(self, values: Tensor) -> Tensor | None:
        """As `gather`, but on the main process only; None on the others, which are sent nothing."""
        if self.num_processes == 1:
            return values
        own = values.to(self.device).contiguous()
        received = [torch.empty_like(own) for _ in range(self.num_processes)] if self.is_main else None
        torch.distributed.gather(own, received, dst=0)
        return None if received is None else torch.cat(received[:: self.team_size]).to(values.device)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over processes of a tensor of one shape."""
        reduced: Any = self._accelerator.reduce(values, reduction="mean")
        return reduced

    def team_sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of a team of a tensor of one shape; ``values`` may become it."""
        if self.team_size > 1:
            torch.distributed.all_reduce(values, group=self._team)
        return values

    def from_leader(self, said: bytes) -> bytes:
        """What the first process of the team says, on each of them; from the others nothing is taken."""
        if self.team_size == 1:
            return said
        leader = self.team_index * self.team_size
        length = torch.tensor([len(said)], device=self.device)
        torch.distributed.broadcast(length, src=leader, group=self._team)
        text = torch.zeros(int(length), dtype=torch.uint8)
        if self.leads:
            text[:] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        text = text.to(self.device)
        torch.distributed.broadcast(text, src=leader, group=self._team)
        return bytes(text.tolist())

    def join(self) -> None:
        """Make one process that no launcher has started a group of itself: DeepSpeed and FSDP want one."""
        if torch.distributed.is_initialized():
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")

    def wait(self) -> None:
        """A barrier."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """End the process group."""
        self._accelerator.end_training()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
