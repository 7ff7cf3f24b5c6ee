"""The rewards on CLIP, SigLIP and BLIP: tiny random models in the published formats against the formulas written out again."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import tiny_rewards
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, SiglipImageProcessorPil, SiglipModel

from flowsteer.rewards.scorers.aesthetic_v25 import AestheticV25
from flowsteer.rewards.scorers.batching import PromptMemory
from flowsteer.rewards.scorers.clip_scores import AestheticV2, CLIPScore, PickScore
from flowsteer.rewards.scorers.composition import CompositionReward
from flowsteer.rewards.scorers.diversity import PixelDiversity
from flowsteer.rewards.scorers.hpsv2 import HPSv2, clean_prompt
from flowsteer.rewards.scorers.image_reward import UNUSED, ImageReward
from flowsteer.rewards.scorers.jpeg import JPEGCompressibility, JPEGIncompressibility
from flowsteer.rewards.scorers.preprocess import Preprocess
from flowsteer.rewards.scorers.weights import file_sha256, folder_sha256, read_tensors
from flowsteer.rewards.types import Reward

torch.set_num_threads(1)

PROMPTS = ["a red circle", "blue square, a circle", "", "a red circle", "a very long prompt " * 30]
V25 = {"prefix": "scoring_head.", "places": (0, 2, 4, 6, 8)}
# float32 sums of other lengths in another order; PickScore multiplies them by exp(logit_scale), about 20 here
CLOSE = {"abs": 1e-5, "rel": 1e-5}


def images(size: int = 5, height: int = 40, width: int = 52, seed: int = 0) -> np.ndarray:
    """uint8 [size, H, W, 3]: noise on a slope, so that neither resizing nor cropping leaves it as it is."""
    random = np.random.default_rng(seed)
    slope = np.linspace(0, 120, width)[None, None, :, None] * random.random((size, 1, 1, 3))
    return (slope + random.integers(0, 130, (size, height, width, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with all of the checkpoints."""
    folder = tmp_path_factory.mktemp("weights")
    tiny_rewards.clip(folder / "clip")
    tiny_rewards.siglip(folder / "siglip")
    tiny_rewards.hpsv2(folder / "hpsv2.pt")
    tiny_rewards.image_reward(folder / "image_reward.pt")
    tiny_rewards.bert_tokenizer(folder / "bert")
    tiny_rewards.aesthetic_head(folder / "v2.pth", 24)
    tiny_rewards.aesthetic_head(folder / "v25.pth", 32, **V25)
    return folder


MAKERS: dict[str, Callable[..., Any]] = {
    "pickscore": lambda place, **more: PickScore(**{"weights": f"{place}/clip", "tokenizer": None, **more}),
    "clip_score": lambda place, **more: CLIPScore(**{"weights": f"{place}/clip", **more}),
    "hpsv2": lambda place, **more: HPSv2(
        **{"weights": f"{place}/hpsv2.pt", "tokenizer": f"{place}/clip", "version": "v2.1", **more}
    ),
    "image_reward": lambda place, **more: ImageReward(
        **{"weights": f"{place}/image_reward.pt", "tokenizer": f"{place}/bert", **more}
    ),
    "aesthetic_v2": lambda place, **more: AestheticV2(
        **{"head": f"{place}/v2.pth", "weights": f"{place}/clip", **more}
    ),
    "aesthetic_v2_5": lambda place, **more: AestheticV25(
        **{"head": f"{place}/v25.pth", "weights": f"{place}/siglip", **more}
    ),
}
READS_PROMPTS = ("pickscore", "clip_score", "hpsv2", "image_reward")


@pytest.fixture(scope="module")
def rewards(place) -> dict[str, Any]:
    return {name: make(place) for name, make in MAKERS.items()}


class TestNumbers:
    """Each reward against its definition, computed by other means."""

    def clip_logits(self, place: Path, shown: np.ndarray) -> Tensor:
        """[B, B], by transformers' whole model, processor and tokenizer."""
        model = CLIPModel.from_pretrained(place / "clip").eval()
        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        pixels = processor(list(shown), return_tensors="pt")["pixel_values"]
        ids = CLIPTokenizer.from_pretrained(place / "clip")(
            PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
        )
        with torch.no_grad():
            return model(**ids, pixel_values=pixels).logits_per_image

    def test_pickscore_and_the_conventions_of_clip_score(self, place, rewards):
        logits = self.clip_logits(place, images()).diagonal()
        cosine = logits / math.exp(3)  # the tiny model's logit_scale
        assert rewards["pickscore"](images(), PROMPTS) == pytest.approx(logits.tolist(), **CLOSE)
        assert MAKERS["pickscore"](place, logit_scale=False)(images(), PROMPTS) == pytest.approx(
            cosine.tolist(), **CLOSE
        )
        assert rewards["clip_score"](images(), PROMPTS) == pytest.approx(cosine.tolist(), **CLOSE)
        by_logits = MAKERS["clip_score"](place, convention="logits")(images(), PROMPTS)
        assert by_logits == pytest.approx(logits.tolist(), **CLOSE)

    def test_the_papers_clip_score_is_never_negative(self, place, tmp_path, rewards):
        # the same model with its image side turned round has the negative cosines
        model = CLIPModel.from_pretrained(place / "clip")
        model.visual_projection.weight.data.neg_()
        model.save_pretrained(tmp_path)
        tiny_rewards.clip_tokenizer(tmp_path)
        cosines = rewards["clip_score"](images(), PROMPTS)
        turned = CLIPScore(str(tmp_path))(images(), PROMPTS)
        assert turned == pytest.approx([-cosine for cosine in cosines], **CLOSE)
        for weights, values in ((f"{place}/clip", cosines), (str(tmp_path), turned)):
            papers = CLIPScore(weights, convention="paper")(images(), PROMPTS)
            assert papers == pytest.approx([2.5 * max(value, 0) for value in values], **CLOSE)
        assert max(max(cosines), 0) > 0 or max(max(turned), 0) > 0

    def test_an_aesthetic_head_is_one_affine_map(self, place, rewards):
        """Layers without activations multiply to one row of weights and one offset."""

        def collapsed(file: str, prefix: str, places: tuple[int, ...]) -> tuple[Tensor, Tensor]:
            state, row, offset = read_tensors(place / file), torch.ones(1, 1), torch.zeros(1)
            for number in reversed(places):
                offset = offset + row @ state[f"{prefix}{number}.bias"]
                row = row @ state[f"{prefix}{number}.weight"]
            return row[0], offset

        shown = images()
        clip = CLIPModel.from_pretrained(place / "clip").eval()
        with torch.no_grad():
            pixels = Preprocess(size=16, fit="crop_round")(shown)
            embedded = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        row, offset = collapsed("v2.pth", "layers.", (0, 2, 4, 6, 7))
        assert rewards["aesthetic_v2"](shown, PROMPTS) == pytest.approx((embedded @ row + offset).tolist(), **CLOSE)

        siglip = SiglipModel.from_pretrained(place / "siglip").eval()
        processor = SiglipImageProcessorPil(size={"height": 18, "width": 18}, resample=3)
        with torch.no_grad():
            pixels = processor(list(shown), return_tensors="pt")["pixel_values"]
            embedded = F.normalize(siglip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        row, offset = collapsed("v25.pth", **V25)
        assert rewards["aesthetic_v2_5"](shown, PROMPTS) == pytest.approx((embedded @ row + offset).tolist(), **CLOSE)

    def test_hpsv2_is_open_clips_cosine(self, place, rewards):
        state = {key: value.float() for key, value in read_tensors(place / "hpsv2.pt")["state_dict"].items()}
        tokenizer = CLIPTokenizer.from_pretrained(place / "clip")
        ids = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        pixels = Preprocess(size=28, fit="pad", resize="plain")(images())
        with torch.no_grad():
            cosine = (open_clip_images(state, pixels) * open_clip_texts(state, ids)).sum(-1)
        assert rewards["hpsv2"](images(), PROMPTS) == pytest.approx(cosine.tolist(), **CLOSE)
        assert np.std(cosine.numpy()) > 0.01  # there is something to compare

    def test_image_reward_is_blip_and_its_head(self, place, rewards):
        state = read_tensors(place / "image_reward.pt")
        vocabulary = {word: number + 5 for number, word in enumerate(tiny_rewards.WORDS)}
        ids = torch.zeros(len(PROMPTS), 35, dtype=torch.int64)
        for row, prompt in enumerate(PROMPTS):
            # [CLS] words [SEP], cut off at 35; [CLS] is not replaced by [ENC]
            tokens = [2, *[vocabulary[word] for word in prompt.replace(",", " ,").split()][:33], 3]
            ids[row, : len(tokens)] = torch.tensor(tokens)
        pixels = Preprocess(size=32, fit="crop_round")(images())
        with torch.no_grad():
            raw = blip_score(state, pixels, ids)
        expected = (raw - 0.16717362830052426) / 1.0333394966054072
        assert rewards["image_reward"](images(), PROMPTS) == pytest.approx(expected.tolist(), **CLOSE)
        assert np.std(expected.numpy()) > 0.1

    def test_special_tokens_in_a_prompt_are_read_as_the_package_does(self, rewards):
        tokenizer = rewards["image_reward"].tokenizer
        size = tiny_rewards.MED_CONFIG["vocab_size"]
        assert tokenizer("a [ENC] [DEC]").input_ids == [2, 5, size - 1, size - 2, 3]

    def test_antialiasing_changes_hpsv2(self, place, rewards):
        shown = images(height=90, width=120)
        plain, antialiased = (rewards["hpsv2"], MAKERS["hpsv2"](place, antialias=True))
        first, second = np.array(plain(shown, PROMPTS)), np.array(antialiased(shown, PROMPTS))
        assert np.abs(first - second).max() > 1e-3  # hundreds of times the tolerance of the comparisons here
        assert plain.fingerprint["antialias"] is False  # as published
        assert antialiased.fingerprint["antialias"] is True
        small = images(height=28, width=28)  # nothing to resize, nothing to antialias
        assert plain(small, PROMPTS) == antialiased(small, PROMPTS)

    @pytest.mark.parametrize(
        ("prompt", "cleaned"),  # as ``hpsv2.src.open_clip.tokenizer.basic_clean`` with ftfy 6.3.1 gives them
        [
            ("  “Tom &amp;amp; Jerry’s”  ", '"Tom & Jerry\'s"'),
            ("it&rsquo;s &amp;ldquo;new&amp;rdquo;", 'it\'s "new"'),
            ("Hawaiʼi ‚a‛ „b‟", "Hawai'i 'a' \"b\""),
            ("ＡＢＣ　＂ｄ＇！～", "ABC \"d'!~"),
            ("ｶﾀｶﾅ ￥", "カタカナ ¥"),
            ("naïve café, 日本、「x」", "naïve café, 日本、「x」"),
        ],
    )
    def test_hpsv2_cleans_prompts_as_open_clip(self, prompt, cleaned):
        assert clean_prompt(prompt) == cleaned

    def test_hpsv2_reads_the_cleaned_prompt(self, rewards):
        shown = images(2)
        # each by itself: on some processors equal rows of one batch differ in the last digit
        first, second = (rewards["hpsv2"](shown[[0]], [text]) for text in ("it’s &lt;3", "it's <3"))
        assert first == second


@pytest.mark.parametrize("name", MAKERS)
class TestContract:
    def test_it_is_a_reward_of_finite_numbers(self, rewards, name):
        assert isinstance(rewards[name], Reward)
        scores = rewards[name](images(), PROMPTS, include=[None] * 5)
        assert all(type(score) is float and math.isfinite(score) for score in scores)
        assert len(set(scores)) == 5  # images differ, so scores do

    def test_images_keep_their_order_and_prompts(self, rewards, name):
        order = [3, 0, 4, 1, 2]
        straight = rewards[name](images(), PROMPTS)
        shuffled = rewards[name](images()[order], [PROMPTS[row] for row in order])
        assert shuffled == pytest.approx([straight[row] for row in order], **CLOSE)

    def test_a_score_does_not_depend_on_its_batch(self, place, rewards, name):
        together = rewards[name](images(), PROMPTS)
        alone = [rewards[name](images()[row : row + 1], PROMPTS[row : row + 1])[0] for row in range(5)]
        assert alone == pytest.approx(together, **CLOSE)
        assert MAKERS[name](place, batch_size=2)(images(), PROMPTS) == pytest.approx(together, **CLOSE)

    def test_each_image_is_scored_against_its_own_prompt_only(self, rewards, name):
        before = rewards[name](images(), PROMPTS)
        after = rewards[name](images(), [*PROMPTS[:2], "long prompt, blue", *PROMPTS[3:]])
        changed = [abs(first - second) > 1e-4 for first, second in zip(before, after)]
        assert changed == [False, False, name in READS_PROMPTS, False, False]
        assert getattr(rewards[name], "uses_prompt", True) == (name in READS_PROMPTS)

    def test_a_video_is_the_mean_of_its_frames(self, rewards, name):
        frames = images(6)
        video = frames.reshape(2, 3, *frames.shape[1:])
        each = rewards[name](frames, [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3)
        expected = np.reshape(each, (2, 3)).mean(1).tolist()
        assert rewards[name](video, PROMPTS[:2]) == pytest.approx(expected, **CLOSE)
        assert rewards[name].video

    def test_an_empty_batch(self, rewards, name):
        assert rewards[name](images(0), []) == []

    def test_other_images_are_refused(self, rewards, name):
        for shown in (images(2) / 255, images(2)[..., :1], images(3), images(2)[0]):
            with pytest.raises(ValueError, match=f"{name} scores uint8 images .* with 2 prompts"):
                rewards[name](shown, PROMPTS[:2])

    def test_threads_get_what_one_gets(self, rewards, name):
        batches = [(images(3, seed=seed), [f"prompt {seed}", "a red circle", "a"]) for seed in range(8)]
        expected = [rewards[name](*batch) for batch in batches]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda batch: rewards[name](*batch), batches))
        assert all(first == pytest.approx(second, **CLOSE) for first, second in zip(found, expected))

    def test_nothing_is_trained(self, rewards, name):
        modules = [value for value in vars(rewards[name]).values() if isinstance(value, nn.Module)]
        modules += [rewards[name].clip.model] if hasattr(rewards[name], "clip") else []
        assert modules
        assert all(not module.training for module in modules)
        assert not any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def test_options_are_checked_before_anything_is_looked_for(self, place, name):
        wrong = {
            "batch_size": (0, "batch_size must be at least 1, got 0"),
            "device": ("gpu:x", "device 'gpu:x' cannot be used: "),
            "resize": ("tensor", "resize must be pil, antialias, plain, got 'tensor'"),
            "max_tokens": (1, "max_tokens must be at least 2, got 1"),
        }
        parameters = inspect.signature(type(MAKERS[name](place))).parameters
        nowhere = {part: "/nowhere/x" for part in ("weights", "head", "tokenizer") if part in parameters}
        for option in wrong.keys() & parameters.keys():
            value, message = wrong[option]
            with pytest.raises(ValueError, match=message):
                MAKERS[name](place, **nowhere | {option: value})

    def test_other_weights_are_refused_by_their_hash(self, place, rewards, name):
        reported = rewards[name].fingerprint["weights_sha256"]
        file = {"hpsv2": "hpsv2.pt", "image_reward": "image_reward.pt"}.get(name)
        folder = place / ("siglip" if name == "aesthetic_v2_5" else "clip")
        assert reported == (file_sha256(place / file) if file else folder_sha256(folder))
        MAKERS[name](place, sha256=reported)
        with pytest.raises(ValueError, match=f"has the sha256 {reported}, expected {'a' * 64}"):
            MAKERS[name](place, sha256="a" * 64)

    def test_weights_that_are_not_there(self, place, name):
        with pytest.raises(ValueError, match=r"there is no (file|folder) /nowhere/x.*give the path of one"):
            MAKERS[name](place, weights="/nowhere/x")


class TestPrompts:
    @pytest.mark.parametrize("name", READS_PROMPTS)
    def test_a_prompt_is_read_once(self, place, name):
        reward = MAKERS[name](place)
        holder = reward.clip if hasattr(reward, "clip") else reward
        tokenizer, read = holder.tokenizer, []
        holder.tokenizer = lambda texts, **more: read.extend(texts) or tokenizer(texts, **more)
        reward(images(4), ["a", "red", "a", "a"])
        reward(images(2, seed=1), ["red", "circle"])
        video = images(4).reshape(2, 2, 40, 52, 3)
        reward(video, ["circle", "circle"])
        assert read == ["a", "red", "circle"]

    def test_the_memory_is_bounded_and_keeps_what_was_used_last(self):
        computed = []
        memory = PromptMemory(lambda prompt: computed.append(prompt) or prompt.upper(), size=2)
        assert memory(["b", "a", "b"]) == ["B", "A", "B"]
        assert memory(["b"]) == ["B"]
        assert memory(["c"]) == ["C"]  # "a" goes: "b" was used after it
        assert memory(["b", "a"]) == ["B", "A"]
        assert computed == ["b", "a", "c", "a"]
        assert memory(list("vwxyz")) == list("VWXYZ")  # more at once than are kept

    @pytest.mark.parametrize("name", READS_PROMPTS)
    def test_long_prompts_are_cut_off_at_the_limit(self, place, name):
        reward = MAKERS[name](place, max_tokens=8)
        start = "a red circle, a blue square "
        first, second = reward(images(1)[[0, 0]], [start, start + "very long prompt"])
        assert first == pytest.approx(second, **CLOSE)
        with pytest.raises(ValueError, match=r"max_tokens must be at most \d+, which .* takes, got 1000"):
            MAKERS[name](place, max_tokens=1000)


OPTIONS = [
    *[(name, "resize", how) for name in MAKERS if name != "hpsv2" for how in ("antialias", "plain")],
    *[(name, "max_tokens", 6) for name in READS_PROMPTS],
    ("pickscore", "logit_scale", False),
    ("clip_score", "convention", "logits"),
    ("clip_score", "convention", "paper"),
    ("hpsv2", "antialias", True),
]


@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_each_option_changes_scores_and_fingerprint(place, rewards, name, option, value):
    shown = images(height=40, width=48)
    changed = MAKERS[name](place, **{option: value})
    difference = np.abs(np.subtract(changed(shown, PROMPTS), rewards[name](shown, PROMPTS)))
    assert difference.max() > 1e-4
    before, after = rewards[name].fingerprint, changed.fingerprint
    assert before.keys() == after.keys()
    assert before != after


def test_a_fingerprint_calls_a_reward_as_its_entry_point_does(rewards):
    names = {point.value: point.name for point in entry_points(group="flowsteer.rewards")}
    for reward in (
        *rewards.values(),
        JPEGCompressibility(),
        JPEGIncompressibility(),
        CompositionReward(),
        PixelDiversity(),
    ):
        kind = type(reward)
        assert reward.fingerprint["reward"] == names[f"{kind.__module__}:{kind.__name__}"]


@pytest.mark.parametrize("kind", [JPEGCompressibility, JPEGIncompressibility])
def test_the_fingerprint_of_a_jpegs_size(kind):
    fingerprint = kind(quality=80).fingerprint
    assert (fingerprint["quality"], fingerprint["pillow"]) == (80, PIL.__version__)
    assert "libjpeg" in fingerprint  # Pillow does not bring its own everywhere
    assert kind().fingerprint == fingerprint | {"quality": 95}


@pytest.mark.parametrize("name", MAKERS)
def test_the_fingerprint_says_what_a_score_depends_on(place, rewards, tmp_path, name):
    fingerprint = rewards[name].fingerprint
    assert fingerprint["reward"] == name
    assert fingerprint["torch"] == torch.__version__
    assert {"version", "weights_sha256", "preprocess_resize", "preprocess_fit", "transformers"} <= fingerprint.keys()
    assert all(type(value) in (str, int, float, bool) for value in fingerprint.values())
    assert MAKERS[name](place).fingerprint == fingerprint
    other = {
        "hpsv2": lambda: tiny_rewards.hpsv2(tmp_path / "x.pt", seed=1),
        "image_reward": lambda: tiny_rewards.image_reward(tmp_path / "x.pt", seed=1),
        "aesthetic_v2_5": lambda: tiny_rewards.siglip(tmp_path / "x", seed=1),
    }.get(name, lambda: tiny_rewards.clip(tmp_path / "x", seed=1))()
    changed = MAKERS[name](place, weights=str(other))
    assert changed.fingerprint != fingerprint
    assert changed(images(), PROMPTS) != pytest.approx(rewards[name](images(), PROMPTS), abs=1e-3)


class TestOtherCheckpoints:
    """Key for key: what is missing, unexpected or of another model is named."""

    def changed(self, place: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Any:
        state = read_tensors(place / f"{name}.pt")
        change(state.get("state_dict", state))
        torch.save(state, tmp_path / "changed.pt")
        return MAKERS[name](place, weights=str(tmp_path / "changed.pt"))

    @pytest.mark.parametrize(
        ("name", "key", "said"),
        [
            ("hpsv2", "ln_final.bias", "text_model.final_layer_norm.bias"),
            ("hpsv2", "logit_scale", "logit_scale"),
            ("hpsv2", "text_projection", "text_projection"),
            (
                "hpsv2",
                "visual.transformer.resblocks.1.attn.in_proj_bias",
                "vision_model.encoder.layers.1.self_attn.k_proj.b",
            ),
            ("image_reward", "blip.visual_encoder.blocks.1.attn.qkv.bias", "encoder.layers.1.self_attn.qkv.bias"),
            ("image_reward", "blip.visual_encoder.pos_embed", "pos_embed"),
            (
                "image_reward",
                "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
                "encoder.layer.0.crossattention.self.key.weight",
            ),
            ("image_reward", "mlp.layers.7.bias", "7.bias"),
        ],
    )
    def test_a_missing_key_is_named(self, place, tmp_path, name, key, said):
        with pytest.raises(ValueError, match=f"lacks {said}"):
            self.changed(place, tmp_path, name, lambda state: state.pop(key))

    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("hpsv2", "visual.ln_mid.weight"),
            ("hpsv2", "transformer.resblocks.0.ls_1.gamma"),
            ("image_reward", "blip.itm_head.weight"),
            ("image_reward", "blip.text_encoder.pooler.dense.weight"),
        ],
    )
    def test_an_unexpected_key_is_named(self, place, tmp_path, name, key):
        with pytest.raises(ValueError, match=f"has the unexpected .*{key.split('.')[-2]}"):
            self.changed(place, tmp_path, name, lambda state: state.update({key: torch.zeros(3)}))

    def test_what_image_reward_does_not_use_may_lack(self, place, tmp_path, rewards):
        def drop(state):
            for key in [key for key in state if key.startswith(UNUSED)]:
                del state[key]

        reward = self.changed(place, tmp_path, "image_reward", drop)
        assert reward(images(), PROMPTS) == rewards["image_reward"](images(), PROMPTS)

    def test_a_file_of_another_kind(self, place):
        with pytest.raises(
            ValueError, match=r"v2.pth has no 'state_dict' \(it has layers.0.weight.*no HPSv2 checkpoint"
        ):
            MAKERS["hpsv2"](place, weights=f"{place}/v2.pth")
        with pytest.raises(
            ValueError, match=r"v2.pth has the unexpected layers.0.weight; these are weights of another"
        ):
            MAKERS["image_reward"](place, weights=f"{place}/v2.pth")
        with pytest.raises(ValueError, match=r"scoring_head.N.weight from 32 numbers"):
            AestheticV25(f"{place}/v2.pth", f"{place}/siglip")

    def test_a_tokenizer_that_does_not_belong_to_the_model(self, place, tmp_path):
        tiny_rewards.hpsv2(tmp_path / "x.pt", vocab_size=500)
        with pytest.raises(ValueError, match="the tokenizer has 514 tokens and the model 500"):
            MAKERS["hpsv2"](place, weights=str(tmp_path / "x.pt"))
        with pytest.raises(ValueError, match=r"siglip has no tokenizer \(tokenizer.json, or vocab.json"):
            MAKERS["clip_score"](place, tokenizer=f"{place}/siglip")
        with pytest.raises(ValueError, match=r"siglip has no tokenizer \(tokenizer.json or vocab.txt"):
            MAKERS["image_reward"](place, tokenizer=f"{place}/siglip")

    def test_options_that_do_not_exist(self, place):
        with pytest.raises(ValueError, match="convention must be cosine, logits, paper, got 'cos'"):
            MAKERS["clip_score"](place, convention="cos")
        with pytest.raises(ValueError, match=r"version must be v2.0 or v2.1, got 'v3'"):
            MAKERS["hpsv2"](place, version="v3")

    def test_the_heads_hash_is_checked(self, place):
        for name, file in (("aesthetic_v2", "v2.pth"), ("aesthetic_v2_5", "v25.pth")):
            digest = file_sha256(place / file)
            assert MAKERS[name](place, head_sha256=digest).fingerprint["head_sha256"] == digest
            with pytest.raises(ValueError, match=f"{file} has the sha256 {digest}, expected {'b' * 64}"):
                MAKERS[name](place, head_sha256="b" * 64)

    def test_the_size_of_the_pictures_is_read_from_the_positions(self, place, tmp_path):
        tiny_rewards.hpsv2(tmp_path / "x.pt", image_size=56)
        reward = MAKERS["hpsv2"](place, weights=str(tmp_path / "x.pt"))
        assert reward.fingerprint["preprocess_size"] == 56
        assert len(reward(images(), PROMPTS)) == 5


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """[N, L, D] of queries, [N, M, D] of keys and values; the mask is added to the logits."""
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def open_clip_blocks(state: dict[str, Tensor], name: str, x: Tensor, head_width: int, mask: Tensor | None) -> Tensor:
    for layer in range(2):
        block = f"{name}.resblocks.{layer}"
        normed = norm(state, f"{block}.ln_1", x, 1e-5)
        parts = (normed @ state[f"{block}.attn.in_proj_weight"].T + state[f"{block}.attn.in_proj_bias"]).chunk(3, -1)
        x = x + linear(state, f"{block}.attn.out_proj", attention(*parts, x.shape[-1] // head_width, mask))
        hidden = gelu(linear(state, f"{block}.mlp.c_fc", norm(state, f"{block}.ln_2", x, 1e-5)))
        x = x + linear(state, f"{block}.mlp.c_proj", hidden)
    return x


def open_clip_images(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Open_clip's ``encode_image(normalize=True)``."""
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(pixels), 1, -1), patches], 1)
    x = norm(state, "visual.ln_pre", x + state["visual.positional_embedding"], 1e-5)
    x = open_clip_blocks(state, "visual.transformer", x, 80, None)
    return F.normalize(norm(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"], dim=-1)


def open_clip_texts(state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Open_clip's ``encode_text(normalize=True)``: pooled at the largest token."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((77, 77), -torch.inf).triu(1)
    x = norm(state, "ln_final", open_clip_blocks(state, "transformer", x, 64, mask), 1e-5)
    return F.normalize(x[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"], dim=-1)


def blip_score(state: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> Tensor:
    """ImageReward's raw score [N], before it is normalised."""
    seen, read = "blip.visual_encoder", "blip.text_encoder"
    projection = (state[f"{seen}.patch_embed.proj.weight"], state[f"{seen}.patch_embed.proj.bias"])
    patches = F.conv2d(pixels, *projection, stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{seen}.cls_token"].expand(len(pixels), -1, -1), patches], 1) + state[f"{seen}.pos_embed"]
    for block in range(2):
        name = f"{seen}.blocks.{block}"
        parts = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(state, f"{name}.attn.proj", attention(*parts, 2))
        hidden = gelu(linear(state, f"{name}.mlp.fc1", norm(state, f"{name}.norm2", x, 1e-6)))
        x = x + linear(state, f"{name}.mlp.fc2", hidden)
    x = norm(state, f"{seen}.norm", x, 1e-6)

    words, places = (state[f"{read}.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    y = norm(state, f"{read}.embeddings.LayerNorm", words[ids] + places[: ids.shape[1]], 1e-12)
    padding = torch.where(ids == 0, -torch.inf, 0.0)[:, None, None]
    for layer in range(2):
        name = f"{read}.encoder.layer.{layer}"
        for kind, source, mask in (("attention", None, padding), ("crossattention", x, None)):
            over = y if source is None else source
            parts = [
                linear(state, f"{name}.{kind}.self.{part}", of)
                for part, of in (("query", y), ("key", over), ("value", over))
            ]
            mixed = linear(state, f"{name}.{kind}.output.dense", attention(*parts, 3, mask))
            y = norm(state, f"{name}.{kind}.output.LayerNorm", y + mixed, 1e-12)
        hidden = linear(state, f"{name}.output.dense", gelu(linear(state, f"{name}.intermediate.dense", y)))
        y = norm(state, f"{name}.output.LayerNorm", y + hidden, 1e-12)
    score = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        score = linear(state, f"mlp.layers.{place}", score)
    return score[:, 0]
