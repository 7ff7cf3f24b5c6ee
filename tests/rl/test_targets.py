"""``model.lora.targets: auto``: which layers it finds, and that it finds them by what they do and not only by their names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import zoo
from conftest import Make
from safetensors.torch import load_file
from torch import nn
from zoo.entries import entries, lifted

from flowsteer.rl.check.toy import Toy
from flowsteer.rl.config import parse_config
from flowsteer.rl.start import start
from flowsteer.rl.targets import automatic_targets, endings, like, summary, trainable
from flowsteer.rl.train import train
from flowsteer.rollout.data.prompts import Row

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 1.0}
PICTURE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")
PROMPT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
PROMPT += ("ff_context.net.0.proj", "ff_context.net.2")


def found(name: str) -> tuple[str, ...]:
    pipeline, inputs, _ = lifted(entries()[name])
    return automatic_targets(pipeline, Row.of("a red circle", inputs[0] if inputs else {}), **SETTINGS)


def test_attention_and_feed_forward_layers_that_lead_somewhere() -> None:
    """In the last block of Stable Diffusion 3 the prompt's own queries lead nowhere; its keys and values do."""
    first = {f"transformer_blocks.0.{name}" for name in PICTURE + PROMPT}
    last = {f"transformer_blocks.1.{name}" for name in (*PICTURE, "attn.add_k_proj", "attn.add_v_proj")}
    assert {*found("StableDiffusion3Pipeline")} == first | last


def test_feed_forward_layers_without_a_name_of_their_own() -> None:
    """The single blocks of FLUX: ``proj_mlp`` and ``proj_out``, but not the ``proj_out`` of the whole transformer."""
    names = found("FluxPipeline")
    assert {"single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_out"} <= {*names}
    assert "proj_out" not in names


def test_both_denoisers_are_asked() -> None:
    """Wan 2.2: the second transformer sees the last steps only."""
    pipeline = zoo.lifted("wan")
    second = pipeline.denoisers["transformer_2"]
    names = automatic_targets(pipeline, Row("a red circle"), **SETTINGS)
    assert {*trainable(second)} == {*names}


def test_layers_of_norms_and_embeddings_are_left_alone() -> None:
    for name in ("StableDiffusion3Pipeline", "FluxPipeline", "sd", "QwenImagePipeline"):
        assert not [path for path in found(name) if re.search("norm|emb|mod", path)], name


def test_experts_that_are_not_asked_are_left_out() -> None:
    """HiDream's experts run without a gradient outside of its own training."""
    names = found("HiDreamImagePipeline")
    assert names
    assert not [path for path in names if ".experts." in path]


def test_no_weight_and_no_gradient_is_left_behind() -> None:
    pipeline = zoo.lifted("sd3")
    before = {name: value.clone() for name, value in pipeline.denoisers["transformer"].named_parameters()}
    automatic_targets(pipeline, Row("a red circle"), **SETTINGS)
    after = dict(pipeline.denoisers["transformer"].named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.grad is None and not value.requires_grad for value in after.values())
    assert not [module for module in pipeline.denoisers["transformer"].modules() if module._forward_hooks]


def test_a_layer_that_multiplies_by_zero_is_not_reached() -> None:
    pipeline = zoo.lifted("sd3")
    block: nn.Module = pipeline.denoisers["transformer"].transformer_blocks[1]  # type: ignore[index]
    with torch.no_grad():
        block.ff.net[2].weight.zero_()  # type: ignore[index]
    names = automatic_targets(pipeline, Row("a red circle"), **SETTINGS)
    assert "transformer_blocks.1.ff.net.0.proj" not in names
    assert "transformer_blocks.1.ff.net.2" in names


def test_a_network_without_such_layers_is_told() -> None:
    transformer = zoo.lifted("sd3").denoisers["transformer"]
    assert {"to_k", "net.2", "proj_out"} <= {*endings(transformer)}
    with pytest.raises(
        ValueError, match=r"targets=auto finds no attention .* in network; list its layers in model.lora.targets"
    ):
        automatic_targets(Toy(), Row("a red circle"), **SETTINGS)  # type: ignore[arg-type]


def test_names_of_kinds() -> None:
    assert like("transformer_blocks.7.attn.to_out.0") == "attn.to_out.0"
    assert like("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q") == "attn1.to_q"
    assert like("single_transformer_blocks.3.proj_out") == "proj_out"
    assert summary(["blocks.0.ff.up", "blocks.1.ff.up", "blocks.0.attn.to_q"]) == "ff.up 2, attn.to_q 1"


def test_it_is_the_default_and_is_exported(make_config: Make, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", num_steps=1, **{"model.lora": {"rank": 2, "alpha": 2}})
    run = start(parse_config(config), quiet=True)
    train(run)
    run.export()
    run.close()
    tensors = load_file(tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors")
    layers = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in tensors}
    assert {"transformer_blocks.0.ff.net.2", "transformer_blocks.1.attn.to_q"} <= layers
    assert all(tensor.any() for name, tensor in tensors.items() if ".lora_B." in name)  # every layer has learned
