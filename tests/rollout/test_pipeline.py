"""The lifted pipeline against the pipeline itself, over the zoo."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
import zoo
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

from flowsteer.rollout.lifting import selfcheck
from flowsteer.rollout.lifting.conditioning import (
    Conditioning,
    Count,
    ListRows,
    Nested,
    Rows,
    UnlikeConditioning,
    find_layout,
)
from flowsteer.rollout.lifting.loading import load_diffusers
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.schedules import read_schedule, steppable
from flowsteer.rollout.lifting.selfcheck import check
from flowsteer.rollout.lifting.several import Several

FAMILIES = list(zoo.ZOO)
PROMPT, OTHER = "a red circle on a blue square", "two dogs"
STEPS = 3
# Another batch size may be served by other kernels: up to 5e-7 here, 4e-5 over the 62 pipelines once measured.
ROWS = {"rtol": 0, "atol": 5e-5}


def noise(conditioning: Conditioning, seed: int = 3) -> Tensor:
    shape = (len(conditioning), *conditioning.latent_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(conditioning.latent_dtype)


@torch.no_grad()
def draw(pipeline: FlowPipeline, latents: Tensor, conditioning: Conditioning) -> tuple[Tensor, list[Tensor]]:
    """The images by Euler or DDIM (eta 0), in the operations and precisions of diffusers' schedulers; the velocities."""
    sigma, alpha = conditioning.schedule.sigma, conditioning.schedule.alpha
    velocities = []
    for index in range(conditioning.schedule.num_steps):
        step = pipeline.begin(latents, index, conditioning)
        velocity = step.velocity
        velocities.append(velocity)
        if conditioning.schedule.prediction == "velocity":
            after = latents.float() + (sigma[index + 1] - sigma[index]) * velocity
        else:
            denoised = (latents - sigma[index] * velocity) / alpha[index]
            after = alpha[index + 1] * denoised + sigma[index + 1] * velocity
        latents = step.finish(after.to(velocity.dtype))
    return pipeline.decode(latents, conditioning), velocities


def plainly(name: str, pipe, prompts: list[str], latents: Tensor, scale: float) -> Tensor:
    """The unmodified pipeline, called as its user would."""
    family = zoo.ZOO[name]
    arguments = {**family.size, **family.call_kwargs, family.guidance_name: family.off if scale == 1 else scale}
    if family.guidance_name == "true_cfg_scale":
        arguments["negative_prompt"] = [""] * len(prompts)
    return pipe(
        prompt=prompts,
        num_inference_steps=STEPS,
        latents=latents.clone(),
        output_type="pt",
        return_dict=False,
        **arguments,
    )[0].float()


def prepare(pipeline: FlowPipeline, prompts: list[str], scale: float = 1.0) -> Conditioning:
    return pipeline.prepare(prompts, num_inference_steps=STEPS, guidance_scale=scale)


# --- parity ---


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", FAMILIES)
def test_parity_bit_for_bit(name, guided):
    pipeline = zoo.shared(name)
    scale = zoo.ZOO[name].guided if guided else 1.0
    conditioning = prepare(pipeline, [PROMPT], scale)
    latents = noise(conditioning)
    images, velocities = draw(pipeline, latents, conditioning)
    assert torch.equal(images, plainly(name, pipeline.pipe, [PROMPT], latents, scale))
    assert images.dtype == torch.float32
    assert images.shape[2 if name == "wan" else 1] == 3
    assert (images.min() >= 0) & (images.max() <= 1)
    assert all(velocity.std() > 0.3 for velocity in velocities), "the networks must be live for parity to mean anything"
    assert not torch.equal(images, draw(pipeline, latents, prepare(pipeline, [OTHER], scale))[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_parity_of_a_group(name):
    """Two samples of one prompt: what ``take`` makes of one row is what the pipeline makes of a batch."""
    pipeline = zoo.shared(name)
    scale = zoo.ZOO[name].guided
    conditioning = prepare(pipeline, [PROMPT], scale).take([0, 0])
    latents = noise(conditioning)
    images, _ = draw(pipeline, latents, conditioning)
    expected = plainly(name, pipeline.pipe, [PROMPT] * 2, latents, scale)
    torch.testing.assert_close(images, expected, **ROWS)  # the text encoder saw one prompt, or two
    assert not torch.allclose(images[0], images[1], atol=1e-2)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen"])
def test_parity_of_two_prompts(name):
    pipeline = zoo.shared(name)
    conditioning = prepare(pipeline, [PROMPT, OTHER], zoo.ZOO[name].guided)
    latents = noise(conditioning)
    images, _ = draw(pipeline, latents, conditioning)
    expected = plainly(name, pipeline.pipe, [PROMPT, OTHER], latents, zoo.ZOO[name].guided)
    torch.testing.assert_close(images, expected, **ROWS)


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_parity_in_bfloat16(name):
    pipe = zoo.build(name, torch.bfloat16)
    pipeline = zoo.lifted(name, pipe)
    conditioning = prepare(pipeline, [PROMPT], 4.0)
    assert conditioning.latent_dtype == (torch.float32 if name == "wan" else torch.bfloat16)
    latents = noise(conditioning)
    images, velocities = draw(pipeline, latents, conditioning)
    assert velocities[0].dtype == torch.bfloat16
    assert torch.equal(images, plainly(name, pipe, [PROMPT], latents, 4.0))
    # latents that are kept in another precision are taken in the pipeline's
    assert torch.equal(pipeline.velocity(latents.float(), 0, conditioning), velocities[0])
    assert torch.equal(pipeline.decode(latents.float(), conditioning), pipeline.decode(latents, conditioning))


def test_call_arguments_are_those_of_the_same_picture():
    pipeline = zoo.shared("zimage")
    conditioning = prepare(pipeline, [PROMPT])
    latents = noise(conditioning)
    arguments = pipeline.call_arguments([PROMPT], num_inference_steps=STEPS, guidance_scale=1.0)
    assert torch.equal(draw(pipeline, latents, conditioning)[0], pipeline.pipe(**arguments, latents=latents.clone())[0])


# --- one step by itself ---


@pytest.mark.parametrize("name", FAMILIES)
def test_any_step_in_any_order(name):
    pipeline = zoo.shared(name)
    conditioning = prepare(pipeline, [PROMPT], zoo.ZOO[name].guided)
    latents = [noise(conditioning, seed) for seed in range(STEPS)]
    with torch.no_grad():
        forward = [pipeline.velocity(latents[index], index, conditioning) for index in range(STEPS)]
        backward = [pipeline.velocity(latents[index], index, conditioning) for index in reversed(range(STEPS))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward)))


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_a_batch(name):
    pipeline = zoo.shared(name)
    prompts = [PROMPT] * 3 if name == "qwen" else [PROMPT, OTHER, "blue"]
    conditioning = prepare(pipeline, prompts, zoo.ZOO[name].guided)
    latents = noise(conditioning)
    with torch.no_grad():
        whole = pipeline.velocity(latents, 1, conditioning)
        part = pipeline.velocity(latents[[2, 0]], 1, conditioning.take([2, 0]))
        joined = Conditioning.join([conditioning.take(torch.tensor([2])), conditioning.take([0, 1])])
        again = pipeline.velocity(latents[[2, 0, 1]], 1, joined)
    torch.testing.assert_close(part, whole[[2, 0]], **ROWS)
    assert torch.equal(again, pipeline.velocity(latents[[2, 0, 1]], 1, conditioning.take([2, 0, 1])))
    torch.testing.assert_close(again, whole[[2, 0, 1]], **ROWS)
    assert not torch.allclose(whole[0], whole[2], atol=1e-2)


def test_velocity_names_what_does_not_fit():
    pipeline = zoo.shared("sd3")
    conditioning = prepare(pipeline, [PROMPT, OTHER])
    with pytest.raises(
        ValueError, match=r"latents have the shape \(1, 4, 8, 8\); this conditioning needs \(2, 4, 8, 8\)"
    ):
        pipeline.velocity(torch.zeros(1, 4, 8, 8), 0, conditioning)
    with pytest.raises(ValueError, match=r"denoising index 3; allowed are 0 to 2"):
        pipeline.velocity(noise(conditioning), 3, conditioning)


# --- calls of the network ---


@pytest.mark.parametrize("name", FAMILIES)
def test_guidance_off_is_one_pass_and_the_route_sees_every_call(name):
    pipeline = zoo.lifted(name)
    calls: list[tuple[str, int]] = []

    def call(component, *args, **kwargs):
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        calls.append((component, len(given)))
        return pipeline.denoisers[component](*args, **kwargs)

    plain = prepare(pipeline, [PROMPT])
    unrouted = pipeline.velocity(noise(plain), 0, plain)
    pipeline.route(call)
    with torch.no_grad():
        assert torch.equal(pipeline.velocity(noise(plain), 0, plain), unrouted)
        assert len(calls) == 1
        assert calls[0][1] == 1, "without guidance one row goes through the network"
        pipeline.velocity(noise(plain), STEPS - 1, plain)
    if name == "wan":
        assert [component for component, _ in calls] == ["transformer", "transformer_2"]
    calls.clear()
    guided = prepare(pipeline, [PROMPT], zoo.ZOO[name].guided)
    pipeline.velocity(noise(guided), 0, guided)
    rows = sum(count for _, count in calls)
    assert rows == (1 if name == "flux" else 2), "FLUX's guidance is an input of the network"


def test_a_wrapper_without_attributes_can_stand_in_the_route():
    """As DistributedDataParallel does; Qwen-Image asks its transformer for ``cache_context``."""
    pipeline = zoo.lifted("qwen")

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    wrapper = Wrapper(pipeline.denoisers["transformer"])
    conditioning = prepare(pipeline, [PROMPT], 4.0)
    before = pipeline.velocity(noise(conditioning), 0, conditioning)
    pipeline.route(lambda component, *args, **kwargs: wrapper(*args, **kwargs))
    assert torch.equal(pipeline.velocity(noise(conditioning), 0, conditioning), before)


# The last block's text stream is computed and thrown away by these architectures: no gradient can reach it.
DEAD_LORA = {
    "qwen": {f"transformer_blocks.1.attn.{part}" for part in ("add_q_proj", "to_add_out")},
    "sd3": {"transformer_blocks.1.attn.add_q_proj"},
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_lora(name):
    pipeline = zoo.lifted(name)
    for denoiser in pipeline.denoisers.values():
        denoiser.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    conditioning = prepare(pipeline, [PROMPT], zoo.ZOO[name].guided)
    for index in (0, STEPS - 1):  # Wan's two transformers share the steps
        latents = noise(conditioning, index)
        (pipeline.velocity(latents, index, conditioning) * noise(conditioning, 7)).sum().backward()
    dead, live = set(), 0
    for denoiser in pipeline.denoisers.values():
        for parameter_name, parameter in denoiser.named_parameters():
            if "lora_B" in parameter_name:  # lora_A has none before B moves from 0
                if parameter.grad is None or not parameter.grad.any():
                    dead.add(parameter_name.split(".lora_B")[0])
                else:
                    live += 1
    assert dead == DEAD_LORA.get(name, set())
    assert live >= 8


# --- prepare ---


def test_a_prepared_prompt_comes_from_memory():
    pipeline = zoo.lifted("sd3")
    first = prepare(pipeline, [PROMPT])
    assert prepare(pipeline, [PROMPT]) is first
    assert prepare(pipeline, [PROMPT], 4.0) is not first
    repeated = prepare(pipeline, [OTHER, PROMPT, OTHER])
    assert len(repeated) == 3
    assert torch.equal(repeated.values["prompt_embeds"][0], repeated.values["prompt_embeds"][2])
    assert torch.equal(repeated.values["prompt_embeds"][1:2], first.values["prompt_embeds"])


def test_the_memory_is_bounded():
    pipeline = FlowPipeline(zoo.build("sd3"), **zoo.ZOO["sd3"].size, cache_size=2)
    first = prepare(pipeline, ["one"])
    prepare(pipeline, ["two", "three"])
    again = prepare(pipeline, ["one"])
    assert again is not first
    assert torch.equal(again.values["prompt_embeds"], first.values["prompt_embeds"])


def test_global_random_state_is_left_alone():
    pipeline = zoo.lifted("wan")
    before = torch.get_rng_state()
    conditioning = prepare(pipeline, [PROMPT], 4.0)
    draw(pipeline, noise(conditioning), conditioning)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_of_the_pipeline_in_between_changes_nothing():
    """Pipelines remember their last call on themselves (``pipe._guidance_scale``)."""
    pipeline = zoo.lifted("sd3")
    conditioning = prepare(pipeline, [PROMPT], 4.0)
    latents = noise(conditioning)
    before = pipeline.velocity(latents, 0, conditioning)
    plainly("sd3", pipeline.pipe, [OTHER], latents, 1.0)
    assert torch.equal(pipeline.velocity(latents, 0, conditioning), before)
    assert len(Conditioning.join([conditioning, prepare(pipeline, [OTHER], 4.0)])) == 2
    assert torch.equal(zoo.lifted("sd3", pipeline.pipe).velocity(latents, 0, conditioning), before)


def test_prompts_of_unlike_length_are_refused_together():
    pipeline = zoo.shared("qwen")
    with pytest.raises(UnlikeConditioning, match=r"prompt_embeds is a tensor \[1, \d+, 16\] and a tensor .*'two dogs'"):
        prepare(pipeline, [PROMPT, OTHER])
    assert issubclass(UnlikeConditioning, ValueError)


def test_a_negative_prompt_counts():
    pipeline = zoo.shared("sd3")
    plain = prepare(pipeline, [PROMPT], 4.0)
    latents = noise(plain)
    other = pipeline.prepare([PROMPT], num_inference_steps=STEPS, guidance_scale=4.0, negative_prompt="blurry")
    assert not torch.equal(pipeline.velocity(latents, 0, plain), pipeline.velocity(latents, 0, other))
    with pytest.raises(UnlikeConditioning, match="noise levels"):
        Conditioning.join([plain, pipeline.prepare([PROMPT], num_inference_steps=4, guidance_scale=4.0)])


def test_take_names_rows_that_are_not_there():
    conditioning = prepare(zoo.shared("sd3"), [PROMPT])
    with pytest.raises(ValueError, match=r"rows \[0, 1\] of a conditioning with 1 rows; allowed are 0 to 0"):
        conditioning.take([0, 1])
    with pytest.raises(ValueError, match="no prompt to prepare"):
        prepare(zoo.shared("sd3"), [])


def test_to_moves_every_tensor():
    conditioning = prepare(zoo.shared("qwen"), [PROMPT], 4.0).to("meta")
    assert conditioning.values["prompt_embeds"].device.type == "meta"
    assert conditioning.items[0][1].device.type == "meta"
    assert conditioning.schedule.sigma.device.type == "cpu"


# --- the arguments of __call__ ---


def test_arguments_that_the_pipeline_does_not_have():
    pipe = zoo.shared("sd3").pipe
    with pytest.raises(ValueError, match=r"has no argument 'max_sequence_len'; did you mean 'max_sequence_length'\?"):
        FlowPipeline(pipe, call_kwargs={"max_sequence_len": 3})
    with pytest.raises(ValueError, match="'latents' is a setting of its own"):
        FlowPipeline(pipe, call_kwargs={"latents": None})
    unguided = zoo.build_class_without_guidance()
    with pytest.raises(ValueError, match="has no guidance: guidance_scale must be 1, got 3"):
        prepare(FlowPipeline(unguided), [PROMPT], 3.0)


def test_an_offloaded_network_is_refused():
    pipe = zoo.build("sd3")
    add_hook_to_module(pipe.transformer, ModelHook())
    with pytest.raises(ValueError, match="transformer carries offloading hooks"):
        FlowPipeline(pipe)


def test_the_users_arguments_win():
    pipeline = FlowPipeline(zoo.build("flux"), **zoo.ZOO["flux"].size, call_kwargs={"true_cfg_scale": 2.0})
    arguments = pipeline.call_arguments([PROMPT], num_inference_steps=2, guidance_scale=3.5)
    assert arguments["guidance_scale"] == 3.5
    assert arguments["true_cfg_scale"] == 2.0
    assert arguments["negative_prompt"] == [""], "true guidance is off without one"


# --- pipelines of somebody's own ---

STEP = zoo.STEP


def test_code_after_the_step_runs(tmp_path):
    after = STEP + "                latents = 0.9 * latents + 0.01 * noise_pred\n"
    pipe = zoo.build_variant(tmp_path, "after", (STEP, after))
    pipeline = zoo.lifted("sd3", pipe)
    passes = []
    pipeline.route(lambda name, *args, **kwargs: passes.append(name) or pipe.transformer(*args, **kwargs))
    conditioning = prepare(pipeline, [PROMPT])
    latents = noise(conditioning)
    images, _ = draw(pipeline, latents, conditioning)
    assert torch.equal(images, plainly("sd3", pipe, [PROMPT], latents, 1.0))
    assert len(passes) == STEPS, "the pass of the velocity is resumed"
    with torch.no_grad():
        step = pipeline.begin(latents, 1, conditioning)
        other = pipeline.begin(latents, 0, conditioning)  # steps do not disturb each other
        resumed = step.finish(2 * latents)
        other.finish(latents)
    assert torch.equal(resumed, 0.9 * (2 * latents) + 0.01 * step.velocity)
    assert len(passes) == STEPS + 2
    with pytest.raises(ValueError, match="this step is finished; begin another one"):
        step.finish(latents)


def test_writing_into_the_latents_does_not_reach_the_caller(tmp_path):
    skip = "                if self.interrupt:\n                    continue\n"
    write = skip + "                latents[:, :1] = 0.5 * latents[:, :1]\n"
    pipe = zoo.build_variant(tmp_path, "in_place", (skip, write))
    pipeline = zoo.lifted("sd3", pipe)
    conditioning = prepare(pipeline, [PROMPT])
    latents = noise(conditioning)
    kept = latents.clone()
    first = pipeline.velocity(latents, 0, conditioning)
    assert torch.equal(latents, kept)
    assert torch.equal(pipeline.velocity(latents, 0, conditioning), first)


def test_what_the_epilogue_wants_from_the_loop(tmp_path):
    """As Bria FIBO does: a dtype that only the loop sets."""
    end = "            latents = (latents / self.vae.config.scaling_factor) + self.vae.config.shift_factor\n"
    pipe = zoo.build_variant(tmp_path, "dtype", (end, "            latents = latents.to(latents_dtype)\n" + end))
    pipeline = zoo.lifted("sd3", pipe)
    conditioning = prepare(pipeline, [PROMPT])
    latents = noise(conditioning)
    assert torch.equal(draw(pipeline, latents, conditioning)[0], plainly("sd3", pipe, [PROMPT], latents, 1.0))


def test_a_prologue_that_draws_without_a_generator(tmp_path):
    """As Stable Diffusion 3's ControlNet does with the latents of the control image."""
    before = "        # 7. Denoising loop\n"
    jitter = "        prompt_embeds = prompt_embeds + torch.randn_like(prompt_embeds)\n"
    pipe = zoo.build_variant(tmp_path, "jittered", (before, jitter + before))
    one, other = (prepare(zoo.lifted("sd3", pipe), [PROMPT]).values["prompt_embeds"] for _ in range(2))
    assert torch.equal(one, other)


def test_a_step_that_is_not_taken(tmp_path):
    skip = "                if self.interrupt:\n"
    pipe = zoo.build_variant(tmp_path, "skipping", (skip, "                if i == 1:\n"))
    pipeline = zoo.lifted("sd3", pipe)
    conditioning = prepare(pipeline, [PROMPT])
    with pytest.raises(ValueError, match="takes no step at denoising index 1"):
        pipeline.velocity(noise(conditioning), 1, conditioning)


def test_a_local_from_an_earlier_iteration_is_named(tmp_path):
    pipe = zoo.build_variant(tmp_path, "cached", (STEP, zoo.CACHE + STEP))
    pipeline = zoo.lifted("sd3", pipe)
    conditioning = prepare(pipeline, [PROMPT])
    with pytest.raises(ValueError, match=r"needs a local that an earlier iteration has set .*'kept'"):
        pipeline.velocity(noise(conditioning), 1, conditioning)


def test_latents_that_are_not_the_steps_sample(tmp_path):
    part = STEP.replace("noise_pred, t, latents", "noise_pred[:, :2], t, latents[:, :2]")
    pipeline = zoo.lifted("sd3", zoo.build_variant(tmp_path, "partial", (STEP, part)))
    with pytest.raises(ValueError, match=r"StableDiffusion3Pipeline steps a part of what it starts from noise"):
        prepare(pipeline, [PROMPT])


def test_a_loop_that_reads_its_noise_before_its_step_is_refused(tmp_path):
    """Rollouts are trained on rows that do not hold the noise that a sample started with."""
    loop = ("        # 7. Denoising loop\n", "        kept = latents\n        # 7. Denoising loop\n")
    before = (STEP, "                noise_pred = noise_pred + 0.1 * kept\n" + STEP)
    report = check(zoo.lifted("sd3", zoo.build_variant(tmp_path, "remembers", loop, before)))
    findings = {finding.name: finding for finding in report.findings if not finding.ok}
    assert list(findings) == ["its noise"]
    assert "changes the velocity by" in findings["its noise"].detail
    after = (STEP, STEP + "                latents = latents + 0.0 * kept\n")
    assert check(zoo.lifted("sd3", zoo.build_variant(tmp_path, "harmless", loop, after))).ok


def test_a_step_may_take_a_part_of_the_state(tmp_path):
    """The other part is the same for all steps, as the first frame of a video that is given."""
    constant = (
        "        # 6. Denoising loop\n        latents = torch.cat([latents, 0.5 * torch.ones_like(latents)], 1)\n"
    )
    step = f"""\
                part = latents[:, :4]
{STEP.replace("latents = ", "part = ").replace("t, latents", "t, part")}\
                latents = torch.cat([part, latents[:, 4:]], 1)
"""
    joined = (
        "torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents",
        "(latents[:, :4] * latents[:, 4:])",
    )
    end = ("latents = (latents / self.vae", "latents = (latents[:, :4] / self.vae")
    loop = ("        # 7. Denoising loop\n", constant.replace("# 6", "# 7"))
    pipe = zoo.build_variant(tmp_path, "beside", (STEP, step), joined, end, loop)
    pipeline = zoo.lifted("sd3", pipe)
    report = check(pipeline)
    assert report.ok, report.text()
    assert "bit for bit" in next(finding.detail for finding in report.findings if finding.name == "parity")
    conditioning = prepare(pipeline, [PROMPT])
    assert conditioning.latent_shape == (4, 8, 8)
    assert conditioning.rest is not None
    assert conditioning.rest.shape == (1, 8, 8, 8)


def test_a_pipeline_for_one_prompt_at_a_time(tmp_path):
    before = "        device = self._execution_device\n\n        lora_scale = (\n"
    pipe = zoo.build_variant(tmp_path, "single", (before, "        assert batch_size == 1, 'one prompt'\n" + before))
    pipeline = zoo.lifted("sd3", pipe)
    assert check(pipeline).ok
    whole = zoo.shared("sd3")
    rows, alone = (prepare(own, [PROMPT, OTHER]).take([1, 0, 1]) for own in (whole, pipeline))
    assert isinstance(alone, Several)
    started, _ = alone.start(noise(rows))
    assert torch.equal(started, noise(rows))  # each row's own
    latents = noise(rows)
    velocity, one_by_one = whole.velocity(latents, 1, rows), pipeline.velocity(latents, 1, alone)
    assert (velocity - one_by_one).abs().max() < 1e-4 * velocity.std()
    pictures = [own.decode(latents, given) for own, given in ((whole, rows), (pipeline, alone))]
    assert (pictures[0] - pictures[1]).abs().max() < 1e-4


# --- layouts ---


def test_layouts():
    def layout(make):
        return find_layout(make(2), make(3), "x")

    assert layout(lambda n: torch.zeros(n, 5)) == Rows(0, 1)
    assert layout(lambda n: torch.zeros(4, 2 * n)) == Rows(1, 2)
    assert layout(lambda n: torch.zeros(4)) is None
    assert layout(lambda n: ["a"] * n) == ListRows(1)
    assert layout(lambda n: ["a"] * 2 * n) == ListRows(2)
    assert layout(lambda n: 2 * n) == Count(2)
    assert layout(lambda n: 7) is None
    assert layout(lambda n: True) is None
    assert layout(lambda n: {"a": 1, "b": torch.zeros(n)}) == Nested({"b": Rows(0, 1)})
    assert layout(lambda n: [torch.zeros(1, n), "same"]) == Nested({0: Rows(1, 1)})
    with pytest.raises(
        ValueError, match=r"local x is a tensor \[2, 2\] for two prompts and a tensor \[3, 3\] for three"
    ):
        layout(lambda n: torch.zeros(n, n))
    with pytest.raises(ValueError, match="local x is None for two prompts"):
        find_layout(None, torch.zeros(3), "x")


def test_blocks_are_taken_and_joined_block_by_block():
    rows, index = Rows(0, 2), torch.tensor([1])
    ab = torch.tensor([10, 11, 20, 21])  # [negative a, negative b, a, b]
    c = torch.tensor([12, 22])
    assert rows.take(ab, index, 2).tolist() == [11, 21]
    assert rows.join([ab, c]).tolist() == [10, 11, 12, 20, 21, 22]
    assert ListRows(2).take(["na", "nb", "a", "b"], index, 2) == ["nb", "b"]
    assert ListRows(2).join([["na", "a"], ["nb", "b"]]) == ["na", "nb", "a", "b"]
    nested = Nested({0: rows, 1: Count(2)})
    assert nested.take((ab, 4, "same"), index, 2)[1:] == (2, "same")
    assert nested.join([(ab, 4, "same"), (c, 2, "same")])[1:] == (6, "same")


# --- noise levels ---


def test_flow_levels_are_the_shifted_ones():
    schedule = prepare(zoo.shared("sd3"), [PROMPT]).schedule
    # scheduler with shift 3: sigma' = 3 sigma / (1 + 2 sigma), on levels that were shifted once at construction
    low = 3 * 0.001 / (1 + 2 * 0.001)
    plain = torch.tensor([1.0, (1 + low) / 2, low])
    expected = torch.cat([3 * plain / (1 + 2 * plain), torch.zeros(1)])
    torch.testing.assert_close(
        schedule.sigma, expected, rtol=0, atol=1e-6
    )  # float32 rounding of the scheduler's tables
    assert torch.equal(schedule.alpha, 1 - schedule.sigma)
    torch.testing.assert_close(schedule.timesteps, 1000 * schedule.sigma[:-1], rtol=0, atol=1e-3)


def test_an_epsilon_pipeline_gets_ddim_with_the_same_levels():
    pipeline = zoo.shared("sdxl")
    assert isinstance(pipeline.pipe.scheduler, diffusers.DDIMScheduler)
    assert not pipeline.pipe.scheduler.config.clip_sample
    schedule = prepare(pipeline, [PROMPT]).schedule
    assert schedule.prediction == "epsilon"
    assert schedule.timesteps.tolist() == [667, 334, 1]  # leading, offset 1
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = torch.cumprod(1 - betas, 0)[[667, 334, 1]]
    torch.testing.assert_close(schedule.alpha[:-1], bar.sqrt().float(), rtol=1e-5, atol=0)  # float32 products of 1000
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(4), rtol=0, atol=1e-6)
    assert schedule.sigma[-1] == 0


def test_the_last_ddim_level_is_the_schedulers():
    scheduler = diffusers.DDIMScheduler(set_alpha_to_one=False, prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    schedule = read_schedule(scheduler, 4)
    assert schedule.prediction == "v_prediction"
    assert schedule.alpha[-1] == scheduler.alphas_cumprod[0] ** 0.5


def test_flow_levels_of_other_schedulers():
    """Wan's checkpoints come with UniPC: its levels are used, its steps are not."""
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(4)
    assert steppable(scheduler) is scheduler
    schedule = read_schedule(scheduler, 4)
    assert torch.equal(schedule.sigma, scheduler.sigmas)
    assert schedule.prediction == "velocity"


def test_schedulers_that_do_not_fit():
    heun = diffusers.FlowMatchHeunDiscreteScheduler()
    heun.set_timesteps(3)
    with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler has"):
        read_schedule(heun, len(heun.timesteps))
    rising = diffusers.FlowMatchEulerDiscreteScheduler()
    rising.set_timesteps(3)
    rising.sigmas = rising.sigmas.flip(0)
    with pytest.raises(ValueError, match="they must fall, from at most 1 to at least 0"):
        read_schedule(rising, 3)
    with pytest.raises(ValueError, match="EDMEulerScheduler predicts epsilon on noise levels of its own"):
        steppable(diffusers.EDMEulerScheduler())
    rescaled = diffusers.EulerDiscreteScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    rescaled.alphas_cumprod = rescaled.alphas_cumprod * 0.5
    with pytest.raises(ValueError, match=r"noise levels that DDIMScheduler.from_config does not reproduce"):
        steppable(rescaled)


def test_levels_that_a_pipeline_counts_from_0_to_1():
    inverted, plain = (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=own) for own in (True, False))  # Mochi's
    for scheduler in (inverted, plain):
        scheduler.set_timesteps(3)
    schedule, other = read_schedule(inverted, 3), read_schedule(plain, 3)
    assert schedule.rising
    assert not other.rising
    torch.testing.assert_close(schedule.sigma, other.sigma, rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.alpha, other.alpha, rtol=0, atol=1e-6)


# --- decoding ---


def stable_diffusion_that_is_always_caught() -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1 with a safety checker that flags every picture."""
    xl = zoo.build("sdxl")
    config = CLIPConfig(
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 16,
            "patch_size": 8,
        },
        projection_dim=8,
    )
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2)  # the cosine from which a picture is flagged
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=32,
            norm_num_groups=2,
        ),
        scheduler=diffusers.DDIMScheduler(),
        vae=xl.vae,
        text_encoder=zoo.parts.clip_text(projection=False),
        tokenizer=xl.tokenizer,
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )


@torch.no_grad()
def test_a_flagged_picture_is_not_black_and_the_pipeline_keeps_its_checker(caplog):
    pipe = stable_diffusion_that_is_always_caught()
    pipe.set_progress_bar_config(disable=True)
    pipeline = FlowPipeline(pipe, height=16, width=16)
    conditioning = prepare(pipeline, [PROMPT], 5.0)
    latents = noise(conditioning)
    assert "the safety checker of StableDiffusionPipeline is off in training" in caplog.text
    assert draw(pipeline, latents, conditioning)[0].std() > 0.01
    assert plainly("sdxl", pipe, [PROMPT], latents, 5.0).abs().max() == 0  # what the pipeline itself makes of it
    report = selfcheck.check(pipeline, guidance_scale=5.0)
    assert report.ok, report.text()


# --- loading ---


@pytest.mark.parametrize("how", ["null", "missing"])
def test_stable_diffusion_3_without_t5_loads(tmp_path, how):
    whole = zoo.build("sd3")
    components = {**whole.components, "text_encoder_3": None, "tokenizer_3": None}
    pipe = type(whole)(**components)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    if how == "missing":
        index = json.loads((tmp_path / "model_index.json").read_text())
        for name in ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"):
            del index[name]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = FlowPipeline.load(str(tmp_path), **zoo.ZOO["sd3"].size, call_kwargs=zoo.ZOO["sd3"].call_kwargs)
    assert loaded.pipe.text_encoder_3 is None
    conditioning = prepare(loaded, [PROMPT], 4.0)
    latents = noise(conditioning)
    images = draw(loaded, latents, conditioning)[0]
    assert torch.equal(images, plainly("sd3", loaded.pipe, [PROMPT], latents, 4.0))
    # Equal weights at other addresses: where they are not aligned alike, other kernels serve them.
    torch.testing.assert_close(images, plainly("sd3", pipe, [PROMPT], latents, 4.0), rtol=0, atol=1e-5)
    assert load_diffusers(str(tmp_path), dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
