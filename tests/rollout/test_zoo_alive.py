"""The zoo is alive: what a pipeline draws depends on the prompt, on guidance and on every picture, and on nothing else."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from zoo import audio, epsilon_images, epsilon_sd, epsilon_sdxl, epsilon_video, video, video_easyanimate
from zoo.entries import NOT_BUILT, Entry, built, entries

pytestmark = pytest.mark.slow  # of the zoo itself; test_zoo.py holds each pipeline of it against itself

ENTRIES = entries()
APART = 1e-4
"""Results are in [0, 1]; rounding changes those of networks this small by less than 1e-6."""

ALWAYS_GUIDED = {"hunyuan_dit_pag"}
"""diffusers repeats the picture's size for three parts of a batch, though there are two without guidance."""


def arguments(pipe: Any) -> Any:
    """The names that the pipeline's call knows."""
    return inspect.signature(type(pipe).__call__).parameters


def guidance(pipe: Any, entry: Entry, value: float) -> dict[str, float]:
    """The argument that switches guidance on; where the pipeline has a guider, the guider's own scale is set."""
    if entry.guidance_name == "guider":
        pipe.guider.guidance_scale = value
        return {}
    return {entry.guidance_name: value}


def result(
    pipe: Any, entry: Entry, prompt: str, inputs: dict[str, Any], guided: float | None
) -> torch.Tensor:  # the picture, video or sound of one call
    known = arguments(pipe)
    further: dict[str, Any] = {"output_type": "pt"} if "output_type" in known else {}
    if entry.prompt_name in known:
        further[entry.prompt_name] = prompt
    if entry.guidance_name == "true_cfg_scale":
        further["negative_prompt"] = ""  # without one these classes leave guidance off
    if guided is not None:
        further |= guidance(pipe, entry, guided)
    with torch.random.fork_rng():
        torch.manual_seed(3)  # some pipelines encode their pictures with noise of the global generator
        output = pipe(
            **further | entry.call | entry.size | inputs,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(2),
            return_dict=False,
        )[0]
    return torch.cat([torch.as_tensor(part).float().flatten() for part in output])


def apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > APART)


def uninitialised(pipe: DiffusionPipeline) -> list[str]:
    return [
        f"{component}.{name}"
        for component, network in pipe.components.items()
        if isinstance(network, nn.Module)
        for name, parameter in network.named_parameters()
        if not parameter.isfinite().all()
    ]


@pytest.fixture
def marked_memory():
    """While this lasts, memory that nobody has written to is not a number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_weight_of_a_pipeline_is_initialised(name: str, marked_memory: None):
    pipe = built(ENTRIES[name])
    assert uninitialised(pipe) == []


@pytest.mark.parametrize("name", ENTRIES)
def test_result_depends_on_all_that_is_given(name: str) -> None:
    entry = ENTRIES[name]
    pipe = built(entry)
    (prompt, other, _), inputs, guided = entry.prompts, entry.inputs(0), entry.guided
    first = result(pipe, entry, prompt, inputs, guided)

    assert torch.isfinite(first).all()
    assert torch.equal(result(built(entry), entry, prompt, inputs, guided), first), "the same at every call"
    if entry.prompt_name in arguments(pipe):
        assert apart(result(pipe, entry, other, inputs, guided), first), "prompt"
    for argument, value in entry.inputs(1).items():
        assert apart(result(pipe, entry, prompt, inputs | {argument: value}, guided), first), argument
    if name in ALWAYS_GUIDED:
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            result(pipe, entry, prompt, inputs, 1.0)
    elif guided is not None:
        assert apart(result(pipe, entry, prompt, inputs, 1.0), first), "guidance"


@pytest.mark.parametrize("name", ENTRIES)
def test_prompts_are_of_one_length(name: str) -> None:
    assert len({len(prompt) for prompt in ENTRIES[name].prompts}) == 1


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_schedulers_differ(base: str) -> None:
    """A setting of a scheduler that changed nothing would prove nothing."""
    module = {"sd": epsilon_sd, "sdxl": epsilon_sdxl}[base]
    names = [base, *(f"{base}_{name}" for name in module.SCHEDULERS if f"{base}_{name}" in ENTRIES)]
    results = {}
    for name in names:
        entry = ENTRIES[name]
        results[name] = result(built(entry), entry, entry.prompts[0], {}, entry.guided)
    for one, other in itertools.combinations(names, 2):
        assert apart(results[one], results[other]), (one, other)


def test_classes_left_out_exist() -> None:
    modules = (epsilon_images, video, audio, epsilon_video)
    names = [*NOT_BUILT, *(name for module in modules for name in module.NOT_BUILT)]
    assert names
    assert [name for name in names if not hasattr(diffusers, name)] == []


def test_easyanimate_control_cannot_be_called() -> None:
    """Why it is left out; as soon as this fails, it can be built as the others are."""
    pipe: Any = video_easyanimate.of(diffusers.EasyAnimateControlPipeline, 3 * video_easyanimate.LATENTS)()
    entry = ENTRIES["easyanimate"]
    with pytest.raises(TypeError, match="text_encoder_index"):
        pipe(prompt=entry.prompts[0], **entry.call, **entry.size, num_inference_steps=3)
