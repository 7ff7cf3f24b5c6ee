"""The LoRA that a run exports has the strength of training in every tool, in every format, and fused into the pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from conftest import Make
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from exports import CLOSE, RANK, TARGETS, tuned, write
from inprocess import finished, fresh_process
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner
from zoo.entries import built, entries

from flowsteer.rl.command.main import app
from flowsteer.rl.export import LORA_FILE, convert_lora, folded, how_to_load, load_lora, lora_state, merge
from flowsteer.rl.policy import Policy
from flowsteer.rollout.lifting.loading import load_diffusers
from flowsteer.rollout.lifting.pipeline import FlowPipeline

FORMATS = ("diffusers", "peft", "kohya")


def velocity(pipe: DiffusionPipeline, model: str) -> Tensor:
    return velocity_of(zoo.lifted(model, pipe))


@torch.no_grad()
def velocity_of(pipeline: zoo.FlowPipeline) -> Tensor:
    """The prediction at the second of three denoising indices, for fixed noise."""
    rows = pipeline.prepare(["a red circle"], num_inference_steps=3, guidance_scale=1.0)
    noise = torch.randn((1, *rows.latent_shape), generator=torch.Generator().manual_seed(0))
    return pipeline.velocity(noise, 1, rows)


def plain_reader(denoiser: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    """A loader that knows no header: alpha is a tensor ``.alpha``, or else equal to the rank."""
    for path, layer in denoiser.named_modules():
        kohya = f"lora_{prefix}_{path.replace('.', '_')}"
        for name, first, second in ((f"{prefix}.{path}", "lora_A", "lora_B"), (kohya, "lora_down", "lora_up")):
            if f"{name}.{first}.weight" in tensors:
                down, up = (tensors.pop(f"{name}.{part}.weight") for part in (first, second))
                scale = float(tensors.pop(f"{name}.alpha", len(down))) / len(down)
                layer.weight.data += scale * (up @ down)
    assert not tensors, "tensors that belong to no layer"


def denoiser_of(pipe: DiffusionPipeline) -> tuple[str, nn.Module]:
    prefix = "unet" if "unet" in pipe.components else "transformer"
    return prefix, getattr(pipe, prefix)


# --- every loader agrees


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("alpha", [2, 4, 8, 12])
@pytest.mark.parametrize("model", ["sd3", "sdxl"])
def test_a_reader_that_knows_no_header_gets_the_strength_of_training(model, alpha, layout, tmp_path) -> None:
    policy = tuned(model, alpha)
    trained = velocity_of(policy.pipeline)  # type: ignore[arg-type]
    folder = write(policy, tmp_path / "export")
    if layout != "diffusers":
        folder = convert_lora(folder, tmp_path / layout, layout=layout).parent
    pipe = zoo.build(model)
    base = velocity(pipe, model)
    plain_reader(denoiser_of(pipe)[1], denoiser_of(pipe)[0], load_file(folder / LORA_FILE))
    assert (velocity(pipe, model) - trained).abs().max() < CLOSE
    assert (base - trained).abs().max() > 1e-2


def test_the_header_says_what_the_weights_say(tmp_path) -> None:
    (config,) = loaded_by_diffusers("sd3", write(tuned("sd3", 12), tmp_path)).transformer.peft_config.values()
    assert (config.r, config.lora_alpha, config.use_rslora) == (RANK, RANK, False)


def loaded_by_diffusers(model: str, folder: Path) -> DiffusionPipeline:
    pipe = zoo.build(model)
    pipe.load_lora_weights(folder)
    return pipe


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1, 2, 16])
def test_folding_a_power_of_two_is_exact(ratio) -> None:
    trained = lora_state(tuned("sd3", RANK), "transformer")  # alpha = rank: as trained
    again = folded(folded_at(trained, ratio))
    for key, value in trained.tensors.items():
        assert torch.equal(again.tensors[key] / ratio if "lora_B" in key else again.tensors[key], value), key


def folded_at(lora, ratio):
    settings = {**lora.settings, "lora_alpha": RANK * ratio}
    return type(lora)(prefix=lora.prefix, tensors=lora.tensors, settings=settings)


# --- formats


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("model", ["sd3", "sdxl", "flux"])
def test_each_format_is_loaded_back_by_its_library(model, layout, tmp_path) -> None:
    """Bit for bit: alpha is twice the rank, and the library runs the forward pass of training."""
    policy = tuned(model, 2 * RANK)
    trained = velocity_of(policy.pipeline)  # type: ignore[arg-type]
    file = convert_lora(write(policy, tmp_path / "export"), tmp_path / layout, layout=layout)
    if layout == "peft":
        assert {path.name for path in file.parent.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        pipe = zoo.build(model)
        name, denoiser = denoiser_of(pipe)
        setattr(pipe, name, PeftModel.from_pretrained(denoiser, str(file.parent)).get_base_model())
    elif (model, layout) == ("sd3", "kohya"):  # diffusers reads kohya's keys of UNets and of Flux only
        pipe = zoo.build(model)
        plain_reader(pipe.transformer, "transformer", load_file(file))
        assert (velocity(pipe, model) - trained).abs().max() < CLOSE
        return
    else:
        pipe = loaded_by_diffusers(model, file.parent)
    assert torch.equal(velocity(pipe, model), trained)


def test_kohya_s_keys(tmp_path) -> None:
    file = convert_lora(
        write(tuned("sdxl", 8), tmp_path / "export"), tmp_path / "kohya", layout="kohya", dtype=torch.bfloat16
    )
    tensors = load_file(file)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{name}.lora_down.weight"].shape[0] == tensors[f"{name}.lora_up.weight"].shape[1] == RANK
    assert float(tensors[f"{name}.alpha"]) == RANK
    assert {value.dtype for key, value in tensors.items() if not key.endswith(".alpha")} == {torch.bfloat16}


def test_a_lora_of_which_diffusers_loads_nothing_is_refused(tmp_path) -> None:
    """Diffusers only warns, and the pictures are those of the base model."""
    exported = write(tuned("sd3", 8), tmp_path / "export")
    load_lora(zoo.build("sd3"), exported)
    convert_lora(exported, tmp_path / "kohya", layout="kohya")
    with pytest.raises(
        ValueError, match="holds nothing that diffusers can load into StableDiffusion3Pipeline; give the"
    ):
        load_lora(zoo.build("sd3"), tmp_path / "kohya")
    with pytest.raises(ValueError, match="holds nothing that diffusers can load into StableDiffusionXLPipeline"):
        load_lora(zoo.build("sdxl"), exported)


@pytest.mark.parametrize("layout", FORMATS)
def test_a_second_transformer_has_a_folder_of_its_own(layout, tmp_path) -> None:
    file = convert_lora(write(tuned("wan", 8), tmp_path / "export"), tmp_path / "out", layout=layout)
    second = load_file(tmp_path / "out" / "transformer_2" / file.name)
    first = load_file(file)
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_it_is_said_how_each_kind_of_pipeline_loads_it() -> None:
    """By the pipeline, by a second call, by the network, or not at all but as a whole pipeline."""
    wan = zoo.build("wan")
    second = 'pipe.load_lora_weights("export/transformer_2", load_into_transformer_2=True)'
    both = {name: getattr(wan, name) for name in ("transformer_2", "transformer")}  # in either order
    assert set(how_to_load(wan, both).split("; ")) == {'pipe.load_lora_weights("export")', second}
    said = {name: how_to_load(pipe, {"transformer": pipe.transformer}) for name, pipe in unloadable()}
    assert said == {
        "OvisImagePipeline": 'pipe.transformer.load_lora_adapter("export", prefix="transformer", '
        'weight_name="pytorch_lora_weights.safetensors")',
        "pixart_sigma": "only as a whole pipeline: `flowsteer export RUN FOLDER`",
    }


def unloadable() -> Iterator[tuple[str, Any]]:
    """Two pipelines without load_lora_weights; the network of the first loads a LoRA, that of the second does not."""
    for name in ("OvisImagePipeline", "pixart_sigma"):
        yield name, built(entries()[name])


def test_a_pipeline_that_loads_no_lora_is_given_it_all_the_same(tmp_path) -> None:
    for (name, tuned_pipe), (_, fresh) in zip(unloadable(), unloadable()):
        size, call = entries()[name].size, entries()[name].call
        tuned_pipeline = FlowPipeline(tuned_pipe, **size, call_kwargs=call)
        policy = Policy(tuned_pipeline, lora=(4, 4, ("to_q", "to_k")), variants=frozenset(), seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.parameters().values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        write(policy, tmp_path / name)
        before, after = (FlowPipeline(pipe, **size, call_kwargs=call) for pipe in (built(entries()[name]), fresh))
        load_lora(fresh, tmp_path / name)
        velocities = []
        for pipeline in (before, tuned_pipeline, after):
            rows = pipeline.prepare(["a red circle"], num_inference_steps=2, guidance_scale=1.0)
            noise = torch.randn((1, *rows.latent_shape), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                velocities.append(pipeline.velocity(noise, 0, rows))
        base, trained, loaded = velocities
        assert (trained - base).abs().max() > 1e-2
        assert (loaded - trained).abs().max() < 1e-4  # fused weights round otherwise


def test_an_export_of_an_earlier_version_is_folded_when_it_is_read(tiny_sd3, tmp_path) -> None:
    """It held lora_B as trained, and alpha in the header only."""
    now, old = write(tuned("sd3", 12), tmp_path / "now"), tmp_path / "old"
    old.mkdir()
    tensors = {key: value / 3 if "lora_B" in key else value for key, value in load_file(now / LORA_FILE).items()}
    about = {"transformer.r": 4, "transformer.lora_alpha": 12, "transformer.target_modules": list(TARGETS)}
    save_file(tensors, old / LORA_FILE, metadata={"lora_adapter_metadata": json.dumps(about)})
    read = load_file(convert_lora(old, tmp_path / "out", layout="diffusers"))
    for key, value in load_file(now / LORA_FILE).items():
        torch.testing.assert_close(read[key], value, rtol=1e-6, atol=0)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    fused = [load_file(merge(str(tiny_sd3), each, tmp_path / f"merged {each.name}") / weights) for each in (now, old)]
    for key, value in fused[0].items():
        torch.testing.assert_close(fused[1][key], value, rtol=1e-6, atol=1e-6)


def test_what_cannot_be_converted_is_refused(tmp_path) -> None:
    folder = write(tuned("sd3", 8), tmp_path / "export")
    with pytest.raises(ValueError, match="there is no layout 'comfy' of a LoRA, only diffusers, peft, kohya"):
        convert_lora(folder, tmp_path / "out", layout="comfy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not empty; choose another one"):
        convert_lora(folder, folder, layout="peft")
    with pytest.raises(ValueError, match=f"holds no {LORA_FILE}.*if it trains all weights, use the format 'pipeline'"):
        convert_lora(tmp_path, tmp_path / "out", layout="peft")
    tensors = load_file(folder / LORA_FILE)
    about = {"transformer.r": 4, "transformer.lora_alpha": 4}
    foreign = {"lora_adapter_metadata": json.dumps(about)}
    encoder = {"text_encoder.q_proj.lora_A.weight": torch.zeros(4, 8)}
    for header, more in ((None, {}), (foreign, encoder)):
        save_file({**tensors, **more}, folder / LORA_FILE, metadata=header)
        with pytest.raises(ValueError, match=r"was not written by flowsteer.*give the export folder of a run"):
            convert_lora(folder, tmp_path / "out", layout="peft")


# --- the merged pipeline


def test_a_merged_pipeline_in_bfloat16_is_rounded_once(tiny_sd3, tmp_path) -> None:
    policy = tuned("sd3", 12)
    merged = merge(str(tiny_sd3), write(policy, tmp_path / "export"), tmp_path / "merged", dtype=torch.bfloat16)
    found = load_file(merged / "transformer/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    tensors = load_file(tmp_path / "export" / LORA_FILE)
    for key, value in load_file(tiny_sd3 / "transformer/diffusion_pytorch_model.safetensors").items():
        path = f"transformer.{key.removesuffix('.weight')}"
        expected = value.bfloat16().float()
        if f"{path}.lora_A.weight" in tensors:
            expected = expected + tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
        assert torch.equal(found[key], expected.bfloat16()), key


def test_full_weights_are_merged_in_the_dtype_that_is_asked_for(tiny_sd3, tmp_path) -> None:
    weights = zoo.build("sd3").transformer
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter += 0.01
    weights.save_pretrained(tmp_path / "export" / "transformer")
    merged = merge(str(tiny_sd3), tmp_path / "export", tmp_path / "merged", dtype=torch.bfloat16)
    found = load_file(merged / "transformer/diffusion_pytorch_model.safetensors")
    for key, value in weights.state_dict().items():
        assert torch.equal(found[key], value.bfloat16()), key


def dtypes(folder: Path) -> set[torch.dtype]:
    files = [file for file in folder.rglob("*.safetensors") if file.parent.name != "text_encoder_3"]
    return {value.dtype for file in files for value in load_file(file).values() if value.is_floating_point()}


@pytest.fixture(scope="module")
def run(make_config: Make, tmp_path_factory) -> Path:
    """A finished run in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16") / "run"
    return finished(make_config(folder, num_steps=1, **{"model.dtype": "bfloat16"})).folder


def test_the_command_writes_in_the_dtype_of_the_run_unless_told(run, tmp_path) -> None:
    written = {}
    for name, options in {
        "pipeline": [],
        "wide": ["--dtype", "float32"],
        "lora": ["--format", "kohya"],
        "narrow": ["--format", "peft", "--dtype", "bfloat16"],
    }.items():
        with fresh_process():
            done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / name), *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        written[name] = dtypes(tmp_path / name)
    assert written == {
        "pipeline": {torch.bfloat16},
        "wide": {torch.float32},
        "lora": {torch.float32},  # adapters are trained in float32
        "narrow": {torch.bfloat16},
    }


def draw(pipe: DiffusionPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 3.0, "max_sequence_length": 12}
    generator = torch.Generator().manual_seed(0)
    return pipe(["a red circle", "a blue square"], generator=generator, output_type="pt", **call).images


def test_a_merged_embedded_pipeline_loads_without_arguments(tmp_path) -> None:
    """Diffusers requires a T5 of Stable Diffusion 3; the embedded one has none, and is drawn with zeros in its place."""
    policy = Policy(zoo.FlowPipeline(load_diffusers("embedded")), lora=(4, 8, TARGETS), variants=frozenset(), seed=0)
    merged = merge("embedded", write(policy, tmp_path / "export"), tmp_path / "merged")  # B is 0: the base
    pipe = DiffusionPipeline.from_pretrained(merged)
    assert isinstance(pipe, StableDiffusion3Pipeline)
    assert torch.equal(draw(pipe), draw(load_diffusers("embedded")))
    assert torch.equal(draw(load_diffusers(str(merged))), draw(pipe))


def test_a_required_component_that_stays_absent_is_said(tmp_path) -> None:
    pipe = zoo.build("flux")
    pipe.register_modules(text_encoder=None)
    pipe.save_pretrained(tmp_path / "base")
    with pytest.warns(
        UserWarning, match=r"FluxPipeline has no text_encoder; .*from_pretrained\(folder, text_encoder=None\)"
    ):
        merge(str(tmp_path / "base"), write(tuned("flux", 8), tmp_path / "export"), tmp_path / "merged")
