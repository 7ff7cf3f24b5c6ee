"""GenEval's rules on hand-made detections; a tiny random detector and CLIP for the way there."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_rewards
import torch
from safetensors.torch import save_file

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.scorers.geneval.mask2former import Mask2Former, Segment, segments
from flowsteer.rewards.scorers.geneval.reward import GRAY, GenEvalReward
from flowsteer.rewards.scorers.geneval.rules import COLORS, RELATIONS, Detection, judge, read_metadata, relations
from flowsteer.rewards.scorers.weights import read_tensors

torch.set_num_threads(1)

NAMES = ["bench", "computer mouse", "dog"]
BENCH = {"class": "bench", "count": 1}


def at(x: float, y: float, color: str | None = None, *, size: float = 10) -> Detection:
    """A square object around a point."""
    return Detection(box=(x - size / 2, y - size / 2, x + size / 2, y + size / 2), confidence=0.9, color=color)


def wanted(include, exclude=None, tag="single_object"):
    return read_metadata(include, exclude, tag, names=NAMES)


def images(size: int = 3, height: int = 48, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, height, width, 3), dtype=np.uint8)


class TestRules:
    @pytest.mark.parametrize(
        ("include", "exclude", "objects", "comparisons"),
        [
            # single objects; more than asked for is right
            ([BENCH], None, {}, [0]),
            ([BENCH], None, {"bench": [at(0, 0)]}, [1]),
            ([BENCH], None, {"bench": [at(0, 0), at(50, 0)], "dog": [at(9, 9)]}, [1]),
            # two objects
            ([BENCH, {"class": "dog", "count": 1}], None, {"dog": [at(0, 0)]}, [0, 1]),
            # counting: not fewer, and by the exclusion not more
            ([{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}], {"dog": [at(0, 0)] * 2}, [2 / 3, 1]),
            ([{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}], {"dog": [at(0, 0)] * 3}, [1, 1]),
            ([{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}], {"dog": [at(0, 0)] * 4}, [1, 3 / 4]),
            ([{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}], {"dog": [at(0, 0)] * 16}, [1, 0]),
            # colours: of the surest objects only
            ([{**BENCH, "color": "red"}], None, {"bench": [at(0, 0, "red"), at(1, 1, "blue")]}, [1, 1]),
            ([{**BENCH, "color": "red"}], None, {"bench": [at(0, 0, "blue"), at(1, 1, "red")]}, [1, 0]),
            ([{"class": "dog", "count": 2, "color": "red"}], None, {"dog": [at(0, 0, "red"), at(1, 1)]}, [1, 1 / 2]),
            ([{"class": "dog", "count": 2, "color": "red"}], None, {"dog": [at(0, 0, "red")]}, [1 / 2, 1 / 2]),
            # positions: the opposite side has nothing, a right angle has a quarter
            (
                [BENCH, {"class": "dog", "count": 1, "position": ["left of", 0]}],
                None,
                {"bench": [at(50, 0)], "dog": [at(0, 0)]},
                [1, 1, 1],
            ),
            (
                [BENCH, {"class": "dog", "count": 1, "position": ["right of", 0]}],
                None,
                {"bench": [at(50, 0)], "dog": [at(0, 0)]},
                [1, 1, 0],
            ),
            (
                [BENCH, {"class": "dog", "count": 1, "position": ["above", 0]}],
                None,
                {"bench": [at(50, 0)], "dog": [at(0, 0)]},
                [1, 1, 1 / 4],
            ),
            (
                [BENCH, {"class": "dog", "count": 1, "position": ["above", 0]}],
                None,
                {"dog": [at(0, 0)]},
                [0, 1, 0],
            ),
        ],
    )
    def test_each_comparison(self, include, exclude, objects, comparisons):
        strict = float(all(value == 1 for value in comparisons))
        verdict = judge(wanted(include, exclude), objects)
        assert verdict["strict"] == strict
        assert verdict["graded"] == pytest.approx(0.8 * np.mean(comparisons) + 0.2 * strict)

    def test_a_place_is_measured_from_the_objects_that_were_asked_for(self):
        # the second bench, less sure than the first, plays no part
        include = [BENCH, {"class": "dog", "count": 1, "position": ["right of", 0]}]
        objects = {"bench": [at(0, 0), at(100, 0)], "dog": [at(50, 0)]}
        assert judge(wanted(include), objects)["strict"] == 1
        objects["bench"].reverse()
        assert judge(wanted(include), objects)["strict"] == 0

    @pytest.mark.parametrize(
        ("x", "y", "found"),
        [
            (-30, 0, {"left of"}),
            (30, 0, {"right of"}),
            (0, -30, {"above"}),  # pixels count downwards
            (0, 30, {"below"}),
            (-30, -30, {"left of", "above"}),
            (0, 0, set()),
            (1.9, 0, set()),  # a tenth of 10 and 10 is 2
            (2.1, 0, set()),  # apart by 0.1 of 2.1
            (5, 0, {"right of"}),  # by 3 of 5
        ],
    )
    def test_relations(self, x, y, found):
        assert relations(at(x, y).box, at(0, 0).box) == found

    def test_relations_of_many_boxes(self):
        """GenEval: each axis of the centres' offset, less a tenth of both widths, over the whole offset, beyond a half."""
        random = np.random.default_rng(0)
        counts = dict.fromkeys(RELATIONS, 0)
        for _ in range(300):
            corners, sizes = random.uniform(0, 60, (2, 2)), random.uniform(5, 60, (2, 2))
            offset = (corners + sizes / 2)[0] - (corners + sizes / 2)[1]
            shrunk = np.sign(offset) * np.clip(np.abs(offset) - 0.1 * sizes.sum(0), 0, None)
            dx, dy = shrunk / np.linalg.norm(offset)
            expected = {
                name
                for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5))
                if holds and np.abs(shrunk).max() >= 1e-3
            }
            boxes = [tuple(map(float, (*corner, *(corner + size)))) for corner, size in zip(corners, sizes)]
            assert relations(boxes[0], boxes[1]) == expected
            for name in expected:
                counts[name] += 1
        assert min(counts.values()) > 30

    def test_graded_is_one_exactly_where_strict_is(self):
        random = np.random.default_rng(1)
        seen = set()
        for _ in range(400):
            include = [
                {**BENCH, "color": "red"},
                {"class": "dog", "count": int(random.integers(1, 3)), "position": ["above", 0]},
            ]
            objects = {
                name: [
                    at(*random.uniform(0, 60, 2), str(random.choice(["red", "blue"])))
                    for _ in range(random.integers(4))
                ]
                for name in NAMES
            }
            verdict = judge(wanted(include, [{"class": "dog", "count": 3}]), objects)
            assert 0 <= verdict["graded"] <= 1
            assert (verdict["graded"] == pytest.approx(1)) == (verdict["strict"] == 1)
            seen.add(verdict["strict"])
        assert seen == {0.0, 1.0}

    @pytest.mark.parametrize(
        ("include", "message"),
        [
            (["bench"], "geneval cannot read 'bench'"),
            (5, "geneval cannot read 5; include and exclude are lists of objects"),
            (BENCH, "geneval cannot read {'class'.*; include and exclude are lists of objects"),
            ([{"class": "bench", "count": float("inf")}], "geneval cannot read"),
            ([{"class": "bench"}], "geneval cannot read"),
            ([{"class": "bench", "count": "many"}], "geneval cannot read"),
            ([{"class": "banch", "count": 1}], "geneval cannot detect 'banch'; did you mean 'bench'?"),
            ([{"class": "bench", "count": 0}], "geneval counts from 1, got 0 of 'bench'"),
            ([{**BENCH, "color": "crimson"}], "geneval knows the colours red, .*, got 'crimson'"),
            (
                [BENCH, {**BENCH, "position": ["under", 0]}],
                "geneval knows the positions left of, .*, got .'under', 0. in",
            ),
            ([BENCH, {**BENCH, "position": ["above", 1]}], "of an earlier clause, got .'above', 1. in clause 1"),
            ([BENCH, {**BENCH, "position": "above"}], "geneval cannot read"),
        ],
    )
    def test_metadata_that_cannot_be(self, include, message):
        with pytest.raises(ValueError, match=message):
            wanted(include)


class TestDetector:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return tiny_rewards.mask2former(tmp_path_factory.mktemp("weights") / "detector")

    @pytest.fixture(scope="class")
    def detector(self, folder):
        return Mask2Former(str(folder), short_side=40)

    def test_segments_are_mmdets(self):
        """Every guess with every class; confidence is that of the class times the mask's mean inside."""
        generator = torch.Generator().manual_seed(0)
        logits, masks = (
            torch.randn(4, 3, generator=generator),
            3 * torch.randn(4, 6, 7, generator=generator),
        )
        masks[3] = -1  # an empty mask is no object
        expected = []
        for guess in range(3):
            chances = np.exp(logits[guess].numpy()) / np.exp(logits[guess].numpy()).sum()
            values = masks[guess].numpy()
            inside = 1 / (1 + np.exp(-values[values > 0]))
            expected += [(float(chances[label] * inside.mean()), "xy"[label], values > 0) for label in range(2)]
        expected.sort(key=lambda entry: -entry[0])
        for threshold in (0.0, 0.2):
            found = segments(logits, masks, labels=("x", "y"), threshold=threshold)
            kept = [entry for entry in expected if entry[0] > threshold]
            assert 0 < len(kept) <= 6
            assert [segment.label for segment in found] == [label for _, label, _ in kept]
            assert [segment.confidence for segment in found] == pytest.approx([score for score, _, _ in kept], abs=1e-6)
            assert all((segment.mask == mask).all() for segment, (_, _, mask) in zip(found, kept))

    def test_guesses_below_the_threshold_need_no_mask(self):
        logits = torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0]])  # the first is sure of nothing
        masks = torch.ones(2, 6, 7)
        read = []

        class Masks:
            def __getitem__(self, guess):
                read.append(guess)
                return masks[guess]

        found = segments(logits, Masks(), labels=("x", "y"), threshold=0.3)  # pyright: ignore[reportArgumentType]
        assert [segment.label for segment in found] == ["x"]
        assert set(read) == {1}

    def test_the_file_is_read_once(self, folder, monkeypatch):
        read = []
        counted = "flowsteer.rewards.scorers.geneval.mask2former.read_tensors"
        monkeypatch.setattr(counted, lambda file: read.append(file) or read_tensors(file))
        Mask2Former(str(folder))
        assert read == [folder / "model.safetensors"]

    def test_a_box_holds_its_mask(self):
        mask = np.zeros((20, 30), bool)
        mask[3:7, 10:12] = mask[5, 25] = True
        assert Segment(label="x", confidence=1, mask=mask).box == (10, 3, 26, 7)

    def test_masks_have_the_images_size_and_do_not_depend_on_the_batch(self, detector):
        shown = images()
        together = detector(shown, 0.0)
        assert detector.labels == tiny_rewards.LABELS
        for row, found in enumerate(together):
            alone = detector(shown[row : row + 1], 0.0)[0]
            assert [segment.label for segment in found] == [segment.label for segment in alone]
            for first, second in zip(found, alone):
                assert first.confidence == pytest.approx(second.confidence, abs=1e-5)
                assert first.mask.shape == (48, 60)
                assert (first.mask != second.mask).mean() < 0.01  # a pixel whose logit is 0 to the last digit
        confidences = [[segment.confidence for segment in found] for found in together]
        assert all(values == sorted(values, reverse=True) for values in confidences)
        assert confidences[0] != pytest.approx(confidences[1], abs=1e-4)

    def test_the_size_shown_matters(self, folder, detector):
        shown = images(1)
        before, after = (
            [segment.confidence for segment in each(shown, 0.0)[0]]
            for each in (detector, Mask2Former(str(folder), short_side=64))
        )
        assert before != pytest.approx(after, abs=1e-4)
        with pytest.raises(ValueError, match="short_side must be at least 32 pixels, got 31"):
            Mask2Former(str(folder), short_side=31)

    def test_a_long_image_is_limited_by_its_longer_side(self, detector):
        sizes = []
        handle = detector.model.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(tuple(kwargs["pixel_values"].shape[-2:])), with_kwargs=True
        )
        detector(images(1, 48, 60), 0.5)  # 40 x 50
        detector(images(1, 20, 100), 0.5)  # at most 40 * 1333 / 800 = 66.65 long: 13 x 67
        handle.remove()
        assert sizes == [(64, 64), (32, 96)]  # to multiples of 32

    def test_a_mask_lies_where_the_model_saw_it(self, detector):
        """48 x 60 pixels are shown as 40 x 50 in the corner of 64 x 64: column 16 there is column 16 / 50 * 60 = 19.2 here."""

        def left_quarter(module, args, output):
            masks = torch.full_like(output.masks_queries_logits[-1], -1.0)
            masks[..., : masks.shape[-1] // 4] = 1.0
            output.masks_queries_logits = (masks,)
            return output

        handle = detector.model.register_forward_hook(left_quarter)
        found = detector(images(1), 0.0)[0]
        handle.remove()
        assert {segment.box for segment in found} == {(0, 0, 19, 48)}

    def test_the_published_names_are_those_of_the_class(self, folder, detector):
        """Each is where it belongs, and what the file lacks of the backbone, no mask reads."""
        held = read_tensors(folder / "model.safetensors")
        block = "model.pixel_level_module.encoder.encoder.layers.3.blocks.0"
        loaded = detector.model.pixel_level_module.encoder.swin.encoder.layers[3].blocks[0]
        assert torch.equal(loaded.attention.q_proj.weight, held[f"{block}.attention.self.query.weight"])
        assert torch.equal(loaded.mlp.fc2.bias, held[f"{block}.output.dense.bias"])
        before = detector(images(1), 0.0)[0]
        norm = detector.model.pixel_level_module.encoder.swin.layernorm
        kept = norm.weight.clone()
        norm.weight.data.fill_(7)
        after = detector(images(1), 0.0)[0]
        norm.weight.data.copy_(kept)
        assert [segment.confidence for segment in before] == [segment.confidence for segment in after]

    def test_another_model_is_refused(self, folder, tmp_path):
        with pytest.raises(ValueError, match=r"cannot be loaded as a Mask2FormerModel|it is no Mask2FormerModel"):
            Mask2Former(str(tiny_rewards.siglip(tmp_path / "siglip")))
        for key, message in (
            ("class_predictor.weight", "lacks class_predictor.weight"),
            ("model.transformer_module.level_embed.weight", "lacks transformer_module.level_embed.weight"),
            (
                "model.pixel_level_module.encoder.hidden_states_norms.stage4.bias",
                "lacks pixel_level_module.encoder.hidden_states_norms.stage4.bias",
            ),
        ):
            changed = tiny_rewards.mask2former(tmp_path / key)
            state = read_tensors(changed / "model.safetensors")
            del state[key]
            save_file(state, changed / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(ValueError, match=message):
                Mask2Former(str(changed))


class TestReward:
    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("weights")
        tiny_rewards.clip(folder / "clip")
        tiny_rewards.mask2former(folder / "detector")
        return folder

    def make(self, place, **more):
        return GenEvalReward(str(place / "detector"), str(place / "clip"), short_side=32, **more)

    @pytest.fixture(scope="class")
    def reward(self, place):
        return self.make(place)

    def segment(self, label: str, confidence: float, left: int = 0) -> Segment:
        mask = np.zeros((48, 60), bool)
        mask[10:30, left : left + 12] = True
        return Segment(label=label, confidence=confidence, mask=mask)

    def test_thresholds_and_names(self, reward):
        shown = images(1)[0]
        asked = [{"class": "computer mouse", "count": 2}]  # COCO says "mouse"
        found = [self.segment("mouse", confidence) for confidence in (0.95, 0.6, 0.2)]
        assert reward._judge(shown, found, wanted(asked))["strict"] == 1
        assert reward._judge(shown, found[1:], wanted(asked))["strict"] == 0  # 0.2 is below 0.3
        assert reward._judge(shown, found, wanted(asked, tag="counting"))["strict"] == 0  # and 0.6 below 0.9

    def test_at_most_sixteen_of_a_class(self, reward):
        found = [self.segment("dog", 0.9)] * 30
        for count, strict in ((16, 1), (17, 0)):
            asked = wanted([{"class": "dog", "count": count}])
            assert reward._judge(images(1)[0], found, asked)["strict"] == strict

    def test_a_colour_is_that_of_the_object_on_gray(self, reward):
        shown, segment = images(1)[0], self.segment("dog", 0.9, left=20)
        outside = np.where(segment.mask[..., None], shown, images(1, seed=9)[0])
        assert reward.color(shown, segment, "dog") == reward.color(outside, segment, "dog")
        crop = np.full((20, 12, 3), GRAY, np.uint8)
        crop[:] = shown[10:30, 20:32]
        with torch.no_grad():
            seen = reward.clip.images(crop[None])[0]
            means = []
            for color in COLORS:
                texts = [
                    f"a photo of a {color} dog",
                    f"a photo of a {color}-colored dog",
                    f"a photo of a {color} object",
                ]
                mean = reward.clip.prompts(texts).mean(0)
                means.append(float(mean / mean.norm() @ seen))
        color = COLORS[int(np.argmax(means))]
        assert reward.color(shown, segment, "dog") == color
        for named, strict in ((color, 1), (COLORS[COLORS.index(color) - 1], 0)):
            asked = wanted([{"class": "dog", "count": 1, "color": named}])
            assert reward._judge(shown, [segment], asked)["strict"] == strict

    def test_a_mask_with_a_hole_shows_gray_through_it(self, reward):
        shown, segment = images(1)[0], self.segment("dog", 0.9, left=20)
        segment.mask[15:20, 22:26] = False
        seen = []
        handle = reward.clip.model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
        )
        reward.color(shown, segment, "dog")
        handle.remove()
        crop = shown[10:30, 20:32].copy()
        crop[5:10, 2:6] = GRAY
        assert torch.equal(seen[0], reward.clip.preprocess(crop[None]))

    def test_scores_of_a_batch(self, place, reward):
        include = [[BENCH], None, [{"class": "dog", "count": 4}], []]
        shown, prompts = images(4), ["a bench", "?", "four dogs", "?"]
        answer = reward(shown, prompts, include=include, exclude=[None] * 4, tag=["x"] * 4)
        assert answer.keys() == {"score", "graded", "strict"}
        assert answer["score"] == answer["graded"]
        assert answer["strict"] == [1, None, 0, None]  # it sees a bench, and three dogs
        assert answer["graded"] == [1, None, pytest.approx(0.8 * 3 / 4), None]
        for row in (0, 2):
            found = reward.detector(shown[row : row + 1], 0.3)[0]
            assert reward._judge(shown[row], found, wanted(include[row])) == {
                name: answer[name][row] for name in ("graded", "strict")
            }
        small = self.make(place, batch_size=1, score="strict")
        assert small(shown, prompts, include=include)["score"] == answer["strict"]
        assert small.fingerprint != reward.fingerprint

    def test_a_video_is_the_mean_of_its_frames(self, reward):
        frames, include = images(4), [{"class": name, "count": 3} for name in NAMES]
        each = reward(frames, [""] * 4, include=[include] * 4)["graded"]
        assert len(set(each)) > 1
        video = reward(frames.reshape(2, 2, 48, 60, 3), [""] * 2, include=[include] * 2)["graded"]
        assert video == pytest.approx(np.reshape(each, (2, 2)).mean(1).tolist())

    def test_a_prompt_without_metadata_has_no_score_nor_has_one_with_wrong_metadata(self, reward, caplog):
        cat = [{"class": "cat", "count": 1}]
        rows, asked = [[BENCH], None, cat, cat, 7], []
        handle = reward.detector.model.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append(len(kwargs["pixel_values"])), with_kwargs=True
        )
        scores = RewardSet([("geneval", reward, 1.0)]).score(torch.rand(5, 3, 48, 60), ["a"] * 5, {"include": rows})
        handle.remove()
        assert scores.missing.tolist() == [False, True, True, True, True]
        assert asked == [1]  # the batch once, and not each image alone
        said = "no score of some images, whose metadata are wrong: geneval cannot"
        assert [record.getMessage() for record in caplog.records] == [
            f"{said} detect 'cat'",
            f"{said} read 7; include and exclude are lists of objects",
        ]

    def test_where_all_metadata_are_wrong_the_reason_is_raised(self, reward):
        rows = [[{"class": "cat", "count": 1}]] * 2
        scores = RewardSet([("geneval", reward, 1.0)]).score(torch.rand(2, 3, 48, 60), ["a"] * 2, {"include": rows})
        assert all("geneval cannot detect 'cat'" in scores.failures[row] for row in (0, 1))

    def test_bad_calls(self, place, reward):
        with pytest.raises(
            ValueError, match="needs GenEval's metadata as columns of the prompt file: include, exclude"
        ):
            reward(images(1), ["a"])
        with pytest.raises(ValueError, match="geneval scores uint8 images"):
            reward(images(1) / 255, ["a"], include=[[BENCH]])
        with pytest.raises(ValueError, match="score must be graded or strict, got 'loose'"):
            self.make(place, score="loose")
        for option, value in (("short_side", 31), ("batch_size", 0), ("device", "gpu:x"), ("score", "loose")):
            with pytest.raises(ValueError, match=option):  # before anything is looked for
                GenEvalReward("/nowhere/x", **{option: value})

    def test_the_fingerprint_says_whose_numbers_these_are_not(self, reward):
        assert "not GenEval's numbers" in reward.fingerprint["version"]
        assert reward.fingerprint["detector_sha256"] == reward.detector.sha256
        assert reward.fingerprint["reward"] == "geneval"
        assert reward.video
        assert "not GenEval's numbers" in (GenEvalReward.__doc__ or "").splitlines()[0]
