"""What every worker does: it takes the batches of a training step that belong to its process, one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NotRequired, TypedDict

from flowsteer.rollout.data.batches import Batch, step_batches
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.several import Prepared
from flowsteer.rollout.sample import prepare_ahead, prepare_rows
from flowsteer.rollout.types import Rollout

Done = Callable[[Rollout], object]


class Share(TypedDict):
    """How rows are prepared, and which of a training step's samples are one process's. As in the section ``rollout``."""

    num_inference_steps: int
    guidance_scale: float
    negative_prompt: NotRequired[str | None]
    prompts_per_step: int
    group_size: int
    batch_size: int
    updates_per_rollout: int  # batches come in the order of the updates that they are shared among
    mixed: NotRequired[bool]  # an update has a random part of the batches, not those of one prompt after another
    seed: int  # of prompts and noise
    num_processes: int
    process_index: int


class Worker(ABC):
    """The base of both workers; `rollouts` is what a subclass adds.

    Args:
        pipeline: what prepares the prompts.
        prompts: the prompt file.
        share: see `Share`.
    """

    def __init__(self, pipeline: Pipeline, prompts: Prompts, share: Share) -> None:
        self.pipeline = pipeline
        self.prompts = prompts
        self.num_inference_steps = share["num_inference_steps"]
        self.guidance_scale = share["guidance_scale"]
        self.guidance_scales = {self.guidance_scale}  # all that a step's rows are prepared with
        self.negative_prompt = share.get("negative_prompt")
        self.prompts_per_step = share["prompts_per_step"]
        self.group_size = share["group_size"]
        self.batch_size = share["batch_size"]
        self.updates_per_rollout = share["updates_per_rollout"]
        self.mixed = share.get("mixed", False)
        self.seed = share["seed"]
        self.num_processes = share["num_processes"]
        self.process_index = share["process_index"]
        self.drawing: Callable[[], AbstractContextManager[None]] = nullcontext  # entered while samples are drawn

    @abstractmethod
    def rollouts(self, batch: Batch, step: int, policy_version: int) -> Iterator[Rollout]:
        """The rollouts of a batch."""

    def batches(self, step: int) -> list[Batch]:
        """What this process takes in a training step: a pure function of the seed and the step."""
        return step_batches(
            self.prompts,
            step=step,
            seed=self.seed,
            prompts_per_step=self.prompts_per_step,
            group_size=self.group_size,
            batch_size=self.batch_size,
            num_processes=self.num_processes,
            process_index=self.process_index,
            updates_per_rollout=self.updates_per_rollout,
            mixed=self.mixed,
        )

    def sample(self, step: int, *, policy_version: int = 0, done: Done | None = None) -> list[Rollout]:
        """The step's rollouts; ``done`` gets each one while the next is made."""
        made = []
        batches = self.batches(step)
        self.prepare_ahead(batches)
        with self.drawing():
            for batch in batches:
                for rollout in self.rollouts(batch, step, policy_version):
                    made.append(rollout)
                    if done is not None:
                        done(rollout)
        return made

    def prepare_ahead(self, batches: Sequence[Batch]) -> None:
        """Encode the distinct prompts of a step together."""
        rows = [self.prompts.row(row) for row in dict.fromkeys(row for batch in batches for row in batch.rows)]
        for guidance_scale in sorted(self.guidance_scales):
            prepare_ahead(
                self.pipeline,
                rows,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=guidance_scale,
                negative_prompt=self.negative_prompt,
            )

    def prepare(self, batch: Batch, guidance_scale: float) -> Prepared:
        """The batch's prompts, a row for each sample."""
        return prepare_rows(
            self.pipeline,
            [self.prompts.row(row) for row in batch.rows],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=self.negative_prompt,
        )
