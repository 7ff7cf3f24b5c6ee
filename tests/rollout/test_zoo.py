"""Every pipeline of the zoo: lifted and checked against itself, bit for bit, or refused with a sentence.

The report holds that prompts and pictures are seen, that steps can be taken by themselves and rows in other batches, and that
the lifted steps draw what the pipeline draws.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from zoo.entries import Entry, entries, lifted

from flowsteer.rollout.lifting.loop import fixed_randomness
from flowsteer.rollout.lifting.pipeline import as_tensor
from flowsteer.rollout.lifting.selfcheck import Report, check
from flowsteer.rollout.steps.solvers import euler

ENTRIES = entries()
CLIPS = r"DDIMScheduler with clip_sample=True clips what it predicts; train with model.scheduler=\{clip_sample: false\}"
LINSPACE = r"with timestep_spacing=linspace steps to other levels than it visits; train with model.scheduler="
KARRAS = (
    r"with use_karras_sigmas=True has noise levels of its own; train with model.scheduler=\{use_karras_sigmas: false\}"
)
BEYOND = r"has noise levels \[.*\]; they must fall, from at most 1 to at least 0"
OTHER_DDIM = r"has noise levels that DDIMScheduler.from_config does not reproduce"
CONSISTENCY = r"asks its scheduler for what DDIMScheduler, which stands in for the pipeline's own, cannot do"
PART = r"steps a part of what it starts from noise"
IMPURE = r"FAIL  purity +steps by themselves differ"

REFUSED: dict[str, str] = {
    "FluxControlInpaintPipeline": r"uses noise, which is made of the noise that it starts with",
    "Flux2KleinKVPipeline": IMPURE,
    "HunyuanImagePipeline": IMPURE,  # guided: its guider keeps momentum
    "QwenImage21Pipeline": r"QwenImage21Pipeline has no guidance: guidance_scale must be 1",
    "QwenImageLayeredPipeline": r"draws a list, not a batch of pictures",  # several layers of each picture
    "SanaSprintPipeline": r"SCMScheduler has a noise schedule of another kind",
    "SanaSprintImg2ImgPipeline": r"SCMScheduler has a noise schedule of another kind",
    "Cosmos2TextToImagePipeline": BEYOND,
    "sd_latent_upscale": BEYOND,
    "stable_audio_3_audio2audio": BEYOND,
    "any_flow_far": r"denoises 3 times in a loop around its denoising loop",
    "hunyuan_video_i2v_token_replace": PART,
    "sana_i2v": PART,
    "ltx_condition": IMPURE,
    "ltx_condition_video": IMPURE,
    "stable_audio": r"predicts v_prediction on noise levels of its own",
    "ace_step": IMPURE,  # guided: its guidance keeps momentum
    "ace_step_reference": IMPURE,
    "lcm": CONSISTENCY,
    "lcm_img2img": CONSISTENCY,
    **dict.fromkeys(("sd_ddim_clip_sample", "sdxl_ddim_clip_sample", "pixart_sigma_ddim_clip_sample"), CLIPS),
    **dict.fromkeys(("sd_ddim_linspace", "sdxl_ddim_linspace", "sdxl_euler_linspace", "allegro"), LINSPACE),
    **dict.fromkeys(
        ("sd_euler_karras", "sd_dpm_karras", "sdxl_euler_karras", "sdxl_dpm_karras", "stable_video"), KARRAS
    ),
    "sdxl_euler_v_zero_snr": OTHER_DDIM,
}
"""Entries that are refused, and what is said."""

LEFT_OUT: dict[str, str] = {
    "VisualClozeGenerationPipeline": "it is given a grid of pictures, and its prompt under another name",
    "ltx2_condition": "it is given objects of a class of its own",
}
"""Entries that no prompt file can be written for, and why."""

_TRAILING = (
    "diffusers' DDIM steps by t - 1000 // n, here to the next timestep, which is one off where 1000 / n is not whole"
)
CLOSE: dict[str, str] = {
    **dict.fromkeys(("sd_ddim_trailing", "sdxl_ddim_trailing", "sdxl_euler_trailing"), _TRAILING),
    **dict.fromkeys(("sd_ddim_v_zero_snr", "sdxl_ddim_v_zero_snr"), _TRAILING),
}
"""Entries that are equal up to a small difference, and why."""


def report_of(entry: Entry, guidance_scale: float) -> Report:
    pipeline, inputs, negative = lifted(entry)
    arguments: dict[str, Any] = {"guidance_scale": guidance_scale, "negative_prompt": negative, "inputs": inputs}
    return check(pipeline, prompts=entry.prompts, **arguments)


def verdict(name: str, guidance_scale: float) -> str:
    """``bits``, a distance, or why it is refused."""
    try:
        report = report_of(ENTRIES[name], guidance_scale)
    except ValueError as error:
        return str(error)
    if not report.ok:
        return report.text()
    parity = next(finding.detail for finding in report.findings if finding.name == "parity")
    return "bits" if "bit for bit" in parity else parity


def holds(name: str, guidance_scale: float) -> None:
    said = verdict(name, guidance_scale)
    if name in REFUSED:
        assert re.search(REFUSED[name], said), said
    elif name in CLOSE:
        (distance,) = re.findall(r"equals \w+\(...\).* to (\S+) \(allowed", said)
        assert float(distance) < 2e-3, said
    else:
        assert said == "bits", said


CHECKED = [name for name in ENTRIES if name not in LEFT_OUT]
LONG = "QwenImageEditInpaintPipeline"  # half a minute: it makes a million pixels of every picture


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == LONG else ()) for name in CHECKED]
)
def test_a_pipeline_is_lifted_or_refused(name: str) -> None:
    holds(name, ENTRIES[name].guided or 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHECKED if ENTRIES[name].guided])
def test_a_pipeline_is_lifted_without_guidance(name: str) -> None:
    holds(name, 1.0)


def test_lists_name_entries() -> None:
    assert {*REFUSED, *LEFT_OUT, *CLOSE} <= ENTRIES.keys()
    assert len(CHECKED) - len(REFUSED) - len(CLOSE) >= 150


@pytest.mark.parametrize("name", ["mochi", "longcat_audio"])
def test_rising_levels_are_those_that_the_pipeline_steps_by(name: str) -> None:
    """Its own scheduler adds (s' - s) v with s = 1 - sigma rising; the same numbers in another order of sums."""
    entry = ENTRIES[name]
    pipeline, _, _ = lifted(entry)
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.0}
    latents, row = pipeline.own_start(entry.prompts[0], **settings)
    assert row.schedule.rising
    assert row.schedule.sigma[0] == 1
    with torch.no_grad(), fixed_randomness(latents.device):
        own = as_tensor(pipeline.pipe(**pipeline.call_arguments([entry.prompts[0]], **settings))[0], name)
        for index in range(3):
            step = pipeline.begin(latents, index, row)
            latents = step.finish(euler(step.velocity, latents, row.schedule, index)[0])
    torch.testing.assert_close(pipeline.decode(latents, row), own, rtol=0, atol=1e-5 * float(own.abs().max()))
