"""The sections that say what is drawn: prompt files, and what a pipeline is given besides prompts."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from flowsteer.rl.config.section import Section
from flowsteer.rollout.data.files import Source
from flowsteer.rollout.data.inputs import Input, Kind, kind_of


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

    @model_validator(mode="after")
    def _one_place(self) -> SourceConfig:
        if (self.file is None) == (self.dataset is None):
            raise ValueError("a source of prompts is one of file and dataset")
        return self


def as_sources(given: Any) -> Any:
    """A file's name stands for the source that it is, and one source for a list of it."""
    several = given if isinstance(given, (list, tuple)) else [given]
    return [{"file": one} if isinstance(one, str) else one for one in several]


Sources = Annotated[tuple[SourceConfig, ...], Field(min_length=1), BeforeValidator(as_sources)]


class PromptsConfig(Section):
    """What to draw."""

    train: Sources = (SourceConfig(file="shapes_train.txt"),)
    """A file by its name, a source, or a list of these, of which each has a weight: ``[{file: a.jsonl, weight: 3}, b.txt]``."""


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
