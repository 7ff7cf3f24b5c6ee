"""Prompts that are encoded together: the same bits in any company, in few passes, and one by one where that cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import Make
from torch import nn

from flowsteer.rl.command.check_model import encoding_findings
from flowsteer.rl.config import Config
from flowsteer.rl.start import start
from flowsteer.rollout.data.prompts import Row
from flowsteer.rollout.lifting.company import TOGETHER, Company, place_of
from flowsteer.rollout.lifting.conditioning import Conditioning, difference, same
from flowsteer.rollout.lifting.loading import EMBEDDED, SHIPPED, load_diffusers
from flowsteer.rollout.lifting.pipeline import FlowPipeline

PROMPTS = ["a", *(f"{number} red circles and a blue one" for number in range(TOGETHER + 2))]
SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}


def fresh(name: str, together: int = TOGETHER) -> FlowPipeline:
    """A pipeline with a memory of its own."""
    pipe = load_diffusers(name) if name == EMBEDDED else zoo.shared(name).pipe
    return FlowPipeline(pipe, together=together, call_kwargs=SHIPPED.get(name))


@contextmanager
def counted(pipeline: FlowPipeline) -> Iterator[list[int]]:
    """How many rows each pass of the text encoders has."""
    rows: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(len(next(iter([*args, *kwargs.values()]))))

    encoders = pipeline.loop.encoders.values()
    handles = [encoder.register_forward_pre_hook(note, with_kwargs=True) for encoder in encoders]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def unlike(one: Conditioning, other: Conditioning) -> list[str]:
    """The values of two rows that are not the same bits, but for the noise of the prologue's own draw."""
    assert difference(one, other) is None
    return [
        str(key) for key in one.layout if key not in one.noise_names and not same(one.values[key], other.values[key])
    ]


@pytest.mark.parametrize("name", [EMBEDDED, pytest.param("wan", marks=pytest.mark.slow)])  # CLIPs; UMT5
def test_a_row_has_the_same_bits_in_any_company(name):
    pipeline, other = fresh(name), fresh(name)
    assert pipeline.one_by_one(PROMPTS[0], **SETTINGS) == ""
    whole = pipeline.prepare(PROMPTS, **SETTINGS)
    backwards = other.prepare(PROMPTS[::-1], **SETTINGS)
    assert isinstance(whole, Conditioning)
    assert isinstance(backwards, Conditioning)
    for place in (0, 1, len(PROMPTS) - 1):
        row = whole.take([place])
        assert unlike(row, backwards.take([len(PROMPTS) - 1 - place])) == []
        alone = fresh(name).prepare([PROMPTS[place]], **SETTINGS)
        assert isinstance(alone, Conditioning)
        assert unlike(row, alone) == [], "a prompt by itself has companions, too"


def test_passes_have_eight_rows_each():
    pipeline = fresh(EMBEDDED)
    pipeline.prepare(["before"], **SETTINGS)
    with counted(pipeline) as rows:
        pipeline.prepare(PROMPTS, **SETTINGS)
    assert set(rows) == {TOGETHER}
    with counted(pipeline) as rows:
        pipeline.prepare(PROMPTS[::-1], **SETTINGS)
    assert rows == []


def test_without_padding_prompts_are_encoded_one_by_one():
    pipeline, apart = fresh("qwen"), fresh("qwen", together=1)
    (found,) = encoding_findings(pipeline, **SETTINGS)
    assert found.ok
    assert found.detail.startswith("one by one: prompts of unlike lengths do not go together: ")
    one, other = (own.prepare([PROMPTS[1]], **SETTINGS) for own in (pipeline, apart))
    assert isinstance(one, Conditioning)
    assert isinstance(other, Conditioning)
    assert unlike(one, other) == []
    (found,) = encoding_findings(fresh(EMBEDDED), **SETTINGS)
    assert found.detail == f"{TOGETHER} prompts at once, with the same bits in any company"


def test_rows_that_share_a_vector_are_encoded_one_by_one():
    assert "widths that are no multiple of 16" in fresh("sd3").one_by_one(PROMPTS[0], **SETTINGS)


def test_where_places_matter_a_row_keeps_its_own():
    rows = [Row.of(prompt, {}) for prompt in PROMPTS]
    for order in (rows, rows[::-1], rows[3:7]):
        batches = list(Company(anywhere=False).batches(order, TOGETHER))
        assert all(len(filled) == TOGETHER for filled, _ in batches)
        assert all(place == place_of(row, TOGETHER) for _, places in batches for place, row in places.items())
        assert {row for _, places in batches for row in places.values()} == {*order}
        assert len(list(Company(anywhere=True).batches(order, TOGETHER))) == math.ceil(len(order) / TOGETHER)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1), slice(3, 7)])
def test_what_is_kept_of_a_batch_is_what_its_own_place_gave(order: slice, monkeypatch: pytest.MonkeyPatch):
    """Here each place gives its number. A row also stands at other places, where one is filled up with it."""
    preparer, rows = fresh(EMBEDDED).preparer, [Row.of(prompt, {}) for prompt in PROMPTS][order]
    monkeypatch.setattr(preparer, "company", lambda *_: Company(anywhere=False))
    monkeypatch.setattr(preparer, "batched", lambda rows, settings: [*range(len(rows))])
    monkeypatch.setattr(preparer.loop, "kept", lambda prepared: prepared)
    settings: Any = "the same"
    assert preparer.rows(rows, settings) == [place_of(row, TOGETHER) for row in rows]


def test_a_step_encodes_its_prompts_before_its_first_batch(make_config: Make, tmp_path: Path):
    settings = {"model.path": EMBEDDED, "rollout.prompts_per_step": 4, "rollout.batch_size": 4, "rollout.group_size": 4}
    run = start(Config.model_validate(make_config(tmp_path / "run", **settings)), quiet=True)
    pipeline = run.policy.pipeline
    assert isinstance(pipeline, FlowPipeline)
    pipeline.forget()
    with counted(pipeline) as rows:
        run.worker.sample(0)
    passes = len(rows) / len(pipeline.loop.encoders)
    run.close()
    assert set(rows) == {TOGETHER}
    assert passes < 4, "not one for each prompt"


def test_the_number_of_processes_does_not_matter(make_config: Make, tmp_path: Path):
    sizes = {"rollout.prompts_per_step": 4, "rollout.batch_size": 4, "rollout.group_size": 4}
    run = start(Config.model_validate(make_config(tmp_path / "run", **{"model.path": EMBEDDED}, **sizes)), quiet=True)
    worker, pipeline = run.worker, run.policy.pipeline
    assert isinstance(pipeline, FlowPipeline)

    def drawn(num_processes: int) -> dict[int, torch.Tensor]:
        found = {}
        for process in range(num_processes):
            pipeline.forget()
            worker.num_processes, worker.process_index = num_processes, process
            for rollout in worker.sample(0):
                found |= dict(zip(rollout.sample.tolist(), rollout.latents))
        return found

    whole, shared = drawn(1), drawn(2)
    run.close()
    assert whole.keys() == shared.keys()
    assert all(torch.equal(whole[sample], shared[sample]) for sample in whole)
