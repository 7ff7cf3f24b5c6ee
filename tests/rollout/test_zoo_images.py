"""The zoo is alive: what a pipeline of it draws depends on the prompt, on every picture it is given, and on guidance."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from zoo.entries import NOT_BUILT, Entry, arguments, built, entries

pytestmark = pytest.mark.slow  # of the zoo itself; test_zoo.py holds each pipeline of it against itself

ENTRIES = {name: entry for name, entry in entries().items() if name.endswith("Pipeline")}
NOTICEABLE = 1e-4  # of values between 0 and 1: a hundred times the rounding errors of pictures this size


def draw(pipe: Any, wanted: dict[str, Any]) -> torch.Tensor:
    """All values of what the pipeline gives for one row in three steps, [N]."""
    ours = {
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
        "return_dict": False,
    }
    takes = inspect.signature(type(pipe).__call__).parameters
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some classes draw from the global state what they encode of a picture
        output = pipe(**wanted, **{name: value for name, value in ours.items() if name in takes})[0]
    return torch.cat([torch.as_tensor(part).float().flatten() for part in output])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


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
    assert type(pipe).__name__ == name
    assert uninitialised(pipe) == []


@pytest.mark.parametrize("name", ENTRIES)
def test_what_a_pipeline_draws_depends_on_all_it_is_told(name: str):
    entry: Entry = ENTRIES[name]
    pipe, wanted = built(entry), arguments(entry, 0)
    first = draw(pipe, wanted)
    assert first.isfinite().all()
    others: dict[str, Any] = {entry.prompt_name: entry.prompts[1], **entry.inputs(1)}
    if entry.guided is not None and entry.guidance_name != "guider":
        others[entry.guidance_name] = entry.guided + 1
    changes = {argument: distance(first, draw(pipe, wanted | {argument: other})) for argument, other in others.items()}
    assert {argument for argument, change in changes.items() if change < NOTICEABLE} == set(), changes


@pytest.mark.parametrize("name", ENTRIES)
def test_the_prompts_of_an_entry_are_of_one_length(name: str):
    assert len({len(prompt) for prompt in ENTRIES[name].prompts}) == 1


def test_no_class_is_both_built_and_left_out():
    assert ENTRIES.keys().isdisjoint(NOT_BUILT)
    assert all(hasattr(diffusers, name) for name in (*ENTRIES, *NOT_BUILT))
