"""Prompts, and what else a prompt file says of each of them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from PIL.Image import Image

from flowsteer.rollout.data.files import Source, Table, read_table
from flowsteer.rollout.data.inputs import Input, Kind, Media, Value, read_inputs, read_pictures
from flowsteer.rollout.data.pictures import Group, PictureColumns, merged, read_groups

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A prompt and its inputs: all that a pipeline is told of a row. Equal rows are prepared once."""

    text: str
    inputs: tuple[tuple[str, Value], ...] = ()  # (argument of the pipeline, value), those that the row has, by name

    @classmethod
    def of(cls, text: str, inputs: Mapping[str, Value]) -> Row:
        """The row of a prompt and its inputs. Example: ``Row.of("a cat", {"strength": 0.5})``."""
        return cls(text, tuple(sorted(inputs.items())))

    @property
    def signature(self) -> tuple[tuple[str, int | float | None], ...]:
        """Equal for rows that a pipeline handles alike: of the same inputs and numbers, whatever their files and texts are."""
        return tuple((name, value if isinstance(value, (int, float)) else None) for name, value in self.inputs)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """N prompts, and what else their files say of each.

    Example: ``Prompts(texts=("a cat", "two dogs"), columns={"count": (1, 2)})``.
    """

    texts: tuple[str, ...]  # N
    columns: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # name -> N values
    inputs: dict[str, tuple[Value, ...]] = field(default_factory=dict)  # argument of the pipeline -> N values
    sources: tuple[tuple[int, int], ...] = ()  # (rows, weight) of each source, in order; () is one source
    groups: tuple[Group, ...] = ()  # N groups of pictures to learn from; () where samples are drawn
    num_duplicates: int = 0  # rows that stand earlier in the file too; they are drawn as often as any other
    media: tuple[str, ...] = ()  # columns that hold pictures themselves, as in data sets; they are not in ``columns``
    pictures: dict[str, tuple[Media | None, ...]] = field(default_factory=dict)  # column -> N pictures, for rewards

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("there are no prompts")
        for name, values in chain(self.columns.items(), self.inputs.items(), self.pictures.items()):
            if len(values) != len(self.texts):
                raise ValueError(f"column {name!r} has {len(values)} values for {len(self.texts)} prompts")
        if self.groups and len(self.groups) != len(self.texts):
            raise ValueError(f"there are {len(self.groups)} groups of pictures for {len(self.texts)} prompts")
        object.__setattr__(self, "sources", self.sources or ((len(self.texts), 1),))

    def __len__(self) -> int:
        return len(self.texts)

    def row(self, place: int) -> Row:
        """One row, without the inputs that it lacks, and without its seed, which no pipeline is told."""
        given = {name: values[place] for name, values in self.inputs.items() if name != "seed"}
        return Row.of(self.texts[place], {name: value for name, value in given.items() if value is not None})

    def seed(self, place: int) -> int | None:
        """The seed of a row's initial noise; None: it has none of its own."""
        value = self.inputs["seed"][place] if "seed" in self.inputs else None
        assert value is None or isinstance(value, (int, float))
        return None if value is None else int(value)

    def fingerprint(self) -> str:
        """A hash of everything in it: two files with the same one are the same training data."""
        more = [self.inputs] if self.inputs else []
        more += [self.sources] if len(self.sources) > 1 else []
        more += [self.pictures] if self.pictures else []
        more += [[[picture.said() for picture in group] for group in self.groups]] if self.groups else []
        everything = json.dumps([self.texts, self.columns, *more], sort_keys=True, default=str)
        return hashlib.sha256(everything.encode()).hexdigest()[:16]


def read_prompts(
    sources: str | Path | Source | Sequence[Source],
    *,
    inputs: Mapping[str, Input] | None = None,
    pictures: PictureColumns | None = None,
    warn: bool = True,
) -> Prompts:
    """Read one or several sources of prompts, see `flowsteer.rollout.data.files.read_table`.

    Args:
        sources: a file, or what `Source` says, or several of these. Columns that only some have are None in the others.
        inputs: which columns are arguments of the pipeline.
        pictures: which columns hold pictures to learn from; rows of one prompt then form one group.
        warn: of prompts that stand there twice, and of lines that begin with ``#``: they are prompts like all others.

    Raises:
        ValueError: with the file and the line: no such file, empty, not UTF-8, no prompt, an input that cannot be read.
    """
    if isinstance(sources, (str, Path)):
        sources = [Source(file=str(sources))]
    given = [sources] if isinstance(sources, Source) else list(sources)
    if not given:
        raise ValueError("there is no source of prompts; give at least one file")
    tables = [read_table(source, warn=warn) for source in given]
    parts = [_of_table(table, inputs or {}, pictures) for table in tables]
    names = {name: None for part in parts for name in part.columns}
    prompts = Prompts(
        texts=tuple(chain.from_iterable(part.texts for part in parts)),
        columns={name: tuple(chain.from_iterable(_column(part, name) for part in parts)) for name in names},
        inputs={name: tuple(chain.from_iterable(part.inputs[name] for part in parts)) for name in inputs or {}},
        groups=tuple(chain.from_iterable(part.groups for part in parts)),
        sources=tuple((len(part), source.weight) for part, source in zip(parts, given)),
        media=tuple(dict.fromkeys(name for part in parts for name in part.media)),
    )
    rows = Counter(
        (prompts.row(place), prompts.seed(place), prompts.groups[place : place + 1]) for place in range(len(prompts))
    )
    duplicates = sum(count - 1 for count in rows.values())
    if duplicates and warn:
        names_of_sources = ", ".join(source.name for source in given)
        logger.warning(
            "%s: %d of %d prompts stand there more than once; each row is drawn",
            names_of_sources,
            duplicates,
            len(prompts),
        )
    return replace(prompts, num_duplicates=duplicates)


def _of_table(table: Table, inputs: Mapping[str, Input], pictures: PictureColumns | None) -> Prompts:
    """The rows of one source; those of one prompt as one, where pictures form groups."""
    read = read_inputs(inputs, table.columns, where=table.where, folder=table.folder)
    for value, where in zip(read.get("seed", ()), table.where):
        if value is not None and not _is_seed(value):
            raise ValueError(
                f"{where}, column {inputs['seed'].column!r} (inputs.seed): a seed is a whole number from 0 to 2^32 - 1, got "
                f"{value!r}"
            )
    own = pictures.names if pictures else ()
    columns = {
        name: values
        for name, values in table.columns.items()
        if name not in own and not any(map(_is_media, values))  # pictures are inputs only
    }
    media = tuple(name for name in table.columns if name not in own and name not in columns)
    prompts = Prompts(texts=table.texts, columns=columns, inputs=read, media=media)
    if pictures is None:
        return prompts
    groups = read_groups(pictures, table, columns)
    rows = [prompts.row(place) for place in range(len(prompts))]
    groups, first = merged(groups, rows, table.where, pictures)
    return Prompts(
        texts=tuple(table.texts[place] for place in first),
        columns={name: tuple(values[place] for place in first) for name, values in columns.items()},
        inputs={name: tuple(values[place] for place in first) for name, values in read.items()},
        groups=groups,
        media=media,
    )


def with_pictures(
    prompts: Prompts,
    sources: Sequence[Source],
    wanted: Mapping[str, Kind],
    *,
    inputs: Mapping[str, Input] | None = None,
) -> Prompts:
    """The prompts with the pictures that rewards want, from the same sources. A column that no source has is left out.

    Args:
        prompts: what `read_prompts` made of the sources and inputs.
        sources: of the prompts.
        wanted: column -> what it is to be shown as.
        inputs: which columns are arguments of the pipeline.

    Raises:
        ValueError: a value that is no such picture, with its row; a column that the pipeline gets as something else.
    """
    found: dict[str, tuple[Media | None, ...]] = {}
    missing: dict[str, Kind] = {}
    for column, kind in wanted.items():
        same = {own.kind: argument for argument, own in (inputs or {}).items() if own.column == column}
        alike = _STILL if kind in _STILL else (kind,)
        if unlike := sorted(set(same).difference(alike)):
            raise ValueError(
                f"inputs.{same[unlike[0]]} takes the column {column!r} as {unlike[0]}, a reward wants it as {kind}; give them "
                "columns of their own"
            )
        if kind in same and kind != "video":  # whose frames may have several sizes for a pipeline, not for a reward
            found[column] = tuple(own if isinstance(own, Media) else None for own in prompts.inputs[same[kind]])
        elif column in prompts.columns or column in prompts.media:
            missing[column] = kind
    tables = [read_table(source, warn=False) for source in sources] if missing else []
    for column, kind in missing.items():
        found[column] = tuple(
            value
            for table in tables
            for value in read_pictures(
                _column(table, column),
                kind,
                f"column {column!r} (for a reward)",
                where=table.where,
                folder=table.folder,
            )
        )
    return replace(prompts, pictures=found)


_STILL = ("image", "rgba", "mask")  # one picture each, of which one kind can be read as another


def _is_media(value: Any) -> bool:
    """Whether a value is a picture, or holds bytes, as in data sets: no reward in another process could be given it."""
    if isinstance(value, dict):
        return any(map(_is_media, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_is_media, value))
    return isinstance(value, (bytes, Image))


def _is_seed(value: Value) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 2**32 and float(value).is_integer()


def _column(part: Prompts | Table, name: str) -> tuple[Any, ...]:
    return part.columns.get(name, (None,) * len(part.texts))
