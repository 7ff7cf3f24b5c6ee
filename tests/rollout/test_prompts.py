"""Prompt files and the batches of a training step."""

import itertools
import json
from collections import Counter
from typing import Any

import PIL.Image
import pytest
import torch
from datasets import Dataset, DatasetDict

from flowsteer.rollout.data.batches import check_divisible, sample_seeds, step_batches, step_rows
from flowsteer.rollout.data.files import Source
from flowsteer.rollout.data.inputs import Input
from flowsteer.rollout.data.prompts import Prompts, read_prompts


def numbered(count: int) -> Prompts:
    return Prompts(texts=tuple(f"prompt {row}" for row in range(count)))


def whole_step(prompts, *, num_processes, updates_per_rollout=1, **options):
    """Per update, the batches of all processes in the order in which they are drawn: the first of each, the second, ..."""
    shares = [
        step_batches(
            prompts,
            num_processes=num_processes,
            process_index=process,
            updates_per_rollout=updates_per_rollout,
            **options,
        )
        for process in range(num_processes)
    ]
    each = len(shares[0]) // updates_per_rollout
    return [
        [
            batch
            for at_once in zip(*(share[update * each : (update + 1) * each] for share in shares))
            for batch in at_once
        ]
        for update in range(updates_per_rollout)
    ]


def flat(batches):
    return [
        (row, group, sample, seed)
        for batch in batches
        for row, group, sample, seed in zip(
            batch.rows, batch.group.tolist(), batch.sample.tolist(), batch.seeds.tolist(), strict=True
        )
    ]


class TestFiles:
    def test_a_text_file_has_a_prompt_per_line(self, tmp_path):
        path = tmp_path / "some.txt"
        # a byte order mark, Windows line ends, an empty line, and a line separator that is part of a prompt
        path.write_bytes("\ufeffa red circle\r\n\r\n  zwölf Äpfel \nline\u2028separator".encode())
        prompts = read_prompts(path)
        assert prompts.texts == ("a red circle", "zwölf Äpfel", "line\u2028separator")
        assert prompts.columns == {}
        assert len(prompts) == 3

    def test_a_jsonl_file_has_columns(self, tmp_path):
        path = tmp_path / "some.jsonl"
        rows = [{"prompt": "a", "count": 2, "colors": ["red"]}, {"colors": None, "prompt": "b", "count": 3}]
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        prompts = read_prompts(path)
        assert prompts.texts == ("a", "b")
        assert prompts.columns == {"count": (2, 3), "colors": (["red"], None)}

    def test_duplicates_are_kept_counted_and_warned_of(self, tmp_path, caplog):
        path = tmp_path / "some.txt"
        path.write_text("a\nb\na\na\n")
        prompts = read_prompts(path)
        assert prompts.texts == ("a", "b", "a", "a")
        assert prompts.num_duplicates == 2
        assert "2 of 4 prompts stand there more than once" in caplog.text

    def test_a_shipped_file_by_its_name_unless_there_is_one_here(self, tmp_path, monkeypatch):
        monkeypatch.setattr("flowsteer.rollout.data.files.files", lambda package: tmp_path / "shipped")
        (tmp_path / "shipped").mkdir()
        (tmp_path / "shipped" / "some.txt").write_text("shipped")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        assert read_prompts("some.txt").texts == ("shipped",)
        (tmp_path / "here" / "some.txt").write_text("mine")
        assert read_prompts("some.txt").texts == ("mine",)
        with pytest.raises(ValueError, match=r"there is no prompt file other.txt, .* is shipped \(some.txt\)"):
            read_prompts("other.txt")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.txt", b"", r"x.txt holds no prompt; write one per line"),
            ("x.txt", b"\n  \n", r"x.txt holds no prompt"),
            ("x.txt", b"fine\nna\xefve\n", r"x.txt, line 2: not UTF-8 .*save the file in UTF-8"),
            ("x.json", b"a", r"ends in .txt .*, .jsonl .*, .csv or .parquet"),
            ("x.jsonl", b'{"prompt": "a"}\n\n{"prompt": ', r"x.jsonl, line 3: not JSON"),
            ("x.jsonl", b'{"prompt": "a"}\n{"text": "b"}', r"x.jsonl, line 2: no prompt"),
            ("x.jsonl", b'{"prompt": 3}', r"line 1: no prompt"),
            ("x.jsonl", b'["a"]', r"line 1: no prompt"),
            ("x.jsonl", b'{"prompt": " "}', r"line 1: no prompt"),
            ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "\\ud83d"}', r"line 2: the prompt holds half a character"),
            ("x.csv", b"prompt,n\na,1,2\n", r"x.csv, line 2: more values than the header has columns"),
            ("x.csv", b"prompt,n,n\na,1,2\n", r"two columns have the same name among prompt, n, n"),
            ("x.csv", b"text,n\na,1\n", r'x.csv, line 2: no prompt; each row needs a text under "prompt"'),
            ("x.parquet", b"no", r"x.parquet is no parquet file"),
            ("x.jsonl", b'{"prompt": "a", "images": 1}', r"line 1: a column may not be called 'images'"),
        ],
    )
    def test_a_bad_file_is_refused_with_its_line(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / name)

    def test_rows_may_lack_columns(self, tmp_path):
        """As in GenEval's own metadata, where some rows have ``exclude``."""
        path = tmp_path / "geneval.jsonl"
        rows = [
            {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
            {"tag": "counting", "include": [], "exclude": [{"class": "clock", "count": 3}], "prompt": "two clocks"},
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        prompts = read_prompts(path)
        assert prompts.columns["exclude"] == (None, rows[1]["exclude"])
        assert list(prompts.columns) == ["tag", "include", "exclude"]

    def test_a_csv_file_has_numbers_and_empty_cells(self, tmp_path):
        path = tmp_path / "some.csv"
        rows = 'caption,count,share,name,code\n"a,\n\nb",2,0.5,x,007\n\n3,,1,3,1e5\n'
        path.write_text(rows, encoding="utf-8-sig")
        prompts = read_prompts(Source(file=str(path), prompt="caption"))
        assert prompts.texts == ("a,\n\nb", "3")
        assert prompts.columns == {
            "count": (2, None),
            "share": (0.5, 1),
            "name": ("x", "3"),
            "code": ("007", "1e5"),
        }

    def test_a_parquet_file_and_a_data_set(self, tmp_path):
        rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": None}]
        data = Dataset.from_list(rows)
        data.to_parquet(tmp_path / "some.parquet")
        DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "saved")
        whole = read_prompts(tmp_path / "some.parquet")
        assert (whole.texts, whole.columns) == (("a", "b"), {"n": (1, None)})
        assert read_prompts(Source(dataset=str(tmp_path / "saved"))) == whole
        assert read_prompts(Source(dataset=str(tmp_path / "saved"), split="test")).texts == ("b",)
        with pytest.raises(ValueError, match=r"the data set .*none \(train\) cannot be loaded"):
            read_prompts(Source(dataset=str(tmp_path / "none")))

    def test_pictures_of_a_data_set_are_inputs_and_no_columns(self, tmp_path):
        pictures = [PIL.Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (10, 20, 30)]
        rows = [{"prompt": "a", "image": pictures[0], "several": pictures[1:], "n": 1}]
        Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        source = Source(dataset=str(tmp_path / "saved"))
        inputs = {"image": Input(column="image", kind="image"), "images": Input(column="several", kind="images")}
        prompts = read_prompts(source, inputs=inputs)
        assert prompts.columns == {"n": (1,)}
        loaded = {name: value.load() for name, value in prompts.row(0).inputs}
        assert loaded["image"].getpixel((0, 0)) == (10, 0, 0)
        assert [one.getpixel((0, 0))[0] for one in loaded["images"]] == [20, 30]
        assert prompts.fingerprint() == read_prompts(source, inputs=inputs).fingerprint()

    def test_comments_are_left_out_where_that_is_asked(self, tmp_path):
        path = tmp_path / "some.txt"
        path.write_text("# animals\na dog\n#\na cat\n")
        assert read_prompts(path).texts == ("# animals", "a dog", "#", "a cat")
        assert read_prompts(Source(file=str(path), comments=True)).texts == ("a dog", "a cat")

    def test_no_file(self, tmp_path):
        with pytest.raises(ValueError, match=r"there is no prompt file .*missing.txt"):
            read_prompts(tmp_path / "missing.txt")
        with pytest.raises(ValueError, match="is a folder"):
            read_prompts(tmp_path)

    def test_prompts_are_checked_where_they_are_made(self):
        with pytest.raises(ValueError, match="no prompts"):
            Prompts(texts=())
        with pytest.raises(ValueError, match="column 'n' has 1 values for 2 prompts"):
            Prompts(texts=("a", "b"), columns={"n": (1,)})


class TestSources:
    def draws(self, prompts, count):
        return [prompts.texts[row] for row in step_rows(prompts, step=0, seed=3, prompts_per_step=count)]

    def sources(self, tmp_path, weights, sizes):
        made = []
        for name, weight, size in zip("ab", weights, sizes):
            path = tmp_path / f"{name}.txt"
            path.write_text("\n".join(f"{name}{row}" for row in range(size)))
            made.append(Source(file=str(path), weight=weight))
        return read_prompts(made)

    @pytest.mark.parametrize("sizes", [(5, 2), (3, 40)])
    def test_each_source_is_drawn_by_its_weight_and_without_replacement(self, tmp_path, sizes):
        prompts = self.sources(tmp_path, (3, 1), sizes)
        drawn = self.draws(prompts, 4 * 10)
        for start in range(0, 40, 4):
            assert [text[0] for text in sorted(drawn[start : start + 4])] == ["a", "a", "a", "b"]
        first = [text for text in drawn if text[0] == "a"][: sizes[0]]
        assert sorted(first) == [f"a{row}" for row in range(sizes[0])]
        assert drawn != sorted(drawn)

    def test_a_source_alone_is_drawn_as_ever(self, tmp_path):
        """Whatever its weight: a run that is resumed draws what it drew."""
        path = tmp_path / "a.txt"
        path.write_text("\n".join(f"a{row}" for row in range(5)))
        alone = read_prompts(path)
        assert self.draws(alone, 12) == self.draws(read_prompts([Source(file=str(path))]), 12)
        assert sorted(self.draws(alone, 5)) == [f"a{row}" for row in range(5)]

    def test_columns_that_one_source_has(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"prompt": "a", "n": 1}')
        (tmp_path / "b.txt").write_text("b")
        prompts = read_prompts([Source(file=str(tmp_path / name)) for name in ("a.jsonl", "b.txt")])
        assert prompts.columns == {"n": (1, None)}
        assert prompts.sources == ((1, 1), (1, 1))


# (prompts_per_step, group_size, batch_size): batches of several groups, of one, of a part of one
SHAPES = [(8, 4, 8), (8, 4, 4), (8, 4, 2), (8, 16, 4), (16, 2, 8)]


class TestBatches:
    @pytest.mark.parametrize(("prompts_per_step", "group_size", "batch_size"), SHAPES)
    @pytest.mark.parametrize(("updates", "num_processes"), [(1, 2), (2, 2), (1, 4)])
    def test_the_number_of_processes_changes_nothing(
        self, prompts_per_step, group_size, batch_size, updates, num_processes
    ):
        options = {
            "step": 3,
            "seed": 7,
            "prompts_per_step": prompts_per_step,
            "group_size": group_size,
            "batch_size": batch_size,
            "updates_per_rollout": updates,
        }
        alone = whole_step(numbered(13), num_processes=1, **options)
        several = whole_step(numbered(13), num_processes=num_processes, **options)
        assert [flat(update) for update in several] == [flat(update) for update in alone]
        batches = [batch for update in alone for batch in update]
        assert {len(batch) for batch in batches} == {batch_size}
        assert [sample for _, _, sample, _ in flat(batches)] == list(range(prompts_per_step * group_size))

    def test_processes_are_at_neighbouring_batches_at_the_same_time(self):
        """A group that is larger than a batch passes all networks at once: DGPO adds up over it."""
        shares = [
            step_batches(
                numbered(9),
                step=0,
                seed=0,
                prompts_per_step=8,
                group_size=4,
                batch_size=4,
                num_processes=4,
                process_index=r,
            )
            for r in range(4)
        ]
        for process, share in enumerate(shares):
            first, second = share
            assert first.sample.tolist() == list(range(process * 4, process * 4 + 4))
            assert second.sample.tolist() == list(range(16 + process * 4, 16 + process * 4 + 4))

    @pytest.mark.parametrize(("prompts_per_step", "group_size", "batch_size"), SHAPES)
    def test_each_prompt_has_one_whole_group(self, prompts_per_step, group_size, batch_size):
        (batches,) = whole_step(
            numbered(100),
            num_processes=1,
            step=2,
            seed=1,
            prompts_per_step=prompts_per_step,
            group_size=group_size,
            batch_size=batch_size,
        )
        samples = flat(batches)
        assert Counter(group for _, group, _, _ in samples) == dict.fromkeys(range(prompts_per_step), group_size)
        assert len({(row, group) for row, group, _, _ in samples}) == prompts_per_step
        assert Counter(row for row, _, _, _ in samples).most_common(1)[0][1] == group_size

    @pytest.mark.parametrize(("num_prompts", "prompts_per_step"), [(12, 4), (10, 4), (3, 8)])
    def test_each_prompt_stands_once_in_every_pass(self, num_prompts, prompts_per_step):
        drawn = []
        for step in range(15):
            (batches,) = whole_step(
                numbered(num_prompts),
                num_processes=1,
                step=step,
                seed=5,
                prompts_per_step=prompts_per_step,
                group_size=2,
                batch_size=2,
            )
            drawn += [batch.rows[0] for batch in batches]
        passes = [
            tuple(drawn[start : start + num_prompts]) for start in range(0, len(drawn) - num_prompts + 1, num_prompts)
        ]
        assert all(sorted(order) == list(range(num_prompts)) for order in passes)
        assert len(set(passes)) > 1  # every pass has an order of its own
        assert any(order != tuple(range(num_prompts)) for order in passes)

    def test_a_prompt_twice_in_a_step_is_two_groups(self):
        (batches,) = whole_step(
            numbered(2), num_processes=1, step=0, seed=0, prompts_per_step=4, group_size=2, batch_size=4
        )
        samples = flat(batches)
        assert Counter(row for row, _, _, _ in samples) == {0: 4, 1: 4}
        assert len({group for _, group, _, _ in samples}) == 4

    def test_it_is_a_function_of_seed_and_step(self):
        def drawn(**changes):
            options = {"step": 1, "seed": 2, "prompts_per_step": 4, "group_size": 2, "batch_size": 4} | changes
            return flat(whole_step(numbered(50), num_processes=1, **options)[0])

        assert drawn() == drawn()
        assert [row for row, *_ in drawn()] != [row for row, *_ in drawn(seed=3)]
        seeds = [
            {seed for *_, seed in drawn(step=step, seed=seed)} for step, seed in itertools.product(range(4), range(4))
        ]
        assert len(set().union(*seeds)) == 4 * 4 * 8  # none twice

    def test_the_order_of_prompts_and_the_seeds_stay_what_they_are(self):
        """A change here makes every published run impossible to repeat: these are numbers of the first version."""
        (batch,) = step_batches(
            numbered(10),
            step=1,
            seed=42,
            prompts_per_step=4,
            group_size=1,
            batch_size=4,
            num_processes=1,
            process_index=0,
        )
        assert batch.rows == (8, 4, 2, 7)
        assert batch.seeds.tolist() == [
            3646000439448458261,
            8322642459733875503,
            7989751083540306476,
            4482864034974019863,
        ]

    def test_seeds_are_63_bits_wide_and_even(self):
        seeds = sample_seeds(range(4000), seed=0, step=0)
        assert seeds.dtype == torch.int64
        assert len(set(seeds.tolist())) == 4000
        assert seeds.min() >= 0
        # each of 63 bits is set in half of 4000 draws; 5 standard deviations of a binomial are 158
        for bit in range(63):
            assert abs(int(((seeds >> bit) & 1).sum()) - 2000) < 158

    def test_a_step_or_process_that_cannot_be(self):
        options = {"seed": 0, "prompts_per_step": 2, "group_size": 2, "batch_size": 2, "num_processes": 2}
        with pytest.raises(ValueError, match="processes are 0 to 1"):
            step_batches(numbered(4), step=0, process_index=2, **options)
        with pytest.raises(ValueError, match="steps begin at 0"):
            step_batches(numbered(4), step=-1, process_index=0, **options)


def test_mixed_updates_have_parts_of_all_groups():
    """On any number of processes the same samples in each update; each sample once; nearly every group in both updates."""
    sizes: dict[str, Any] = {"prompts_per_step": 8, "group_size": 12, "batch_size": 1, "updates_per_rollout": 2}

    def updates(processes: int, step: int, mixed: bool = True) -> list[set[int]]:
        halves = [set[int](), set[int]()]
        for index in range(processes):
            own = step_batches(
                numbered(20), step=step, seed=3, num_processes=processes, process_index=index, mixed=mixed, **sizes
            )
            for place, batch in enumerate(own):
                halves[place * 2 // len(own)].update(batch.sample.tolist())
        return halves

    first, second = updates(1, 0)
    assert first | second == set(range(96))
    assert not first & second
    assert {sample // 12 for sample in first} == {sample // 12 for sample in second} == set(range(8))
    assert updates(4, 0) == [first, second]
    assert updates(1, 1) != [first, second]
    assert updates(2, 0, mixed=False) == [set(range(48)), set(range(48, 96))]


SIZES = ("prompts_per_step", "group_size", "batch_size", "num_processes", "updates_per_rollout")


class TestDivisibility:
    @pytest.mark.parametrize(
        "sizes", [(24, 16, 64, 1, 1), (24, 16, 64, 2, 3), (8, 4, 2, 4, 4), (1, 8, 8, 1, 1), (3, 8, 4, 3, 2)]
    )
    def test_what_works(self, sizes):
        check_divisible(**dict(zip(SIZES, sizes)))

    @pytest.mark.parametrize(
        ("sizes", "reason", "proposal"),
        [
            (
                (6, 4, 16, 1, 1),
                "24 samples per step (6 x 4) do not fill batches of 16",
                "prompts_per_step=4 or 8; batch_size=12 or 24",
            ),
            ((6, 4, 6, 1, 1), "a batch of 6 neither holds whole groups of 4", "batch_size=4 or 8; group_size=3 or 6"),
            (
                (6, 4, 4, 4, 1),
                "6 batches per step cannot be shared evenly among 4 processes x 1 updates",
                "prompts_per_step=4 or 8; batch_size=2",
            ),
            ((6, 4, 4, 2, 2), "among 2 processes x 2 updates", "prompts_per_step=4 or 8"),
            ((7, 5, 15, 8, 3), "do not fill batches of 15", "prompts_per_step=72; group_size=360"),
        ],
    )
    def test_what_does_not_says_why_and_proposes(self, sizes, reason, proposal):
        with pytest.raises(ValueError, match="one of these works") as error:
            check_divisible(**dict(zip(SIZES, sizes)))
        assert reason in str(error.value)
        assert proposal in str(error.value)

    def test_every_proposal_works(self):
        for sizes in itertools.product((1, 3, 6), (2, 5), (2, 4, 6, 9), (1, 2, 3), (1, 2)):
            given = dict(zip(SIZES, sizes))
            try:
                check_divisible(**given)
            except ValueError as error:
                advice = str(error).partition("one of these works: ")[2]
                assert advice
                for proposal in advice.split("; "):
                    name, _, values = proposal.partition("=")
                    for value in values.split(" or "):
                        check_divisible(**{**given, name: int(value)})

    @pytest.mark.parametrize("name", SIZES)
    def test_sizes_are_at_least_one(self, name):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            check_divisible(**{**dict.fromkeys(SIZES, 1), name: 0})


def test_lines_that_look_like_comments_are_warned_of_once(tmp_path, caplog):
    file = tmp_path / "prompts.txt"
    file.write_text("# my prompts\na cat\n#1 fan\n")
    assert read_prompts(file).texts == ("# my prompts", "a cat", "#1 fan")
    assert len(caplog.messages) == 1
    assert "2 lines, line 1 the first, begin with '#' and are drawn as prompts" in caplog.text
    caplog.clear()
    read_prompts(file, warn=False)
    assert not caplog.messages
