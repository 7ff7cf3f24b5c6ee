"""What `scripts/gpu_check.py` runs: a pipeline of Stable Diffusion 3.5 medium's size with random weights, and training steps
with it that are measured. The parts are those of `rl/build.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from flowsteer.rl.build import (
    build_algorithm,
    build_engine,
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
from flowsteer.rollout.lifting.loading import load_diffusers
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.types import Rollout

JPEG = 'rewards={"flowsteer.rewards.scorers.jpeg:JPEGCompressibility": {}}'  # by its place: entry points need an installation
PROMPTS = Prompts(texts=tuple(f"a {c} {s}" for c in ("red", "blue", "green") for s in ("circle", "square", "star")))
CONFIGS = {"flow_grpo": "sd35m_flow_grpo_ocr", "diffusion_nft": "sd35m_nft_ocr"}
# The transformer's and the autoencoder's published config.json, and the widths of the two CLIP text encoders
TRANSFORMER: dict[str, dict[str, Any]] = {
    "full": dict(sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
                 caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384,
                 dual_attention_layers=tuple(range(13))),
    "tiny": dict(sample_size=16, num_layers=3, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=64,
                 caption_projection_dim=32, pooled_projection_dim=48, pos_embed_max_size=16, dual_attention_layers=(0,)),
}  # fmt: skip
AUTOENCODER: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
    latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
CHANNELS = {"full": (128, 256, 512, 512), "tiny": (8, 8, 16, 16)}
CLIP_WIDTHS = {"full": (768, 1280), "tiny": (16, 32)}
SETTINGS = {  # on top of the published ones
    "full": ["rollout.prompts_per_step=2", "rollout.group_size=8"],
    "tiny": ["rollout.prompts_per_step=2", "rollout.group_size=4", "rollout.batch_size=4", "model.height=64",
             "model.width=64", "model.call.max_sequence_length=16", "rollout.num_inference_steps=4"],
}  # fmt: skip
TINY_NFT = ["algorithm.noise_levels_per_sample=3", "algorithm.end_level=4"]


def make_pipeline(size: str, device: torch.device) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium with random weights of a fixed seed, in bfloat16 on the device."""
    tokenizer = load_diffusers("embedded").tokenizer  # type: ignore[attr-defined]
    tokenizer.model_max_length = 77
    depth: dict[str, Any] = {
        "num_hidden_layers": 1,
        "vocab_size": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    joint = TRANSFORMER[size]["joint_attention_dim"]
    channels = CHANNELS[size]
    torch.manual_seed(0)
    with device:  # drawn where it lives: on a CPU so many numbers take a minute
        transformer: Any = SD3Transformer2DModel(
            patch_size=2, in_channels=16, out_channels=16, qk_norm="rms_norm", **TRANSFORMER[size]
        )
        transformer = transformer.to(torch.bfloat16)  # before the others take memory
        blocks: dict[str, Any] = {"block_out_channels": channels, "norm_num_groups": min(32, channels[0])}
        vae = AutoencoderKL(**AUTOENCODER, **blocks)
        clips = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(hidden_size=w, projection_dim=w, intermediate_size=w, num_attention_heads=4, **depth)
            )
            for w in CLIP_WIDTHS[size]
        ]
        t5 = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=joint, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
        )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=clips[0],
        tokenizer=tokenizer, text_encoder_2=clips[1], tokenizer_2=tokenizer, text_encoder_3=t5, tokenizer_3=tokenizer,
    )  # fmt: skip
    return pipe.to(device, torch.bfloat16)


def held() -> int:
    """Bytes of live tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def nbytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


class Trial:
    """One training run with the parts that `rl/build.py` makes, and what it measures on the way."""

    def __init__(
        self, size: str, name: str, folder: Path, *, cpu: bool, checkpointing: bool = False, seed: int = 0
    ) -> None:
        overrides = [JPEG, "evaluation=null", "algorithm.updates_per_rollout=1", f"seed={seed}", *SETTINGS[size]]
        overrides += [
            f"engine.device={'cpu' if cpu else 'auto'}",
            *(TINY_NFT * (size == "tiny" and name == "diffusion_nft")),
        ]
        config = self.config = load_config(CONFIGS[name], overrides)
        self.processes = build_processes(config)
        self.on_gpu = self.processes.device.type == "cuda"
        model = config.model
        self.pipeline = FlowPipeline(
            make_pipeline(size, self.processes.device), height=model.height, width=model.width, call_kwargs=model.call
        )
        self.network: Any = self.pipeline.denoisers["transformer"]
        self.model = fingerprint({"transformer": self.network})
        self.num_parameters = sum(parameter.numel() for parameter in self.network.parameters())
        parts = self.pipeline.pipe.components.items()
        self.sizes = {name: nbytes(part) for name, part in parts if isinstance(part, nn.Module)}
        if checkpointing:
            self.network.enable_gradient_checkpointing()
        self.passes: Counter[bool] = Counter()  # of the denoiser, with and without a gradient
        self.network.register_forward_pre_hook(lambda *_: self.passes.update([torch.is_grad_enabled()]))
        plan = build_plan(config.rollout.plan, config)
        self.algorithm = build_algorithm(config, plan, self.processes)
        self.policy = build_policy(
            config, self.pipeline, self.algorithm, lora_targets(config, self.pipeline, PROMPTS.row(0))
        )
        self.engine = build_engine(config, self.processes, self.policy, self.algorithm)
        self.worker = build_worker(config, self.pipeline, PROMPTS, plan, self.processes)
        self.scorer = StepScorer(build_rewards(config, self.processes.device))
        self.checkpoints = Checkpoints(folder, self.engine, model=self.model, prompts="", rewards={}, keep=9)
        self.seconds: dict[str, float] = {}
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
