"""Prompt files of several formats, read as one table: a prompt a row, and further columns."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")  # 007 and 1e5 stay texts

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
RESERVED = ("images", "prompts", "completions")  # what rewards are given under these names is not a column


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where prompts come from: a file, or a data set of Hugging Face's `datasets`.

    Example: ``Source(file="prompts.csv", prompt="caption", weight=3)``.
    """

    file: str | None = None
    dataset: str | None = None  # a folder or hub id
    split: str = "train"  # of a data set
    prompt: str = "prompt"  # the column with the prompts
    weight: int = 1  # how many of its prompts are drawn for each one of a source of weight 1
    comments: bool = False  # lines of a text file that begin with # are left out
    made_by: str | None = None  # the command that makes the file, for the message if it is not there

    @property
    def name(self) -> str:
        """For messages."""
        return self.file or f"{self.dataset} ({self.split})"


@dataclass(frozen=True, kw_only=True)
class Table:
    """N rows of a source."""

    texts: tuple[str, ...]  # N
    columns: dict[str, tuple[Any, ...]]  # N values each, None where a row has none
    where: tuple[str, ...]  # N, each row's place, for messages
    folder: Path  # what relative paths in it are relative to


def read_table(source: Source, *, warn: bool = True) -> Table:
    """Read a source; UTF-8 where it is text.

    A ``.txt`` file has one prompt per line. A ``.jsonl`` file has an object per line, a ``.csv`` file a header; both may lack
    columns in some rows, and so may a ``.parquet`` file or a data set. A column of a ``.csv`` file whose values all are
    plain numbers (3, 0.5) is read as numbers. A bare name may also be that of a file that is shipped with the project, such as
    ``shapes_train.txt``.

    Raises:
        ValueError: with the file and the line: no such file, empty, not UTF-8, no prompt, a reserved name.
    """
    if source.dataset is not None:
        return _of_dataset(source)
    place = find(source.file or "", made_by=source.made_by)
    if place.suffix == ".parquet":
        return _of_parquet(source, place)
    text = _text(place)
    if place.suffix == ".txt":
        return _of_text(source, place, _lines(text), warn=warn)
    rows = _of_json(place, _lines(text)) if place.suffix == ".jsonl" else _of_csv(source, place, text)
    return _table(rows, source, place.parent, str(place))


def find(path: str | Path, *, made_by: str | None = None) -> Path:
    """A prompt file here, or one of that name that is shipped. Raises ValueError if there is none, or of another format.

    ``made_by`` is the command that makes it, for the message.
    """
    place = Path(path)
    shipped = {Path(str(item)).name: Path(str(item)) for item in files("flowsteer.configs").iterdir()}
    names = sorted(name for name in shipped if name.endswith(SUFFIXES))
    if not place.is_file():
        if place.is_dir():
            raise ValueError(f"{place} is a folder; give the prompt file itself, or a data set as {{dataset: {place}}}")
        if str(path) not in names and made_by is not None:
            raise ValueError(f"there is no prompt file {place}; make it first: {made_by}")
        if str(path) not in names:
            raise ValueError(
                f"there is no prompt file {place}, and none of that name is shipped ({', '.join(names) or 'none is'})"
            )
        place = shipped[str(path)]
    if place.suffix not in SUFFIXES:
        raise ValueError(
            f"{place}: a prompt file ends in .txt (one prompt per line), .jsonl (objects with a prompt), .csv or .parquet"
        )
    return place


def _text(place: Path) -> str:
    data = place.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{place}, line {line}: not UTF-8 ({error.reason}); save the file in UTF-8") from error


def _lines(text: str) -> list[tuple[int, str]]:
    """The lines with text in them, and their numbers."""
    # not splitlines(), which also cuts at characters that may stand inside a prompt
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _of_text(source: Source, place: Path, lines: list[tuple[int, str]], *, warn: bool) -> Table:
    hashes = [number for number, line in lines if line.startswith("#")]
    if source.comments:
        lines = [(number, line) for number, line in lines if not line.startswith("#")]
    elif hashes and warn:
        logger.warning(
            "%s: %s, line %d the first, begin with '#' and are drawn as prompts; if they are comments, give the file as "
            "{file: %s, comments: true}",
            place,
            "1 line" if len(hashes) == 1 else f"{len(hashes)} lines",
            hashes[0],
            place,
        )
    if not lines:
        raise ValueError(f"{place} holds no prompt; write one per line")
    where = tuple(f"{place}, line {number}" for number, _ in lines)
    return Table(texts=tuple(line for _, line in lines), columns={}, where=where, folder=place.parent)


Rows = Iterable[tuple[str, dict[str, Any]]]  # the place of a row, and its values by column


def _of_json(place: Path, lines: list[tuple[int, str]]) -> Rows:
    for number, line in lines:
        where = f"{place}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'{where}: not JSON ({error}); each line is an object like {{"prompt": "a red circle"}}'
            ) from error
        except RecursionError as error:
            raise ValueError(f"{where}: nested too deeply") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where}: no prompt; each line is an object with a text under "prompt", got {line[:80]}')
        yield where, row


def _of_csv(source: Source, place: Path, text: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = list(reader.fieldnames or ())
    if len({*names}) < len(names):
        raise ValueError(f"{place}: two columns have the same name among {', '.join(names)}")
    rows = [(reader.line_num, row) for row in reader if any(row.values())]
    for line, row in rows:
        if None in row:
            raise ValueError(f"{place}, line {line}: more values than the header has columns")
    numbers = {
        name
        for name in names
        if name != source.prompt and all(_NUMBER.fullmatch(row[name]) for _, row in rows if row[name])
    }
    for line, row in rows:
        values: dict[str, Any] = {name: value or None for name, value in row.items()}
        for name in numbers:
            if (number := values[name]) is not None:
                values[name] = float(number) if "." in number else int(number)
        yield f"{place}, line {line}", values


def _of_parquet(source: Source, place: Path) -> Table:
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(place).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{place} is no parquet file that can be read: {error}") from error
    return _table(((f"{place}, row {n}", row) for n, row in enumerate(rows, 1)), source, place.parent, str(place))


def _of_dataset(source: Source) -> Table:
    """A folder that `datasets` has saved, a folder of data files, or a hub id."""
    import datasets

    assert source.dataset is not None
    folder = Path(source.dataset)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            data: Any = datasets.load_from_disk(str(folder))
            data = data[source.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(source.dataset, split=source.split)
    except Exception as error:  # of many kinds, from files and from the network
        raise ValueError(f"the data set {source.name} cannot be loaded ({type(error).__name__}: {error})") from error
    for name, feature in data.features.items():
        if isinstance(feature, datasets.Image):  # as bytes: decoded when a row is prepared
            data = data.cast_column(name, datasets.Image(decode=False))
    rows = ((f"{source.name}, row {n}", row) for n, row in enumerate(data, 1))
    return _table(rows, source, folder if folder.is_dir() else Path.cwd(), source.name)


def _table(rows: Rows, source: Source, folder: Path, name: str) -> Table:
    """The prompts and the other columns; what a row lacks is None."""
    kept = [*rows]
    if not kept:
        raise ValueError(f"{name} holds no prompt; write one per line")
    names = dict.fromkeys(column for _, row in kept for column in row if column != source.prompt)
    for where, row in kept:
        text = row.get(source.prompt)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{where}: no prompt; each row needs a text under "{source.prompt}", got {str(row)[:80]}')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: the prompt holds half a character ({error.reason}): {text!r}") from error
        reserved = [column for column in RESERVED if column in row and column != source.prompt]
        if reserved:
            raise ValueError(
                f"{where}: a column may not be called {reserved[0]!r}, a name that rewards need; rename it"
            )
    return Table(
        texts=tuple(row[source.prompt].strip() for _, row in kept),
        columns={column: tuple(row.get(column) for _, row in kept) for column in names},
        where=tuple(where for where, _ in kept),
        folder=folder,
    )
