"""The diversity rewards: distances whose values are known, on the real (tiny) CLIP."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_rewards
import torch
import torch.nn.functional as F
from transformers import CLIPModel

from flowsteer.rewards.scorers.diversity import ClipDiversity, PixelDiversity
from flowsteer.rewards.scorers.preprocess import Preprocess

torch.set_num_threads(1)


def plain(*levels: int, side: int = 40) -> np.ndarray:
    """uint8 [G, side, side, 3], each image of one level."""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def noise(size: int, side: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(tiny_rewards.clip(tmp_path_factory.mktemp("weights") / "clip"))


@pytest.fixture(scope="module")
def clip(folder) -> ClipDiversity:
    return ClipDiversity(folder)


class TestPixels:
    def test_levels_are_as_far_apart_as_they_differ(self):
        assert PixelDiversity()(plain(0, 255), ["a"] * 2) == pytest.approx([1, 1], abs=1e-6)
        expected = [(51 + 204) / 2 / 255, (51 + 153) / 2 / 255, (204 + 153) / 2 / 255]
        assert PixelDiversity()(plain(0, 51, 204), ["a"] * 3) == pytest.approx(expected, abs=1e-6)

    def test_it_is_the_root_mean_square_over_the_shrunk_image(self):
        # four quarters: one pixel each at size 2; a difference of 255 in one quarter of one channel
        first, second = plain(0, 0)
        second[:20, :20, 1] = 255
        pair = np.stack([first, second])
        assert PixelDiversity(2)(pair, ["a"] * 2) == pytest.approx([(1 / 12) ** 0.5] * 2, abs=1e-6)
        assert PixelDiversity(1)(pair, ["a"] * 2) == pytest.approx([(1 / 3) ** 0.5 / 4] * 2, abs=1e-6)

    def test_detail_below_the_size_does_not_count(self):
        board = np.indices((40, 40)).sum(0) % 2 * 255
        images = np.stack([board, 255 - board])[..., None].repeat(3, -1).astype(np.uint8)
        assert PixelDiversity(20)(images, ["a"] * 2) == pytest.approx([0, 0], abs=1e-6)
        assert PixelDiversity(40)(images, ["a"] * 2) == pytest.approx([1, 1], abs=1e-6)

    def test_a_video_is_compared_frame_by_frame(self):
        video = np.stack([plain(0, 100), plain(0, 0)])
        assert PixelDiversity()(video, ["a"] * 2) == pytest.approx([(1 / 2) ** 0.5 * 100 / 255] * 2, abs=1e-6)

    def test_bad_size(self):
        with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
            PixelDiversity(0)


class TestClip:
    def test_it_is_the_mean_cosine_distance(self, folder, clip):
        images = noise(4)
        model = CLIPModel.from_pretrained(folder).eval()
        with torch.no_grad():
            vectors = model.get_image_features(pixel_values=Preprocess(size=16)(images)).pooler_output
        cosines = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
        expected = [np.mean([1 - cosines[i, j].item() for j in range(4) if j != i]) for i in range(4)]
        assert clip(images, ["a"] * 4) == pytest.approx(expected, abs=1e-6)
        assert np.std(expected) > 1e-4

    def test_a_video_is_compared_frame_by_frame(self, clip):
        frames = noise(4)
        videos = np.stack([frames[:2], frames[2:]])
        each = [clip(frames[[first, second]], ["a"] * 2)[0] for first, second in ((0, 2), (1, 3))]
        assert clip(videos, ["a"] * 2) == pytest.approx([np.mean(each)] * 2, abs=1e-6)

    def test_options_change_score_and_fingerprint(self, folder, clip):
        images = noise(3, side=41)[:, :, :30]
        other = ClipDiversity(folder, resize="plain")
        assert other(images, ["a"] * 3) != pytest.approx(clip(images, ["a"] * 3), abs=1e-4)
        assert other.fingerprint != clip.fingerprint
        small = ClipDiversity(folder, batch_size=2)
        assert small(images, ["a"] * 3) == pytest.approx(clip(images, ["a"] * 3), abs=1e-6)
        with pytest.raises(ValueError, match="these are other weights"):
            ClipDiversity(folder, sha256="0" * 64)
        with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
            ClipDiversity("/nowhere/x", batch_size=0)
        with pytest.raises(ValueError, match="resize must be pil, antialias, plain, got 'tensor'"):
            ClipDiversity("/nowhere/x", resize="tensor")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [lambda clip: PixelDiversity(), lambda clip: clip], ids=["pixel", "clip"])
class TestBoth:
    def test_equal_images_score_zero(self, make, clip):
        assert make(clip)(noise(1)[[0, 0, 0]], ["a"] * 3) == pytest.approx([0, 0, 0], abs=1e-6)

    def test_the_odd_one_out_scores_most_and_order_is_kept(self, make, clip):
        images = np.stack([noise(1)[0], noise(1)[0], plain(10)[0], noise(1)[0]])
        scores = make(clip)(images, ["a"] * 4)
        assert int(np.argmax(scores)) == 2
        order = [2, 0, 3, 1]
        assert make(clip)(images[order], ["a"] * 4) == pytest.approx([scores[row] for row in order], abs=1e-6)

    def test_an_image_alone_has_no_score(self, make, clip):
        assert make(clip)(noise(1), ["a"]) == [None]
        assert make(clip)(noise(0), []) == []

    def test_several_prompts_are_refused(self, make, clip):
        with pytest.raises(ValueError, match="compares the images of one prompt, got 2 prompts in one call"):
            make(clip)(noise(2), ["a", "b"])
        with pytest.raises(ValueError, match="scores uint8 images"):
            make(clip)(noise(2) / 255, ["a", "a"])

    def test_it_says_that_it_compares(self, make, clip):
        assert make(clip).groupwise
        assert not make(clip).uses_prompt
        assert make(clip).video
        assert make(clip).fingerprint["reward"].endswith("_diversity")
