"""The pipeline that ships: it loads, it draws, it is as good as it says, and its script still makes one."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from embedded_networks import learn_merges
from typer.testing import CliRunner

from flowsteer.rewards.scorers.world import TASKS, all_captions, reserved_captions, train_captions

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "rollout" / "embedded"
WEIGHTS = {  # sha256 of what was evaluated; new weights need new numbers, here and in the documentation
    "text_encoder/model.safetensors": "898e4765b54ca6c56d67e944beb2585c0570262d18b3f099a6793d6827907798",
    "text_encoder_2/model.safetensors": "8ede3b333f896a57694024fe874a564956baf156c9e10b5be7b1133d12621a47",
    "transformer/diffusion_pytorch_model.safetensors": "c87290ab91827145af12631ef5ce30525b47e907a4556031ba11345ca27bf535",
    "vae/diffusion_pytorch_model.safetensors": "2a4d3e708f1685d362f89793449b677ac66e52991ce3410e2436e9f2e43e6abe",
}


def load_script():
    """The pre-training script as a module; scripts/ is no package."""
    spec = importlib.util.spec_from_file_location("pretrain_embedded", ROOT / "scripts" / "pretrain_embedded.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    """The shipped pipeline, loaded as a user would."""
    loaded = StableDiffusion3Pipeline.from_pretrained(
        FOLDER,
        text_encoder_3=None,
        tokenizer_3=None,
        image_encoder=None,
        feature_extractor=None,
        torch_dtype=torch.float32,
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_is_small_and_what_was_evaluated() -> None:
    sizes = {file.relative_to(FOLDER).as_posix(): file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()}
    assert 4.5e6 < sum(sizes.values()) < 10e6
    found = {
        file.relative_to(FOLDER).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in FOLDER.rglob("*.safetensors")
    }
    assert found == WEIGHTS


def test_every_part_is_loaded_in_float32(pipeline) -> None:
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert {weight.dtype for weight in part.parameters()} == {torch.float32}
    assert sum(weight.numel() for weight in pipeline.transformer.parameters()) == pytest.approx(2.3e6, rel=0.05)


def test_it_loads_in_float32_even_when_nobody_asks_for_it() -> None:
    # transformers loads what is stored: float16 text encoders beside a float32 transformer would fail in the first call
    loaded = StableDiffusion3Pipeline.from_pretrained(
        FOLDER, text_encoder_3=None, tokenizer_3=None, image_encoder=None, feature_extractor=None
    )
    assert {part.dtype for part in (loaded.transformer, loaded.vae, loaded.text_encoder)} == {torch.float32}


def test_every_word_of_the_world_is_one_token(pipeline) -> None:
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        assert tokenizer.model_max_length == 12
        for caption in all_captions()[::11]:
            assert len(tokenizer(caption.text).input_ids) == len(caption.text.split()) + 2
        words = tokenizer("a zebra", padding="max_length").input_ids
        assert len(words) == 12  # another word is spelt
        assert words.count(tokenizer.eos_token_id) < 10


def test_it_draws_a_picture_that_depends_on_seed_and_caption(pipeline) -> None:
    def picture(caption: str, seed: int) -> np.ndarray:
        return pipeline(
            caption,
            num_inference_steps=4,
            guidance_scale=1.0,
            max_sequence_length=12,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]

    first = picture("a red circle on black", 0)
    assert first.shape == (32, 32, 3)
    assert first.std() > 0.05
    assert np.array_equal(first, picture("a red circle on black", 0))
    assert not np.array_equal(first, picture("a red circle on black", 1))
    assert np.abs(first - picture("a blue square on white", 0)).mean() > 0.1


def test_it_is_as_good_as_it_says(pipeline) -> None:
    captions = [c for task in TASKS for c in [c for c in reserved_captions() if c.task == task][:16]]
    plain = script.strict_accuracy(pipeline, tuple(captions), guidance=1.0, seed=0).mean()
    guided = script.strict_accuracy(pipeline, tuple(captions), guidance=3.0, seed=0).mean()
    # 0.48 and 0.66 on all 264 captions; three deviations of the mean of 96 pictures, sqrt(.25 / 96) = .05 each
    assert plain == pytest.approx(0.48, abs=0.15)
    assert guided == pytest.approx(0.66, abs=0.15)
    assert guided > plain


def test_the_default_number_of_zero_tokens_works_too(pipeline) -> None:
    captions = tuple(c for c in train_captions() if c.task == "colors")[::9]

    def colored(length: int) -> np.ndarray:
        return pipeline(
            [c.text for c in captions],
            num_inference_steps=4,
            guidance_scale=1.0,
            max_sequence_length=length,
            generator=[torch.Generator().manual_seed(i) for i in range(len(captions))],
            output_type="np",
        ).images

    # diffusers appends 256 zero tokens unless told otherwise; training drew 12 or 256, so the pictures stay alike
    assert np.abs(colored(12) - colored(256)).mean() < 0.1


# ------------------------------------------------------------------------------------------------------- the script


def as_trained(pipeline: StableDiffusion3Pipeline):
    """The pipeline's networks as the script trains them."""
    denoiser = script.Denoiser(pipeline.tokenizer)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(denoiser, name).load_state_dict(getattr(pipeline, name).state_dict())
    return denoiser


def test_training_encodes_prompts_as_the_pipeline_does(pipeline) -> None:
    texts = ["", "a red circle", "three blue squares on white"]
    denoiser = as_trained(pipeline)
    embeds, pooled = denoiser.encode(script.tokenize(pipeline.tokenizer, texts))
    expected, negative, expected_pooled, negative_pooled = pipeline.encode_prompt(
        texts, None, None, max_sequence_length=12, do_classifier_free_guidance=True
    )
    assert expected.shape == (3, 12 + 12, 128)
    assert torch.equal(expected[:, :12], embeds[:, :12])
    assert expected[:, 12:].abs().max() == embeds[:, 12:].abs().max() == 0
    assert torch.equal(expected_pooled, pooled)
    # a dropped caption is the empty prompt, which is what guidance compares with
    assert torch.equal(negative[:, :12], embeds[:1, :12].expand(3, -1, -1))
    assert torch.equal(negative_pooled, pooled[:1].expand(3, -1))


@pytest.mark.parametrize("num_zero_tokens", [1, 12, 256])
def test_one_weighted_zero_token_is_as_many_zero_tokens(pipeline, num_zero_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, sigma = torch.randn(2, 8, 8, 8, generator=generator), torch.tensor([0.3, 0.9])
    ids = script.tokenize(pipeline.tokenizer, ["a red circle left of a square", "two circles"])
    denoiser = as_trained(pipeline)
    with torch.no_grad():
        short = denoiser(latents, sigma, ids, torch.full((2,), num_zero_tokens))
        embeds, pooled = denoiser.encode(ids)
        denoiser.transformer.set_attn_processor(JointAttnProcessor2_0())
        long = denoiser.transformer(
            hidden_states=latents,
            timestep=sigma * 1000,
            encoder_hidden_states=torch.cat([embeds[:, :12], torch.zeros(2, num_zero_tokens, 128)], dim=1),
            pooled_projections=pooled,
        ).sample
    # the same sums in another order, in float32, through four blocks
    torch.testing.assert_close(short, long, rtol=1e-4, atol=1e-4)


def test_byte_pairs_are_merged_by_how_often_they_occur() -> None:
    # "a b" occurs 5 + 2 times, "b c</w>" 5 times
    merges = learn_merges(Counter({"abc": 5, "abd": 2}))
    assert merges == [("a", "b"), ("ab", "c</w>"), ("ab", "d</w>")]


def test_a_batch_is_reproducible_and_drops_a_tenth_of_the_captions() -> None:
    data = script.Data(
        latents=torch.arange(50.0)[:, None, None, None].expand(-1, 8, 8, 8),
        captions=torch.arange(50),
        ids=torch.arange(51)[:, None].expand(-1, 12),
    )
    latents, noise, sigma, ids, zeros = data.batch(4000, torch.Generator().manual_seed(1))
    again = data.batch(4000, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip((latents, noise, sigma, ids, zeros), again))
    dropped = ids[:, 0] == 50
    assert abs(dropped.float().mean() - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5  # four deviations
    assert torch.equal(ids[~dropped, 0].float(), latents[~dropped, 0, 0, 0])  # the caption is the picture's own
    # logit-normal: the logit of sigma is N(0, 1); quantiles are drawn evenly, so its moments are sharper than 1 / sqrt(N)
    assert torch.logit(sigma).mean().abs() < 0.01
    assert abs(torch.logit(sigma).std() - 1) < 0.01
    assert set(zeros.tolist()) == {12, 256}


def test_the_pool_holds_no_reserved_caption() -> None:
    captions = train_captions()
    pool = script.draw_pool(64, seed=0, captions=captions)
    assert pool.pictures.shape == (64, 3, 32, 32)
    assert not {captions[i].meaning for i in pool.captions} & {c.meaning for c in reserved_captions()}
    # and `prepare` draws from nothing else
    assert "draw_pool(pool_size, seed, train_captions())" in (ROOT / "scripts" / "pretrain_embedded.py").read_text()


def test_the_script_makes_a_pipeline_that_loads_and_goes_on_where_it_was(tmp_path) -> None:
    runner, out, work = CliRunner(), tmp_path / "out", tmp_path / "work"
    command = ["train", "--smoke", "--out", str(out), "--work", str(work)]
    result = runner.invoke(script.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    loaded = script.load_pipeline(out)
    assert loaded("a circle", num_inference_steps=2, max_sequence_length=12, output_type="np").images.shape == (
        1,
        32,
        32,
        3,
    )
    assert loaded.vae.config.scaling_factor != 0.18215  # the autoencoder's own, not diffusers' default
    # a second run finds its state and has nothing left to do
    again = runner.invoke(script.app, command, catch_exceptions=False)
    assert "resuming at step 4" in again.output


def test_captions_are_written_where_they_are_wanted(tmp_path) -> None:
    result = CliRunner().invoke(script.app, ["captions", "--folder", str(tmp_path)])
    assert result.exit_code == 0
    for name in ("shapes_train.txt", "shapes_reserved.txt"):
        assert (tmp_path / name).read_text() == (ROOT / "configs" / name).read_text()
