"""Pixels for vision towers: against transformers' and Pillow's own, and against the formulas of bicubic interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from flowsteer.rewards.scorers.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, resized, resized_shape

SIZES = [(40, 40), (40, 57), (61, 40), (16, 16), (12, 31), (16, 19), (200, 130)]


def images(size: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, height, width, 3), dtype=np.uint8)


def denormalised(pixels: torch.Tensor) -> torch.Tensor:
    """CLIP's pixels back to [0, 1]."""
    return pixels * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crop_is_transformers_clip_processor(height, width):
    shown = images(2, height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = processor(list(shown), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(Preprocess(size=16)(shown), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_stretch_is_transformers_siglip_processor(height, width):
    shown = images(2, height, width)
    processor = SiglipImageProcessorPil(size={"height": 18, "width": 18}, resample=Image.Resampling.BICUBIC)
    expected = processor(list(shown), return_tensors="pt")["pixel_values"]
    half = (0.5, 0.5, 0.5)
    ours = Preprocess(size=18, fit="stretch", mean=half, std=half)(shown)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_crop_round_cuts_where_torchvision_does(height, width):
    shown = images(1, height, width)
    image = Image.fromarray(shown[0])
    scale = 16 / min(height, width)  # torchvision: the shorter side exactly, the longer one rounded down
    image = image.resize((max(16, int(width * scale)), max(16, int(height * scale))), Image.Resampling.BICUBIC)
    left, top = (round((side - 16) / 2) for side in image.size)
    expected = np.asarray(image.crop((left, top, left + 16, top + 16)), dtype=np.float32) / 255
    ours = denormalised(Preprocess(size=16, fit="crop_round")(shown))[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_the_two_crops_differ_by_a_row_where_the_rest_is_odd():
    shown = images(1, 19, 16)  # 3 rows too many: 1 above and 2 below, or 2 above and 1 below
    whole = torch.from_numpy(shown[0]).movedim(-1, 0) / 255
    floor, nearest = (denormalised(Preprocess(size=16, fit=fit)(shown))[0] for fit in ("crop", "crop_round"))
    torch.testing.assert_close(floor, whole[:, 1:17], atol=1e-6, rtol=0)
    torch.testing.assert_close(nearest, whole[:, 2:18], atol=1e-6, rtol=0)


def test_plain_is_cubic_convolution():
    """Keys 1981 with a = -0.75 at four neighbours, edges repeated, pixel centres at half numbers: torchvision < 0.17."""

    def weight(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def matrix(size: int, out: int) -> np.ndarray:
        rows = np.zeros((out, size))
        for row in range(out):
            place = (row + 0.5) * size / out - 0.5
            for neighbour in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
                rows[row, min(max(neighbour, 0), size - 1)] += weight(place - neighbour)
        return rows

    shown = images(1, 37, 29)
    expected = np.einsum("ah,bw,hwc->cab", matrix(37, 16), matrix(29, 12), shown[0] / 255)
    np.testing.assert_allclose(resized(shown, (16, 12), "plain")[0].numpy(), expected, atol=2e-6)


def test_antialias_is_pillows_resize_of_floats():
    shown = images(1, 57, 41)
    planes = [Image.fromarray(shown[0, ..., channel].astype(np.float32) / 255) for channel in range(3)]
    expected = np.stack([np.asarray(plane.resize((12, 16), Image.Resampling.BICUBIC)) for plane in planes])
    np.testing.assert_allclose(resized(shown, (16, 12), "antialias")[0].numpy(), expected, atol=1e-5)


def test_the_three_resizes_differ_and_only_pils_is_rounded():
    shown = images(1, 64, 64)
    made = {how: resized(shown, (16, 16), how) for how in ("pil", "antialias", "plain")}
    assert (
        made["plain"] - made["antialias"]
    ).square().mean().sqrt() > 0.1  # white noise: antialiasing removes most of it
    assert torch.equal((made["pil"] * 255).round() / 255, made["pil"])
    # Pillow rounds after each of its two passes, which adds up to one level
    assert 0.1 / 255 < (made["pil"] - made["antialias"]).abs().max() < 1.1 / 255
    assert made["plain"].max() > 1  # overshoots, as published: there is no clamp


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(16, 16, (0, 16), (0, 16)), (32, 17, (0, 16), (4, 12)), (13, 32, (5, 11), (0, 16)), (16, 11, (0, 16), (2, 13))],
)
def test_pad_puts_black_around_before_normalising(height, width, rows, columns):
    # 17 / 2 = 8.5 becomes 8 and 13 / 2 = 6.5 becomes 6, Python's round; an odd row of black goes to the end
    shown = images(1, height, width) // 2 + 100
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[slice(*rows), slice(*columns)] = True
    pixels = denormalised(Preprocess(size=16, fit="pad", resize="antialias")(shown))[0]
    assert pixels[:, ~inside].abs().max() < 1e-6 if not inside.all() else True
    assert pixels[:, inside].min() > 0.2
    expected = resized(shown, resized_shape(height, width, 16, "pad"), "antialias")[0]
    torch.testing.assert_close(pixels[:, inside].view(expected.shape), expected, atol=1e-6, rtol=0)


def test_an_image_of_one_row_is_an_image():
    for fit in ("crop", "crop_round", "pad", "stretch"):
        for resize in ("pil", "antialias", "plain"):
            assert Preprocess(size=4, fit=fit, resize=resize)(images(1, 1, 40)).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("resize", ["pil", "antialias", "plain"])
def test_an_image_does_not_depend_on_its_batch(resize):
    shown, preprocess = images(3, 30, 41), Preprocess(size=16, resize=resize)
    alone = torch.cat([preprocess(shown[row : row + 1]) for row in range(3)])
    assert torch.equal(preprocess(shown), alone)


def test_channels_stay_red_green_blue():
    shown = np.zeros((1, 20, 20, 3), np.uint8)
    shown[..., 0] = 255
    assert denormalised(Preprocess(size=16)(shown)).mean((0, 2, 3)).tolist() == pytest.approx([1, 0, 0], abs=1e-6)


def test_each_choice_is_in_the_fingerprint():
    half = (0.5, 0.5, 0.5)
    changes = [{}, {"size": 8}, {"fit": "pad"}, {"resize": "plain"}, {"mean": half}, {"std": half}]
    prints = [Preprocess(**{"size": 16, **change}).fingerprint() for change in changes]
    assert all(first != second for place, first in enumerate(prints) for second in prints[:place])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, got 0"),
        ({"size": 4, "fit": "squash"}, "fit must be crop, crop_round, pad, stretch, got 'squash'"),
        ({"size": 4, "resize": "bilinear"}, "resize must be pil, antialias, plain, got 'bilinear'"),
    ],
)
def test_choices_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)
