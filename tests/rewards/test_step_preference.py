"""The step-aware preference model: it begins as CLIP, hears the noise level, comes back from its folder; its script runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import preference_fit
import preference_pairs
import pytest
import torch
import train_step_preference
import typer
import zoo
from PIL import Image
from tiny_preference import tiny_clip, tiny_model
from typer.testing import CliRunner

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.registry import load_reward
from flowsteer.rewards.scorers.step_preference import StepPreference, StepPreferenceModel

PROMPTS = ["a red circle", "two blue squares", "", "a red circle", "a very long prompt " * 20]


def images(size: int, side: int = 20, seed: int = 0) -> np.ndarray:
    """uint8 [size, side, side, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (size, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model that hears the noise level."""
    place = tmp_path_factory.mktemp("preference") / "model"
    tiny_model(perturbed=True).save(place)
    return place


class TestModel:
    def test_new_it_is_clip_at_every_noise_level(self):
        model = tiny_model()
        shown = images(5)
        ids = model.tokenizer(
            PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        plain = model.clip(input_ids=ids, pixel_values=model.preprocess(shown)).logits_per_image.diagonal()
        for level in (0.0, 0.5, 1.0):
            scores = model(shown, torch.full((5,), level), PROMPTS)
            # the towers compute the same; only the sums of the cosine are in another order
            torch.testing.assert_close(scores, plain, rtol=1e-5, atol=1e-5)
        vision = model.clip.get_image_features(model.preprocess(shown)).pooler_output
        embedded = model.embed_images(shown, torch.rand(5))
        assert torch.equal(embedded, torch.nn.functional.normalize(vision, dim=-1))

    def test_the_noise_level_matters_once_it_is_learnt(self):
        model = tiny_model(perturbed=True)
        low, high = (model(images(5), torch.full((5,), level), PROMPTS) for level in (0.2, 0.8))
        assert ((low - high).abs() > 1e-3).all()

    def test_without_gates_a_tower_is_its_embedding(self):
        model = tiny_model()
        width = model.clip.config.vision_config.hidden_size
        for layer in model.modulation.blocks:
            layer.bias.view(6, width)[[2, 5]] = 0
        tower, pixels = model.clip.vision_model, model.preprocess(images(3))
        token = tower.post_layernorm(tower.pre_layrnorm(tower.embeddings(pixels))[:, 0])
        expected = torch.nn.functional.normalize(model.clip.visual_projection(token), dim=-1)
        torch.testing.assert_close(model.embed_images(images(3), torch.rand(3)), expected)

    def test_every_weight_of_the_modulation_learns(self):
        model = tiny_model(perturbed=True).requires_grad_(True)
        model(images(3), torch.rand(3), PROMPTS[:3]).square().sum().backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in model.modulation.parameters())

    def test_pictures_are_brought_to_the_tower(self):
        model = tiny_model()
        gray = np.full((1, 50, 30, 3), 255, np.uint8)
        pixels = model.preprocess(gray)
        assert pixels.shape == (1, 3, 16, 16)
        mean, std = 0.48145466, 0.26862954  # of red, as OpenAI published them
        torch.testing.assert_close(pixels[:, 0], torch.full((1, 16, 16), (1 - mean) / std))

    def test_it_comes_back_bit_for_bit(self, folder, tmp_path):
        model, loaded = tiny_model(perturbed=True), StepPreferenceModel.load(folder)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        levels = torch.rand(5)
        assert torch.equal(loaded(images(5), levels, PROMPTS), model(images(5), levels, PROMPTS))
        names = {file.suffix for file in folder.rglob("*") if file.is_file()}
        assert names <= {".json", ".safetensors", ".txt"}  # nothing that is unpickled
        loaded.half().save(tmp_path / "half")
        assert StepPreferenceModel.load(tmp_path / "half").clip.logit_scale.dtype == torch.float16
        with pytest.raises(ValueError, match="exists already"):
            model.save(folder)


class TestReward:
    def test_it_is_found_by_name_and_scores_finished_images(self, folder):
        reward = load_reward("step_preference", path=str(folder), device="cpu")
        assert isinstance(reward, StepPreference)
        shown = images(5)
        scores = reward(shown, PROMPTS)
        assert scores == reward(shown, PROMPTS, sigma=[0.0] * 5)
        assert scores[0] != scores[1]
        expected = tiny_model(perturbed=True)(shown, torch.zeros(5), PROMPTS)
        assert scores == pytest.approx(expected.tolist(), abs=1e-5)

    def test_a_score_depends_on_neither_order_nor_batch(self, folder):
        reward = StepPreference(str(folder), device="cpu")
        shown, sigma = images(5), [0.1, 0.9, 0.0, 0.4, 0.6]
        whole = reward(shown, PROMPTS, sigma=sigma)
        turned = reward(shown[::-1], PROMPTS[::-1], sigma=sigma[::-1])[::-1]
        small = StepPreference(str(folder), device="cpu", batch_size=2)(shown, PROMPTS, sigma=sigma)
        assert turned == pytest.approx(whole, abs=1e-5)  # float32 sums in kernels of another shape
        assert small == pytest.approx(whole, abs=1e-5)

    def test_the_noise_level_is_a_column(self, folder):
        pictures = torch.from_numpy(images(4)).movedim(-1, 1).float() / 255
        rewards = RewardSet([("spm", StepPreference(str(folder), device="cpu"), 1.0)])
        sigma = [0.0, 0.2, 0.5, 1.0]
        direct = StepPreference(str(folder), device="cpu")(images(4), ["a cat"] * 4, sigma=sigma)
        assert rewards.score(pictures, ["a cat"] * 4, {"sigma": sigma}).total.tolist() == pytest.approx(
            direct, abs=1e-5
        )

    def test_a_video_is_the_mean_of_its_frames(self, folder):
        reward = StepPreference(str(folder), device="cpu")
        frames = images(3)
        alone = reward(frames, ["a cat"] * 3, sigma=[0.3] * 3)
        assert reward(frames[None], ["a cat"], sigma=[0.3]) == pytest.approx([np.mean(alone)], abs=1e-5)

    @pytest.mark.parametrize("sigma", [[0.5, 1.2], [-0.1, 0], [math.nan, 0], [500, 0]])
    def test_noise_levels_out_of_range_are_refused(self, folder, sigma):
        with pytest.raises(ValueError, match=r"between 0 .* and 1"):
            StepPreference(str(folder), device="cpu")(images(2), ["a", "b"], sigma=sigma)

    def test_other_wrong_arguments_are_refused(self, folder):
        reward = StepPreference(str(folder), device="cpu")
        with pytest.raises(ValueError, match="one noise level per image"):
            reward(images(2), ["a", "b"], sigma=[0.1])
        with pytest.raises(ValueError, match="uint8 images"):
            reward(images(2).astype(np.float32), ["a", "b"])
        with pytest.raises(ValueError, match="batch_size"):
            StepPreference(str(folder), batch_size=0)

    def test_other_folders_are_refused(self, folder, tmp_path):
        with pytest.raises(ValueError, match=r"no folder .*; train one with scripts/train_step_preference"):
            StepPreference(str(tmp_path / "nothing"))
        with pytest.raises(ValueError, match=r"has no config\.json"):
            StepPreference(str(tmp_path))
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match="damaged"):
            StepPreference(str(tmp_path))
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        with pytest.raises(ValueError, match=r"'clip'.*--init"):
            StepPreference(str(tmp_path))
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(ValueError, match=r"lacks model\.safetensors and tokenizer"):
            StepPreference(str(tmp_path))


class TestLoss:
    def test_pairs_are_cross_entropy_of_softmax(self):
        nan = math.nan
        scores = torch.tensor([1.0, 3.0, 0.5, 0.2, 0.9])
        groups = [
            preference_pairs.Group(
                prompt="a", latents=torch.zeros(2, 1), preference=torch.tensor([[nan, 1], [0, nan]])
            ),
            preference_pairs.Group(
                prompt="b", latents=torch.zeros(3, 1), preference=torch.full((3, 3), nan), weight=0.5
            ),
        ]
        groups[1].preference[0, 1], groups[1].preference[1, 0] = 0.5, 0.5  # a tie
        loss, right = preference_fit.pair_loss(scores, groups)
        first = -torch.tensor([1.0, 3.0]).log_softmax(0)[0]
        second = -torch.tensor([0.5, 0.2]).log_softmax(0).mean()
        torch.testing.assert_close(loss, (first + 0.5 * second) / 1.5)
        assert right == 0  # the only clear pair is in the wrong order

    def test_ties_and_missing_scores_are_no_pairs(self):
        found = preference_pairs.preferences(torch.tensor([[1.0, 0.0, 0.04, math.nan]]), 0.05)[0]
        expected = torch.full((4, 4), math.nan)
        expected[0, 1:3], expected[1:3, 0] = 1, 0
        assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))

    def test_levels_are_even_and_some_are_clean(self):
        split = preference_fit.split_by_level(list(range(20)), [1, 2, 3, 4], 0.2, torch.Generator().manual_seed(0))
        assert {index: len(some) for index, some in split.items()} == dict.fromkeys((None, 1, 2, 3, 4), 4)
        assert sorted(place for some in split.values() for place in some) == list(range(20))
        assert preference_fit.split_by_level([0, 1], [1], 1.0, torch.Generator()).keys() == {None}

    def test_equal_and_missing_scores_count_half(self):
        preference = preference_pairs.preferences(torch.tensor([[3.0, 2.0, 1.0]]), 0.0)[0]
        group = preference_pairs.Group(prompt="a", latents=torch.zeros(3, 1), preference=preference)
        assert preference_fit.pairs_in_order(torch.tensor([3.0, 2.0, 1.0]), [group]) == 3
        assert preference_fit.pairs_in_order(torch.tensor([2.0, 2.0, 1.0]), [group]) == 2.5
        assert preference_fit.pairs_in_order(torch.tensor([math.nan, 2.0, 1.0]), [group]) == 2


def run(*arguments: str | Path) -> None:
    """The script's command in this process."""
    app = typer.Typer()
    app.command()(train_step_preference.main)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None:
        raise done.exception


SMALL = ["--device", "cpu", "--tower-width", "32", "--num-blocks", "1", "--projection", "16", "--steps", "3"]
SMALL += ["--prompts-per-step", "4", "--images-per-prompt", "3"]


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion XL, which predicts the noise."""
    place = tmp_path_factory.mktemp("pipelines") / "sdxl"
    zoo.build("sdxl").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Six pairs from people, one of them a tie, of three captions."""
    place = tmp_path_factory.mktemp("pairs")
    lines = []
    for number, picture in enumerate(images(12, side=24)):
        Image.fromarray(picture).save(place / f"{number}.png")
    for number in range(6):
        row = {"caption": f"caption {number // 2}", "image_0": f"{2 * number}.png", "image_1": f"{2 * number + 1}.png"}
        lines.append(json.dumps({**row, "label_0": [1, 0, 0.5, 1, 0, 1][number], "num_example_per_prompt": 2}))
    (place / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return place


class TestScript:
    def test_the_embedded_pipeline(self, tmp_path):
        out = tmp_path / "out"
        options = [
            "--num-prompts",
            "6",
            "--num-held-out",
            "4",
            "--num-inference-steps",
            "3",
            "--reward-option",
            "score=graded",
        ]
        run(out, *SMALL, *options, "--prompts", "shapes_train.txt", "--held-out", "shapes_reserved.txt")
        report = json.loads((out / "accuracy.json").read_text())
        sigmas = [row["sigma"] for row in report["accuracy"]]
        assert sigmas == sorted(sigmas, reverse=True)
        assert len(sigmas) == 3  # pure noise has nothing to say; finished images come last
        assert 0 < sigmas[0] < 1
        assert sigmas[-1] == 0
        finished = report["accuracy"][-1]
        assert finished["the reward"] == 1  # it made the labels
        assert all(0 <= row[name] <= 1 for row in report["accuracy"] for name in ("before", "after"))
        assert report["settings"]["reward_option"] == ["score=graded"]
        reward = load_reward("step_preference", path=str(out), device="cpu")
        assert np.isfinite(reward(images(2), ["a red circle", "two squares"], sigma=[0.4, 0.0])).all()
        with pytest.raises(ValueError, match="exists already"):
            run(out, *SMALL, "--prompts", "shapes_train.txt")

    def test_a_noise_predicting_pipeline_twice_the_same(self, unet, tmp_path):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("\n".join(f"prompt {number}" for number in range(6)))
        options = ["--model", unet, "--height", "16", "--width", "16", "--prompts", prompts, "--min-difference", "0"]
        options += ["--reward", "jpeg_incompressibility", "--num-inference-steps", "2", "--guidance-scale", "3"]
        for name in ("first", "second"):
            run(tmp_path / name, *SMALL, *options)
        first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
        report = json.loads((tmp_path / "first" / "accuracy.json").read_text())
        assert len(report["accuracy"]) == 3  # even the noisiest level of such a model holds some data

    def test_pairs_from_people(self, unet, pairs, tmp_path):
        out = tmp_path / "out"
        run(
            out,
            *SMALL,
            "--model",
            unet,
            "--height",
            "16",
            "--width",
            "16",
            "--pairs",
            pairs,
            "--num-inference-steps",
            "2",
        )
        (clean,) = [row for row in json.loads((out / "accuracy.json").read_text())["accuracy"] if row["sigma"] == 0]
        assert clean["pairs"] in (1, 2)
        assert "the reward" not in clean


class TestPairs:
    @pytest.fixture(scope="class")
    def base(self):
        return preference_pairs.Base(
            zoo.shared("sdxl"), num_inference_steps=2, guidance_scale=1.0, negative_prompt=None
        )

    def test_people_s_pairs_are_encoded_as_the_pipeline_wants_them(self, base, pairs):
        groups = preference_pairs.read_pairs(pairs, base)
        assert [group.prompt for group in groups] == [f"caption {number // 2}" for number in range(6)]
        assert groups[0].weight == 0.5
        assert groups[2].preference[0, 1] == 0.5
        assert groups[1].preference[0, 1] == 0
        assert groups[1].preference[1, 0] == 1
        # the way back: what is decoded is what the autoencoder makes of the picture
        vae = base.pipeline.pipe.vae
        picture = preference_pairs._read_image(pairs / "0.png", (16, 16))[None]
        with torch.no_grad():
            expected = (vae.decode(vae.encode(picture).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        shown = base.predict(["caption 0"], groups[0].latents[:1], torch.zeros(1), None)
        assert np.abs(shown[0] / 255 - expected[0].permute(1, 2, 0).numpy()).max() < 1 / 255

    def test_the_images_of_a_group_get_the_same_noise(self, base):
        latents = torch.randn(1, *base.latent_shape).expand(3, -1, -1, -1)
        groups = [
            preference_pairs.Group(prompt=prompt, latents=latents, preference=torch.zeros(3, 3)) for prompt in "ab"
        ]
        shown = preference_fit.show(base, groups, base.indices[0], torch.Generator().manual_seed(0))
        assert np.abs(shown[0].astype(int) - shown[1]).max() <= 1  # rounding
        assert np.abs(shown[0].astype(int) - shown[3]).max() > 1

    def test_prompts_that_cannot_share_a_batch_are_predicted_one_by_one(self):
        base = preference_pairs.Base(
            zoo.shared("qwen"), num_inference_steps=2, guidance_scale=1.0, negative_prompt=None
        )
        prompts = ["a cat", "a cat", "a much longer prompt"]
        latents, pictures = base.draw(prompts, torch.tensor([0, 1, 2]))
        alone, _ = base.draw(prompts[2:], torch.tensor([2]))
        assert torch.equal(latents[2:], alone)
        noise = torch.zeros_like(latents)
        shown = base.predict(prompts, latents, noise, None)
        assert np.abs(shown / 255 - pictures.movedim(1, -1).numpy()).max() < 1 / 255
        together = base.predict(prompts, latents, noise, base.indices[-1])
        assert np.array_equal(together[2:], base.predict(prompts[2:], latents[2:], noise[2:], base.indices[-1]))

    def test_videos_are_refused(self):
        with pytest.raises(ValueError, match="trains on images"):
            preference_pairs.Base(zoo.shared("wan"), num_inference_steps=2, guidance_scale=1.0, negative_prompt=None)

    def test_latents_that_are_no_image_are_refused(self, pairs):
        base = preference_pairs.Base(
            zoo.shared("flux"), num_inference_steps=2, guidance_scale=1.0, negative_prompt=None
        )
        with pytest.raises(
            ValueError, match=r"latents \[B, C, H, W\]; this one has AutoencoderKL and latents \[16, 16\]"
        ):
            preference_pairs.read_pairs(pairs, base)

    def test_bad_lines_are_named(self, base, tmp_path):
        file = tmp_path / "pairs.jsonl"
        good = {"caption": "a", "image_0": "x.png", "image_1": "y.png", "label_0": 1}
        for row, message in [
            ("{", "line 1: not JSON"),
            (json.dumps({"caption": "a"}), "line 1: lacks image_0, image_1, label_0"),
            (json.dumps({**good, "label_0": 2}), "label_0 is 2; it must be 1, 0, or .5"),
            (json.dumps(good), "line 1: there is no image .*x.png"),
        ]:
            file.write_text(row)
            with pytest.raises(ValueError, match=message):
                preference_pairs.read_pairs(file, base)
        with pytest.raises(ValueError, match="there is no file"):
            preference_pairs.read_pairs(tmp_path / "nothing", base)
        alone = preference_pairs.Group(prompt="a", latents=torch.zeros(2, 1), preference=torch.zeros(2, 2))
        with pytest.raises(ValueError, match="at least two captions"):
            preference_pairs.split_pairs([alone], 0)

    def test_a_new_model_needs_a_clip_text_tower(self):
        base = preference_pairs.Base(
            zoo.shared("zimage"), num_inference_steps=2, guidance_scale=1.0, negative_prompt=None
        )
        with pytest.raises(ValueError, match=r"Qwen3Model.*--init"):
            preference_fit.new_model(base, image_size=None, patch_size=4, width=32, num_blocks=1, projection=8)

    def test_a_published_clip_begins_as_it_is(self, tmp_path):
        clip = tiny_clip()
        clip.save_pretrained(tmp_path)
        zoo.parts.clip_tokenizer().save_pretrained(tmp_path)
        model = preference_fit.pretrained_model(str(tmp_path)).eval()
        with torch.no_grad():
            scores = [found(images(3), torch.rand(3), PROMPTS[:3]) for found in (model, tiny_model())]
        assert torch.equal(*scores)
        with pytest.raises(ValueError, match=r"--init .*no CLIP checkpoint"):
            preference_fit.pretrained_model(str(tmp_path / "nothing"))
