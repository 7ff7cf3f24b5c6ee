"""One pipeline of each kind: two steps under ZeRO-2 and FSDP2 on two processes, exported, redrawn by diffusers bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
import zoo
from conftest import Make
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from zoo.entries import Entry, as_input, built, entries
from zoo.training import drawn

from flowsteer.rl.export import load_lora
from flowsteer.rollout.data.inputs import Media
from flowsteer.rollout.lifting.loop import fixed_randomness
from flowsteer.rollout.lifting.pipeline import FlowPipeline, as_tensor

pytestmark = pytest.mark.slow

STEPS = 4
WAN = Entry(build=lambda: zoo.build("wan"), call={"num_frames": 1}, size={"height": 16, "width": 16}, guided=4.0)
ENTRIES = entries() | {"wan": WAN}
KINDS = {
    "packed latents": "FluxPipeline",
    "lists": "ZImagePipeline",
    "two transformers": "wan",
    "a picture along the sequence": "FluxKontextPipeline",
    "a picture along the sequence, Qwen": "QwenImageEditPipeline",
    "a picture along the channels": "FluxFillPipeline",
    "inpainting": "FluxInpaintPipeline",
    "a picture along the channels of a video": "hunyuan_skyreels_i2v",
    "ControlNet": "FluxControlNetPipeline",
    "image to image": "StableDiffusion3Img2ImgPipeline",
    "several pictures": "QwenImageEditPlusPipeline",
    "video": "ltx",
    "audio": "stable_audio_3",
    "audio and video": "ltx2",
    "UNet with epsilon": "sd",
    "UNet with v": "sd_ddim_v",
    "distilled": "Flux2KleinPipeline",
}
NEED_TORCHVISION = ("a picture along the sequence, Qwen", "several pictures")  # to load the processors of Qwen2.5-VL
ENDS = {"audio": "wav", "tensor": "npy", "tensors": "npy"}


def prompt_file(entry: Entry, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Three rows with what the entry is given, and which columns are which inputs."""
    rows, inputs = [], {}
    for place, prompt in enumerate(entry.prompts):
        row: dict[str, Any] = {"prompt": prompt}
        for name, value in entry.inputs(place).items():
            media = as_input(name, value)
            assert isinstance(media, Media)
            files = []
            for number, part in enumerate(media.parts):
                assert isinstance(part, bytes)
                files.append(f"{name}{place}_{number}.{ENDS.get(media.kind, 'png')}")
                (folder / files[-1]).write_bytes(part)
            row[f"{name}_file"] = files if media.kind in ("images", "video", "tensors") else files[0]
            inputs[name] = {"column": f"{name}_file", "kind": media.kind}
        rows.append(row)
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file, inputs


def train_and_draw(config: dict[str, Any], *, resume: bool = False) -> None:
    """A run in one of its processes; then the first prompt is drawn by the policy, still under its engine."""
    from flowsteer.rl.config import parse_config
    from flowsteer.rl.start import start
    from flowsteer.rl.train import train

    run = start(parse_config(config), resume=resume, quiet=True)
    try:
        train(run)
        run.export()
        row = run.worker.prompts.row(0)
        pipeline: Any = run.worker.pipeline
        with run.policy.using(run.policy.best):
            picture = drawn(pipeline, row.text, dict(row.inputs), settings(config))
        if run.engine.is_main:
            save_file({"drawn": picture.contiguous()}, run.folder / "drawn.safetensors")
    finally:
        run.close()


def settings(config: dict[str, Any]) -> dict[str, Any]:
    rollout = config["rollout"]
    return {name: rollout[name] for name in ("num_inference_steps", "guidance_scale", "negative_prompt")}


def test_prompts_of_unlike_length_are_evaluated_under_zero_3(make_config: Make, tmp_path: Path) -> None:
    """Qwen-Image does not pad. Only the first of two processes has prompts that cannot share a batch."""
    zoo.build("qwen").save_pretrained(tmp_path / "model")
    train, uneven = tmp_path / "train.txt", tmp_path / "uneven.txt"
    train.write_text("a cat\na dog\n", encoding="utf-8")
    uneven.write_text("a cat\na cat\ntwo blue boats\na dog\na small red boat\na dog\n", encoding="utf-8")
    sizes = {
        "num_inference_steps": STEPS,
        "prompts_per_step": 2,
        "group_size": 2,
        "batch_size": 2,
        "plan": {"name": "all"},
    }
    overrides: dict[str, Any] = {
        "model": {"path": str(tmp_path / "model"), "lora": {"rank": 4, "alpha": 8}, "height": 16, "width": 16},
        "prompts.train": str(train),
        "rollout": sizes,
        "rewards": {"zoo.training:brightness": {}},
        "algorithm.updates_per_rollout": 1,
        "engine": {"device": "cpu", "strategy": "zero3", "timeout_s": 60},
        "evaluation": {"prompts": str(uneven), "num_prompts": 6, "num_inference_steps": 2},
    }
    run = launch.run(make_config(tmp_path / "run", num_steps=1, **overrides), processes=2)
    for step in (0, 1):
        table = json.loads((run / "evaluations" / f"step_{step:06d}.json").read_text())
        assert all(score is not None for (score,) in table["scores"]["total"])
        assert (run / "evaluations" / f"step_{step:06d}.png").exists()


@pytest.mark.parametrize(
    ("kind", "strategy"), [(kind, "zero2") for kind in KINDS] + [(kind, "fsdp2") for kind in KINDS]
)
def test_it_is_trained_exported_and_redrawn(kind: str, strategy: str, make_config: Make, tmp_path: Path) -> None:
    entry = ENTRIES[KINDS[kind]]
    model: dict[str, Any] = {"path": str(tmp_path / "model"), "lora": {"rank": 4, "alpha": 8}, **entry.size}
    if kind in NEED_TORCHVISION:
        model |= {"path": KINDS[kind], "adapter": "zoo.entries:from_zoo"}
    else:
        built(entry).save_pretrained(tmp_path / "model")
    file, inputs = prompt_file(entry, tmp_path)
    call = {name: value for name, value in entry.call.items() if name not in ("negative_prompt", "output_type")}
    rollout: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "guidance_scale": entry.guided or 1.0,
        "negative_prompt": entry.call.get("negative_prompt"),
        "prompts_per_step": 2,
        "group_size": 2,
        "batch_size": 2,
        "plan": {"name": "all"},
    }
    if kind.startswith("UNet"):
        rollout["kernel"] = {"name": "ddim"}
    overrides: dict[str, Any] = {
        "model": model | {"call": call},
        "prompts.train": str(file),
        "rollout": rollout,
        "rewards": {f"zoo.training:{'loudness' if kind == 'audio' else 'brightness'}": {}},
        "algorithm.updates_per_rollout": 1,
        "engine.strategy": strategy,
        "optimizer.epsilon": 1e-12,
        "optimizer.learning_rate": 1e-2,
        **({"inputs": inputs} if inputs else {}),
    }
    config = make_config(tmp_path / "run", num_steps=2, **overrides)
    run = launch.run(config, processes=2, work=train_and_draw)
    after = load_file(run / "drawn.safetensors")["drawn"]

    plain: Any = built(entry) if kind in NEED_TORCHVISION else DiffusionPipeline.from_pretrained(tmp_path / "model")
    plain.set_progress_bar_config(disable=True)
    if getattr(plain, "safety_checker", None) is not None:
        plain.safety_checker = None
    lifted = FlowPipeline(plain, **entry.size, call_kwargs=call)
    first = {name: as_input(name, value) for name, value in entry.inputs(0).items()}
    lifted.prepare([entry.prompts[0]], inputs=[first], **settings(config))  # whether it wants a bare text

    def by_diffusers() -> torch.Tensor:
        arguments = lifted.call_arguments(
            [entry.prompts[0]], inputs=[first], **settings(config)
        )  # some change their lists
        with fixed_randomness(torch.device("cpu")), torch.no_grad():
            return as_tensor(plain(**arguments), type(plain).__name__)

    base = by_diffusers()
    load_lora(plain, run / "export")
    for name in lifted.denoisers:
        for key, parameter in getattr(plain, name).named_parameters():
            parameter.requires_grad_(
                ".lora_" in key
            )  # as in training: torch multiplies by which weights want a gradient
    assert torch.equal(by_diffusers(), after)
    assert (after - base).abs().max() > 1e-4
