"""The world of shapes: its captions are counted, its reserved ones stay reserved, its pictures show what they should."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pytest

from flowsteer.rewards.scorers import world
from flowsteer.rewards.scorers.world import (
    BACKGROUNDS,
    COLORS,
    MIRRORED,
    SHAPES,
    NotACaption,
    Thing,
    all_captions,
    draw,
    parse_caption,
    reserved_captions,
    train_captions,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_there_are_as_many_captions_as_the_grammar_allows() -> None:
    places, backgrounds, colors, shapes = 5 + 1, 3 + 1, 6, 3
    pairs = shapes * (shapes - 1) * (1 + 2 * colors)  # ordered, none of the two has a colour or one of them
    expected = {
        "single_object": shapes * places * backgrounds,
        "two_object": pairs * backgrounds,
        "counting": 3 * shapes * (colors + 1) * backgrounds,
        "colors": shapes * colors * places * backgrounds,
        "position": pairs * 4 * backgrounds,
        "color_attr": shapes * (shapes - 1) * colors * (colors - 1) * backgrounds,
    }
    assert Counter(caption.task for caption in all_captions()) == expected
    assert len({caption.text for caption in all_captions()}) == sum(expected.values()) == 3036


def test_every_caption_fits_in_twelve_tokens() -> None:
    # ten words, a beginning and an end; scripts/pretrain_embedded.py gives every word one token
    assert max(len(caption.text.split()) for caption in all_captions()) <= 10


def test_parsing_is_the_inverse_of_writing() -> None:
    assert all(parse_caption(caption.text) is caption for caption in all_captions())
    caption = parse_caption("a red circle left of a square on black")
    assert (caption.task, caption.relation, caption.placement, caption.background) == (
        "position",
        "left of",
        None,
        "black",
    )
    assert caption.things == (Thing("circle", "red"), Thing("square"))
    assert parse_caption("three circles").things == (Thing("circle"),) * 3


@pytest.mark.parametrize("text", ["", "a cat", "five circles", "a circle and a circle"])
def test_a_caption_of_another_world_is_refused_with_what_this_one_knows(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a caption of the world.*circle.*purple.*gray.*all_captions"):
        parse_caption(text)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("A red circle", "a red circle"),
        ("a red circle.", "a red circle"),
        ("red circle", "a red circle"),
        (" The  red circle on black\n", "a red circle on black"),
        ("a photo of a red circle", "a red circle"),
        ("A picture of the red circle on a grey background.", "a red circle on gray"),
        ("an image of three blue squares on white.", "three blue squares on white"),
        ("a circle to the left of a blue square", "a circle left of a blue square"),
        ("Circle at top", "a circle at the top"),
        ("a circle in the centre", "a circle in the center"),
    ],
)
def test_another_wording_is_the_canonical_caption(text: str, canonical: str) -> None:
    assert parse_caption(text) is parse_caption(canonical)


def test_every_canonical_caption_is_found_again_in_every_wording() -> None:
    for caption in all_captions():
        for text in (caption.text.upper(), f"A photo of {caption.text}.", caption.text.replace("a ", "the ")):
            assert parse_caption(text) is caption, text


@pytest.mark.parametrize("opening", ["", "a photo of "])
def test_two_colored_shapes_may_have_a_relation(opening: str) -> None:
    caption = parse_caption(f"{opening}A red circle left of a blue square on black.")
    assert caption.things == (Thing("circle", "red"), Thing("square", "blue"))
    assert (caption.task, caption.relation, caption.background) == ("position", "left of", "black")
    assert caption.text == "a red circle left of a blue square on black"
    assert caption not in all_captions()
    mirrored = parse_caption("a blue square right of a red circle")
    assert mirrored.meaning == caption.meaning


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a photo of a cat and a dog", "it does not know 'cat', 'dog'"),
        ("  ", "it is empty"),
        ("a circle and a circle", "one circle could be both of its shapes"),
        ("a red circle left of a circle", "one circle could be both of its shapes"),
        ("a red circle above a red circle", "one circle could be both of its shapes"),
        ("circle red", "it knows these words but not this sentence"),
        ("a red circle left of a blue square at the top", "it knows these words but not this sentence"),
    ],
)
def test_what_cannot_be_verified_has_a_reason(text: str, reason: str) -> None:
    with pytest.raises(NotACaption) as error:
        parse_caption(text)
    assert error.value.reason.startswith(reason)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a circle left of a square", "a square right of a circle on black"),
        ("a red circle above a square", "a square below a red circle"),
        ("a red circle and a blue square", "a blue square and a red circle on white"),
        ("a circle and a red square", "a red square and a circle"),
    ],
)
def test_two_ways_to_say_the_same_have_one_meaning(one: str, other: str) -> None:
    assert parse_caption(one).meaning == parse_caption(other).meaning


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a circle left of a square", "a square left of a circle"),
        ("a circle left of a square", "a circle above a square"),
        ("a red circle and a square", "a circle and a red square"),
        ("a red circle and a blue square", "a blue circle and a red square"),
        ("two circles", "three circles"),
        ("a red circle at the top", "a red circle"),
    ],
)
def test_what_differs_has_another_meaning(one: str, other: str) -> None:
    assert parse_caption(one).meaning != parse_caption(other).meaning


def test_meanings_number_as_the_grammar_says() -> None:
    # an unordered pair of shapes, of which none or one of two has a colour; a relation and its mirror are one
    pairs = comb(3, 2) * (1 + 2 * 6)
    expected = {
        "single_object": 3 * 6,
        "two_object": pairs,
        "counting": 3 * 3 * 7,
        "colors": 3 * 6 * 6,
        "position": pairs * 4,
        "color_attr": comb(3, 2) * 6 * 5,
    }
    meanings = {(caption.task, caption.meaning) for caption in all_captions()}
    assert Counter(task for task, _ in meanings) == expected


def test_reserved_and_training_captions_share_neither_text_nor_meaning() -> None:
    reserved, train = reserved_captions(), train_captions()
    assert len(reserved) + len(train) == len(all_captions())
    assert not {caption.text for caption in reserved} & {caption.text for caption in train}
    assert not {caption.meaning for caption in reserved} & {caption.meaning for caption in train}


def test_the_mirrored_form_of_a_reserved_caption_is_reserved() -> None:
    reserved = {caption.text for caption in reserved_captions()}
    for caption in reserved_captions():
        if len(set(caption.things)) != 2:
            continue
        first, second = caption.things
        link = MIRRORED[caption.relation] if caption.relation else "and"
        tail = f" on {caption.background}" if caption.background else ""
        assert f"a {second.words} {link} a {first.words}{tail}" in reserved


def test_the_reserved_set_is_large_spread_and_fixed() -> None:
    counts = Counter(caption.task for caption in reserved_captions())
    assert counts == {"single_object": 24} | dict.fromkeys(
        ("two_object", "counting", "colors", "position", "color_attr"), 48
    )
    # results are only comparable while the set stays what it is: a change of grammar must be seen to change it
    text = "\n".join(sorted(caption.text for caption in reserved_captions()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a475438d77ee02ce"


def test_training_has_seen_every_word_of_what_is_reserved_in_its_task() -> None:
    def words(captions):
        return {(caption.task, word) for caption in captions for word in caption.text.split()}

    assert words(reserved_captions()) <= words(train_captions())


@pytest.mark.parametrize(
    ("name", "captions"), [("shapes_train.txt", train_captions), ("shapes_reserved.txt", reserved_captions)]
)
def test_the_prompt_files_are_what_the_functions_say(name: str, captions) -> None:
    lines = (CONFIGS / name).read_text().splitlines()
    assert lines == [caption.text for caption in captions()], "run: python scripts/pretrain_embedded.py captions"


def test_a_picture_depends_on_its_generator_alone() -> None:
    caption = parse_caption("a circle and a square")
    first, again = (draw(caption, np.random.default_rng(3)) for _ in range(2))
    other = draw(caption, np.random.default_rng(4))
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_picture_has_the_named_colors_the_named_background_and_no_other() -> None:
    rng = np.random.default_rng(0)
    palette = {value: name for name, value in COLORS.items()} | {(v, v, v): name for name, v in BACKGROUNDS.items()}
    for caption in all_captions()[::7]:
        pixels = Counter(tuple(int(v) for v in pixel) for pixel in draw(caption, rng).reshape(-1, 3))
        seen = {palette[value] for value in pixels if value in palette}  # the rest are edges, blended
        backgrounds, colors = seen & set(BACKGROUNDS), seen & set(COLORS)
        named = {thing.color for thing in caption.things} - {None}
        assert len(backgrounds) == 1
        assert caption.background is None or backgrounds == {caption.background}
        assert named <= colors
        assert len(colors) <= len(set(caption.things))
        # an object covers at least 7 % of a side by a side: no picture without anything in it
        assert sum(pixels[value] for value, name in palette.items() if name in colors) >= 20 * len(caption.things)


def test_objects_lie_apart_inside_and_where_the_caption_says() -> None:
    rng = np.random.default_rng(1)
    for caption in all_captions()[::5]:
        boxes = world._place(caption, rng)
        for x, y, radius in boxes:
            assert min(x, y, 32 - x, 32 - y) >= radius + 1 - 1e-9
        for (ax, ay, ar), (bx, by, br) in combinations(boxes, 2):
            assert max(abs(ax - bx), abs(ay - by)) >= ar + br + 2 - 1e-9
        x, y, _ = boxes[0]
        if caption.relation is not None:
            dx, dy = boxes[1][0] - x, boxes[1][1] - y
            assert {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[caption.relation] > 0
        if caption.placement is not None:
            from_side = {"left": x, "right": 32 - x, "top": y, "bottom": 32 - y}
            center = max(abs(x - 16), abs(y - 16))
            assert center <= 2 if caption.placement == "center" else from_side[caption.placement] <= 10.5


def test_what_is_left_open_varies() -> None:
    rng = np.random.default_rng(2)
    pictures = [draw(parse_caption("a circle"), rng) for _ in range(200)]
    assert {int(picture[0, 0, 0]) for picture in pictures} == set(BACKGROUNDS.values())
    middles = {tuple(int(v) for v in picture[16, 16]) for picture in pictures}
    assert set(COLORS.values()) <= middles
    assert len(SHAPES) == 3


def test_no_background_can_be_taken_for_a_color() -> None:
    # what a colour is recognised by, its distance from gray, is 0 for every background and at least 100 for every colour
    for red, green, blue in COLORS.values():
        rgb = np.array([red, green, blue], float)
        assert np.linalg.norm(rgb - rgb.mean()) >= 100
    # and no two hues are closer than 45 degrees, seen along the gray axis
    chroma = np.array(list(COLORS.values()), float)
    chroma -= chroma.mean(1, keepdims=True)
    chroma /= np.linalg.norm(chroma, axis=1, keepdims=True)
    cosines = (chroma @ chroma.T)[~np.eye(len(chroma), dtype=bool)]
    assert cosines.max() <= np.cos(np.radians(45))
