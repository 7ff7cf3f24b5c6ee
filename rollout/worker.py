"""The rollout worker: the prompts of this process become finished samples, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from flowsteer.rollout.branches import Branching, sample_branches
from flowsteer.rollout.data.batches import Batch
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.several import Prepared
from flowsteer.rollout.sample import sample
from flowsteer.rollout.share import Share, Worker
from flowsteer.rollout.steps.kernels import LogProbWeight
from flowsteer.rollout.steps.noise import mix
from flowsteer.rollout.steps.plan import Plan, compressed_path
from flowsteer.rollout.types import Rollout, Trajectory, kept


class RolloutWorker(Worker):
    """Draws the samples of a training step that belong to this process.

    Args:
        pipeline: what is sampled.
        prompts: the prompt file.
        plan: which steps are stochastic at which training step.
        branching: how groups part at the plan's stochastic steps; None draws whole trajectories.
        tail_fraction: part of the steps after the last stochastic one that is taken, see `compressed_path`.
        train_guidance_scale: guidance of the conditioning that a rollout carries, None for that of sampling.
        keep_means: store the means of stochastic steps.
        training_graph: see `sample`.
        share: see `Share`.
        The others as in the configuration's ``rollout`` section.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Prompts,
        *,
        plan: Plan,
        kernel: str,
        log_prob_weight: LogProbWeight,
        solver: str,
        shared_noise: bool,
        dtype: torch.dtype,
        device: torch.device | str,
        branching: Branching | None = None,
        tail_fraction: float = 1.0,
        train_guidance_scale: float | None = None,
        keep_means: bool = False,
        training_graph: bool = False,
        **share: Unpack[Share],
    ) -> None:
        super().__init__(pipeline, prompts, share)
        self.plan = plan
        self.settings: dict[str, Any] = {
            "kernel": kernel,
            "log_prob_weight": log_prob_weight,
            "solver": solver,
            "keep_mean": keep_means,
            "training_graph": training_graph,
            "dtype": dtype,
            "device": device,
        }
        self.branching = branching
        self.tail_fraction = tail_fraction
        self.train_guidance_scale = self.guidance_scale if train_guidance_scale is None else train_guidance_scale
        self.guidance_scales |= {self.train_guidance_scale}
        self.shared_noise = shared_noise

    @torch.no_grad()
    def rollouts(self, batch: Batch, step: int, policy_version: int) -> Iterator[Rollout]:
        """One rollout, or one for every way in which each of the pools of branches is finished."""
        texts = tuple(self.prompts.texts[row] for row in batch.rows)
        conditioning = self.prepare(batch, self.guidance_scale)
        guided_alike = self.train_guidance_scale == self.guidance_scale
        for_training = conditioning if guided_alike else self.prepare(batch, self.train_guidance_scale)
        columns, pictures = (
            {name: tuple(values[row] for row in batch.rows) for name, values in all_.items()}
            for all_ in (self.prompts.columns, self.prompts.pictures)
        )
        noise_levels = self.plan.noise_levels(step)

        def rollout(latents: Tensor, trajectory: Trajectory | None) -> Rollout:
            return Rollout(
                prompts=texts,
                columns=columns,
                pictures=pictures,
                group=batch.group,
                sample=batch.sample,
                seeds=batch.seeds,
                conditioning=for_training,
                latents=latents,
                images=kept(self.pipeline.decode(latents, conditioning)),
                trajectory=trajectory,
                policy_version=policy_version,
            )

        if self.branching is None:
            yield rollout(*self._sample(conditioning, batch, step, noise_levels))
            return
        pools = sample_branches(
            self.pipeline,
            conditioning,
            self.branching,
            seeds=batch.seeds,
            initial_seeds=self._initial_seeds(batch, step),
            groups=batch.group,
            trunk_seeds=self._group_seeds(batch.group, step),
            noise_levels=noise_levels,
            **self.settings,
        )
        for place, branch in enumerate(pools):  # each way of finishing a pool compares its samples among themselves
            yield replace(
                rollout(branch.latents, branch.trajectory),
                columns=columns | {"sigma": (branch.sigma,) * len(texts)},
                group=batch.group + place * self.prompts_per_step,
                sample=batch.sample + place * self.prompts_per_step * self.group_size,
            )

    def _sample(
        self, conditioning: Prepared, batch: Batch, step: int, noise_levels: tuple[float, ...]
    ) -> tuple[Tensor, Trajectory | None]:
        last = max((index for index, level in enumerate(noise_levels) if level > 0), default=-1)
        return sample(
            self.pipeline,
            conditioning,
            seeds=batch.seeds,
            initial_seeds=self._initial_seeds(batch, step),
            groups=batch.group,
            noise_levels=noise_levels,
            path=compressed_path(len(noise_levels), last, self.tail_fraction),
            **self.settings,
        )

    def _initial_seeds(self, batch: Batch, step: int) -> Tensor:
        """Of each sample's initial noise [B]: the same for a whole group that shares it, whichever batches it is in.

        A row's own seed replaces it; without sharing, the samples of the row's group take this seed, the next, and so on.
        """
        shared = self.shared_noise or self.branching is not None
        seeds = self._group_seeds(batch.group, step) if shared else batch.seeds.clone()
        for place, row in enumerate(batch.rows):
            own = self.prompts.seed(row)
            if own is not None:
                seeds[place] = own if shared else own + int(batch.sample[place]) % self.group_size
        return seeds

    def _group_seeds(self, group: Tensor, step: int) -> Tensor:
        """The same seed for all samples of a group, whichever batches they are in: [B] -> [B]."""
        return torch.tensor([mix(self.seed, step, place) for place in group.tolist()])
