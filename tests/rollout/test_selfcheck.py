"""The self-check lets sound pipelines pass and names what is wrong with the others."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest
import torch
import zoo
from diffusers import StableDiffusion3Img2ImgPipeline

from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.selfcheck import Finding, Report, _levels, check
from flowsteer.rollout.lifting.step import LiftedStep


def findings(report: Report) -> dict[str, Finding]:
    return {finding.name: finding for finding in report.findings}


def check_variant(tmp_path, name, *changes) -> Report:
    return check(zoo.lifted("sd3", zoo.build_variant(tmp_path, name, *changes)))


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_sound_pipelines_pass(name):
    report = check(zoo.shared(name), guidance_scale=zoo.ZOO[name].guided)
    assert report.ok, report.text()
    found = findings(report)
    assert list(found) == ["lifts", "batch axes", "noise levels", "prompts", "purity", "sub-batch", "parity"]
    assert found["parity"].detail.endswith("bit for bit")
    assert found["purity"].detail.endswith("bit for bit")
    assert len(report.text().splitlines()) == 8
    assert "can be trained" in report.text()


def test_steps_of_another_sampler_are_replaced_for_the_comparison():
    """Wan's checkpoints come with UniPC."""
    pipe = zoo.build("wan")
    pipe.scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    report = check(zoo.lifted("wan", pipe))
    assert report.ok, report.text()
    assert "with Euler steps in place of UniPCMultistepScheduler's bit for bit" in findings(report)["parity"].detail


def test_noise_drawn_inside_the_loop(tmp_path):
    noise = "                noise_pred = noise_pred + 0.01 * torch.randn_like(noise_pred)\n"
    report = check_variant(tmp_path, "noisy", (zoo.STEP, noise + zoo.STEP))
    assert not report.ok
    assert "the same call twice differs: noise drawn inside the loop" in findings(report)["purity"].detail
    assert "must not be trained" in report.text()


def test_a_local_that_the_loop_changes(tmp_path):
    decay = "                prompt_embeds = 0.9 * prompt_embeds\n"
    report = check_variant(tmp_path, "decaying", (zoo.STEP, decay + zoo.STEP))
    assert not report.ok
    assert findings(report)["purity"].detail.endswith("; the loop changes prompt_embeds")
    assert not findings(report)["parity"].ok


def test_an_attribute_that_the_loop_changes(tmp_path):
    decay = "                self._guidance_scale = 0.5 * self._guidance_scale\n"
    pipe = zoo.build_variant(tmp_path, "fading", (zoo.STEP, decay + zoo.STEP))
    report = check(zoo.lifted("sd3", pipe), guidance_scale=8.0)
    assert findings(report)["purity"].detail.endswith("; the loop changes self._guidance_scale")


def test_a_cache_from_the_first_step(tmp_path):
    report = check_variant(tmp_path, "cached", (zoo.STEP, zoo.CACHE + zoo.STEP))
    assert not report.ok
    assert "'kept'" in findings(report)["runs"].detail


def test_a_network_with_a_memory():
    pipeline = zoo.lifted("sd3")
    transformer, calls = pipeline.denoisers["transformer"], []

    def call(name, *args, **kwargs):
        calls.append(name)
        return (transformer(*args, **kwargs)[0] * (1 + 0.1 * len(calls)),)

    pipeline.route(call)
    report = check(pipeline)
    assert not findings(report)["purity"].ok
    assert not findings(report)["sub-batch"].ok


def test_prompts_without_an_effect():
    pipeline = zoo.lifted("sd3")
    with torch.no_grad():
        for encoder in (pipeline.pipe.text_encoder, pipeline.pipe.text_encoder_2, pipeline.pipe.text_encoder_3):
            for parameter in encoder.parameters():
                parameter.zero_()
    report = check(pipeline)
    assert findings(report)["prompts"].detail.endswith("two prompts differ by 0")
    assert [name for name, finding in findings(report).items() if not finding.ok] == ["prompts"]


class Adapter:
    """A hand-written pipeline: the protocol and no more."""

    def __init__(self, inner, factor=1.0):
        self.inner, self.factor = inner, factor
        self.denoisers = inner.denoisers
        self.prepare, self.decode = inner.prepare, inner.decode

    def begin(self, latents, index, conditioning):
        scale = 1.0 if len(latents) > 2 else self.factor
        step = self.inner.begin(latents, index, conditioning)
        return LiftedStep(scale * step.velocity, step.finish)


def test_an_adapter_is_held_to_the_same():
    report = check(Adapter(zoo.shared("flux")))
    assert report.ok, report.text()
    assert "a hand-written adapter" in findings(report)["lifts"].detail
    report = check(Adapter(zoo.shared("flux"), factor=1.1))
    assert [name for name, finding in findings(report).items() if not finding.ok] == ["sub-batch"]


def test_findings_can_be_added():
    report = Report(title="X", findings=(Finding(name="a", ok=True, detail="fine"),))
    assert report.ok
    longer = report.with_findings([Finding(name="targets", ok=False, detail="nothing matches to_x")])
    assert not longer.ok
    assert longer.text().splitlines() == [
        "X: must not be trained: see FAIL",
        "  ok    a        fine",
        "  FAIL  targets  nothing matches to_x",
    ]


def test_one_prompt_is_too_few():
    with pytest.raises(ValueError, match="at least two different prompts"):
        check(zoo.shared("sd3"), prompts=["one", "one"])


def image_to_image(value: float) -> FlowPipeline:
    pipe = StableDiffusion3Img2ImgPipeline(**zoo.build("sd3").components)
    image = torch.full((1, 3, 16, 16), value)
    return FlowPipeline(
        pipe, height=16, width=16, call_kwargs={"image": image, "strength": 0.5, "max_sequence_length": 32}
    )


def test_image_to_image_starts_from_its_picture():
    """Its steps begin in the middle: samples start from that level of noise on the encoded picture."""
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0}
    starts = {}
    for value in (0.2, 0.8):
        pipeline = image_to_image(value)
        report = check(pipeline, num_inference_steps=4)
        assert report.ok, report.text()
        assert "samples start from noise on what the pipeline prepares" in report.text()
        row = pipeline.prepare(["a red circle"], **settings)
        sigma = row.schedule.sigma[0].item()
        assert 0.1 < sigma < 0.9
        own, _ = pipeline.own_start("a red circle", **settings)
        noise = (own - row.base) / sigma  # the pipeline's own draw
        starts[value] = row.start(noise)[0]
        assert torch.allclose(starts[value], own, atol=1e-6)
        assert abs(noise.std().item() - 1) < 0.2
    assert (starts[0.2] - starts[0.8]).abs().max() > 0.1


def test_a_late_start_without_a_picture_is_refused():
    late = replace(zoo.shared("sd3").prepare(["a"], num_inference_steps=2, guidance_scale=1.0), base=None)
    late = replace(late, schedule=replace(late.schedule, sigma=0.5 * late.schedule.sigma))
    assert _levels(late, lifted=True).ok  # it is the pipeline's own start
    finding = _levels(late, lifted=False)
    assert not finding.ok
    assert "the first level must then be above 0.9" in finding.detail
