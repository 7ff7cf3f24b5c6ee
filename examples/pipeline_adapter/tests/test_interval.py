"""With the whole interval the adapter is the lifted pipeline, bit for bit; outside of a narrower one nothing is guided."""

from __future__ import annotations

import pytest
import torch
from interval_guidance import IntervalGuidedSD3

from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.selfcheck import check

PROMPTS = ["a red circle", "two blue squares"]


def adapter(**call: float) -> IntervalGuidedSD3:
    return IntervalGuidedSD3(path="embedded", dtype=torch.float32, device="cpu", height=None, width=None, call=call)


def velocities(pipeline, scale: float) -> list[torch.Tensor]:
    conditioning = pipeline.prepare(PROMPTS, num_inference_steps=3, guidance_scale=scale)
    latents = torch.randn((2, *conditioning.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [pipeline.begin(latents, index, conditioning).velocity for index in range(3)]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_with_the_whole_interval_it_is_the_lifted_pipeline(scale: float) -> None:
    mine, lifted = adapter(), FlowPipeline.load("embedded")
    assert all(torch.equal(a, b) for a, b in zip(velocities(mine, scale), velocities(lifted, scale), strict=True))
    conditioning = lifted.prepare(PROMPTS, num_inference_steps=3, guidance_scale=scale)
    latents = torch.randn((2, *conditioning.latent_shape))
    assert torch.equal(mine.decode(latents, conditioning), lifted.decode(latents, conditioning))


def test_only_the_interval_is_guided() -> None:
    """The schedule of three steps has the sigmas 1, 0.5 and 0.001."""
    guided, plain, mine = (
        velocities(adapter(), 4.0),
        velocities(adapter(), 1.0),
        velocities(adapter(low=0.2, high=0.8), 4.0),
    )
    assert torch.equal(mine[0], plain[0])
    assert torch.equal(mine[1], guided[1])
    assert torch.equal(mine[2], plain[2])
    assert not torch.equal(guided[1], plain[1])


def test_it_can_be_trained() -> None:
    report = check(adapter(low=0.2, high=0.8), guidance_scale=4.0)
    assert report.ok, report.text()


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.call has hihg; allowed are low, high, max_sequence_length"):
        adapter(hihg=0.8)
