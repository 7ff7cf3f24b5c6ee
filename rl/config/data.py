"""The sections that say what is drawn: prompt files, and what a pipeline is given besides prompts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from flowsteer.rl.config.section import Section
from flowsteer.rollout.data.files import Source
from flowsteer.rollout.data.inputs import Input, Kind, kind_of
from flowsteer.rollout.data.pictures import PictureColumns, PictureKind


class SourceConfig(Section):
    """Where prompts come from; exactly one of ``file`` and ``dataset``."""

    file: str | None = None
    """A ``.txt`` file with a prompt a line, ``.jsonl``, ``.csv`` or ``.parquet`` with a column of prompts, or the name of a
    file that is shipped."""
    dataset: str | None = None
    """A folder or hub id of Hugging Face's ``datasets``."""
    split: str = "train"
    """Of the data set."""
    prompt: str = "prompt"
    """The column with the prompts."""
    weight: PositiveInt = 1
    """Of several sources: how many prompts are drawn from it for each one of a source of weight 1."""
    comments: bool = False
    """Lines of a text file that begin with ``#`` are comments; otherwise they are prompts."""
    made_by: str | None = None
    """The command that makes the file, which the message says if it is not there."""

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.file is None) == (self.dataset is None):
            raise ValueError("a source of prompts is one of file and dataset")
        if self.made_by is not None and self.dataset is not None:
            raise ValueError("made_by is the command that makes a file; leave it out with a dataset")
        return self


def as_sources(given: Any) -> Any:
    """A file's name stands for the source that it is, and one source for a list of it."""
    several = given if isinstance(given, (list, tuple)) else [given]
    return [{"file": one} if isinstance(one, str) else one for one in several]


Sources = Annotated[tuple[SourceConfig, ...], Field(min_length=1), BeforeValidator(as_sources)]


class PicturesConfig(Section):
    """Columns of ``prompts.train`` with pictures to learn from: ``image``, or ``chosen`` and ``rejected``."""

    image: str | None = None
    """Column with a path, or a list of paths, relative to the file. The pictures of a prompt, in one row or in several, are
    its group."""
    score: str | None = None
    """Column with what each picture of ``image`` is worth, a number or a list of numbers; null: ``rewards`` score them."""
    chosen: str | None = None
    """Column with the better of two pictures, whose score is 1."""
    rejected: str | None = None
    """Column with the other one, whose score is 0."""
    kind: PictureKind = "image"
    """``image``, or ``video``: an animated picture or a film."""
    cache: str | None = None
    """Folder for encoded pictures, which several runs may share; null keeps them in memory only, up to 1 GiB."""

    @model_validator(mode="after")
    def _one_shape(self) -> PicturesConfig:
        pair = (self.chosen is not None, self.rejected is not None)
        if pair[0] != pair[1] or pair[0] == (self.image is not None):
            raise ValueError("pictures are an image column, or a chosen and a rejected one")
        if self.score is not None and self.image is None:
            raise ValueError("chosen and rejected pictures have the scores 1 and 0; leave score out")
        return self

    @property
    def has_scores(self) -> bool:
        """Whether the file says what pictures are worth."""
        return self.score is not None or self.chosen is not None


class PromptsConfig(Section):
    """What to draw, or the pictures to learn from."""

    train: Sources = (SourceConfig(file="shapes_train.txt"),)
    """A file by its name, a source, or a list of these, of which each has a weight: ``[{file: a.jsonl, weight: 3}, b.txt]``."""
    pictures: PicturesConfig | None = None
    """Learn from the file's pictures; null draws samples."""


def pictures_of(given: PromptsConfig, group_size: int) -> PictureColumns | None:
    """The columns with pictures, as the prompt files' reader takes them."""
    if given.pictures is None:
        return None
    return PictureColumns(**given.pictures.model_dump(exclude={"cache"}), group_size=group_size)


def sources_of(given: Sources) -> list[Source]:
    """The sources of a setting."""
    return [Source(**one.model_dump()) for one in given]


def name_of(given: Sources) -> str:
    """A setting of sources, for messages: the names of its files and data sets."""
    return ", ".join(source.name for source in sources_of(given))


class InputConfig(Section):
    """From which column of the prompt file an argument of the pipeline is taken."""

    column: str
    """Paths in it are relative to the prompt file; rows without a value give the pipeline none."""
    kind: Kind
    """``image``, ``images`` (a list), ``rgba`` (with alpha), ``mask`` (grey), ``video`` (an animated picture, a film,
    or a list of frames), ``audio`` (a WAV file), ``number`` or ``text``."""


def with_kinds(given: Any) -> Any:
    """A column's name stands for the input of the kind that the argument's name says."""
    if not isinstance(given, dict):
        return given
    return {
        name: {"kind": kind_of(name), **({"column": own} if isinstance(own, str) else own)}
        if isinstance(own, (str, dict))
        else own
        for name, own in given.items()
    }


Inputs = Annotated[dict[str, InputConfig], BeforeValidator(with_kinds)]


def inputs_of(given: dict[str, InputConfig]) -> dict[str, Input]:
    """The inputs of a configuration as the prompt files' reader takes them."""
    return {name: Input(column=own.column, kind=own.kind) for name, own in given.items()}
