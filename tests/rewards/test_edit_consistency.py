"""The reward that compares an edit with its source: SSIM against the formula and against scikit-image, and its mask."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flowsteer.rewards.registry import load_reward
from flowsteer.rewards.scorers.edit_consistency import EditConsistency, ssim_map

reward = EditConsistency()


def pictures() -> tuple[np.ndarray, np.ndarray]:
    """Two of 24 x 40 pixels that are partly alike."""
    y, x = np.mgrid[:24, :40]
    first = np.stack([(7 * x + 3 * y) % 256, (5 * x * y) % 256, (x * x + 11 * y) % 256], axis=-1)
    second = [(7 * x + 3 * y + 9) % 256, (5 * x * y + 40 * (x > 20)) % 256, (x * x + 13 * y) % 256]
    return first.astype(np.uint8), np.stack(second, axis=-1).astype(np.uint8)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def score(image: np.ndarray, source: np.ndarray | None, mask: np.ndarray | None = None) -> float | None:
    (found,) = reward(image[None], ["make it red"], source=[source], mask=[mask])
    return found


# skimage.metrics.structural_similarity(*pictures(), channel_axis=-1, gaussian_weights=True, sigma=1.5,
# use_sample_covariance=False, data_range=255, full=True) of scikit-image 0.26.0: its mean, without a border of 5 pixels, and
# places of its map
SCIKIT_IMAGE = 0.6337197070330637
PLACES = {
    (0, 0, 0): 0.7694447688243038,
    (0, 39, 1): 0.9150101679482854,
    (12, 20, 2): 0.37895317083496177,
    (23, 5, 1): 1.0,
    (11, 33, 0): 0.22455628017557616,
}


class TestMeasure:
    def test_the_map_is_that_of_scikit_image(self):
        found = ssim_map(*pictures())
        assert found[5:-5, 5:-5].mean() == pytest.approx(SCIKIT_IMAGE, abs=1e-12)
        assert {place: found[place] for place in PLACES} == pytest.approx(PLACES, abs=1e-12)

    def test_the_map_is_the_formula(self):
        """Equations 13 to 16 of Wang et al., window by window."""
        first, second = noise(13, 37, 3), noise(13, 37, 3, seed=1) // 2
        offsets = np.arange(-5, 6)
        window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
        window /= window.sum()
        x, y = (np.pad(one.astype(float), [(5, 5), (5, 5), (0, 0)], mode="symmetric") for one in (first, second))
        c1, c2 = 6.5025, 58.5225  # (0.01 * 255)^2, (0.03 * 255)^2
        found = ssim_map(first, second)
        for row, column, channel in ((0, 0, 0), (6, 18, 1), (12, 36, 2), (3, 32, 0), (5, 31, 1)):
            a, b = (one[row : row + 11, column : column + 11, channel] for one in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            expected = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            expected /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
            assert found[row, column, channel] == pytest.approx(expected, abs=1e-10)

    @pytest.mark.parametrize("shape", [(1, 1), (5, 3), (64, 64), (32, 100)])
    def test_an_untouched_picture_scores_exactly_one(self, shape):
        picture = noise(*shape, 3)
        assert score(picture, picture) == 1.0
        assert score(picture, picture, noise(*shape) // 2) == 1.0

    @pytest.mark.parametrize(("level", "other"), [(0, 255), (100, 101), (10, 200)])
    def test_plain_pictures_differ_by_their_luminance_alone(self, level, other):
        first, second = np.full((20, 30, 3), level, np.uint8), np.full((20, 30, 3), other, np.uint8)
        expected = (2 * level * other + 6.5025) / (level**2 + other**2 + 6.5025)
        assert score(first, second) == pytest.approx(expected, abs=1e-12)

    def test_the_opposite_scores_zero_and_not_less(self):
        picture = noise(40, 40, 3)
        assert ssim_map(picture, 255 - picture).mean() < -0.5
        assert score(picture, 255 - picture) == 0.0


class TestMask:
    def test_nothing_inside_of_the_mask_matters(self):
        source, mask = noise(32, 48, 3), np.zeros((32, 48), np.uint8)
        mask[8:20, 10:40] = 255
        edited = source.copy()
        edited[8:20, 10:40] = noise(12, 30, 3, seed=1)
        assert score(edited, source, mask) == 1.0
        assert score(edited, source) < 0.8
        edited[0, 0] = 255 - edited[0, 0]
        assert score(edited, source, mask) < 1.0

    def test_it_is_the_mean_over_what_is_outside(self):
        first, second = pictures()
        mask = np.zeros((24, 40), np.uint8)
        mask[:, 20:] = 128  # from half white on
        mask[:, :20] = 127
        kept = np.where((mask >= 128)[..., None], first, second)
        assert score(first, second, mask) == pytest.approx(ssim_map(first, kept)[:, :20].mean(), abs=1e-12)

    def test_what_cannot_be_compared_has_no_score(self):
        picture = noise(16, 16, 3)
        assert score(picture, None) is None
        assert score(picture, picture, np.full((8, 8), 255, np.uint8)) is None
        assert reward(np.stack([picture] * 2), ["a", "b"], source=[None, picture]) == [None, 1.0]

    def test_source_and_mask_are_resized_as_diffusers_does(self):
        image, source, mask = noise(24, 32, 3), noise(48, 80, 3, seed=1), noise(12, 16, seed=2)
        expected_source = np.asarray(Image.fromarray(source).resize((32, 24), Image.Resampling.LANCZOS))
        expected_mask = np.asarray(Image.fromarray(mask).resize((32, 24), Image.Resampling.LANCZOS))
        assert score(image, source, mask) == score(image, expected_source, expected_mask)
        assert score(image, source, mask) != score(image, source)


def test_it_takes_images_alone_and_says_so():
    with pytest.raises(ValueError, match=r"edit_consistency scores uint8 images \[B, H, W, 3\]"):
        reward(noise(1, 2, 8, 8, 3), ["a"], source=[noise(8, 8, 3)])
    assert isinstance(load_reward("edit_consistency"), EditConsistency)
