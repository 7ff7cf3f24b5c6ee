"""A toy of four numbers whose velocity is a small network: the real page, worker, comparison and optimiser, in seconds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowsteer.rewards.types import Scores
from flowsteer.rl.build import batches_per_update, build_algorithm, build_plan, build_processes, build_worker
from flowsteer.rl.compare import compare
from flowsteer.rl.config import Config, check_config, parse_config
from flowsteer.rl.engine.base import prepare
from flowsteer.rl.engine.optimizer import OptimizerSettings
from flowsteer.rl.plugins import find_algorithm
from flowsteer.rl.policy import Policy
from flowsteer.rl.types import Comparison
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.step import LiftedStep
from flowsteer.rollout.types import Rollout, Schedule, flat_mean

STEPS, GROUP, PROMPTS = 5, 8, Prompts(texts=("a", "bb", "ccc"))
FIXED = {"num_inference_steps": STEPS, "prompts_per_step": len(PROMPTS), "group_size": GROUP, "batch_size": GROUP}


@dataclass(frozen=True)
class ToyRows:
    """One number per prompt."""

    schedule: Schedule
    values: Tensor  # [B]
    latent_shape: tuple[int, ...] = (4,)

    def take(self, rows: Any) -> ToyRows:
        return replace(self, values=self.values[torch.as_tensor(rows)])

    def start(self, noise: Tensor) -> tuple[Tensor, ToyRows]:
        return noise, self


class Toy:
    """A hand-written pipeline: four latents, a linear velocity, "images" that are the latents themselves."""

    def __init__(self) -> None:
        self.power = 1.0  # of the noise levels; 1: equal steps
        self.network = nn.Linear(6, 4)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def prepare(self, prompts: list[str], *, num_inference_steps: int, **guidance: Any) -> ToyRows:
        sigma = torch.linspace(1, 0, num_inference_steps + 1) ** self.power
        schedule = Schedule(sigma=sigma, alpha=1 - sigma, timesteps=1000 * sigma[:-1])
        return ToyRows(schedule, torch.tensor([float(len(prompt)) / 10 for prompt in prompts]))

    def begin(self, latents: Tensor, index: int, rows: ToyRows) -> LiftedStep:
        sigma = rows.schedule.sigma[index].expand(len(latents), 1)
        return LiftedStep(self.network(torch.cat([latents, sigma, rows.values[:, None]], dim=1)))

    def route(self, call: Any) -> None:
        raise AssertionError("the toy runs without DeepSpeed")

    def decode(self, latents: Tensor, rows: ToyRows) -> Tensor:
        """[B, 4] to [B, 1, 2, 2]."""
        return latents.view(-1, 1, 2, 2)


def toy_config(overrides: Mapping[str, Any]) -> Config:
    """A configuration for the toy: three groups of eight in batches of a group; ``section.key`` overrides."""
    algorithm = find_algorithm(overrides["algorithm"]["name"])
    data: dict[str, Any] = {
        "num_steps": 1,
        "model": {"lora": None},
        "rollout": {
            **FIXED,
            "plan": {"name": "all" if algorithm.learns_from == "transitions" else "none"},
        },
        "rewards": {"jpeg_compressibility": {}},
        "advantage": {} if algorithm.on_pairs else {"clip": 2.0},  # pairs ask for no advantages
        "engine": {"device": "cpu"},
    }
    for key, value in overrides.items():
        section = data
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = copy.deepcopy(value)  # a trial's overrides are shared
    data["algorithm"] = {"updates_per_rollout": 1} | data["algorithm"]
    return parse_config(data)


class ToyRun:
    """What `rl/train.py` does in a step, on the toy; an algorithm and its rollouts by the builders of real runs."""

    def __init__(self, overrides: Mapping[str, Any], *, learning_rate: float = 0.02) -> None:
        config = toy_config(overrides)
        self.config, self.toy = config, Toy()
        self.plan = build_plan(config.rollout.plan, config)
        check_config(config, 1)
        self.processes = build_processes(config)
        self.algorithm: Any = build_algorithm(config, self.plan, self.processes)
        variants = self.algorithm.variants | {"reference"}
        self.policy = Policy(self.toy, lora=None, variants=variants, seed=0)  # type: ignore[arg-type]
        settings = OptimizerSettings(
            learning_rate=learning_rate,
            schedule="constant",
            warmup_updates=0,
            total_updates=1000,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            epsilon=1e-8,
            max_grad_norm=1.0,
        )
        self.engine = prepare(
            self.processes,
            self.policy,
            settings,
            strategy="plain",
            dtype=torch.float32,
            batch_size=config.rollout.batch_size,
            batches=batches_per_update(config, 1),
            passes_per_batch=self.algorithm.passes_per_batch,
        )
        self.worker = build_worker(config, self.toy, PROMPTS, self.plan, self.processes)  # type: ignore[arg-type]

    def rollouts(self, step: int = 0) -> list[Rollout]:
        with self.policy.using(self.algorithm.acting):
            return self.worker.sample(step)

    def compare(
        self, rollouts: Sequence[Rollout], scores: Sequence[Scores]
    ) -> tuple[list[Comparison], dict[str, float]]:
        named = [replace(own, parts={"mean": own.total}) for own in scores]  # of one reward, for advantage.combine
        settings = self.config.advantage.model_dump()
        return compare(rollouts, named, self.engine.gather, weights={"mean": 1.0}, **settings)

    def learn(self, step: int) -> float:
        """One training step for the reward "mean of the pixels"; returns the reward's mean."""
        rollouts = self.rollouts(step)
        comparisons, statistics = self.compare(rollouts, [Scores(total=flat_mean(r.images)) for r in rollouts])
        for batch in self.algorithm.batches(rollouts, comparisons, step):
            loss, _ = self.algorithm.loss(self.policy, batch)
            self.engine.backward(loss)
        self.policy.follow_old(self.algorithm.old_decay(self.engine.num_updates))
        return statistics["reward_mean"]

    def value(self) -> float:
        """The mean reward of the deterministic sampler: 64 samples of each prompt, the same noise at every call."""
        rows = self.toy.prepare(list(PROMPTS.texts), num_inference_steps=STEPS, guidance_scale=1.0).take([0, 1, 2] * 64)
        latents = torch.randn((len(rows.values), 4), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for index in range(STEPS):
                latents = latents - self.policy.velocity(latents, index, rows) / STEPS
        return float(latents.mean())

    def gradient(self, rollouts: Sequence[Rollout], comparisons: Sequence[Comparison]) -> list[Tensor]:
        """Of the mean of all losses."""
        losses = [self.algorithm.loss(self.policy, b)[0] for b in self.algorithm.batches(rollouts, comparisons, 0)]
        return list(torch.autograd.grad(torch.stack(losses).mean(), list(self.policy.parameters().values())))


def comparison(
    advantage: Sequence[float], weight: Sequence[float] | None = None, score: Sequence[float] | None = None
) -> Comparison:
    """Of one batch; scores are the advantages unless given."""
    ones = [1.0] * len(advantage)
    return Comparison(
        score=torch.tensor(list(score or advantage)),
        advantage=torch.tensor(list(advantage)),
        weight=torch.tensor(list(weight or ones)),
    )
