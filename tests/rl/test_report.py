"""The report on small run folders in the real format: what it says, what it must not say, and what it needs to say it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import finished
from PIL import Image

from flowsteer.rl.evaluate import image_grid, save_grid
from flowsteer.rl.export import merge
from flowsteer.rl.report import curves
from flowsteer.rl.report.page import (
    changed_prompts,
    compared_pictures,
    difference,
    loading_snippet,
    number,
    read_evaluations,
    write_report,
)
from flowsteer.rl.report.sheets import cut_grids

VOID = {"meta", "img", "br"}
HOSTILE = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }}"


def make_run(folder: Path, *, done: int = 4, num_steps: int = 4, **changes: Any) -> Path:
    """Configuration and metrics of a run that has done ``done`` steps; ``changes`` go into every line."""
    folder.mkdir()
    config = {
        "output": "/home/somebody/runs/first",
        "num_steps": num_steps,
        "model": {"path": "embedded", "lora": {"rank": 8, "alpha": 16}},
        "rollout": {"num_inference_steps": 10, "guidance_scale": 1.0},
        "rewards": {"composition": {"weight": 1.0, "options": {"url": "http://inner-host:80/a", "api_key": "hush"}}},
        "algorithm": {"name": "flow_grpo"},
        "evaluation": {"num_inference_steps": 7, "guidance_scale": 1.5},
    }
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(done):
        line = {"step": step, "reward_mean": 0.25 + 0.125 * step, "reward_std": 0.1, "reward_missing": 0.0}
        line |= {"reward/composition": 0.25 + 0.125 * step, "reward/composition/colour": 0.5 + 0.1 * step}
        line |= {"gradient_agreement": 0.2 - 0.01 * step, "learning_rate": 3e-4, "num_updates": 2.0 * (step + 1)}
        line |= {"seconds/sample": 10.0, "seconds/improve": 30.0}
        lines.append(json.dumps(line | changes) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def add_evaluation(
    folder: Path, step: int, scores: Sequence[Sequence[float | None]], prompts: Sequence[str] = ()
) -> None:
    """An evaluation as `Run` writes it, of pictures whose grey is their place."""
    (folder / "evaluations").mkdir(exist_ok=True)
    path = folder / "evaluations" / f"step_{step:06d}.json"
    means = [np.mean([s for s in row if s is not None]) for row in scores]
    half = 1.96 * float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    table = {
        "step": step,
        "summary": {"total": {"mean": float(np.mean(means)), "interval": half}},
        "prompts": list(prompts) or [f"prompt number {place}" for place in range(len(scores))],
        "scores": {"total": scores},
    }
    path.write_text(json.dumps(table))
    save_grid(torch.arange(len(scores)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8) / 50, path.with_suffix(".png"))


class Page(HTMLParser):
    """Checks that every element is closed where it was opened, and keeps text and attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def test_whole_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    before = [[0.1, 0.3], [0.2, 0.2], [0.4, None], [0.5, 0.5]]
    after = [[0.3, 0.5], [0.5, 0.5], [0.6, 0.9], [0.8, 0.8]]
    add_evaluation(folder, 0, before)
    add_evaluation(folder, 4, after)
    (folder / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "pictures" / "before_and-after.png")
    results = {
        "Table of mine": {"columns": ["what", "value"], "rows": [["accuracy", 0.123456], ["gap", None]], "note": "n=3"}
    }
    (folder / "results.json").write_text(json.dumps(results))

    path = write_report(folder)

    assert path == folder / "report.html"
    assert not list(folder.glob("*.part")) + list(folder.glob(".*.part"))
    page = Page(path)
    # Paired differences: 0.2, 0.3, 0.2 (the seed that both have), 0.3: mean 0.25, half 1.96 * sqrt(1/300) / 2 = 0.0566.
    assert "a mean difference of +0.250 (95 % interval +0.193 to +0.307), a gain beyond the noise" in page.text
    assert "4 steps , 8 updates , 3 min of training" in page.text  # 4 x 40 s
    assert "Table of mine" in page.text
    assert "0.123" in page.text
    assert "before and after" in page.text
    assert page.count("img") == 2 * 4 + 1 + 2 * 4  # side by side, the picture, prompts that changed
    # total, reward, colour, agreement, time; the rate is constant and composition alone is the total
    assert page.count("svg") == 5
    assert "The same at all 4 steps so far." in page.text
    assert "reward/composition/colour" in page.text
    assert "num_inference_steps=7, guidance_scale=1.5" in page.text
    for explained in ("Cosine between the gradients", "Healthy:", "Seconds of each training step"):
        assert explained in page.text


def test_page_is_one_offline_file_without_scripts(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    for step in (0, 4):
        add_evaluation(folder, step, [[0.1], [0.2 + 0.1 * step]])

    page = Page(write_report(folder))

    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith(("data:image/png;base64,", "#")), (tag, name)
        assert tag not in ("script", "link", "iframe", "object")
        assert not [name for name in attributes if name.startswith("on")]
    assert "@import" not in page.source
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"}


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    add_evaluation(folder, 0, [[0.1], [0.2]])

    page = Page(write_report(folder))

    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {a["href"] for _, a in page.elements if "href" in a} | set(re.findall(r"url\((#[^)]*)\)", page.source))
    assert used <= {f"#{name}" for name in ids}


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", **{f"reward/{HOSTILE}": None, f"seconds/{HOSTILE} $\\x$": 1.0})
    add_evaluation(folder, 0, [[0.1], [0.2]], prompts=[HOSTILE, "plain"])
    add_evaluation(folder, 4, [[0.4], [0.1]], prompts=[HOSTILE, "plain"])
    (folder / "results.json").write_text(
        json.dumps({HOSTILE: {"columns": [HOSTILE], "rows": [[HOSTILE]], "note": HOSTILE}})
    )

    page = Page(write_report(folder))

    assert "<script" not in page.source
    assert "alert('x')</script>" not in page.source
    assert page.text.count(" ".join(HOSTILE.split())) >= 7  # pair, four in the table, reward, act
    assert "{{ 7 * 7 }}" in page.text


def test_nothing_of_the_machine_is_told(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "first")))

    for private in ("somebody", str(tmp_path), "inner-host", "hush", str(Path.home()) + "/"):
        assert private not in page.source
    assert "…/first" in page.text  # the output folder keeps its own name


def test_unfinished_run_without_evaluations(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", done=1, num_steps=50)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "reward_m')  # a kill cut it short

    page = Page(write_report(folder))

    assert "1 of 50 steps" in page.text
    assert "This run is not finished" in page.text
    assert "There is no evaluation." in page.text
    assert "The same at the one step so far." in page.text


def test_one_evaluation_is_told_without_a_difference(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", done=2)
    add_evaluation(folder, 0, [[0.25], [0.75]])

    page = Page(write_report(folder))

    assert "total before training is 0.500 (0.010 to 0.990)" in page.text  # 1.96 * sqrt(1/8) / sqrt(2) = 0.49
    assert "mean difference" not in page.text
    assert page.count("img") == 2, "a picture for each prompt"
    assert page.count("input") == 0, "nothing to choose"


@pytest.mark.parametrize("text", ["null", "NaN"])
def test_numbers_that_are_missing(tmp_path: Path, text: str) -> None:
    folder = make_run(tmp_path / "first", gradient_agreement=None, reward_missing=2.0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1] = re.sub(r'"reward_mean": [\d.]+', f'"reward_mean": {text}', lines[1])
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    add_evaluation(folder, 0, [[0.5]])  # one prompt: its interval is NaN

    page = Page(write_report(folder))

    assert "Of 4 steps, 1 without a finite number." in page.text
    assert "No finite number so far." in page.text
    assert "0.500 (– to –)" in page.text
    assert "Some pictures could not be scored" in page.text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page.source).lower()


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ([0.2, 0.3, 0.4], "gain"),
        ([0.0, 0.1, 0.2], "loss"),
        ([0.1, 0.3, 0.2], "within"),
        ([None, None, 0.2], "too few"),
    ],
)
def test_verdict_is_that_of_paired_differences(tmp_path: Path, after: list[float | None], verdict: str) -> None:
    # The means' own intervals overlap in each case (half 0.11): only the pairing can tell the first two from noise.
    folder = make_run(tmp_path / "first")
    add_evaluation(folder, 0, [[0.1], [0.2], [0.3]])
    path = folder / "evaluations" / "step_000004.json"
    add_evaluation(folder, 4, [[0.0 if score is None else score] for score in after])
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"scores": {"total": [[score] for score in after]}}))

    found = difference(read_evaluations(folder))

    assert found is not None
    assert verdict in found[2]
    assert verdict in Page(write_report(folder)).text


def test_pictures_stand_side_by_side_with_caption_and_score_after_the_curves(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    for step in (0, 2, 4):
        add_evaluation(folder, step, [[(place + step) / 64, None] for place in range(48)])

    pictures = compared_pictures(read_evaluations(folder))
    page = Page(write_report(folder))

    assert pictures is not None
    assert pictures.names == ["before", "after 2 steps", "after 4 steps"]
    assert pictures.prompts == [f"prompt number {place}" for place in range(0, 48, 2)], "24, spread evenly"
    assert pictures.scores == [[(place + step) / 64 for step in (0, 2, 4)] for place in range(0, 48, 2)]
    shown = [name for name, _ in page.elements if name in ("svg", "img", "input")]
    assert shown[-1] == "img"
    assert shown.index("input") > len(shown) - 1 - shown[::-1].index("svg"), "the curves come first"
    alternatives = [attributes["alt"] for name, attributes in page.elements if name == "img"]
    assert alternatives[3:6] == [f"prompt number 2, {name}" for name in pictures.names], "one prompt's are neighbours"
    assert "before 0.031 after 2 steps 0.062 after 4 steps 0.094 prompt number 2 " in page.text  # 2, 4 and 6 of 64
    assert "24 of the evaluation's 48 prompts, spread evenly" in page.text
    boxes = [attributes for name, attributes in page.elements if name == "input"]
    assert [box["id"] for box in boxes if "checked" in box] == ["show0", "show2"], "first and last; all can be chosen"
    assert len(boxes) == 3
    for place in range(3):
        assert f"#show{place}:not(:checked) ~ .pairs .e{place} {{ display: none; }}" in page.source


def test_pictures_of_the_same_place_are_compared(tmp_path: Path) -> None:
    """`add_evaluation` draws a prompt's place as its grey."""
    folder = make_run(tmp_path / "first")
    for step in (0, 4):
        add_evaluation(folder, step, [[0.5]] * 30)
    pictures = compared_pictures(read_evaluations(folder))
    assert pictures is not None
    for prompt, images in zip(pictures.prompts, pictures.images):
        for image in images:
            content = base64.b64decode(image.removeprefix("data:image/png;base64,"))
            grey = np.asarray(Image.open(io.BytesIO(content)))
            assert abs(int(grey[0, 0, 0]) - round(int(prompt.split()[-1]) / 50 * 255)) <= 1
            assert np.ptp(grey) == 0, "no gutter"


def test_evaluations_that_cannot_be_compared_are_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    add_evaluation(folder, 0, [[0.1], [0.2]], prompts=["a", "b"])
    for step in (2, 3, 4):
        add_evaluation(folder, step, [[0.1], [0.2]])
    Image.new("RGB", (7, 5)).save(folder / "evaluations" / "step_000002.png")
    pictures = compared_pictures(read_evaluations(folder))
    assert pictures is not None
    assert (pictures.names, pictures.left_out) == (["after 3 steps", "after 4 steps"], 2)
    assert (
        "Not shown: 2 evaluations of other prompts or without pictures of this size." in Page(write_report(folder)).text
    )


def test_many_evaluations_keep_the_page_small(tmp_path: Path) -> None:
    """Noise does not compress: 24 prompts x 20 evaluations at 256 pixels would be 126 MB."""
    folder = make_run(tmp_path / "first")
    noise = np.random.default_rng(0).integers(0, 255, (2 * 258, 12 * 258, 3), dtype=np.uint8)
    for step in range(20):
        add_evaluation(folder, step, [[0.5]] * 24)
        Image.fromarray(noise).save(folder / "evaluations" / f"step_{step:06d}.png", compress_level=0)
    assert write_report(folder).stat().st_size < 20e6  # 4e6 pixels x 3 bytes x 4 / 3, and base64 of the last pairs


def test_evaluations_of_other_prompts_are_not_compared(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    add_evaluation(folder, 0, [[0.1], [0.2]], prompts=["a", "b"])
    add_evaluation(folder, 4, [[0.8], [0.9]], prompts=["a", "c"])

    assert difference(read_evaluations(folder)) is None
    assert changed_prompts(read_evaluations(folder)) == ([], [])
    assert "their difference is not tested" in Page(write_report(folder)).text


def test_prompts_that_changed_most_come_first(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    add_evaluation(folder, 0, [[0.5]] * 10)
    add_evaluation(folder, 4, [[0.5 + gain / 10] for gain in (0, 1, -4, 2, -1, 3, 4, 0.5, 0.7, 0.6)])

    gained, lost = changed_prompts(read_evaluations(folder))

    assert [entry.prompt[-1] for entry in gained] == ["6", "5", "3", "1", "8", "9"]
    assert [entry.prompt[-1] for entry in lost] == ["2", "4"]


@pytest.mark.parametrize("count", [1, 5, 12, 30])
def test_grids_are_cut_into_the_pictures_that_they_were_made_of(count: int) -> None:
    pictures = torch.rand((count, 3, 8, 6), generator=torch.Generator().manual_seed(0)) * 0.9
    tiles = cut_grids([image_grid([pictures], scale=2), image_grid([pictures.flip(0)], scale=2)], count)

    assert tiles is not None
    expected = (pictures * 255).round().byte().permute(0, 2, 3, 1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    for place in range(count):
        np.testing.assert_array_equal(np.asarray(tiles[0][place]), expected[place].numpy())
        np.testing.assert_array_equal(np.asarray(tiles[1][place]), expected[count - 1 - place].numpy())


def test_sheet_of_another_size_is_not_cut() -> None:
    assert cut_grids([Image.new("RGB", (121, 20)), Image.new("RGB", (121, 20))], 24) is None


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first")
    (folder / "pictures").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 6000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "pictures" / "wide.png")

    # 6000 x 40 pixels of noise are 720 kB, 1.8 % of that area squared; reduced to 1800 x 12 they are 65 kB, 87 in base64.
    assert write_report(folder).stat().st_size < 250_000


def test_long_curves_are_thinned_by_means() -> None:
    values = np.arange(1000, dtype=float)
    values[3] = math.nan

    thinned = curves.thin(values)

    assert len(thinned) == 334  # 1000 points at 3 each
    assert thinned[0] == 1.0  # of 0, 1, 2
    assert thinned[1] == 4.5  # of 4 and 5
    assert thinned[-1] == 999.0


def test_smoothing_leaves_a_line_a_line_inside_and_skips_gaps() -> None:
    line = np.arange(60, dtype=float)

    np.testing.assert_allclose(curves.smooth(line)[2:-2], line[2:-2], atol=1e-12)
    line[10] = math.nan
    assert curves.smooth(line)[10] == 10.0  # of 8, 9, 11, 12
    assert np.isnan(curves.smooth(np.full(5, math.nan))).all()


def test_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "first", done=3000, num_steps=3000)

    page = write_report(folder)

    assert "Each point is the mean of 8 steps." in Page(page).text
    assert page.stat().st_size < 300_000  # five drawings of at most 400 points


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-1.5, "−1.500"),
        (0.0, "0.000"),
        (3e-4, "0.0003"),
        (12345.0, "1.23e+04"),
        (None, "–"),
        (math.nan, "–"),
        (7, "7"),
        ("-a", "-a"),
    ],
)
def test_numbers_read_well(value: Any, text: str) -> None:
    assert number(value) == text


def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not the folder of a run: it has no config\.json"):
        write_report(tmp_path)
    folder = make_run(tmp_path / "first", done=0)
    with pytest.raises(ValueError, match=r"no metrics yet .* wait for the first step"):
        write_report(folder)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="no metrics yet"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config\.json is not JSON"),
        ("config.json", "[]", r"config\.json must hold a mapping, it holds a list"),
        ("results.json", '{"a": 1}', r"the table 'a' needs 'columns' and 'rows'"),
        ("results.json", '{"a": {"columns": ["b"], "rows": [[1, 2]]}}', "needs 1 cells, one per column"),
        ("evaluations/step_000000.json", '{"step": 0}', r"step_000000\.json is not an evaluation .*remove it"),
        ("pictures/broken.png", "no picture", r"broken\.png is not a picture that can be read"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = make_run(tmp_path / "first")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)

    with pytest.raises(ValueError, match=message):
        write_report(folder)


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_the_python_on_the_page_draws_with_the_result(
    lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a reader would: copied into Python, in the folder in which the run was started."""
    monkeypatch.chdir(tmp_path)
    settings = {"num_steps": 1, "output": "runs/first", "rewards": "jpeg_compressibility", "trackers": []}
    rollout = {"prompts_per_step": 2, "group_size": 2, "batch_size": 4, "num_inference_steps": 2}
    finished(
        {
            **settings,
            "model": {"lora": lora},
            "rollout": rollout,
            "algorithm": {"name": "diffusion_nft", "noise_levels_per_sample": 1},
            "optimizer": {"learning_rate": 0.01},
            "evaluation": {"num_prompts": 1, "num_seeds": 2, "num_inference_steps": 2},
        }
    )
    config = json.loads(Path("runs/first/config.json").read_text())
    snippet = loading_snippet(config, Path("runs/first"), read_evaluations(Path("runs/first")))
    if lora is None:
        terminal = re.match(r"# once, in a terminal: (flowsteer export .*)\n", snippet)
        assert terminal
        _, _, run, folder = terminal[1].split()
        assert merge("embedded", Path(run) / "export", Path(folder)).is_dir()
    space: dict[str, Any] = {}
    exec(snippet, space)
    assert space["image"].size == (32, 32)
    assert "flowsteer.rl" not in snippet
