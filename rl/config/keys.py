"""Every key of the configuration with its type, its default and its explanation, read from the schema itself."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowsteer.rl.config import Config
from flowsteer.rl.plugins import find_algorithm, installed_names

NAME = "NAME"  # stands for the names that a user chooses, such as a reward's
OF_ITS_KEYS = "those of its keys"  # the default of a section without variants


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key.

    Example: ``Key(path="rollout.plan.size", variant="window", kind="integer > 0", default="2", about="")``.
    """

    path: str
    variant: str  # the ``name`` of the section that has it; "" where the section has no variants
    kind: str
    default: str  # as YAML; "" where the key is required
    about: str  # one line; "" where there is none

    def text(self) -> str:
        """Two or three lines for the screen."""
        of = f" (with name: {self.variant})" if self.variant else ""
        ends = f", default {self.default}" if self.default else ", required"
        return f"{self.path}{of}\n    {self.kind}{ends}" + (f"\n    {self.about}" if self.about else "")


def find_keys(pattern: str | None = None, *, installed: bool = False) -> list[Key]:
    """The keys whose path contains the pattern, or matches it where it has a ``*``; without one all of them.

    ``installed``: those of the algorithms of other packages, too. Raises ValueError, with the nearest keys, if none matches.
    """
    keys = list(_keys_of(Config, "", ""))
    if installed:
        keys += [key for name in installed_names() for key in _keys_of_plugin(name)]
    if pattern is None:
        return keys
    wanted = pattern if "*" in pattern else f"*{pattern}*"
    found = [key for key in keys if fnmatch.fnmatchcase(key.path.lower(), wanted.lower())]
    if not found:
        last = {key.path.rsplit(".", 1)[-1]: key.path for key in keys}
        near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], last, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(last[name] for name in near)}?" if near else ""
        raise ValueError(f"no key of the configuration matches {pattern!r}{hint} `flowsteer config keys` lists all")
    return found


def _keys_of_plugin(name: str) -> Iterator[Key]:
    """The keys of an installed algorithm; none of one that cannot be used, which `flowsteer algorithms list` says."""
    with suppress(Exception):
        yield from _keys_of(find_algorithm(name), "algorithm.", name)


def _keys_of(section: type[BaseModel], prefix: str, variant: str) -> Iterator[Key]:
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        if name == "name" and variant:
            continue  # the section's own row lists the names of its variants
        path = f"{prefix}{name}"
        below = _sections(field.annotation)
        if not below or field.description or field.is_required() or field.default is None:
            default = "" if field.is_required() else _default(field)
            kind = _kind(schema["properties"][name], schema.get("$defs", {}))
            if len(below) > 1:
                names = " | ".join(child.model_fields["name"].default for child in below)
                kind = f"section with name: {names}"
            yield Key(path=path, variant=variant, kind=kind, default=default, about=_about(section, name))
        node = schema["properties"][name]
        many = f".{NAME}" if isinstance(node.get("additionalProperties"), dict) else ""
        many = "[]" if node.get("type") == "array" else many
        for child in below:
            own = child.model_fields["name"].default if len(below) > 1 else variant
            yield from _keys_of(child, f"{path}{many}.", own)


def _about(section: type[BaseModel], name: str) -> str:
    """The explanation of a key, of the class itself or of the first of its bases that has one, in one line."""
    for cls in section.__mro__:
        field = cls.model_fields.get(name) if issubclass(cls, BaseModel) else None
        if field is not None and field.description:
            return " ".join(field.description.split())
    return ""


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation: of a section one, of variants several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _sections(argument)]


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, BaseModel):
        name = value.model_dump().get("name")
        return f"name: {name}" if name else OF_ITS_KEYS
    if isinstance(value, tuple) and any(isinstance(own, BaseModel) for own in value):
        value = [own.model_dump(exclude_defaults=True) for own in value]
    return value if isinstance(value, str) and value else json.dumps(value)


def _kind(node: dict[str, Any], defs: dict[str, Any]) -> str:
    """The type that a JSON schema stands for, in words."""
    if "$ref" in node:
        target = defs[node["$ref"].rsplit("/", 1)[-1]]
        return _kind(target, defs) if target.get("type") != "object" else "section"
    if "enum" in node or "const" in node:
        return " | ".join(json.dumps(value).strip('"') for value in node.get("enum", [node.get("const")]))
    if choices := node.get("anyOf", []) + node.get("oneOf", []):
        return " | ".join(dict.fromkeys(_kind(choice, defs) for choice in choices))
    kind = node.get("type", "anything")
    if kind == "array":
        items = node.get("prefixItems")
        return f"list of {len(items)}: {_kind(items[0], defs)}" if items else f"list of {_kind(node['items'], defs)}"
    if kind == "object":
        return "mapping of names to values"
    words = {"string": "text", "boolean": "true | false"}
    bounds = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {node[bound]:g}" for bound, sign in bounds.items() if bound in node]
    return f"{words.get(kind, kind)} {' and '.join(limits)}".strip()
