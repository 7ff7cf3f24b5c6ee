"""Does flowsteer hold what it promises on this device, with how much memory, and how fast? Downloads nothing.

    python scripts/gpu_check.py                  # the published sizes in bfloat16; ends within ten minutes
    python scripts/gpu_check.py --size tiny      # tiny networks of the same kinds, also on a CPU
    python scripts/gpu_check.py --parts speed memory --options none compile

Weights are random: denoisers and autoencoders have the published shapes of Stable Diffusion 3.5 medium and FLUX.1-dev, the
text encoders are one layer deep and give embeddings of the published shapes. The settings are those of the shipped
configurations, with fewer samples. Prints one line of JSON for each claim, ``{"claim": ..., "ok": ...}`` with its figures;
``ok`` is null where a claim cannot be tried here, with the reason. Exit code 1 if one fails.

- selfcheck: the pipeline can be trained (`rollout/lifting/selfcheck.py`).
- exact: in the first training step the ratio is exactly 1 (Flow-GRPO, MixGRPO) and the distances to the reference and the
  old policy are exactly 0; after an update the ratio of newly drawn samples is again exactly 1 and the distance to the old
  policy 0.
- seeds: with the same seed, samples, weights and optimiser are equal bit for bit; with another one, samples are not.
- resume: a checkpoint that is restored into a newly made run goes on bit for bit, weights and optimiser.
- memory: bytes by part. Peaks are beyond what is held before; null on a CPU.
- plan: what `flowsteer plan` predicts by part, and the peak of a training step beside it, which is between 0.8 and 1.25 of
  it; null on a CPU. What CUDA takes for itself is left out on both sides.
- speed: images per second and model FLOPs utilisation (MFU). `torch.utils.flop_counter` counts the FLOPs of one sample's
  passes and decoding, forward and backward; what checkpointing computes again does not count. MFU is null where the
  device's peak is not known. With an option, ``gain`` is the time without it over the time with it.
- quickstart: the quick start's training on this device, with a reward that needs Pillow alone.

exact, memory and speed are claimed of Flow-GRPO, MixGRPO and DiffusionNFT, of FLUX, and of one option after the other
(``--options``). seeds and resume ask torch for deterministic kernels; the others run with its default ones.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # equal bits need it, before CUDA begins

import torch
from gpu_models import MODELS
from gpu_trial import JPEG, Trial, held
from safetensors import safe_open

from flowsteer.rl.engine.shares import whole_size
from flowsteer.rl.plan.parts import CUDA_CONTEXT, estimate
from flowsteer.rl.plan.settings import Settings
from flowsteer.rollout.lifting import selfcheck

PARTS = ("selfcheck", "exact", "seeds", "resume", "memory", "plan", "speed", "quickstart")
ZERO_AT_START = {  # by algorithm
    "flow_grpo": ("ratio_deviation", "kl"),
    "mixgrpo": ("ratio_deviation", "kl"),
    "diffusion_nft": ("kl", "old_distance"),
}
ZERO_AGAIN = {  # on samples drawn after an update
    "flow_grpo": ("ratio_deviation",),
    "mixgrpo": ("ratio_deviation",),
    "diffusion_nft": ("old_distance",),
}
PEAK_BF16 = (  # dense, FLOP/s, from NVIDIA's data sheets; the first whose words all stand in the device's name
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989.4e12), ("H200 NVL", 835e12), ("H200", 989.4e12),
    ("H800 PCIe", 756e12), ("H800", 989.4e12), ("GB200", 2500e12), ("B200", 2250e12), ("A100", 312e12),
    ("A800", 312e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("RTX 4090 Laptop", None),
    ("RTX 4090 D", None), ("RTX 4090", 165.2e12),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way to save memory or time."""

    overrides: tuple[str, ...]
    model: str = "sd35m"
    algorithm: str = "flow_grpo"
    package: str | None = None  # that must be installed
    gpu: bool = False  # not on a CPU
    full: bool = False  # not worth a tiny model


def _attention(name: str, package: str | None = None, **more: Any) -> Option:
    return Option(overrides=(f"model.attention={name}",), package=package, model="flux1dev", **more)


OPTIONS = {
    "checkpointing": Option(overrides=("model.gradient_checkpointing=true",)),
    "checkpointing_every_2": Option(overrides=("model.gradient_checkpointing={every: 2}",)),
    "checkpointing_nft": Option(overrides=("model.gradient_checkpointing=true",), algorithm="diffusion_nft"),
    "compile": Option(overrides=("model.compile=true",)),
    "compile_nft": Option(overrides=("model.compile=true",), algorithm="diffusion_nft"),
    "merge_lora": Option(overrides=("rollout.merge_lora=true",), algorithm="diffusion_nft"),
    "offload": Option(overrides=("model.offload.text_encoders=true", "model.offload.vae=true")),
    "zero1": Option(overrides=("engine.strategy=zero1",)),
    "zero2": Option(overrides=("engine.strategy=zero2",)),
    "zero3": Option(overrides=("engine.strategy=zero3",)),
    "fsdp2": Option(overrides=("engine.strategy=fsdp2",)),
    "adafactor": Option(overrides=("optimizer.name=adafactor",)),
    "adamw8bit": Option(overrides=("optimizer.name=adamw8bit",), package="bitsandbytes"),
    "int8": Option(overrides=("model.quantize=int8",), package="torchao"),
    "fp8": Option(overrides=("model.quantize=fp8",), package="torchao", gpu=True),
    "nf4": Option(overrides=("model.quantize=nf4",), package="bitsandbytes"),
    "attention_math": _attention("_native_math"),
    "attention_flash": _attention("_native_flash", gpu=True),
    "attention_efficient": _attention("_native_efficient", gpu=True),
    "attention_cudnn": _attention("_native_cudnn", gpu=True),
    "attention_flash_attn": _attention("flash", package="flash_attn", gpu=True),
    "flux_checkpointing": Option(overrides=("model.gradient_checkpointing=true",), model="flux1dev", full=True),
    "flux_int8": Option(overrides=("model.quantize=int8",), model="flux1dev", package="torchao", full=True),
}

Line = dict[str, Any]
Known = dict[tuple[str, str], dict[str, Any]]  # of a model and an algorithm without options


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


def trained(
    model: str, size: str, cpu: bool, name: str, option: str, overrides: tuple[str, ...], known: Known, root: Path
) -> Iterator[Line]:
    """The claims on a run of two training steps: exact, memory and speed.

    ``known`` takes up what a run without an option measured (``option`` is "none" then), for those with one.
    """
    which = {"model": model, "algorithm": name, "option": option}
    trial = Trial(model, size, name, root / f"{model}_{name}_{option}", cpu=cpu, options=overrides)
    _, first = trial.step(0)
    file = trial.checkpoints.save(1) / "process_00000.safetensors"
    rollouts, second = trial.step(1)

    at_start = {key: first[key] for key in ZERO_AT_START[name] if key in first}
    redrawn = {f"{key}_after_update": second[key] for key in ZERO_AGAIN[name]}
    moved = second.get("kl", 1.0) > 0 and first["grad_norm"] > 0  # else zeros would say nothing
    exact = not any({**at_start, **redrawn}.values()) and (name == "diffusion_nft" or first["ratio"] == 1.0)
    yield {"claim": "exact", "ok": exact and moved, **which, "ratio": first.get("ratio"), **at_start, **redrawn,
           "kl_after_update": second.get("kl"), "grad_norm": first["grad_norm"]}  # fmt: skip

    with safe_open(file, framework="pt") as saved:
        optimizer = sum(
            saved.get_tensor(key).nbytes
            for key in saved.keys()  # noqa: SIM118 (no dict)
            if key.startswith("optimizer/") and not key.endswith(("/master", "/step"))
        )
    numel = sum(whole_size(parameter) for parameter in trial.policy.parameters().values())
    lora = sum(
        whole_size(value) * value.element_size() for key, value in trial.network.named_parameters() if ".lora_" in key
    )
    plain = known.get((model, name)) if option != "none" else None
    peaks = {act: trial.bytes[act] for act in ("rollout", "update")}
    right = optimizer == 8 * numel if trial.config.optimizer.name == "adamw" else optimizer <= 8 * numel
    saved_bytes = {
        f"{act}_peak_saved": before - now
        for act, now in peaks.items()
        if now is not None and plain is not None and (before := plain["bytes"][act]) is not None
    }
    yield {"claim": "memory", "ok": right, **which, "trained_parameters": numel, "weights": trial.sizes,
           "adapters": lora, "gradients": 4 * numel, "optimizer": optimizer, "rollout_peak": peaks["rollout"],
           "update_peak": peaks["update"], "held_after": held() or None, **saved_bytes}  # fmt: skip

    if plain is None:
        if option != "none":
            raise ValueError(f"{name} on {model} did not run without options: nothing to compare with")
        plain = known[model, name] = {
            "flops": trial.flops(rollouts[0]),
            "seconds": dict(trial.seconds),
            "bytes": dict(trial.bytes),
        }
    flops, images = plain["flops"], sum(map(len, rollouts))
    batch, steps = trial.config.rollout.batch_size, trial.config.rollout.num_inference_steps
    passes = trial.counted
    drawn = passes["rollout"][False] + passes["rollout"][True]
    trained = trial.engine.accumulation  # compiled, other policies' passes have gradients enabled, too
    right = drawn == len(rollouts) * steps and passes["update"][True] >= trained
    ceiling = peak_flops(torch.cuda.get_device_name()) if trial.on_gpu else None
    for act in ("rollout", "update"):
        backward = trained if act == "update" else 0
        forward = passes[act][False] + passes[act][True] - backward
        work = batch * (flops["forward"] * forward + flops["with_backward"] * backward)
        work += images * flops["decode"] * (act == "rollout")
        utilisation = work / trial.seconds[act] / ceiling if ceiling else None
        gain = plain["seconds"][act] / trial.seconds[act] if option != "none" else None
        yield {"claim": "speed", "ok": right and work > 0 and (utilisation is None or 0 < utilisation <= 1), **which,
               "act": act, "images_per_s": images / trial.seconds[act], "seconds": trial.seconds[act], "gain": gain,
               "first_seconds": trial.first_seconds[act],
               "passes": {"with_gradient": passes[act][True], "without": passes[act][False]}, "batch_size": batch,
               "model_flops": work, "mfu": utilisation, "peak_flops": ceiling}  # fmt: skip
    trial.close()


def repeated(size: str, cpu: bool, name: str, parts: list[str], root: Path) -> Iterator[Line]:
    """The claims on equal bits: one run, the same again, and one that is resumed from its first checkpoint."""
    torch.use_deterministic_algorithms(True, warn_only=True)

    def trial(folder: str) -> Trial:
        return Trial("sd35m", size, name, root / f"{name}_{folder}", cpu=cpu)

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


def checked(model: str, size: str, cpu: bool, root: Path) -> Iterator[Line]:
    """The self-check at this size, with guidance."""
    trial = Trial(model, size, "flow_grpo", root / f"{model}_selfcheck", cpu=cpu)
    began = time.perf_counter()
    report = selfcheck.check(trial.pipeline, guidance_scale=4.5)
    right = size != "full" or trial.num_parameters == MODELS[model].parameters
    yield {"claim": "selfcheck", "ok": report.ok and right, "model": model, "denoiser_parameters": trial.num_parameters,
           "seconds": time.perf_counter() - began, "findings": {f.name: f.ok for f in report.findings}}  # fmt: skip
    trial.close()


def planned(model: str, size: str, cpu: bool, root: Path) -> Iterator[Line]:
    """What a plan says of a training step of Flow-GRPO, and what it takes."""
    trial = Trial(model, size, "flow_grpo", root / f"{model}_plan", cpu=cpu)
    expected = estimate(Settings.of(trial.config, 1))
    if trial.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trial.step(0)
    measured = torch.cuda.max_memory_allocated() if trial.on_gpu else None
    predicted = expected.peak - CUDA_CONTEXT
    ratio = predicted / measured if measured else None
    yield {"claim": "plan", "ok": predicted > 0 and (ratio is None or 0.8 <= ratio <= 1.25), "model": model,
           "predicted": predicted, "measured": measured, "ratio": ratio, "rollout": dict(expected.rollout),
           "update": dict(expected.update)}  # fmt: skip
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


def left_out(option: str, cpu: bool) -> str | None:
    """Why an option cannot be tried here; None where it can."""
    about = OPTIONS[option]
    if about.gpu and cpu:
        return "it needs a GPU"
    if about.package is not None and importlib.util.find_spec(about.package) is None:
        return f"the package {about.package} is not installed"
    return None


def jobs(
    size: str, cpu: bool, parts: list[str], options: list[str], root: Path
) -> Iterator[tuple[str, Callable[[], Iterator[Line]]]]:
    """What is to be tried, in order of importance: a name, and what tries it."""
    known: Known = {}
    chosen = {name: about for name in options if (about := OPTIONS.get(name)) and not (about.full and size == "tiny")}
    models = dict.fromkeys(["sd35m", *(about.model for about in chosen.values())])
    if "selfcheck" in parts:
        for model in models:
            yield f"selfcheck of {model}", partial(checked, model, size, cpu, root)
    if "plan" in parts:
        for model in models:
            yield f"plan of {model}", partial(planned, model, size, cpu, root)
    of_trials = {"exact", "memory", "speed"} & {*parts}
    for model in models:
        for name in MODELS[model].configs if of_trials else ():
            run = partial(trained, model, size, cpu, name, "none", (), known, root)
            yield f"exact, memory, speed of {name} on {model}", run
    for name in ("flow_grpo", "diffusion_nft") if {"seeds", "resume"} & {*parts} else ():
        yield f"seeds, resume of {name}", partial(repeated, size, cpu, name, parts, root)
    if "quickstart" in parts:
        yield "quickstart", partial(quickstart, size, cpu, root)
    for option, about in chosen.items() if of_trials else ():
        what = f"exact, memory, speed with {option}"
        if reason := left_out(option, cpu):
            yield what, partial(_nothing, what, reason)
        else:
            given = (about.model, size, cpu, about.algorithm, option, about.overrides, known, root)
            yield what, partial(trained, *given)


def _nothing(what: str, reason: str) -> Iterator[Line]:
    yield {"claim": what, "ok": None, "left_out": reason}


def claims(
    size: str, cpu: bool, parts: list[str], root: Path, *, options: list[str], limit_s: float = math.inf
) -> Iterator[Line]:
    """Every claim that was asked for; one that cannot be tried is one that fails, but for want of a GPU or a package.

    What has not begun after ``limit_s`` seconds is left out, and said to be.
    """
    began = time.perf_counter()
    for what, job in jobs(size, cpu, parts, options, root):
        if time.perf_counter() - began > limit_s:
            job = partial(_nothing, what, f"{limit_s:.0f} seconds are over (--limit-s)")
        try:
            yield from (line for line in job() if line["claim"] in parts or line["claim"] == what)
        except Exception as error:  # out of memory, a driver's fault: the other claims are still worth trying
            yield {"claim": what, "ok": False, "error": f"{type(error).__name__}: {error}"[:1500]}
        torch.use_deterministic_algorithms(False)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> int:
    """Print a line per claim; 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="full: the published sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which claims; all unless given")
    parser.add_argument("--options", nargs="+", choices=("none", *OPTIONS), default=list(OPTIONS), help=(
        "ways to save memory or time that exact, memory and speed are claimed of, one by one; none: of none"
    ))  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    parser.add_argument("--limit-s", type=float, default=540.0, help="begin nothing more after so many seconds")
    parser.add_argument("--folder", type=Path, help="where models and runs are written; a temporary one unless given")
    given = parser.parse_args()
    cpu = given.cpu or not torch.cuda.is_available()
    if cpu and given.size == "full":
        parser.error("--size full needs a CUDA device, and none is used here; use --size tiny")
    failed = 0
    lines = sys.stdout  # for nothing else: DeepSpeed logs there, too
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, contextlib.redirect_stdout(sys.stderr):
        chosen = {"options": given.options, "limit_s": given.limit_s}
        for line in claims(given.size, cpu, given.parts, Path(folder), **chosen):
            failed += line["ok"] is False
            print(json.dumps(strict(line), allow_nan=False), file=lines, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
