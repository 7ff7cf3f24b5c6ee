"""The editing pipeline that ships: it loads, it edits, it is as good as it says, it trains, and its script makes one."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pretrain_edit
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from edit_networks import EditDenoiser, build_edit_tokenizers, edit_texts, pack, unpack
from inprocess import fresh_process
from PIL import Image
from pretrain_embedded import app
from torch import Tensor
from typer.testing import CliRunner

from flowsteer.rewards.scorers.edits import Case
from flowsteer.rl.config import load_config
from flowsteer.rl.export import merge
from flowsteer.rl.run import Run
from flowsteer.rl.start import start
from flowsteer.rl.train import train
from flowsteer.rollout.data.files import Source, read_table
from flowsteer.rollout.lifting.loop import fixed_randomness
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.steps.solvers import euler

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "rollout" / "embedded_edit"
WEIGHTS = {  # sha256 of what was evaluated; new weights need new numbers, here and in the documentation
    "text_encoder/model.safetensors": "06db8db89fb412c5f2fb4baaa3a495f86f6767eaee1b67a4699f2c2566ba3bcc",
    "text_encoder_2/model.safetensors": "55acb59ec93930f2b89d65375217c9fba42e2cbd736b4cd6a85c410bf1aa370a",
    "transformer/diffusion_pytorch_model.safetensors": "fc96ab0cd3760f1857c31bb17af7e873f417798dbb87bd634a6120865a1656d7",
    "vae/diffusion_pytorch_model.safetensors": "2a4d3e708f1685d362f89793449b677ac66e52991ce3410e2436e9f2e43e6abe",
}
STRICT = 0.306  # on the 264 shipped reserved edits, four noise seeds, six steps
STEPS = 6


@pytest.fixture(scope="module")
def pipeline() -> FluxKontextPipeline:
    """The shipped pipeline, loaded as a user would."""
    loaded = FluxKontextPipeline.from_pretrained(FOLDER)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """The shipped reserved edits."""
    _, count, reserved, seed = pretrain_edit.FILES[1]
    return pretrain_edit.draw_cases(count, reserved=reserved, seed=seed)


def edited(pipeline: FluxKontextPipeline, case: Case, seed: int = 0, **changed: Any) -> np.ndarray:
    arguments: dict[str, Any] = {"image": Image.fromarray(case.source.draw()), "prompt": case.edit.text} | changed
    return pipeline(
        **arguments, height=32, width=32, num_inference_steps=4, output_type="np",
        generator=torch.Generator().manual_seed(seed), **pretrain_edit.CALL,
    ).images[0]  # fmt: skip


def test_it_is_small_and_what_was_evaluated() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 7e6
    found = {
        file.relative_to(FOLDER).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in FOLDER.rglob("*.safetensors")
    }
    assert found == WEIGHTS


def test_its_autoencoder_is_the_other_shipped_pipelines() -> None:
    ours, other = (
        FOLDER.with_name(name) / "vae" / "diffusion_pytorch_model.safetensors" for name in ("embedded_edit", "embedded")
    )
    assert ours.read_bytes() == other.read_bytes()


def test_every_part_is_loaded_in_float32(pipeline: FluxKontextPipeline) -> None:
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}


def test_every_word_of_an_instruction_is_one_token_and_other_words_are_spelt(pipeline: FluxKontextPipeline) -> None:
    ends = {pipeline.tokenizer: 2, pipeline.tokenizer_2: 1}
    for tokenizer, num_ends in ends.items():
        for text in edit_texts():
            assert len(tokenizer(text).input_ids) == len(text.split()) + num_ends
        assert len(tokenizer("zebra").input_ids) >= 5 + num_ends
        assert tokenizer.unk_token_id not in tokenizer("zebra").input_ids[:-1]


def test_what_it_makes_depends_on_source_instruction_and_noise(
    pipeline: FluxKontextPipeline, cases: list[Case]
) -> None:
    first = edited(pipeline, cases[0])
    assert first.shape == (32, 32, 3)
    assert np.array_equal(first, edited(pipeline, cases[0]))
    assert not np.array_equal(first, edited(pipeline, cases[0], seed=1))
    assert np.abs(first - edited(pipeline, cases[0], prompt="add a cyan square")).mean() > 1e-3
    assert np.abs(first - edited(pipeline, cases[0], image=Image.fromarray(cases[4].source.draw()))).mean() > 0.02


def test_it_is_as_good_as_it_says(pipeline: FluxKontextPipeline, cases: list[Case]) -> None:
    hits = pretrain_edit.strict_accuracy(pipeline, cases[:132], seed=0, steps=STEPS)
    # three deviations of the mean of 132 pictures, at most sqrt(.25 / 132) = .044 each
    assert hits.mean() == pytest.approx(STRICT, abs=0.13)


def test_training_computes_the_velocity_that_the_pipeline_does(
    pipeline: FluxKontextPipeline, cases: list[Case]
) -> None:
    clip, t5 = build_edit_tokenizers()
    denoiser = EditDenoiser(clip, t5)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(denoiser, name).load_state_dict(getattr(pipeline, name).state_dict())
    noise, chosen = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)), cases[:2]
    texts, sources = [case.edit.text for case in chosen], [case.source.draw() for case in chosen]
    with torch.no_grad():
        ids = pretrain_edit.tokenize(clip, texts), pretrain_edit.tokenize(t5, texts)
        velocity = denoiser(noise, pretrain_edit.encode(pipeline.vae, sources).float(), torch.ones(2), *ids)
    # one Euler step from pure noise
    made = pipeline(
        image=[Image.fromarray(source) for source in sources], prompt=texts, latents=pack(noise), height=32, width=32,
        num_inference_steps=1, output_type="latent", **pretrain_edit.CALL,
    ).images  # fmt: skip
    # training keeps its latents in float16: 2^-11 of values up to about 4, through the blocks
    torch.testing.assert_close(unpack(made), noise - velocity, rtol=0, atol=5e-3)


# --- training it


def drawn(run: Run, row: Any) -> Tensor:
    """The picture of a row by lifted steps, with the weights that are exported, from the pipeline's own start."""
    pipeline = run.worker.pipeline
    assert isinstance(pipeline, FlowPipeline)
    with run.policy.using(run.policy.best), torch.no_grad():
        latents, prepared = pipeline.own_start(
            row.text, inputs=dict(row.inputs), num_inference_steps=STEPS, guidance_scale=1.0
        )
        for index in range(prepared.schedule.num_steps):
            step = pipeline.begin(latents, index, prepared)
            latents = step.finish(euler(step.velocity, latents, prepared.schedule, index)[0].to(step.velocity.dtype))
        return pipeline.decode(latents, prepared)


def test_the_shipped_configuration_trains_and_its_export_is_redrawn_by_diffusers(tmp_path: Path) -> None:
    overrides = ["num_steps=2", "rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.batch_size=2"]
    overrides += [f"output={tmp_path / 'run'}", "evaluation.num_prompts=2", "optimizer.warmup_updates=0"]
    with (
        fresh_process(),
        contextlib.closing(start(load_config("embedded_edit_nft_edit_composition", overrides), quiet=True)) as run,
    ):
        train(run)
        run.export()
        row = run.worker.prompts.row(0)
        after = drawn(run, row)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) >= {"reward/edit_composition/strict", "grad_norm"} for line in metrics] == [True, True]

    merged = merge("embedded_edit", tmp_path / "run" / "export", tmp_path / "merged")
    plain, base = (DiffusionPipeline.from_pretrained(folder) for folder in (merged, FOLDER))

    def by_diffusers(pipeline: DiffusionPipeline) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        arguments = FlowPipeline(pipeline, height=32, width=32, call_kwargs=pretrain_edit.CALL).call_arguments(
            [row.text], inputs=[dict(row.inputs)], num_inference_steps=STEPS, guidance_scale=1.0
        )
        with fixed_randomness(torch.device("cpu")):
            return pipeline(**arguments | {"generator": torch.Generator().manual_seed(0)})[0]

    for network in (plain.vae, plain.text_encoder, plain.text_encoder_2):
        network.requires_grad_(False)  # as training froze it: torch multiplies by whether a weight wants a gradient
    assert torch.equal(by_diffusers(plain), after)
    assert not torch.equal(by_diffusers(base), after)


# --- the script


def test_the_script_makes_a_pipeline_that_loads_and_goes_on_where_it_was(tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "out"
    command = ["train", "--edit", "--smoke", "--out", str(out), "--work", str(tmp_path / "work")]
    result = runner.invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    case = pretrain_edit.draw_cases(1, reserved=False, seed=0)[0]
    assert edited(pretrain_edit.load_pipeline(out), case).shape == (32, 32, 3)
    again = runner.invoke(app, command, catch_exceptions=False)
    assert "resuming at step 4" in again.output


def test_the_pool_holds_no_reserved_edit() -> None:
    from flowsteer.rewards.scorers.edits import is_reserved

    assert not any(is_reserved(case.meaning) for case in pretrain_edit.draw_cases(200, reserved=False, seed=0))
    # and `prepare` draws from nothing else
    assert "draw_cases(pool, reserved=False, seed=seed + 10)" in (ROOT / "scripts" / "pretrain_edit.py").read_text()


def test_the_pool_is_spoiled_as_it_says(pipeline: FluxKontextPipeline, tmp_path: Path) -> None:
    count = 400
    edits = pretrain_edit.prepare(tmp_path, pipeline.vae, count, seed=0)
    cases = pretrain_edit.draw_cases(count, reserved=False, seed=10)
    right = pretrain_edit.encode(pipeline.vae, [case.target.draw() for case in cases])
    wrong = (edits.targets != right).flatten(1).any(1).float().mean().item()
    deviation = (pretrain_edit.SPOILED_SHARE * (1 - pretrain_edit.SPOILED_SHARE) / count) ** 0.5
    assert abs(wrong - pretrain_edit.SPOILED_SHARE) < 4 * deviation
    sources = pretrain_edit.encode(pipeline.vae, [case.source.draw() for case in cases])
    assert torch.equal(edits.sources, sources)


def test_edits_are_written_where_they_are_wanted(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["captions", "--edit", "--folder", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    for name, *_ in pretrain_edit.FILES:
        ours, shipped = (
            read_table(Source(file=str(tmp_path / name))),
            read_table(Source(file=str(ROOT / "configs" / name))),
        )
        assert ours.texts == shipped.texts
        assert ours.columns["expected"] == shipped.columns["expected"]
