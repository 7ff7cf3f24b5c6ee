"""The rollout worker: the prompts of this process become finished samples, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flowsteer.rollout.noise import mix
from flowsteer.rollout.pipeline import Pipeline
from flowsteer.rollout.plan import Plan
from flowsteer.rollout.prompts import Batch, Prompts, step_batches
from flowsteer.rollout.sample import sample
from flowsteer.rollout.types import Rollout

Done = Callable[[Rollout], object]


class RolloutWorker:
    """Draws the samples of a training step that belong to this process.

    Args:
        pipeline: what is sampled.
        prompts: the prompt file.
        plan: which steps are stochastic at which training step.
        seed: of prompts and noise.
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
        log_prob_weight: Literal["gaussian", "variance"],
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
    ) -> None:
        self.pipeline = pipeline
        self.prompts = prompts
        self.plan = plan
        self.kernel = kernel
        self.log_prob_weight: Literal["gaussian", "variance"] = log_prob_weight
        self.solver = solver
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
        self.dtype = dtype
        self.device = device

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
            rollouts.append(self._draw(batch, step, policy_version))
            if done is not None:
                done(rollouts[-1])
        return rollouts

    @torch.no_grad()
    def _draw(self, batch: Batch, step: int, policy_version: int) -> Rollout:
        texts = [self.prompts.texts[row] for row in batch.rows]
        distinct = list(dict.fromkeys(texts))
        conditioning = self.pipeline.prepare(
            distinct,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
        ).take([distinct.index(text) for text in texts])
        latents, trajectory = sample(
            self.pipeline,
            conditioning,
            seeds=batch.seeds,
            noise_levels=self.plan.noise_levels(step),
            kernel=self.kernel,
            log_prob_weight=self.log_prob_weight,
            solver=self.solver,
            initial_seeds=self._group_seeds(batch.group, step) if self.shared_noise else None,
            dtype=self.dtype,
            device=self.device,
        )
        images: Tensor = self.pipeline.decode(latents, conditioning).float().cpu()
        return Rollout(
            prompts=tuple(texts),
            columns={name: tuple(values[row] for row in batch.rows) for name, values in self.prompts.columns.items()},
            group=batch.group,
            sample=batch.sample,
            seeds=batch.seeds,
            conditioning=conditioning,
            latents=latents,
            images=images,
            trajectory=trajectory,
            policy_version=policy_version,
        )

    def _group_seeds(self, group: Tensor, step: int) -> Tensor:
        """The same seed for all samples of a group, whichever batches they are in: [B] -> [B]."""
        return torch.tensor([mix(self.seed, step, place) for place in group.tolist()])
