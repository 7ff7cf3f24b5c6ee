"""What all sections of the configuration have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def by_name(given: Any) -> Any:
    """A text stands for the section of that name: ``all`` for ``{name: all}``."""
    return {"name": given} if isinstance(given, str) else given


def auto_or_names(given: Any) -> Any:
    """One message for a setting that is ``auto`` or a list of layers, in place of one for each of the two."""
    if given != "auto" and (isinstance(given, str) or given in ([], ())):
        raise ValueError("auto, or a list of names of linear layers such as [to_q, to_k, to_v, to_out.0]")
    return given
