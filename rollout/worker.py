"""The rollout worker: the prompts of this process become finished samples, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowsteer.rollout.branches import Branching, sample_branches
from flowsteer.rollout.data.batches import Batch, step_batches
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.several import Prepared
from flowsteer.rollout.sample import prepare_rows, sample
from flowsteer.rollout.steps.kernels import LogProbWeight
from flowsteer.rollout.steps.noise import mix
from flowsteer.rollout.steps.plan import Plan, compressed_path
from flowsteer.rollout.types import Rollout, Trajectory

Done = Callable[[Rollout], object]


class RolloutWorker:
    """Draws the samples of a training step that belong to this process.

    Args:
        pipeline: what is sampled.
        prompts: the prompt file.
        plan: which steps are stochastic at which training step.
        seed: of prompts and noise.
        branching: how groups part at the plan's stochastic steps; None draws whole trajectories.
        tail_fraction: part of the steps after the last stochastic one that is taken, see `compressed_path`.
        train_guidance_scale: guidance of the conditioning that a rollout carries, None for that of sampling.
        keep_means: store the means of stochastic steps.
        updates_per_rollout: batches come in the order of the updates that they are shared among.
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
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str | None = None,
        prompts_per_step: int,
        group_size: int,
        batch_size: int,
        shared_noise: bool,
        updates_per_rollout: int,
        seed: int,
        num_processes: int,
        process_index: int,
        dtype: torch.dtype,
        device: torch.device | str,
        branching: Branching | None = None,
        tail_fraction: float = 1.0,
        train_guidance_scale: float | None = None,
        keep_means: bool = False,
    ) -> None:
        self.pipeline = pipeline
        self.prompts = prompts
        self.plan = plan
        self.settings: dict[str, Any] = {
            "kernel": kernel,
            "log_prob_weight": log_prob_weight,
            "solver": solver,
            "keep_mean": keep_means,
            "dtype": dtype,
            "device": device,
        }
        self.branching = branching
        self.tail_fraction = tail_fraction
        self.train_guidance_scale = guidance_scale if train_guidance_scale is None else train_guidance_scale
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.prompts_per_step = prompts_per_step
        self.group_size = group_size
        self.batch_size = batch_size
        self.shared_noise = shared_noise
        self.updates_per_rollout = updates_per_rollout
        self.seed = seed
        self.num_processes = num_processes
        self.process_index = process_index

    def batches(self, step: int) -> list[Batch]:
        """What this process draws in a training step: a pure function of the seed and the step."""
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

    def sample(self, step: int, *, policy_version: int = 0, done: Done | None = None) -> list[Rollout]:
        """Draw the step's rollouts with the active policy; ``done`` gets each one while the next is drawn."""
        rollouts = []
        for batch in self.batches(step):
            for rollout in self._draw(batch, step, policy_version):
                rollouts.append(rollout)
                if done is not None:
                    done(rollout)
        return rollouts

    @torch.no_grad()
    def _draw(self, batch: Batch, step: int, policy_version: int) -> Iterator[Rollout]:
        """One rollout, or one for every way in which each of the pools of branches is finished."""
        texts = tuple(self.prompts.texts[row] for row in batch.rows)
        conditioning = self._prepare(batch, self.guidance_scale)
        guided_alike = self.train_guidance_scale == self.guidance_scale
        for_training = conditioning if guided_alike else self._prepare(batch, self.train_guidance_scale)
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
                images=self.pipeline.decode(latents, conditioning).float().cpu(),
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
            initial_seeds=self._group_seeds(batch.group, step),
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
            initial_seeds=self._group_seeds(batch.group, step) if self.shared_noise else None,
            noise_levels=noise_levels,
            path=compressed_path(len(noise_levels), last, self.tail_fraction),
            **self.settings,
        )

    def _prepare(self, batch: Batch, guidance_scale: float) -> Prepared:
        """Prepared, a row for each sample."""
        return prepare_rows(
            self.pipeline,
            [self.prompts.row(row) for row in batch.rows],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=self.negative_prompt,
        )

    def _group_seeds(self, group: Tensor, step: int) -> Tensor:
        """The same seed for all samples of a group, whichever batches they are in: [B] -> [B]."""
        return torch.tensor([mix(self.seed, step, place) for place in group.tolist()])
