"""Does flowsteer hold what it promises on this device, with how much memory, and how fast? Downloads nothing.

    python scripts/gpu_check.py                  # Stable Diffusion 3.5 medium's size in bfloat16; aim: ten minutes on an H100
    python scripts/gpu_check.py --size tiny      # a tiny network of the same kind, also on a CPU
    python scripts/gpu_check.py --parts speed memory

Weights are random: the denoiser and the autoencoder have the published shapes, the text encoders are one layer deep and give
embeddings of the published shapes. The settings are those of ``sd35m_flow_grpo_ocr`` and ``sd35m_nft_ocr``, with fewer
samples. Prints one line of JSON for each claim, ``{"claim": ..., "ok": ...}`` with its figures; exit code 1 if one fails.

- selfcheck: the pipeline can be trained (`rollout/lifting/selfcheck.py`).
- exact: in the first training step the ratio is exactly 1 (Flow-GRPO) and the distances to the reference and the old policy
  are exactly 0; after an update the ratio of newly drawn samples is again exactly 1 and the distance to the old policy 0.
- seeds: with the same seed, samples, weights and optimiser are equal bit for bit; with another one, samples are not.
- resume: a checkpoint that is restored into a newly made run goes on bit for bit, weights and optimiser.
- memory: bytes by part. Peaks are beyond what is held before; null on a CPU.
- speed: images per second and model FLOPs utilisation (MFU). `torch.utils.flop_counter` counts the FLOPs of one sample's
  passes and decoding, forward and backward; what checkpointing computes again does not count. MFU is null where the
  device's peak is not known.
- quickstart: the quick start's training on this device, with a reward that needs Pillow alone.

seeds and resume ask torch for deterministic kernels; the others run with its default ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # equal bits need it, before CUDA begins

import torch
from gpu_trial import CONFIGS, JPEG, Trial, held
from safetensors import safe_open

from flowsteer.rollout.lifting import selfcheck

PARTS = ("selfcheck", "exact", "seeds", "resume", "memory", "speed", "quickstart")
PUBLISHED_PARAMETERS = 2_243_171_520  # of the denoiser
ZERO_AT_START = {"flow_grpo": ("ratio_deviation", "kl"), "diffusion_nft": ("kl", "old_distance")}
ZERO_AGAIN = {"flow_grpo": ("ratio_deviation",), "diffusion_nft": ("old_distance",)}  # on samples drawn after an update
PEAK_BF16 = (  # dense, FLOP/s, from NVIDIA's data sheets; the first whose words all stand in the device's name
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989.4e12), ("H200 NVL", 835e12), ("H200", 989.4e12),
    ("H800 PCIe", 756e12), ("H800", 989.4e12), ("GB200", 2500e12), ("B200", 2250e12), ("A100", 312e12),
    ("A800", 312e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("RTX 4090 Laptop", None),
    ("RTX 4090 D", None), ("RTX 4090", 165.2e12),
)  # fmt: skip

Line = dict[str, Any]


def peak_flops(device: str) -> float | None:
    """A device's peak in bfloat16 by its name, in FLOP/s; None if it is not known. Words count whole: "GH200" is no "H200"."""
    words = set(re.findall(r"[A-Z0-9]+", device.upper()))
    return next((rate for known, rate in PEAK_BF16 if words >= {*known.upper().split()}), None)


def strict(value: Any) -> Any:
    """A figure as JSON can hold it: NaN and infinity, which a failing claim may have, by their names."""
    if isinstance(value, dict):
        return {key: strict(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def trained(size: str, cpu: bool, name: str, checkpointing: bool, known: dict[Any, Any], root: Path) -> Iterator[Line]:
    """The claims on a plain run of two training steps: exact, memory and speed. ``known`` passes on from run to run."""
    which = {"algorithm": name, "gradient_checkpointing": checkpointing}
    trial = Trial(size, name, root / f"{name}_{checkpointing}", cpu=cpu, checkpointing=checkpointing)
    _, first = trial.step(0)
    file = trial.checkpoints.save(1) / "process_00000.safetensors"
    rollouts, second = trial.step(1)

    at_start = {key: first[key] for key in ZERO_AT_START[name]}
    redrawn = {f"{key}_after_update": second[key] for key in ZERO_AGAIN[name]}
    moved = second["kl"] > 0 and first["grad_norm"] > 0  # else zeros would say nothing
    exact = not any({**at_start, **redrawn}.values()) and (name != "flow_grpo" or first["ratio"] == 1.0)
    yield {"claim": "exact", "ok": exact and moved, **which, "ratio": first.get("ratio"), **at_start, **redrawn,
           "kl_after_update": second["kl"], "grad_norm": first["grad_norm"]}  # fmt: skip

    with safe_open(file, framework="pt") as saved:
        moments = [saved.get_tensor(key).nbytes for key in saved.keys() if "/exp_avg" in key]  # noqa: SIM118 (no dict)
    parameters = list(trial.policy.parameters().values())
    numel = sum(parameter.numel() for parameter in parameters)
    lora = sum(value.nbytes for key, value in trial.network.named_parameters() if ".lora_" in key)
    known[name, checkpointing] = peak = trial.bytes["update"]
    plain = known.get((name, False))
    saves = peak is None or plain is None or not checkpointing or peak < plain
    yield {"claim": "memory", "ok": saves and sum(moments) == 8 * numel, **which, "trained_parameters": numel,
           "weights": trial.sizes, "adapters": lora, "gradients": 4 * numel, "optimizer": sum(moments),
           "rollout_peak": trial.bytes["rollout"], "update_peak": peak, "held_after": held() or None}  # fmt: skip

    flops, images = trial.flops(rollouts[0]), sum(map(len, rollouts))
    batch, steps = trial.config.rollout.batch_size, trial.config.rollout.num_inference_steps
    passes = trial.counted
    right = passes["rollout"] == {False: len(rollouts) * steps} and passes["update"][True] == trial.engine.accumulation
    ceiling = peak_flops(torch.cuda.get_device_name()) if trial.on_gpu else None
    for act in ("rollout", "update"):
        work = batch * (flops["forward"] * passes[act][False] + flops["with_backward"] * passes[act][True])
        work += images * flops["decode"] * (act == "rollout")
        utilisation = work / trial.seconds[act] / ceiling if ceiling else None
        yield {"claim": "speed", "ok": right and work > 0 and (utilisation is None or 0 < utilisation <= 1), **which,
               "act": act, "images_per_s": images / trial.seconds[act], "seconds": trial.seconds[act],
               "passes": {"with_gradient": passes[act][True], "without": passes[act][False]}, "batch_size": batch,
               "model_flops": work, "mfu": utilisation, "peak_flops": ceiling}  # fmt: skip
    trial.close()


def repeated(size: str, cpu: bool, name: str, parts: list[str], root: Path) -> Iterator[Line]:
    """The claims on equal bits: one run, the same again, and one that is resumed from its first checkpoint."""
    torch.use_deterministic_algorithms(True, warn_only=True)

    def trial(folder: str) -> Trial:
        return Trial(size, name, root / f"{name}_{folder}", cpu=cpu)

    def state(run: Trial, label: str) -> bytes:
        """Weights of every policy and the optimiser's state, as a checkpoint holds them."""
        folder = root / f"{name}_{label}"
        folder.mkdir()
        run.engine.save(folder)
        return (folder / "process_00000.safetensors").read_bytes()

    once = trial("run")
    drawn, _ = once.step(0)
    once.checkpoints.save(1)
    after_one = state(once, "state_1")
    model = once.model
    if "resume" in parts:
        once.step(1)
        after_two = state(once, "state_2")
        once.close()
        del once  # its memory is needed
        resumed = trial("run")
        unlike, begun = state(resumed, "state_fresh") != after_one, resumed.checkpoints.restore()
        restored = state(resumed, "state_restored") == after_one
        resumed.step(begun)
        goes_on = state(resumed, "state_resumed") == after_two
        yield {"claim": "resume", "ok": unlike and begun == 1 and restored and goes_on, "algorithm": name,
               "restored_equal": restored, "next_step_equal": goes_on, "bytes": len(after_one)}  # fmt: skip
        resumed.close()
        del resumed
    if "seeds" in parts:
        again = trial("again")
        again.worker.seed += 1
        other = not torch.equal(again.worker.sample(0)[0].latents, drawn[0].latents)
        again.worker.seed -= 1
        redrawn, _ = again.step(0)
        same = all(
            torch.equal(a.latents, b.latents) and torch.equal(a.images, b.images) for a, b in zip(drawn, redrawn)
        )
        equal = again.model == model and state(again, "state_again") == after_one
        yield {"claim": "seeds", "ok": same and equal and other, "algorithm": name, "samples_equal": same,
               "weights_and_optimizer_equal": equal, "other_seed_differs": other}  # fmt: skip
        again.close()


def checked(size: str, cpu: bool, root: Path) -> Iterator[Line]:
    """The self-check at this size, with guidance."""
    trial = Trial(size, "flow_grpo", root / "selfcheck", cpu=cpu)
    began = time.perf_counter()
    report = selfcheck.check(trial.pipeline, guidance_scale=4.5)
    right = size != "full" or trial.num_parameters == PUBLISHED_PARAMETERS
    yield {"claim": "selfcheck", "ok": report.ok and right, "denoiser_parameters": trial.num_parameters,
           "seconds": time.perf_counter() - began, "findings": {f.name: f.ok for f in report.findings}}  # fmt: skip
    trial.close()


def quickstart(size: str, cpu: bool, root: Path) -> Iterator[Line]:
    """The embedded quick start's training, two steps of it, as a user runs it."""
    overrides = [JPEG, "evaluation=null", "num_steps=2", "optimizer.warmup_updates=0", f"output={root / 'quickstart'}"]
    overrides += ["engine.device=cpu"] if cpu else []
    overrides += ["rollout.prompts_per_step=8"] if size == "tiny" else []
    command = [sys.executable, "-m", "flowsteer.rl.command", "train", "embedded_nft_composition", *overrides]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    log = root / "quickstart" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()] if done.returncode == 0 else []
    finite = len(lines) == 2 and all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    exported = any((root / "quickstart" / "export").glob("**/*.safetensors"))
    yield {"claim": "quickstart", "ok": finite and exported, "returncode": done.returncode, "exported": exported,
           "seconds": time.perf_counter() - began, "loss": [line["loss"] for line in lines],
           **({} if finite else {"output": (done.stdout + done.stderr)[-1500:]})}  # fmt: skip


def claims(size: str, cpu: bool, parts: list[str], root: Path) -> Iterator[Line]:
    """Every claim that was asked for; one that cannot be tried is one that fails."""
    known: dict[Any, Any] = {}
    jobs: list[tuple[str, Callable[[], Iterator[Line]]]] = []
    if "selfcheck" in parts:
        jobs.append(("selfcheck", partial(checked, size, cpu, root)))
    for name in CONFIGS:
        for checkpointing in (False, True) if {"exact", "memory", "speed"} & {*parts} else ():
            what = f"exact, memory, speed of {name} {'with' if checkpointing else 'without'} gradient checkpointing"
            jobs.append((what, partial(trained, size, cpu, name, checkpointing, known, root)))
        if {"seeds", "resume"} & {*parts}:
            jobs.append((f"seeds, resume of {name}", partial(repeated, size, cpu, name, parts, root)))
    if "quickstart" in parts:
        jobs.append(("quickstart", partial(quickstart, size, cpu, root)))
    for what, job in jobs:
        try:
            yield from (line for line in job() if line["claim"] in parts)
        except Exception as error:  # out of memory, a driver's fault: the other claims are still worth trying
            yield {"claim": what, "ok": False, "error": f"{type(error).__name__}: {error}"[:1500]}
        torch.use_deterministic_algorithms(False)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> int:
    """Print a line per claim; 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="full: Stable Diffusion 3.5 medium's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which claims; all unless given")
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    given = parser.parse_args()
    cpu = given.cpu or not torch.cuda.is_available()
    if cpu and given.size == "full":
        parser.error("--size full needs a CUDA device, and none is used here; use --size tiny")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for line in claims(given.size, cpu, given.parts, Path(folder)):
            failed += not line["ok"]
            print(json.dumps(strict(line), allow_nan=False), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
