"""`flowsteer plan`: the networks have their published sizes, fake tensors take what real ones take, and parts add up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import huggingface_hub.constants
import pytest
import torch
from memory_page import CASES, comparison
from typer.testing import CliRunner

from flowsteer.rl.command.main import app
from flowsteer.rl.config import check_config, load_config
from flowsteer.rl.plan.advice import largest_batch, proposals
from flowsteer.rl.plan.count import LiveBytes, activations, count_pass
from flowsteer.rl.plan.files import known_models, read_model
from flowsteer.rl.plan.inputs import shapes_of
from flowsteer.rl.plan.networks import build, cast_to, lengths, lora_size, size_of, with_lora
from flowsteer.rl.plan.parts import CUDA_CONTEXT, DTYPES, estimate
from flowsteer.rl.plan.settings import Settings, accepts, batches_that_divide

T5, CLIP_L, CLIP_G, UMT5 = 4_762_310_656, 123_060_480, 694_659_840, 5_680_910_336
PUBLISHED = {  # numbers of parameters: exact where the published weights are counted, else to three digits
    "stabilityai/stable-diffusion-3.5-medium": {
        "transformer": 2_243_171_520, "text_encoder_2": CLIP_G, "text_encoder_3": T5, "vae": 83_819_683,
    },
    "black-forest-labs/FLUX.1-dev": {"transformer": 11_901_408_320, "text_encoder": CLIP_L, "text_encoder_2": T5},
    "black-forest-labs/FLUX.2-dev": {"transformer": 32.2e9, "text_encoder": 24.0e9},
    "Qwen/Qwen-Image": {"transformer": 20_430_401_088, "text_encoder": 8.29e9, "vae": 127e6},
    "Tongyi-MAI/Z-Image-Turbo": {"transformer": 6.15e9, "text_encoder": 4.02e9},
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"transformer": 1.42e9, "text_encoder": UMT5},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"transformer": 14.3e9, "text_encoder": UMT5},
    "stabilityai/sdxl-turbo": {"unet": 2_567_463_684, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "vae": 83_653_863},
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"unet": 859_520_964, "safety_checker": 304e6},
    "CompVis/stable-diffusion-v1-4": {"unet": 859_520_964, "text_encoder": CLIP_L},
}  # fmt: skip


@pytest.mark.parametrize("path", PUBLISHED)
def test_shipped_files_describe_networks_of_the_published_size(path):
    model = read_model(path)
    for name, published in PUBLISHED[path].items():
        assert size_of(model.components[name]).weights == pytest.approx(
            published, rel=0 if isinstance(published, int) else 5e-3
        )


def test_every_model_of_the_shipped_configurations_is_known():
    assert {case.path for case in CASES} <= set(known_models())
    assert set(PUBLISHED) <= set(known_models())


def test_a_model_that_is_nowhere_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="neither a folder nor shipped, and the hub cannot be asked"):
        read_model("nobody/nothing")
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        read_model(str(tmp_path))


def tiny_flux(folder):
    """The configuration files of a FLUX with 4 double and 6 single blocks."""
    config = {
        "in_channels": 16, "num_layers": 4, "num_single_layers": 6, "attention_head_dim": 16, "num_attention_heads": 4,
        "joint_attention_dim": 32, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": [4, 6, 6],
    }  # fmt: skip
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return read_model(str(folder))


def test_a_denoiser_that_is_not_known_is_refused(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    index = {"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not know what SanaTransformer2DModel is called with"):
        shapes_of(read_model(str(tmp_path)), height=64, width=64, call={})


@pytest.mark.parametrize(
    ("checkpointing", "lora"),
    [
        (True, (4, "auto")),
        pytest.param(False, (4, "auto"), marks=pytest.mark.slow),
        pytest.param(True, None, marks=pytest.mark.slow),
        pytest.param(False, None, marks=pytest.mark.slow),
    ],
)
def test_shortened_networks_say_what_the_whole_one_takes(tmp_path, checkpointing, lora):
    """Two kinds of four and six blocks, and three rows. The 3 % are gradients of what all blocks share."""
    model = tiny_flux(tmp_path)
    shapes = shapes_of(model, height=128, width=128, call={})
    whole = count_pass(model, shapes, dtype=torch.bfloat16, lora=lora, checkpointing=checkpointing, rows=3)
    planned = activations(str(tmp_path), 128, 128, (), torch.bfloat16, lora, checkpointing).at(3)
    assert lengths(build(model.components["transformer"])) == (4, 6)
    assert planned.kept + planned.beside == pytest.approx(whole.kept + whole.beside, rel=0.03)
    assert planned.sampling == pytest.approx(whole.sampling, rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_take_what_real_ones_take(checkpointing):
    """The embedded transformer, bit of memory by bit: the same counter around a pass with real numbers."""
    model = read_model("embedded")
    shapes = shapes_of(model, height=32, width=32, call={"max_sequence_length": 12})
    fake = count_pass(
        model, shapes, dtype=torch.bfloat16, lora=(4, "auto"), checkpointing=checkpointing, rows=2, sampling=False
    )
    network = build(model.components["transformer"])
    cast_to(network, torch.bfloat16)
    with_lora(network, 4, "auto")
    if checkpointing:
        network.enable_gradient_checkpointing()
    network.to_empty(device="cpu").train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    given = {key: torch.randn_like(value) for key, value in shapes.call(2, torch.bfloat16).items()}
    known = [*network.parameters(), *network.buffers(), *given.values()]
    known += [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    with LiveBytes(known) as live:
        velocity = network(**given, return_dict=False)[0]
        kept, live.peak = live.now, live.now
        velocity.float().square().mean().backward()
    assert fake.kept == kept
    assert fake.beside == live.peak - kept


@pytest.fixture(scope="module")
def embedded() -> Settings:
    """A run of the embedded pipeline with a LoRA, an averaged policy and bfloat16."""
    given = ["model.dtype=bfloat16", "model.lora={rank: 4}", "ema_decay=0.9", "rollout.batch_size=16"]
    return Settings.of(load_config("embedded_flow_grpo_sde_composition", given), 4)


def test_parts_follow_from_the_numbers_of_weights(embedded):
    model = read_model("embedded")
    whole = size_of(model.components["transformer"]).weights
    encoders = sum(size_of(model.components[name]).weights for name in ("text_encoder", "text_encoder_2"))
    lora = lora_size(model.components["transformer"], embedded.rank, embedded.targets)
    found = estimate(embedded)
    assert found.trained == lora
    assert found.update["denoiser"] == 2 * whole
    assert found.update["text encoders"] == 2 * encoders
    assert found.update["adapters and other policies"] == 4 * lora * (1 + len(embedded.moving))
    assert found.update["optimiser"] == 8 * lora
    assert found.update["gradients"] == 4 * lora
    assert found.update["CUDA context"] == CUDA_CONTEXT

    every = replace(embedded, rank=None, targets="auto", reference=False, moving=("ema",))
    by_stage = {name: estimate(replace(every, strategy=name)).update for name in ("zero1", "zero2", "zero3")}
    assert [by_stage[name]["denoiser"] for name in by_stage] == [2 * whole, 2 * whole, 2 * whole / 4]
    assert [by_stage[name]["gradients"] for name in by_stage] == [4 * whole, 4 * whole / 4, 4 * whole / 4]
    assert {by_stage[name]["optimiser"] for name in by_stage} == {12 * whole / 4}
    eight = estimate(replace(every, strategy="zero2", optimizer="adamw8bit")).update["optimiser"]
    assert eight == pytest.approx(6.06 * whole / 4)


def test_stored_rollouts_follow_from_shapes(embedded):
    shapes = shapes_of(read_model("embedded"), height=None, width=None, call={"max_sequence_length": 12})
    row = (1 + embedded.guided) * shapes.row
    each = 2 * (math.prod(shapes.latent) * (1 + 2 * embedded.transitions) + row)
    assert estimate(embedded).update["stored rollouts"] == embedded.samples * each
    assert estimate(embedded).rollout["stored rollouts"] == 2 * embedded.samples * each  # those of the step before, too


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"offload_text_encoders": True}, "text encoders"),
        ({"offload_vae": True}, "VAE"),
        ({"checkpointing": 1}, "activations"),
        ({"checkpointing": 2}, "activations"),
        ({"batch_size": 8}, "activations"),
        ({"quantize": "int8"}, "denoiser"),
        ({"quantize": "nf4"}, "denoiser"),
        ({"optimizer": "adafactor"}, "optimiser"),
        ({"strategy": "fsdp2"}, "denoiser"),
    ],
)
def test_every_option_makes_its_part_smaller(embedded, changed, part):
    assert estimate(replace(embedded, **changed)).update[part] < estimate(embedded).update[part]


def test_what_makes_sampling_smaller(embedded):
    sliced, guided = (replace(embedded, **own) for own in ({"vae_slicing": True}, {"guided": True}))
    assert estimate(sliced).moments["decoding"] < estimate(embedded).moments["decoding"]
    assert estimate(guided).moments["sampling"] > estimate(embedded).moments["sampling"]


def test_rows_that_pass_the_network():
    pairs = Settings.of(load_config("sd35m_diffusion_dpo_ocr"), 8)  # batches of one group: its best and its worst
    assert (pairs.batch_size, pairs.trained_rows) == (24, 2)
    pools = Settings.of(load_config("flux1dev_g2rpo_ocr"), 16)  # twelve candidates left one state
    assert (pools.batch_size, pools.trained_rows, pools.pools, pools.ways) == (12, 1, 8, 2)


def test_the_largest_batch_fits_and_divides(embedded):
    config = load_config("embedded_flow_grpo_sde_composition")
    sizes = batches_that_divide(config, 4, 64)
    for size in sizes:
        rollout = config.rollout.model_copy(update={"batch_size": size})
        check_config(config.model_copy(update={"rollout": rollout}), 4)  # raises where it does not divide
    limit = estimate(replace(embedded, batch_size=sizes[1])).peak
    assert largest_batch(embedded, limit, sizes) == sizes[1]
    assert largest_batch(embedded, CUDA_CONTEXT, sizes) is None


def test_proposals_save_what_they_say_until_the_run_fits(embedded, monkeypatch):
    monkeypatch.setattr("flowsteer.rl.plan.advice.LEAST", 1e4)  # bytes: the embedded pipeline is small
    peak = estimate(embedded).peak
    found = [*proposals(embedded, CUDA_CONTEXT, [1, 2, 4, 8])]  # nothing fits into that
    assert [step.setting for step in found][:1] == ["model.offload.text_encoders=true"]
    assert {"model.gradient_checkpointing=true", "engine.strategy=fsdp2"} <= {step.setting for step in found}
    assert [before - after for before, after in pairwise([peak, *(step.peak for step in found)])] == pytest.approx(
        [step.saves for step in found]
    )
    assert all(estimate(step.settings).peak == step.peak for step in found)
    assert [*proposals(embedded, peak, [])] == []
    first = [*proposals(embedded, found[0].peak, [1, 2])]
    assert len(first) == 1


def test_the_larger_saving_is_not_lost_to_one_that_it_does_not_go_with(monkeypatch):
    """FSDP2 does not take the 8-bit optimiser, which costs less time and saves less."""
    monkeypatch.setattr("flowsteer.rl.plan.advice.LEAST", 1e4)
    config = load_config("embedded_flow_grpo_sde_composition", ["engine.strategy=zero1"])
    taken = partial(accepts, config, 4)
    found = [step.setting for step in proposals(Settings.of(config, 4), CUDA_CONTEXT, [], accepts=taken)]
    assert "engine.strategy=fsdp2" in found
    assert "optimizer.name=adamw8bit" not in found


def test_a_proposal_is_one_that_the_configuration_takes():
    config = load_config("embedded_flow_grpo_sde_composition")
    assert accepts(config, 1, ["model.gradient_checkpointing=true"])
    assert not accepts(config, 1, ["model.no_such_key=true"])
    assert accepts(config, 2, ["engine.strategy=fsdp2"])
    assert not accepts(config, 2, ["optimizer.name=adamw8bit", "engine.strategy=fsdp2"]), "one by one they would do"


def test_the_command_prints_a_plan():
    run = CliRunner().invoke(app, ["plan", "embedded_nft_composition", "--gpus", "1", "--json"])
    assert run.exit_code == 0, run.output
    said = json.loads(run.output)
    assert said["fits"]
    assert said["peak_gb"] == pytest.approx(
        max(sum(said[f"{phase}_gb"].values()) for phase in ("rollout", "update")), abs=0.01
    )
    assert said["largest_batch_size"] >= said["batch_size"]
    assert said["rewards_not_counted"] == ["composition"]


def test_the_command_says_what_does_not_fit():
    given = ["plan", "embedded_nft_composition", "--gpus", "1", "--memory", "1"]
    run = CliRunner().invoke(app, given)
    assert run.exit_code == 1, run.output
    assert "does not fit into 1 x 1 GB" in run.output
    assert "activations" in run.output


@pytest.mark.slow
def test_a_plan_agrees_with_whole_networks_within_ten_per_cent():
    for line in [*comparison()][2:]:
        difference = float(line.split("|")[-2].split()[0])
        assert abs(difference) < 10, line


def test_dtypes_are_those_of_a_configuration():
    assert set(DTYPES) == {"float32", "bfloat16"}
