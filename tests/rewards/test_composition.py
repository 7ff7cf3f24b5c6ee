"""The composition reward: right on what was drawn, zero on what was not, and something to climb in between."""

from __future__ import annotations

from itertools import permutations

import cv2
import numpy as np
import pytest

from flowsteer.rewards.scorers.composition import CompositionReward
from flowsteer.rewards.scorers.world import (
    BACKGROUNDS,
    COLORS,
    Caption,
    all_captions,
    draw,
    parse_caption,
    reserved_captions,
)
from flowsteer.rewards.types import Reward

PARTS = ("graded", "tolerant", "strict")


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, list[str]]:
    """One picture of every caption."""
    rng = np.random.default_rng(0)
    return np.stack([draw(caption, rng) for caption in all_captions()]), [caption.text for caption in all_captions()]


def scene(*objects: tuple[str, str, int, int, int], background: str = "black") -> np.ndarray:
    """A picture drawn here and not by the world: (shape, colour, x, y, radius) each, in whole pixels."""
    picture = np.full((32, 32, 3), BACKGROUNDS[background], np.uint8)
    for shape, color, x, y, radius in objects:
        if shape == "circle":
            cv2.circle(picture, (x, y), radius, COLORS[color], -1)
        else:
            top = [(x - radius, y - radius), (x + radius, y - radius)] if shape == "square" else [(x, y - radius)]
            points = np.array([*top, (x + radius, y + radius), (x - radius, y + radius)], np.int32)
            cv2.fillPoly(picture, [points], COLORS[color])
    return picture


def score(picture: np.ndarray, caption: str) -> tuple[float, float, float]:
    """Graded, tolerant and strict score of one picture."""
    scores = CompositionReward()(picture[None], [caption])
    return tuple(scores[part][0] for part in PARTS)


def test_it_is_a_reward() -> None:
    assert isinstance(CompositionReward(), Reward)


def test_what_was_drawn_is_recognised(drawn) -> None:
    images, prompts = drawn
    scores = CompositionReward()(images, prompts)
    # the contract of the world: 99.5 %; measured 99.9 % over 12,144 drawings (small circles that look square)
    assert np.mean(scores["strict"]) >= 0.995
    assert np.mean(scores["tolerant"]) >= 0.999


def can_be(source: Caption, claim: Caption) -> bool:
    """Whether a picture drawn for ``source`` may rightly be called ``claim`` too."""
    if len(source.things) != len(claim.things):
        return False
    if None not in (source.background, claim.background) and source.background != claim.background:
        return False
    for order in permutations(range(len(claim.things))):
        pairs = [(a, claim.things[i]) for a, i in zip(source.things, order)]
        if any(a.shape != b.shape or (None not in (a.color, b.color) and a.color != b.color) for a, b in pairs):
            continue
        if source.relation and claim.relation:
            swapped = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
            claimed = claim.relation if order == (0, 1) else swapped[claim.relation]
            if claimed == swapped[source.relation]:  # what is 40 degrees from one may be 50 from its neighbour
                continue
        opposite = {("left", "right"), ("top", "bottom")}
        if {(source.placement, claim.placement), (claim.placement, source.placement)} & opposite:
            continue
        return not (source.placement != claim.placement and "center" in (source.placement, claim.placement)) or (
            None in (source.placement, claim.placement)
        )
    return False


def test_the_caption_of_another_picture_passes_only_where_it_is_true(drawn) -> None:
    images, prompts = drawn
    others = np.random.default_rng(1).permutation(len(prompts))
    strict = np.array(CompositionReward()(images, [prompts[i] for i in others])["strict"])
    for i in np.flatnonzero(strict):
        source, claim = all_captions()[i], all_captions()[others[i]]
        recognised = score(images[i], source.text)[2]  # or else it is one of the 0.1 % that are misread
        assert can_be(source, claim) or not recognised, f"{source.text!r} passed for {claim.text!r}"
    assert 0.002 < strict.mean() < 0.02  # measured 0.7 % over all captions


def test_noise_and_empty_pictures_are_worth_nothing() -> None:
    prompts = [caption.text for caption in reserved_captions()]
    rng = np.random.default_rng(2)
    blobs = np.stack(
        [cv2.GaussianBlur(rng.integers(0, 256, (32, 32, 3), np.uint8), (0, 0), 2) for _ in prompts]
    ).astype(np.int32)
    blobs = np.clip((blobs - 128) * 8 + 128, 0, 255).astype(np.uint8)
    for images in (rng.integers(0, 256, (len(prompts), 32, 32, 3), np.uint8), blobs, np.full_like(blobs, 15)):
        scores = CompositionReward()(images, prompts)
        assert sum(scores["strict"]) == sum(scores["tolerant"]) == 0
        assert np.mean(scores["graded"]) < 0.5  # measured 0.16, 0.39 and 0.2


def test_graded_is_one_exactly_where_strict_is(drawn) -> None:
    images, prompts = drawn[0][::4], drawn[1][::4]
    for shift in (0, 1, 100):
        scores = CompositionReward()(images, prompts[shift:] + prompts[:shift])
        graded, strict = np.array(scores["graded"]), np.array(scores["strict"])
        assert np.array_equal(graded == 1, strict == 1)
        assert graded.min() >= 0
        assert graded[strict == 0].max() < 0.8  # 0.8 of comparisons that are not all 1


GOOD = ("circle", "red", 8, 16, 5), ("square", "blue", 24, 16, 5)


@pytest.mark.parametrize(
    ("caption", "right", "wrong"),
    [
        ("a red circle", [GOOD[0]], [("circle", "blue", 8, 16, 5)]),
        ("a red circle", [GOOD[0]], [("square", "red", 8, 16, 5)]),
        ("a red circle", [GOOD[0]], [GOOD[0], ("triangle", "red", 24, 16, 5)]),
        ("a red circle", [GOOD[0]], []),
        ("a circle at the left", [GOOD[0]], [("circle", "red", 22, 16, 5)]),
        ("a circle in the center", [("circle", "red", 16, 16, 5)], [GOOD[0]]),
        ("a red circle and a blue square", GOOD, [("circle", "blue", 8, 16, 5), ("square", "red", 24, 16, 5)]),
        ("a red circle and a blue square", GOOD, GOOD[:1]),
        ("a circle left of a square", GOOD, [("circle", "red", 24, 16, 5), ("square", "blue", 8, 16, 5)]),
        ("a circle left of a square", GOOD, [("circle", "red", 16, 24, 5), ("square", "blue", 16, 8, 5)]),
        ("a square right of a red circle", GOOD, [("circle", "green", 8, 16, 5), GOOD[1]]),
        ("two red circles", [GOOD[0], ("circle", "red", 24, 16, 5)], [GOOD[0]]),
        ("two red circles", [GOOD[0], ("circle", "red", 24, 16, 5)], [GOOD[0], ("circle", "blue", 24, 16, 5)]),
    ],
)
def test_one_fault_costs_the_strict_score_and_part_of_the_graded(caption: str, right, wrong) -> None:
    best, fault, nothing = score(scene(*right), caption), score(scene(*wrong), caption), score(scene(), caption)
    assert best == (1, 1, 1)
    assert fault[2] == 0
    assert nothing[0] <= fault[0] < 0.8
    if wrong:
        assert nothing[0] < fault[0]  # something to climb


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
@pytest.mark.parametrize("second", ["blue square", "red square", "blue circle"])
def test_two_colored_shapes_with_a_relation_are_drawn_and_verified(relation: str, second: str) -> None:
    caption = parse_caption(f"a red circle {relation} a {second}")
    mirrored = f"A photo of a {second} {relation} a red circle."
    rng = np.random.default_rng(0)
    images = np.stack([draw(caption, rng) for _ in range(50)])
    assert np.mean(CompositionReward(score="strict")(images, [caption.text] * 50)["score"]) >= 0.98
    assert np.max(CompositionReward(score="strict")(images, [mirrored] * 50)["score"]) == 0


def test_prompts_that_cannot_be_verified_are_told_with_the_reason() -> None:
    prompts = ["a red circle", "A Red Circle.", "a cat", "a circle and a circle"]
    said = CompositionReward().unscorable(prompts)
    assert list(said) == prompts[2:]
    assert said["a cat"] == "it does not know 'cat'"
    images = np.stack([scene(GOOD[0])] * 4)
    assert CompositionReward()(images, prompts)["strict"] == [1, 1, None, None]


def test_the_background_is_judged() -> None:
    assert score(scene(GOOD[0], background="gray"), "a red circle on gray") == (1, 1, 1)
    graded, tolerant, strict = score(scene(GOOD[0], background="white"), "a red circle on gray")
    assert (tolerant, strict) == (0, 0)
    assert 0.5 < graded < 0.8
    assert all(score(scene(GOOD[0], background=name), "a red circle") == (1, 1, 1) for name in BACKGROUNDS)
    half = scene(GOOD[0])
    half[:, 16:] = BACKGROUNDS["white"]  # no single background
    assert score(half, "a red circle")[2] == 0


def test_tolerant_lets_more_things_be_there_but_none_be_missing() -> None:
    more = scene(*GOOD, ("triangle", "green", 16, 27, 3))
    assert score(more, "a red circle and a blue square")[1:] == (1, 0)
    assert score(scene(*GOOD), "three circles")[1:] == (0, 0)


def test_a_prompt_of_another_world_is_missing_and_the_others_are_not() -> None:
    scores = CompositionReward()(np.stack([scene(GOOD[0])] * 3), ["a red circle", "a photo of a cat", "a circle"])
    assert set(scores) == {"score", *PARTS}
    for values in scores.values():
        assert values == [1.0, None, 1.0]


def test_score_is_the_part_that_was_asked_for() -> None:
    images, prompts = np.stack([scene(*GOOD, ("triangle", "green", 16, 27, 3))]), ["a red circle and a blue square"]
    for part in PARTS:
        scores = CompositionReward(score=part)(images, prompts)
        assert scores["score"] == scores[part]
    assert len({CompositionReward(score=part)(images, prompts)["score"][0] for part in PARTS}) == 3


def test_the_fingerprint_says_what_a_score_depends_on() -> None:
    prints = [CompositionReward(score=part).fingerprint for part in PARTS]
    assert prints[0] == {"reward": "composition", "version": "1", "score": "graded", "opencv": cv2.__version__}
    assert [own["score"] for own in prints] == list(PARTS)


def test_larger_pictures_score_as_the_small_ones_they_are_made_of(drawn) -> None:
    images, prompts = drawn[0][::40], drawn[1][::40]
    large = images.repeat(3, axis=1).repeat(3, axis=2)  # averaging 3x3 equal pixels gives them back
    assert CompositionReward()(large, prompts) == CompositionReward()(images, prompts)


def test_a_sample_does_not_depend_on_its_batch(drawn) -> None:
    images, prompts = drawn[0][5::200], drawn[1][3::200]
    together = CompositionReward()(images, prompts)
    for i in range(len(images)):
        alone = CompositionReward()(images[i : i + 1], prompts[i : i + 1])
        assert all(alone[part][0] == together[part][i] for part in PARTS)
    assert CompositionReward()(images[:0], []) == {"score": [], "graded": [], "tolerant": [], "strict": []}


def test_other_columns_are_allowed_and_ignored() -> None:
    assert CompositionReward()(scene(GOOD[0])[None], ["a circle"], seed=[3])["score"] == [1.0]


@pytest.mark.parametrize(
    ("images", "prompts"),
    [
        (np.zeros((1, 32, 32, 3), np.float32), ["a circle"]),
        (np.zeros((1, 3, 32, 32), np.uint8), ["a circle"]),
        (np.zeros((2, 32, 32, 3), np.uint8), ["a circle"]),
    ],
)
def test_what_is_no_batch_of_pictures_is_refused(images: np.ndarray, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"uint8 pictures \[B, H, W, 3\] with B prompts, got"):
        CompositionReward()(images, prompts)


def test_an_unknown_score_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'graded', 'tolerant' or 'strict'"):
        CompositionReward(score="lenient")
