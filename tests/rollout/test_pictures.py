"""Pictures in the place of samples: how their files are read, and how they become rollouts."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from conftest import PROMPTS
from PIL import Image

from flowsteer.rewards.pixels import to_uint8
from flowsteer.rollout.data.files import Source
from flowsteer.rollout.data.inputs import Input
from flowsteer.rollout.data.pictures import PictureColumns
from flowsteer.rollout.data.prompts import Prompts, read_prompts
from flowsteer.rollout.lifting.conditioning import Conditioning
from flowsteer.rollout.lifting.encode import Encoder
from flowsteer.rollout.offline import PictureWorker
from flowsteer.rollout.steps.plan import no_steps
from flowsteer.rollout.types import Rollout
from flowsteer.rollout.worker import RolloutWorker

SETTINGS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.0}


def columns(**given: Any) -> PictureColumns:
    return PictureColumns(**{"group_size": 2, **given})


def written(folder: Path, rows: list[dict[str, Any]], names: tuple[str, ...] = ("a", "b", "c", "d")) -> Path:
    """A prompt file, and pictures of different colours with these names beside it."""
    for place, name in enumerate(names):
        Image.new("RGB", (16, 16), (50 * place, 100, 0)).save(folder / f"{name}.png")
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def names(prompts: Prompts) -> list[list[str]]:
    """The names of each group's files."""
    return [
        [path.stem for own in group for path in own.media.parts if isinstance(path, Path)] for group in prompts.groups
    ]


class TestReading:
    def test_a_list_is_a_group(self, tmp_path: Path) -> None:
        rows = [{"prompt": "one", "shown": ["a.png", "b.png"], "worth": [1, 0.5], "kept": 7}]
        prompts = read_prompts(written(tmp_path, rows), pictures=columns(image="shown", score="worth"))
        assert names(prompts) == [["a", "b"]]
        assert [own.score for own in prompts.groups[0]] == [1.0, 0.5]
        assert prompts.columns == {"kept": (7,)}, "what pictures are made of is for no reward"

    def test_rows_of_one_prompt_are_a_group_and_keep_their_own_columns(self, tmp_path: Path) -> None:
        rows = [
            {"prompt": "one", "shown": "a.png", "worth": 1, "source": "x"},
            {"prompt": "two", "shown": ["b.png", "c.png"], "worth": [3, 4], "source": "y"},
            {"prompt": "one", "shown": "d.png", "source": "z"},
        ]
        prompts = read_prompts(written(tmp_path, rows), pictures=columns(image="shown", score="worth"))
        assert prompts.texts == ("one", "two")
        assert names(prompts) == [["a", "d"], ["b", "c"]]
        assert [[own.score for own in group] for group in prompts.groups] == [[1.0, None], [3.0, 4.0]]
        assert [own.columns for own in prompts.groups[0]] == [{"source": "x"}, {"source": "z"}]

    def test_rows_with_other_inputs_are_other_groups(self, tmp_path: Path) -> None:
        rows = [{"prompt": "one", "shown": ["a.png", "b.png"], "avoid": text} for text in ("x", "y")]
        given = {"negative_prompt": Input(column="avoid", kind="text")}
        prompts = read_prompts(written(tmp_path, rows), inputs=given, pictures=columns(image="shown"))
        assert prompts.texts == ("one", "one")
        assert prompts.inputs == {"negative_prompt": ("x", "y")}

    def test_without_groups_rows_stay_as_they_are(self, tmp_path: Path) -> None:
        rows = [{"prompt": "one", "shown": name} for name in ("a.png", "b.png")]
        prompts = read_prompts(written(tmp_path, rows), pictures=columns(image="shown", group_size=1))
        assert names(prompts) == [["a"], ["b"]]
        assert prompts.num_duplicates == 0

    def test_chosen_and_rejected_are_worth_one_and_nothing(self, tmp_path: Path) -> None:
        rows = [{"prompt": "one", "good": "a.png", "bad": "b.png"}, {"prompt": "one", "good": "c.png", "bad": "a.png"}]
        prompts = read_prompts(written(tmp_path, rows), pictures=columns(chosen="good", rejected="bad"))
        assert names(prompts) == [["a", "b"], ["c", "a"]]
        assert [[own.score for own in group] for group in prompts.groups] == [[1.0, 0.0]] * 2

    def test_groups_stay_within_their_source(self, tmp_path: Path) -> None:
        rows = [{"prompt": "one", "shown": ["a.png", "b.png"]}]
        file = str(written(tmp_path, rows))
        sources = [Source(file=file, weight=3), Source(file=file)]
        prompts = read_prompts(sources, pictures=columns(image="shown"), warn=False)
        assert prompts.sources == ((1, 3), (1, 1))

    def test_the_fingerprint_is_of_pictures_and_scores(self, tmp_path: Path) -> None:
        row = {"prompt": "one", "shown": ["a.png", "b.png"], "worth": [1, 0]}
        own = columns(image="shown", score="worth")
        first = read_prompts(written(tmp_path, [row]), pictures=own).fingerprint()
        assert read_prompts(written(tmp_path, [row]), pictures=own).fingerprint() == first
        assert read_prompts(written(tmp_path, [row | {"worth": [1, 2]}]), pictures=own).fingerprint() != first
        file = written(tmp_path, [row])
        Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "b.png")
        assert read_prompts(file, pictures=own).fingerprint() != first

    @pytest.mark.parametrize(
        ("row", "given", "message"),
        [
            (
                {"shown": "a.png"},
                {"image": "picture"},
                r"prompts.pictures.image=picture: .*rows.jsonl has no such column",
            ),
            ({"shown": None}, {"image": "shown"}, r"line 1 .*: the column 'shown' has no picture in this row"),
            ({"shown": "z.png"}, {"image": "shown"}, r"line 1 \(prompts.pictures\): there is no file .*z.png"),
            ({"shown": ["a.png"]}, {"image": "shown"}, r"line 1: rollout.group_size=2, but this prompt has 1 picture"),
            (
                {"shown": ["a.png", "b.png"], "worth": 1},
                {"image": "shown", "score": "worth"},
                r"line 1 .*: 2 picture\(s\) and 1 score\(s\) in the column 'worth'",
            ),
            (
                {"shown": "a.png", "worth": "much"},
                {"image": "shown", "score": "worth"},
                r"a score is a finite number, got 'much' in the column 'worth'",
            ),
            (
                {"shown": ["a.png", "b.png"], "bad": "c.png"},
                {"chosen": "shown", "rejected": "bad"},
                r"one picture is chosen, got a list of 2",
            ),
        ],
    )
    def test_a_row_that_cannot_be_used_is_named(
        self, row: dict[str, Any], given: dict[str, str], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=message):
            read_prompts(written(tmp_path, [{"prompt": "one", **row}]), pictures=columns(**given))

    def test_a_missing_file_says_how_it_is_made(self, tmp_path: Path) -> None:
        source = Source(file=str(tmp_path / "rows.jsonl"), made_by="python make.py there")
        with pytest.raises(
            ValueError, match=r"there is no prompt file .*rows.jsonl; make it first: python make.py there$"
        ):
            read_prompts(source)


def worker(prompts: Prompts, encoder: Encoder, **more: Any) -> PictureWorker:
    sizes = {"prompts_per_step": 4, "group_size": 2, "batch_size": 4, "updates_per_rollout": 1, "seed": 3}
    return PictureWorker(encoder, prompts, **{**SETTINGS, **sizes, "num_processes": 1, "process_index": 0, **more})


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(zoo.shared("sd3"))


@pytest.fixture
def prompts(picture_file: Path) -> Prompts:
    return read_prompts(picture_file, pictures=columns(image="pictures", score="scores"))


class TestRollouts:
    def test_they_hold_what_the_file_holds(self, prompts: Prompts, encoder: Encoder) -> None:
        rollouts = worker(prompts, encoder).sample(5, policy_version=7)
        assert [len(rollout) for rollout in rollouts] == [4, 4]
        for rollout in rollouts:
            assert rollout.trajectory is None
            assert rollout.policy_version == 7
            scores = rollout.stored_scores
            assert scores is not None
            for place, prompt in enumerate(rollout.prompts):
                row = PROMPTS.index(prompt)
                assert rollout.columns["number"] == tuple(PROMPTS.index(own) for own in rollout.prompts)
                shown = to_uint8(rollout.images)[place]
                (number,) = [
                    number
                    for number, own in enumerate(prompts.groups[row])
                    if np.array_equal(shown, np.asarray(own.media.load()))
                ]
                assert scores[place] == (row + number) % 4

    def test_conditioning_and_places_are_those_of_samples(self, prompts: Prompts, encoder: Encoder) -> None:
        pipeline = encoder.pipeline
        drawing = RolloutWorker(
            pipeline, prompts, plan=no_steps(3), kernel="flow_sde", log_prob_weight="gaussian", solver="euler", **SETTINGS,
            prompts_per_step=4, group_size=2, batch_size=4, shared_noise=False, updates_per_rollout=1, seed=3,
            num_processes=1, process_index=0, dtype=torch.float32, device="cpu",
        )  # fmt: skip
        for taken, drawn in zip(worker(prompts, encoder).sample(1), drawing.sample(1), strict=True):
            assert taken.prompts == drawn.prompts
            assert all(torch.equal(getattr(taken, name), getattr(drawn, name)) for name in ("group", "sample", "seeds"))
            assert taken.latents.shape == drawn.latents.shape
            assert taken.images.shape == drawn.images.shape
            noise = torch.randn(taken.latents.shape, generator=torch.Generator().manual_seed(0))
            rows = [taken.conditioning, drawn.conditioning]
            with torch.no_grad():
                one, other = (pipeline.velocity(noise, 1, own) for own in rows)  # type: ignore[arg-type]
            assert torch.equal(one, other)

    def test_latents_of_a_cached_row_are_a_fresh_encoding_bit_for_bit(self, prompts: Prompts, encoder: Encoder) -> None:
        """In any batch, in any order, the second time and the first."""
        first = worker(prompts, encoder).sample(0)
        fresh = {}
        for rollout in [*first, *worker(prompts, encoder, batch_size=2, seed=5).sample(2)]:
            for latents, image in zip(rollout.latents, rollout.images):
                key = to_uint8(image[None]).tobytes()
                assert torch.equal(fresh.setdefault(key, latents), latents)
        alone = Encoder(zoo.shared("sd3"))
        row = zoo.shared("sd3").prepare([PROMPTS[0]], **SETTINGS)
        assert isinstance(row, Conditioning)
        for group in prompts.groups:
            for own in group:
                encoded = alone.encode(own.media, row)
                key = to_uint8(encoded.pixels).tobytes()
                assert torch.equal(fresh.get(key, encoded.latents[0]), encoded.latents[0])
        assert len(fresh) >= 8

    def test_processes_share_the_batches_of_one(self, prompts: Prompts, encoder: Encoder) -> None:
        def drawn(**more: Any) -> list[Rollout]:
            return worker(prompts, encoder, **more).sample(2)

        whole = drawn()
        shared = [rollout for index in (0, 1) for rollout in drawn(num_processes=2, process_index=index)]
        for one, other in zip(whole, shared, strict=True):
            assert one.prompts == other.prompts
            assert torch.equal(one.seeds, other.seeds)
            assert torch.equal(one.latents, other.latents)
            assert torch.equal(one.images, other.images)

    @pytest.mark.parametrize("group_size", [2, 3, 4])
    def test_all_pictures_are_taken_equally_often(self, group_size: int, picture_file: Path, encoder: Encoder) -> None:
        own = read_prompts(picture_file, pictures=columns(image="pictures", group_size=group_size))
        taking = worker(own, encoder, prompts_per_step=5, group_size=group_size, batch_size=group_size)
        seen: Counter[str] = Counter()
        for step in range(4):
            for batch in taking.batches(step):
                taken = [picture.media.digest for picture in taking.pictures(batch, step)]
                assert len(set(taken)) == group_size, "no picture twice in a group"
                seen.update(taken)
        assert len(seen) == 20
        assert set(seen.values()) == {group_size}, "four passes over five prompts of four pictures"

    def test_a_score_that_the_file_lacks_is_missing(self, tmp_path: Path, encoder: Encoder) -> None:
        rows = [{"prompt": "one", "shown": ["a.png", "b.png"], "worth": [None, 2]}]
        own = read_prompts(written(tmp_path, rows), pictures=columns(image="shown", score="worth"))
        (rollout,) = worker(own, encoder, prompts_per_step=1, batch_size=2).sample(0)
        assert rollout.stored_scores is not None
        found = sorted(rollout.stored_scores.tolist(), key=math.isnan)
        assert found[0] == 2
        assert math.isnan(found[1])


def test_videos_are_learnt_from_too(tmp_path: Path) -> None:
    """Films as long as those that the pipeline draws, here nine frames in an animated picture."""
    frames = [Image.new("RGB", (16, 16), (20 * place, 100, 0)) for place in range(9)]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:], lossless=True)
    file = written(tmp_path, [{"prompt": "one", "shown": "film.webp"}])
    own = read_prompts(file, pictures=columns(image="shown", kind="video", group_size=1))
    pipeline = zoo.shared("wan")
    (rollout,) = worker(own, Encoder(pipeline), prompts_per_step=1, group_size=1, batch_size=1).sample(0)
    assert rollout.images.shape == (1, 9, 3, 16, 16)
    shown = to_uint8(rollout.images)[0]
    assert shown[:, 0, 0].tolist() == [[20 * place, 100, 0] for place in range(9)]
    assert rollout.latents.shape[1:] == pipeline.prepare(["one"], **SETTINGS).latent_shape
