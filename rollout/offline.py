"""The offline worker: pictures of a file stand in for samples, batch by batch.

A rollout of pictures has no trajectory, and no policy drew it. Everything else is as if it had been drawn: the prompt is
prepared in the same way, the latents are those that the pipeline would decode to the picture, each sample has a seed for the
noise that training adds, and rewards may score the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from flowsteer.rollout.data.batches import Batch, step_batches, step_passes
from flowsteer.rollout.data.pictures import Picture
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.encode import Encoder
from flowsteer.rollout.lifting.several import Several
from flowsteer.rollout.sample import prepare_rows
from flowsteer.rollout.steps.noise import mix
from flowsteer.rollout.types import Rollout

_PICTURE_STREAM = 4  # apart from the streams of rollout/data/batches.py


class PictureWorker:
    """Takes the pictures of a training step that belong to this process.

    Args:
        encoder: of the pipeline that learns.
        prompts: the prompt file, with pictures.
        seed: of the order of prompts and pictures, and of the noise that training adds.
        updates_per_rollout: batches come in the order of the updates that they are shared among.
        The others as in the configuration's ``rollout`` section.
    """

    def __init__(
        self,
        encoder: Encoder,
        prompts: Prompts,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str | None = None,
        prompts_per_step: int,
        group_size: int,
        batch_size: int,
        updates_per_rollout: int,
        seed: int,
        num_processes: int,
        process_index: int,
    ) -> None:
        self.encoder = encoder
        self.pipeline = encoder.pipeline
        self.prompts = prompts
        self.settings: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
        }
        self.prompts_per_step = prompts_per_step
        self.group_size = group_size
        self.batch_size = batch_size
        self.updates_per_rollout = updates_per_rollout
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index

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
        )

    def pictures(self, batch: Batch, step: int) -> list[Picture]:
        """The picture of each sample, B of them.

        A draw of a prompt takes the next ``group_size`` of its pictures, in an order of the prompt's own, and goes on with the
        first after the last: no picture stands twice in a group, and all are taken equally often.
        """
        passes = step_passes(self.prompts, step=step, seed=self.seed, prompts_per_step=self.prompts_per_step)
        found = []
        for row, group, sample in zip(batch.rows, batch.group.tolist(), batch.sample.tolist()):
            own = self.prompts.groups[row]
            order = sorted(range(len(own)), key=lambda place, row=row: mix(self.seed, _PICTURE_STREAM, row, place))
            found.append(own[order[(passes[group] * self.group_size + sample % self.group_size) % len(own)]])
        return found

    def sample(
        self, step: int, *, policy_version: int = 0, done: Callable[[Rollout], object] | None = None
    ) -> list[Rollout]:
        """The step's pictures as rollouts; ``done`` gets each one while the next is encoded."""
        rollouts = []
        for batch in self.batches(step):
            rollout = self._taken(batch, step, policy_version)
            rollouts.append(rollout)
            if done is not None:
                done(rollout)
        return rollouts

    @torch.no_grad()
    def _taken(self, batch: Batch, step: int, policy_version: int) -> Rollout:
        pictures = self.pictures(batch, step)
        conditioning = prepare_rows(self.pipeline, [self.prompts.row(row) for row in batch.rows], **self.settings)
        encoded = []
        for place, picture in enumerate(pictures):
            one = conditioning.take([place])
            encoded.append(self.encoder.encode(picture.media, one.parts[0] if isinstance(one, Several) else one))
        return Rollout(
            prompts=tuple(self.prompts.texts[row] for row in batch.rows),
            columns={name: tuple(own.columns.get(name) for own in pictures) for name in self.prompts.columns},
            group=batch.group,
            sample=batch.sample,
            seeds=batch.seeds,
            conditioning=conditioning,
            latents=torch.cat([own.latents for own in encoded]),
            images=torch.cat([own.pixels for own in encoded]),
            trajectory=None,
            policy_version=policy_version,
            stored_scores=torch.tensor([math.nan if own.score is None else own.score for own in pictures]),
        )
