"""Pictures of the prompt file on their way to a reward: in this process, in a worker, over HTTP, in a function for TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from worker_scorers import digest
from worker_tools import TOKEN, random_images, scorer, serving, within

from flowsteer.rewards.certify.certificate import CHECKS, certify
from flowsteer.rewards.certify.inputs import read_folder
from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.functions import FunctionReward
from flowsteer.rewards.hosts import child, remote, wire, worker
from flowsteer.rewards.hosts.child import WorkerReward
from flowsteer.rewards.hosts.inprocess import Scorer
from flowsteer.rewards.hosts.remote import HTTPReward
from flowsteer.rewards.scorers.edit_consistency import EditConsistency
from flowsteer.rewards.types import Reward
from flowsteer.rl.command.main import app
from flowsteer.rollout.data.files import Source
from flowsteer.rollout.data.inputs import Input, Media
from flowsteer.rollout.data.prompts import read_prompts, with_pictures

START_S = 30.0


class Watch:
    """Keeps what it is given."""

    pictures = {"source": "image", "mask": "mask", "film": "video"}  # noqa: RUF012

    def __init__(self):
        self.given = {}

    def __call__(self, images, prompts, **columns):
        self.given = columns
        return [1.0] * len(prompts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three rows; the second has no picture, the third the first one's."""
    first, second = random_images(8, 6, 3), random_images(2, 4, 5, 3)
    Image.fromarray(first).save(tmp_path / "photo.png")
    Image.fromarray(first[..., 0]).save(tmp_path / "hole.png")
    frames = [Image.fromarray(frame) for frame in second]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:], lossless=True)
    rows = [
        {"prompt": "a", "photo": "photo.png", "mask": "hole.png", "film": "film.webp", "count": 1},
        {"prompt": "b", "photo": None, "mask": None, "film": None, "count": 2},
        {"prompt": "c", "photo": "photo.png", "mask": "hole.png", "film": "film.webp", "count": 3},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def read(folder: Path, rewards: RewardSet, inputs: dict[str, Input] | None = None):
    sources = [Source(file=str(folder / "rows.jsonl"))]
    return with_pictures(read_prompts(sources, inputs=inputs), sources, rewards.pictures, inputs=inputs)


class TestInThisProcess:
    def test_who_asks_gets_pixels_and_the_others_what_the_file_says(self, folder):
        watch, other = Watch(), Watch()
        other.pictures = {}
        rewards = RewardSet([("watch", watch, 1.0), ("other", other, 1.0)], columns={"watch": {"source": "photo"}})
        assert rewards.pictures == {"photo": "image", "mask": "mask", "film": "video"}
        prompts = read(folder, rewards)
        images = torch.zeros(3, 3, 4, 4)
        with Scorer(rewards) as scorer:
            scorer.submit(images, prompts.texts, prompts.columns, pictures=prompts.pictures).result()
        first, second = random_images(8, 6, 3), random_images(2, 4, 5, 3)
        np.testing.assert_array_equal(watch.given["source"][0], first)
        np.testing.assert_array_equal(watch.given["mask"][0], first[..., 0])
        np.testing.assert_array_equal(watch.given["film"][0], second)
        assert [watch.given[name][1] for name in ("source", "mask", "film")] == [None] * 3
        assert watch.given["source"][2] is watch.given["source"][0]  # equal pictures are loaded once
        assert not watch.given["source"][0].flags.writeable  # and no reward can change them for the others
        assert watch.given["photo"] == other.given["photo"] == ["photo.png", None, "photo.png"]
        assert other.given["mask"] == ["hole.png", None, "hole.png"]
        assert "source" not in other.given

    def test_a_picture_with_nan_takes_its_own_row_away(self, folder):
        watch = Watch()
        rewards = RewardSet([("watch", watch, 1.0)])
        prompts, images = read(folder, rewards), torch.zeros(3, 3, 4, 4)
        images[0, 0, 0, 0] = float("nan")
        scores = rewards.score(images, prompts.texts, prompts.columns, pictures=prompts.pictures)
        assert scores.missing.tolist() == [True, False, False]
        assert watch.given["mask"][0] is None
        assert watch.given["mask"][1].shape == (8, 6)

    def test_an_input_of_the_pipeline_is_read_once(self, folder):
        rewards = RewardSet([("watch", Watch(), 1.0)])
        prompts = read(folder, rewards, {"mask_image": Input(column="mask", kind="mask")})
        assert prompts.pictures["mask"] == prompts.inputs["mask_image"]
        assert prompts.pictures["mask"][0] is prompts.inputs["mask_image"][0]

    def test_a_column_that_the_pipeline_takes_as_something_else_is_refused(self, folder):
        with pytest.raises(
            ValueError, match=r"inputs\.image takes the column 'film' as image, a reward wants it as video"
        ):
            read(folder, RewardSet([("watch", Watch(), 1.0)]), {"image": Input(column="film", kind="image")})

    def test_what_is_no_picture_is_named_with_its_line(self, folder):
        Watch.pictures, kept = {"count": "image"}, Watch.pictures
        try:
            with pytest.raises(
                ValueError, match=r"rows\.jsonl, line 1, column 'count' \(for a reward\): a path is needed"
            ):
                read(folder, RewardSet([("watch", Watch(), 1.0)]))
        finally:
            Watch.pictures = kept

    def test_frames_of_several_sizes_are_named_with_their_line(self, tmp_path):
        for name, side in (("a", 4), ("b", 5)):
            Image.fromarray(random_images(side, 4, 3)).save(tmp_path / f"{name}.png")
        (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "film": ["a.png", "b.png"]}', encoding="utf-8")
        with pytest.raises(
            ValueError, match=r"line 1, column 'film' \(for a reward\): the frames of this video have several"
        ):
            read(tmp_path, RewardSet([("watch", Watch(), 1.0)]))

    @pytest.mark.parametrize(
        ("pictures", "message"),
        [
            ({"source": "photo"}, "pictures says that 'source' is 'photo'; a kind is one of image, mask, video"),
            (["source"], r"pictures is \['source'\]; it must map names of columns to kinds"),
        ],
    )
    def test_a_declaration_that_cannot_be(self, pictures, message):
        watch = Watch()
        watch.pictures = pictures
        with pytest.raises(ValueError, match=message):
            RewardSet([("watch", watch, 1.0)])

    def test_one_column_is_of_one_kind(self):
        other = Watch()
        other.pictures = {"source": "mask"}
        with pytest.raises(ValueError, match="wants the column 'source' as mask, another one as image"):
            RewardSet([("watch", Watch(), 1.0), ("other", other, 1.0)])

    def test_the_content_of_pictures_is_part_of_the_prompts(self, folder):
        rewards = RewardSet([("watch", Watch(), 1.0)])
        before = read(folder, rewards).fingerprint()
        Image.fromarray(random_images(8, 6, seed=5)).save(folder / "hole.png")
        assert read(folder, rewards).fingerprint() != before

    def test_a_function_for_trl_gets_pictures_of_pillow(self, folder):
        given = {}

        def watch(completions, source, mask, film, **columns):
            given.update(source=source, mask=mask, film=film)
            return [1.0] * len(completions)

        watch.pictures = {"source": "image", "mask": "mask", "film": "video"}
        rewards = RewardSet([("watch", FunctionReward(watch), 1.0)], columns={"watch": {"source": "photo"}})
        prompts = read(folder, rewards)
        rewards.score(torch.zeros(3, 3, 4, 4), prompts.texts, prompts.columns, pictures=prompts.pictures)
        assert (given["source"][0].mode, given["source"][0].size) == ("RGB", (6, 8))
        assert given["mask"][0].mode == "L"
        assert [frame.size for frame in given["film"][0]] == [(5, 4)] * 2
        assert given["source"][1] is None


@pytest.fixture(scope="module", params=["process", "http", "without numpy"])
def hosted(request: pytest.FixtureRequest) -> Iterator[Reward]:
    """The digests of pictures, in a worker, over HTTP, and in a worker whose Python has no numpy."""
    target = scorer("PictureDigests")
    if request.param == "http":
        with serving(target) as url, pytest.MonkeyPatch.context() as patch:
            patch.setenv(remote.TOKEN_VARIABLE, TOKEN)
            yield HTTPReward(url)
        return
    options = {"hide_numpy": True} if request.param == "without numpy" else {}
    with WorkerReward(target, start_timeout_s=START_S, options=options) as reward:
        yield reward


class TestElsewhere:
    def test_pixels_arrive_whole_each_picture_once(self, hosted):
        source, mask = random_images(8, 6, 3), random_images(5, 7, seed=1)
        images = random_images(4, 3, 2, 3, seed=2)
        other = random_images(1, 1, 3, seed=3)
        with within(20):
            answer = hosted(
                images, list("abcd"), source=[source, None, source, other], mask=[None, mask, None, mask], n=[1] * 4
            )
        assert answer["score"] == [digest(image.tobytes()) for image in images]
        assert answer["source"] == [digest(source.tobytes()), None, digest(source.tobytes()), digest(other.tobytes())]
        assert answer["mask"] == [None, digest(mask.tobytes()), None, digest(mask.tobytes())]
        assert answer["area"] == [48.0, 35.0, 48.0, 36.0]

    def test_the_handshake_says_which_pictures_are_wanted(self, hosted):
        assert hosted.pictures == {"source": "image", "mask": "mask"}
        assert RewardSet([("far", hosted, 1.0)]).pictures == hosted.pictures

    def test_no_pictures_are_no_bytes(self, hosted):
        with within(20):
            answer = hosted(random_images(1, 2, 2, 3), ["a"])
            nothing = hosted(random_images(0, 2, 2, 3), [], source=[])
        assert answer["source"] == [None]
        assert nothing["score"] == []


class TestWire:
    def test_pictures_count_for_the_limit(self):
        images, source = random_images(2, 4, 4, 3), random_images(10, 10, 3)
        given = {"source": [source, source]}
        _, body = wire.score_request(images, ["a", "b"], given, 1, 1.0, 96 + 300, ["source"])
        assert len(body) == 96 + 300  # the shared picture once
        with pytest.raises(ValueError, match="the images take 396 bytes, the worker accepts 395"):
            wire.score_request(images, ["a", "b"], given, 1, 1.0, 395, ["source"])
        with pytest.raises(ValueError, match="the column 'source' holds a str; pictures are uint8 arrays, or None"):
            wire.score_request(images, ["a", "b"], {"source": ["a.png", None]}, 1, 1.0, 1000, ["source"])

    @pytest.mark.parametrize(
        ("pictures", "message"),
        [
            ([], "pictures are no JSON object"),
            ({"source": {"shapes": [[2, 2, 3]]}}, r"the pictures 'source' are no shapes and \[1\] rows"),
            ({"source": {"shapes": [[2, 2, 3]], "rows": [0, 0]}}, "are no shapes and"),
            ({"source": {"shapes": [[2, -2, 3]], "rows": [0]}}, r"the shape \[2, -2, 3\] of a picture 'source'"),
            ({"source": {"shapes": [[2, 2, 3]], "rows": [1]}}, "are no numbers below 1"),
            ({"source": {"shapes": [[2, 2, 3]], "rows": [True]}}, "are no numbers below 1"),
            ({"source": {"shapes": [[9, 9, 3]], "rows": [0]}}, "are no images"),
            ({"known": {"shapes": [[2, 2, 3]], "rows": [0]}}, "'known' is among the columns and the pictures"),
        ],
    )
    def test_a_request_that_lies_about_its_pictures_is_refused(self, pictures, message):
        header = {"op": "score", "proto": 1, "shape": [1, 1, 1, 3], "prompts": ["a"], "columns": {"known": [1]}}
        header |= {"id": 1, "dtype": "uint8", "layout": "NHWC", "seconds": 1, "pictures": pictures}
        with pytest.raises(worker.Refused, match=message):
            worker.check_request(header, 3 + 12)

    def test_a_worker_that_knows_no_pictures_is_sent_none(self):
        hello = {"op": "hello", "proto": [1, 1], "fingerprint": {}, "identity": "", "max_body_bytes": 1}
        said = wire.read_hello({**hello, "groupwise": False, "video": False, "uses_prompt": True})
        assert said.pictures == {}


class NeedsPictures:
    """A plug-in that names pictures, with nothing of ours."""

    pictures = {"before": "image", "area": "mask", "motion": "video"}  # noqa: RUF012
    uses_prompt = False

    def __call__(self, images, prompts, *, before, area, motion, frame_rate, **columns):
        if 0 in images.shape[1:]:
            raise ValueError("images without pixels")
        scores = []
        for image, *row in zip(images, before, area, motion, frame_rate):
            if any(own is None for own in row):
                scores.append(None)
                continue
            parts = [float(own.mean()) for own in row[:3]]
            scores.append(float(image.mean()) + sum(parts) / 7 + row[3] / 3 + float(image[..., 0].std()))
        return scores


class RaisesWithout(NeedsPictures):
    """Has not thought of rows without a picture."""

    def __call__(self, images, prompts, *, before, area, motion, frame_rate, **columns):
        return [float(image.mean() + own.mean()) for image, own in zip(images, before)]


class TestCertificate:
    def test_a_plug_in_with_pictures_gets_trial_pictures(self):
        quick = {name: check for name, check in CHECKS.items() if name not in ("another process", "many pictures")}
        certificate = certify(NeedsPictures, name="needs", checks=quick)
        assert certificate.ok, certificate.text()
        assert certificate["sees the columns"].message == "change scores: before, area, motion, frame_rate"
        assert certificate["missing pictures"].message == "without before None; without area None; without motion None"

    def test_who_raises_without_a_picture_is_refused(self):
        checks = {name: CHECKS[name] for name in ("call", "missing pictures")}
        certificate = certify(RaisesWithout, name="raises", checks=checks)
        assert certificate.refused == ("missing pictures",)
        assert "a sample without 'before' (None): raised" in certificate["missing pictures"].message

    def test_pictures_of_ones_own(self, tmp_path):
        """`--images`: the metadata names the pictures by their paths."""
        lines = []
        for row, image in enumerate(random_images(5, 32, 40, 3)):
            Image.fromarray(image).save(tmp_path / f"{row}.png")
            Image.fromarray(image // 2 + random_images(32, 40, 3, seed=9 + row) // 2).save(
                tmp_path / f"before{row}.png"
            )
            lines.append({"file_name": f"{row}.png", "prompt": f"{row}", "source": f"before{row}.png"})
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        images, prompts, columns = read_folder(tmp_path)
        given: Any = {"images": images, "prompts": prompts, "columns": columns, "folder": tmp_path}
        checks = {name: CHECKS[name] for name in ("load", "call", "answer", "inputs untouched")}
        certificate = certify(EditConsistency, name="edit_consistency", checks=checks, **given)
        assert certificate.ok, certificate.text()
        said = CliRunner().invoke(
            app, ["score", "--metadata", str(tmp_path / "metadata.jsonl"), "-r", "edit_consistency"]
        )
        assert said.exit_code == 0, said.output
        scores = [score for score in certificate.scores if score is not None]
        assert 0.0 < min(scores) < max(scores) < 1.0
        assert f"{scores[0]:.4f}" in said.output  # of the first row, for which the certificate makes an empty mask


def test_a_media_of_another_kind_has_no_pixels_for_rewards(tmp_path: Path) -> None:
    Image.fromarray(random_images(4, 4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="rewards are shown images, masks and videos; this is rgba"):
        Media("rgba", "", (tmp_path / "a.png",)).pixels()


@pytest.mark.parametrize("file", [child.WORKER_FILE, remote.SERVER_FILE])
def test_the_far_side_needs_the_standard_library_alone(file: Path) -> None:
    """The far side of pictures, in a Python that sees no installed package."""
    code = f"import runpy; runpy.run_path({str(file)!r}, run_name='far'); print('ok')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.stdout.strip() == "ok", done.stderr
