"""The offline worker: pictures of a file stand in for samples, batch by batch.

A rollout of pictures has no trajectory, and no policy drew it. Everything else is as if it had been drawn: the prompt is
prepared in the same way, the latents are those that the pipeline would decode to the picture, each sample has a seed for the
noise that training adds, and rewards may score the picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Unpack

import torch

from flowsteer.rollout.data.batches import Batch, step_passes
from flowsteer.rollout.data.pictures import Picture
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.encode import Encoder
from flowsteer.rollout.lifting.several import Several
from flowsteer.rollout.share import Share, Worker
from flowsteer.rollout.steps.noise import mix
from flowsteer.rollout.types import Rollout, kept

_PICTURE_STREAM = 4  # apart from the streams of rollout/data/batches.py


class PictureWorker(Worker):
    """Takes the pictures of a training step that belong to this process.

    Args:
        encoder: of the pipeline that learns.
        prompts: the prompt file, with pictures.
        share: see `Share`; its seed is that of the order of prompts and pictures, too, and of the noise that training adds.
    """

    def __init__(self, encoder: Encoder, prompts: Prompts, **share: Unpack[Share]) -> None:
        super().__init__(encoder.pipeline, prompts, share)
        self.encoder = encoder

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

    @torch.no_grad()
    def rollouts(self, batch: Batch, step: int, policy_version: int) -> Iterator[Rollout]:
        """One rollout, of the batch's pictures."""
        pictures = self.pictures(batch, step)
        conditioning = self.prepare(batch, self.guidance_scale)
        encoded = []
        for place, picture in enumerate(pictures):
            one = conditioning.take([place])
            encoded.append(self.encoder.encode(picture.media, one.parts[0] if isinstance(one, Several) else one))
        yield Rollout(
            prompts=tuple(self.prompts.texts[row] for row in batch.rows),
            columns={name: tuple(own.columns.get(name) for own in pictures) for name in self.prompts.columns},
            group=batch.group,
            sample=batch.sample,
            seeds=batch.seeds,
            conditioning=conditioning,
            latents=torch.cat([own.latents for own in encoded]),
            images=kept(torch.cat([own.pixels for own in encoded])),
            trajectory=None,
            policy_version=policy_version,
            stored_scores=torch.tensor([math.nan if own.score is None else own.score for own in pictures]),
        )
