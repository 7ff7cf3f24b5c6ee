"""What `scripts/gpu_check.py` runs: training steps at a published size with random weights, and what is measured of them.

The parts of a run are those of `rl/build.py`; the pipeline is loaded from a folder as in any run (`scripts/gpu_models.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from gpu_models import MODELS, nbytes, written
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowsteer.rl.build import (
    build_algorithm,
    build_engine,
    build_pipeline,
    build_plan,
    build_policy,
    build_processes,
    build_worker,
)
from flowsteer.rl.build_rewards import build_rewards
from flowsteer.rl.checkpoint import Checkpoints, fingerprint
from flowsteer.rl.compare import compare
from flowsteer.rl.config import load_config
from flowsteer.rl.fit import lora_targets
from flowsteer.rl.metrics import Meter
from flowsteer.rl.scoring import StepScorer
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.conditioning import Conditioning
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.types import Rollout

JPEG = 'rewards={"flowsteer.rewards.scorers.jpeg:JPEGCompressibility": {}}'  # by its place: entry points need an installation
PROMPTS = Prompts(texts=tuple(f"a {c} {s}" for c in ("red", "blue", "green") for s in ("circle", "square", "star")))
SETTINGS = {  # on top of the published ones; each model fills two batches
    "full": ["rollout.prompts_per_step=2"],
    "tiny": ["rollout.prompts_per_step=2", "rollout.group_size=4", "rollout.batch_size=4", "model.height=64",
             "model.width=64", "model.call.max_sequence_length=16", "rollout.num_inference_steps=4"],
}  # fmt: skip
GROUPS = {"sd35m": ["rollout.group_size=8"], "flux1dev": ["rollout.group_size=3"]}  # at full size: one batch each
OF_ALGORITHM = {
    "flow_grpo": [],
    "mixgrpo": ["rollout.plan={name: window, strategy: progressive, size: 2}", "rollout.solver=dpmpp_2m"],
    "diffusion_nft": [],
}
TINY_NFT = ["algorithm.noise_levels_per_sample=3", "algorithm.end_level=4"]


def overrides_of(model: str, size: str, algorithm: str, *, cpu: bool, seed: int = 0) -> list[str]:
    """What differs from the shipped configuration of the model and the algorithm."""
    return [
        JPEG, "evaluation=null", "algorithm.updates_per_rollout=1", f"seed={seed}",
        f"engine.device={'cpu' if cpu else 'auto'}", "model.gradient_checkpointing=false",
        *SETTINGS[size], *(GROUPS[model] if size == "full" else []), *OF_ALGORITHM[algorithm],
        *(TINY_NFT if (size, algorithm) == ("tiny", "diffusion_nft") else []),
    ]  # fmt: skip


def held() -> int:
    """Bytes of live tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


class Trial:
    """One training run with the parts that `rl/build.py` makes, and what it measures on the way.

    Args:
        model: one of `gpu_models.MODELS`.
        size: ``full`` or ``tiny``.
        algorithm: one of the model's.
        folder: of the checkpoints; the model's own folder is beside it.
        cpu: stay on the CPU.
        options: further overrides of the configuration.
        seed: of the run.
    """

    def __init__(
        self,
        model: str,
        size: str,
        algorithm: str,
        folder: Path,
        *,
        cpu: bool,
        options: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        overrides = [*overrides_of(model, size, algorithm, cpu=cpu, seed=seed), *options]
        device = torch.device("cpu" if cpu else "cuda")
        place = written(model, size, device, folder.parent)
        config = self.config = load_config(MODELS[model].configs[algorithm], [*overrides, f"model.path={place}"])
        self.processes = build_processes(config)
        self.on_gpu = self.processes.device.type == "cuda"
        self.pipeline = cast(FlowPipeline, build_pipeline(config, self.processes.device))
        self.network: Any = self.pipeline.denoisers["transformer"]
        self.model = fingerprint({"transformer": self.network})
        self.num_parameters = sum(parameter.numel() for parameter in self.network.parameters())
        parts = self.pipeline.pipe.components.items()
        self.sizes = {name: nbytes(part) for name, part in parts if isinstance(part, nn.Module)}
        self.passes: Counter[bool] = Counter()  # of the denoiser, with and without a gradient
        self.network.register_forward_pre_hook(lambda *_: self.passes.update([torch.is_grad_enabled()]))
        plan = build_plan(config.rollout.plan, config)
        self.algorithm = build_algorithm(config, plan, self.processes)
        self.policy = build_policy(
            config, self.pipeline, self.algorithm, lora_targets(config, self.pipeline, PROMPTS.row(0))
        )
        self.engine = build_engine(config, self.processes, self.policy, self.algorithm)
        self.worker = build_worker(config, self.pipeline, PROMPTS, plan, self.processes, self.policy)
        self.scorer = StepScorer(build_rewards(config, self.processes.device))
        self.checkpoints = Checkpoints(folder, self.engine, model=self.model, prompts="", rewards={}, keep=9)
        self.seconds: dict[str, float] = {}
        self.first_seconds: dict[str, float] = {}  # of the first step, with all that happens once
        self.bytes: dict[str, int | None] = {}
        self.counted: dict[str, Counter[bool]] = {}

    @contextlib.contextmanager
    def measuring(self, act: str) -> Iterator[None]:
        """Seconds, passes and the peak memory beyond what is held at the start."""
        before = held()
        self.passes.clear()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds[act] = time.perf_counter() - began
        self.first_seconds.setdefault(act, self.seconds[act])
        self.bytes[act] = torch.cuda.max_memory_allocated() - before if self.on_gpu else None
        self.counted[act] = Counter(self.passes)

    def sample(self, step: int) -> list[Rollout]:
        """The first act of training, scored on the way as always."""
        with self.policy.using(self.algorithm.acting):
            return self.worker.sample(step, policy_version=self.engine.num_updates, done=self.scorer.submit)

    def step(self, step: int) -> tuple[list[Rollout], dict[str, float]]:
        """One training step, as `rl/train.py` makes it; the samples and the step's metrics."""
        with self.measuring("rollout"):
            rollouts = self.sample(step)
        weights = self.scorer.rewards.weights
        scores, advantage = self.scorer.collect(), self.config.advantage.model_dump()
        comparisons, _ = compare(rollouts, scores, self.engine.gather, weights=weights, **advantage)
        meter = Meter()
        with self.measuring("update"):
            for batch in self.algorithm.batches(rollouts, comparisons, step):
                loss, metrics = self.algorithm.loss(self.policy, batch)
                meter.add(metrics)
                meter.add_update(self.engine.backward(loss))
            self.policy.follow_old(self.algorithm.old_decay(self.engine.num_updates))
        return rollouts, meter.finish(self.engine)

    def flops(self, rollout: Rollout) -> dict[str, float]:
        """Of one sample's pass without a gradient, pass with backward, and decoding. Leaves gradients: ask it last."""
        self.network.disable_gradient_checkpointing()
        latents, row = rollout.latents[:1], cast(Conditioning, rollout.conditioning.take([0]))

        def count(work: Callable[[], object]) -> float:
            # plain matrix products: the counter does not know every device's fused attention
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                work()
            return float(counter.get_total_flops())

        with torch.no_grad():
            forward = count(lambda: self.policy.velocity(latents, 1, row))
        backward = count(lambda: self.policy.velocity(latents, 1, row).float().square().mean().backward())
        return {
            "forward": forward,
            "with_backward": backward,
            "decode": count(lambda: self.pipeline.decode(latents, row)),
        }

    def close(self) -> None:
        """Let go of threads and memory."""
        self.scorer.close()
        self.engine.close()
