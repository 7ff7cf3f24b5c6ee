"""Edits of pictures: what is drawn is what was asked for, and the reward tells a right edit from every other."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from flowsteer.rewards.scorers.edit_composition import EditCompositionReward
from flowsteer.rewards.scorers.edits import (
    KINDS,
    Case,
    Edit,
    Placed,
    Scene,
    all_things,
    edits_of,
    is_reserved,
    meaning,
    place_case,
    sample_case,
    spoiled,
)
from flowsteer.rewards.scorers.world import COLORS, SHAPES, Thing
from flowsteer.rollout.data.files import Source, Table, read_table

FILES = ("edits_train.parquet", "edits_reserved.parquet")


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    rng = np.random.default_rng(0)
    return [sample_case(rng, reserved=i % 2 == 0, kind=KINDS[i % 4]) for i in range(400)]


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    return {name: read_table(Source(file=name)) for name in FILES}


def strict(pictures: list[np.ndarray], cases: list[Case]) -> list[float]:
    scores = EditCompositionReward()(np.stack(pictures), [""] * len(cases), [case.expected for case in cases])
    return [value for value in scores["strict"] if value is not None]


def graded(picture: np.ndarray, expected: dict[str, Any]) -> float:
    value = EditCompositionReward()(picture[None], [""], [expected])["graded"][0]
    assert value is not None
    return value


# --- the world of edits


def test_a_spoiled_target_is_never_what_was_asked_for(cases: list[Case]) -> None:
    """Nothing, something else or something more was done, a third each; what was not touched stays."""
    rng, counts = np.random.default_rng(1), {"nothing": 0, "something": 0}
    targets = [spoiled(case, rng) for case in cases]
    assert strict([target.draw() for target in targets], cases) == [0.0] * len(cases)
    for case, target in zip(cases, targets):
        counts["nothing" if target == case.source else "something"] += 1
        assert target.background == case.source.background
        places = {(one.x, one.y, one.radius) for one in (*case.source.things, *case.target.things)}
        assert {(one.x, one.y, one.radius) for one in target.things} <= places
        changed = set(case.target.things) ^ set(target.things)
        assert 1 <= len(changed) <= 4  # the asked edit not done, another one done: each at most one shape for another
    added = [
        case.edit.kind == "add" and case.target.things[-1] in target.things for case, target in zip(cases, targets)
    ]
    assert any(added)  # something more: the asked edit is there
    share = counts["nothing"] / len(cases)
    assert abs(share - 1 / 3) < 4 * (2 / 9 / len(cases)) ** 0.5  # four deviations


def test_instructions_are_worded_as_documented() -> None:
    red, blue, square = Thing("circle", "red"), Thing("circle", "blue"), Thing("square", "red")
    assert [
        Edit(kind="recolor", before=red, after=blue).text,
        Edit(kind="reshape", before=red, after=square).text,
        Edit(kind="remove", before=red, after=None).text,
        Edit(kind="add", before=None, after=red).text,
    ] == ["make the red circle blue", "turn the red circle into a square", "remove the red circle", "add a red circle"]


def test_a_picture_allows_the_edits_that_leave_all_shapes_different() -> None:
    """Two circles: of five other colours and two other shapes each, those are left out that are there already."""
    pair = [Thing("circle", "red"), Thing("circle", "blue")]
    counts = {kind: len([*edits_of(pair, kind)]) for kind in KINDS}
    assert counts == {"recolor": 8, "reshape": 4, "remove": 2, "add": 16}
    assert [*edits_of(pair[:1], "remove")] == []  # something is left
    assert [*edits_of([*pair, Thing("square", "red")], "add")] == []  # three are enough


def test_an_edit_changes_what_it_names_and_nothing_else(cases: list[Case]) -> None:
    for case in cases:
        before, after = set(case.source.things), set(case.target.things)
        assert {one.thing for one in before - after} == {case.edit.before} - {None}
        assert {one.thing for one in after - before} == {case.edit.after} - {None}
        if case.edit.kind in ("recolor", "reshape"):
            (old,), (new,) = before - after, after - before
            assert (old.x, old.y, old.radius) == (new.x, new.y, new.radius)
        assert case.source.background == case.target.background
        assert len({one.thing for one in after}) == len(after)


def test_a_reserved_meaning_is_never_drawn_for_training(cases: list[Case]) -> None:
    assert [is_reserved(case.meaning) for case in cases] == [i % 2 == 0 for i in range(len(cases))]


def test_one_meaning_in_ten_is_reserved_whatever_the_order_of_the_shapes() -> None:
    things = all_things()
    pairs = [[one, other] for one in things for other in things if one.words < other.words]
    meanings = {meaning(edit, pair) for pair in pairs for kind in KINDS for edit in edits_of(pair, kind)}
    share = sum(map(is_reserved, meanings)) / len(meanings)
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / len(meanings)) ** 0.5  # four deviations of a binomial share
    edit = Edit(kind="remove", before=things[0], after=None)
    assert meaning(edit, things[:3]) == meaning(edit, things[2::-1])


# --- the shipped files


def test_shipped_edits_are_those_of_the_world_and_reserved_ones_are_not_trained(tables: dict[str, Table]) -> None:
    for (name, table), reserved in zip(tables.items(), (False, True)):
        meanings = {meaning_of(table, row) for row in range(len(table.texts))}
        assert {is_reserved(one) for one in meanings} == {reserved}, name
        assert {*table.columns["kind"]} == {*KINDS}
    assert not overlap(tables)


def test_a_reserved_edit_among_the_trained_ones_would_be_found(tables: dict[str, Table]) -> None:
    reserved = tables[FILES[1]]
    mixed = {FILES[0]: dataclasses.replace(reserved, texts=reserved.texts[:1]), FILES[1]: reserved}
    assert overlap(mixed)


def meaning_of(table: Table, row: int) -> str:
    """From the instruction and the expected scene alone, as a reader of the file would work it out."""
    text, words = table.texts[row], table.texts[row].split()
    things = [f"{one['color']} {one['shape']}" for one in table.columns["expected"][row]["things"]]
    if words[0] == "add":
        things.remove(" ".join(words[2:]))
    elif words[0] == "remove":
        things.append(" ".join(words[2:]))
    elif words[0] == "make":
        things[things.index(f"{words[4]} {words[3]}")] = f"{words[2]} {words[3]}"
    else:
        things[things.index(f"{words[2]} {words[6]}")] = f"{words[2]} {words[3]}"
    return f"{text}|{','.join(sorted(things))}"


def overlap(tables: dict[str, Table]) -> set[str]:
    trained, reserved = ({meaning_of(table, row) for row in range(len(table.texts))} for table in tables.values())
    return trained & reserved


# --- the reward


def test_ground_truth_is_strictly_right_and_an_unedited_picture_is_not(cases: list[Case]) -> None:
    # 0.997 of 3,000; small circles and shapes two pixels apart are sometimes misread
    assert np.mean(strict([case.target.draw() for case in cases], cases)) > 0.985
    assert not any(strict([case.source.draw() for case in cases], cases))


def test_another_edits_picture_is_wrong(cases: list[Case]) -> None:
    pictures = [case.target.draw() for case in cases]
    assert np.mean(strict(pictures[1:] + pictures[:1], cases)) < 0.01
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    assert not any(strict([*noise], cases[:50]))


def changed(case: Case, **change: Any) -> np.ndarray:
    """The right edit, but the shape that should have stayed is changed, too."""
    kept = next(one for one in case.target.things if one in case.source.things)
    others = [one for one in case.target.things if one is not kept]
    return Scene(background=case.target.background, things=(dataclasses.replace(kept, **change), *others)).draw()


def test_the_right_edit_with_another_change_is_wrong() -> None:
    """Each case has a shape that stays; its colour, its shape, its place or its size is changed, or it is gone."""
    stays, named = Thing("square", "yellow"), Thing("circle", "red")
    rng = np.random.default_rng(1)
    for kind in KINDS:
        things = [stays] if kind == "add" else [stays, named]
        edit = next(one for one in edits_of(things, kind) if one.before != stays)
        case = place_case(things, edit, rng)
        kept = next(one for one in case.target.things if one.thing == stays)
        assert strict([changed(case)], [case]) == [1.0]
        away = 4.0 if kept.x < 16 else -4.0
        for change in (
            {"thing": Thing("square", "purple")},
            {"thing": Thing("triangle", "yellow")},
            {"x": kept.x + away},
            {"radius": kept.radius - 2.2},
        ):
            wrong = changed(case, **change)
            assert strict([wrong], [case]) == [0.0], (kind, change)
            assert graded(wrong, case.expected) < graded(case.target.draw(), case.expected)
        gone = Scene(
            background=case.target.background, things=tuple(one for one in case.target.things if one is not kept)
        )
        assert strict([gone.draw()], [case]) == [0.0]
        others = {"black": "white", "white": "black", "gray": "black"}
        repainted = Scene(background=others[case.target.background], things=case.target.things)
        assert strict([repainted.draw()], [case]) == [0.0]


def test_a_shape_may_move_by_its_tolerance_and_an_added_one_lies_anywhere() -> None:
    kept = Placed(Thing("square", "yellow"), 10.0, 10.0, 5.0)
    added = Thing("circle", "red")
    source = Scene(background="black", things=(kept,))
    edit = Edit(kind="add", before=None, after=added)
    for x, y in ((24.0, 24.0), (24.0, 9.0), (9.0, 25.0)):
        target = Scene(background="black", things=(kept, Placed(added, x, y, 5.0)))
        case = Case(source=source, edit=edit, target=target)
        for moved, right in ((0.0, 1.0), (2.0, 1.0), (4.0, 0.0)):
            picture = Scene(
                background="black",
                things=(dataclasses.replace(kept, x=10 + moved), Placed(added, 25.0, 24.0, 5.0)),
            )
            assert strict([picture.draw()], [case]) == [right]


def test_the_graded_score_climbs_as_a_shape_comes_closer() -> None:
    expected = {
        "background": "black",
        "things": [{"shape": "square", "color": "red", "x": 8.0, "y": 8.0, "size": 10.0}],
    }
    values = [
        graded(Scene(background="black", things=(Placed(Thing("square", "red"), x, 8.0, 5.0),)).draw(), expected)
        for x in (18.0, 15.0, 12.0, 8.0)
    ]
    # weights 2, 1, 1; the excess over 2.5 pixels takes 1/8 a pixel off the first: 7.5, 4.5, 1.5, 0; 0.2 for strict
    credits = [1 - 7.5 / 8, 1 - 4.5 / 8, 1 - 1.5 / 8, 1.0]
    assert values == pytest.approx([0.8 * (2 * one + 2) / 4 + 0.2 * (one == 1) for one in credits])


def test_an_empty_row_cannot_be_judged_and_a_wrong_one_is_an_error(cases: list[Case]) -> None:
    picture = cases[0].target.draw()[None]
    assert EditCompositionReward()(picture, [""], [None]) == {"score": [None], "graded": [None], "strict": [None]}
    unknown = {"background": "black", "things": [{"shape": "star", "color": "red"}]}
    for expected in ({"things": []}, unknown, {"background": "pink", "things": []}, "a red circle", ["x"]):
        with pytest.raises(ValueError, match="no scene of the world of shapes"):
            EditCompositionReward()(picture, [""], [expected])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="use 'graded' or 'strict'"):
        EditCompositionReward(score="tolerant")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scores uint8 pictures"):
        EditCompositionReward()(picture.astype(np.float32), [""], [None])


def test_what_is_expected_survives_a_file(cases: list[Case], tables: dict[str, Table]) -> None:
    """A prompt file in JSON lines says the same as one in Parquet, which gives lists and objects with every key."""
    for row, expected in enumerate(tables[FILES[1]].columns["expected"][:20]):
        assert json.loads(json.dumps(expected)) == expected
        added = tables[FILES[1]].texts[row].startswith("add")
        assert [one["x"] is None for one in expected["things"]].count(True) == added
        assert {one["shape"] for one in expected["things"]} <= {*SHAPES}
        assert {one["color"] for one in expected["things"]} <= {*COLORS}
