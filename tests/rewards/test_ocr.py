"""The OCR reward on drawn words: the reader's real models on real pixels."""

from importlib.metadata import version

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.scorers.ocr import OCRReward, edit_distance, match_score, quoted_text


def draw(text: str, width: int, height: int, size: int, *, color: str = "black", ground: str = "white") -> np.ndarray:
    """uint8 [H, W, 3] with the text in its middle."""
    image = Image.new("RGB", (width, height), ground)
    ImageDraw.Draw(image).text(
        (width / 2, height / 2), text, fill=color, font=ImageFont.load_default(size), anchor="mm"
    )
    return np.asarray(image)


@pytest.fixture(scope="module")
def reward() -> OCRReward:
    return OCRReward()


@pytest.mark.parametrize(
    ("text", "width", "height", "size"),
    [("GO", 32, 32, 20), ("Hello", 64, 32, 20), ("OPEN", 96, 96, 28), ("Hello\nWorld", 256, 256, 48)],
)
def test_drawn_words_score_one_and_other_words_less(reward, text, width, height, size):
    target = text.replace("\n", " ")
    image = draw(text, width, height, size)
    answer = reward(np.stack([image, image]), [f'a sign that says "{target}"', 'a sign that says "Quixotic"'])
    assert answer["score"][0] == 1
    assert answer["exact"] == [1, 0]
    assert 0 <= answer["score"][1] < 0.5


def test_a_letter_amiss_costs_its_share(reward):
    score = reward(draw("OPEN", 96, 96, 28)[None], ['a sign that says "OVEN"'])["score"][0]
    assert score == pytest.approx(1 - 1 / 4)


def test_a_score_does_not_depend_on_its_batch(reward):
    images = np.stack([draw(text, 96, 48, 24) for text in ("OPEN", "SALE", "STOP")])
    prompts = ['says "OPEN"', 'says "SALT"', 'says "TOP"']
    together = reward(images, prompts)["score"]
    assert together == [reward(images[row : row + 1], prompts[row : row + 1])["score"][0] for row in range(3)]
    assert together == [1, 0.75, 1]  # TOP is part of STOP


def test_colours_come_as_red_green_blue(reward):
    # Red on dark blue reads well; the reader gets the image in its own channel order, whatever ours is
    assert reward(draw("OPEN", 96, 96, 28, color="red", ground="navy")[None], ['"OPEN"'])["score"] == [1]
    seen = []
    engine, reward._engine = reward._engine, lambda image, **options: seen.append(image) or engine(image, **options)
    try:
        reward.read(draw("OPEN", 96, 96, 28, ground="red"))
    finally:
        reward._engine = engine
    assert seen[0][0, 0].tolist() == [0, 0, 255]  # rapidocr, like OpenCV, wants blue first


def test_an_image_without_text_scores_zero(reward):
    assert reward(np.full((1, 96, 96, 3), 255, np.uint8), ['says "OPEN"'])["score"] == [0]
    assert reward(np.full((1, 32, 32, 3), 255, np.uint8), ['says "OPEN"'])["score"] == [0]


def test_the_mode_decides_how_an_image_is_read():
    image = draw("Hello\nWorld", 256, 256, 48)[None]
    assert OCRReward("detect")(image, ['"Hello World"'])["score"] == [1]
    assert OCRReward("recognize")(image, ['"Hello World"'])["score"][0] < 1  # two lines read as one


@pytest.mark.parametrize("prompt", ["no quotes", 'one " quote', 'an empty ""', 'blank "  " only'])
def test_a_prompt_without_a_target_has_no_score(reward, prompt):
    images = torch.ones(2, 3, 32, 32)
    scores = RewardSet([("ocr", reward, 1.0)]).score(images, [prompt, 'says "A"'])
    assert scores.missing.tolist() == [True, False]
    assert list(scores.failures) == [0]
    assert "reward 'ocr' gave no score (None): it has no text between double quotes" in scores.failures[0]


def test_an_image_that_cannot_be_read_has_no_score_and_a_reason(reward, monkeypatch):
    def fail(image, **options):
        raise RuntimeError("no reader")

    monkeypatch.setattr(reward, "_engine", fail)
    scores = RewardSet([("ocr", reward, 1.0)]).score(torch.zeros(1, 3, 32, 32), ['"A"'])
    assert scores.missing.tolist() == [True]
    assert "RuntimeError: no reader" in scores.failures[0]


def test_a_video_is_the_mean_of_its_frames(reward):
    video = np.stack([draw("GO", 32, 32, 20), np.full((32, 32, 3), 255, np.uint8)])[None]
    assert reward(video, ['"GO"']) == {"score": [0.5], "exact": [0.5]}
    assert reward.video


def test_the_fingerprint_says_what_a_score_depends_on(reward):
    assert reward.fingerprint == {
        "reward": "ocr",
        "version": "1",
        "mode": "auto",
        **{package: version(package) for package in ("rapidocr", "onnxruntime")},
        "opencv": cv2.__version__,
    }
    other = OCRReward("recognize", num_threads=2)  # the number of threads changes no score
    assert other.fingerprint == reward.fingerprint | {"mode": "recognize"}


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@pytest.mark.parametrize(
    ("text", "target", "score"),
    [
        ("New York", "new york", 1),
        ("the NEWYORK times", "New York", 1),
        ("", "abcd", 0),
        ("completely different and long", "abc", 0),  # the distance counts at most the target's length
        ("abxd", "abcd", 0.75),
        ("abc", "abcd", 0.75),
    ],
)
def test_the_rule(text, target, score):
    assert match_score(text, target) == score


def test_the_target_is_what_the_first_pair_of_quotes_holds():
    assert quoted_text('a "first" and a "second" sign') == "first"
    assert quoted_text('say "never closed') == ""


def test_bad_options():
    with pytest.raises(ValueError, match="mode must be auto, detect or recognize, got 'fast'"):
        OCRReward("fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        OCRReward(num_threads=0)
