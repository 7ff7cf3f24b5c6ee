"""Faults of a configuration in a user's words: the key as it is written, what is allowed there, and the nearest name."""

from __future__ import annotations

import difflib
from typing import Any

from flowsteer.rl.config.schema import Config
from flowsteer.rl.plugins import DOOR, installed_names


def renamed_stage(stage: Any) -> str:
    """What a configuration of an earlier version says now, from its ``engine.zero_stage``."""
    strategy = {1: "zero1", 2: "zero2", 3: "zero3"}.get(stage, "plain")  # stage 0 spread nothing, as plain does
    given = "null" if stage is None else stage
    return f"this key is engine.strategy now; set engine.strategy={strategy} for zero_stage={given}"


def explain(fault: Any, config: type[Config] = Config) -> str:
    """One line about a fault that pydantic found in ``config``."""
    schema = config.model_json_schema()
    location = [str(part) for part in fault["loc"]]
    key, tag, allowed = _place(location, schema)
    if fault["type"] == "extra_forbidden" and key == "engine.zero_stage":
        return f"{key}: {renamed_stage(fault['input'])}"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed here: {', '.join(allowed)}"
        return f"{key}: unknown key{f' for name={tag}' if tag else ''}; {hint}"
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        names, given = _tags(location, schema), fault["ctx"].get("tag")
        advice = ""
        if location == ["algorithm"]:
            names, advice = [*names, *installed_names()], f". {DOOR.advice()}" if given else ""
        what = f"unknown name {given!r}" if given else "this key is required"
        near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.7) if location == ["algorithm"] else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{key}.name: {what}{hint}; allowed: {', '.join(names)}{advice}"
    if fault["type"] == "missing":
        return f"{key}: this key is required"
    given = f"the text {fault['input']!r}" if isinstance(fault["input"], str) else repr(fault["input"])
    if fault["type"] in ("model_type", "model_attributes_type"):
        keys = ", ".join(_place([*location, "?"], schema)[2])
        return f"{key}: this is a section, got {given}; set its keys, as {key}.KEY=VALUE: {keys}"
    if fault["type"] == "dict_type":
        return f"{key}: maps names to values, got {given}; write {{NAME: VALUE}}"
    return f"{key}: {fault['msg'].removeprefix('Value error, ')}, got {fault['input']!r}"


def _place(location: list[str], schema: dict[str, Any]) -> tuple[str, str | None, list[str]]:
    """The key as a user writes it, the ``name`` of the variant that its section is, and the section's keys.

    Found by walking the JSON schema: pydantic's location also holds the names of variants.
    """
    nodes, key, tag = [schema], [], None
    for place, part in enumerate(location):
        variants = _variants(nodes, schema)
        chosen = [node for node in variants if node.get("properties", {}).get("name", {}).get("const") == part]
        if chosen and place and place < len(location) - 1:
            nodes, tag = chosen, part
            continue
        key.append(part)
        if place < len(location) - 1:
            tag = None
            nodes = [
                node.get("properties", {}).get(part, node.get("additionalProperties"))
                for node in variants
                if part in node.get("properties", {}) or isinstance(node.get("additionalProperties"), dict)
            ]
    properties = [item for node in _variants(nodes, schema) for item in node.get("properties", {}).items()]
    settable = {name for name, about in properties if name == "name" or "const" not in about}
    return ".".join(key), tag, sorted(settable)


def _tags(location: list[str], schema: dict[str, Any]) -> list[str]:
    """The names of the variants that a section can be."""
    nodes = [schema]
    for part in location:
        nodes = [node["properties"][part] for node in _variants(nodes, schema) if part in node.get("properties", {})]
    return [node["properties"]["name"]["const"] for node in _variants(nodes, schema)]


def _variants(nodes: list[dict[str, Any]], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """What the nodes can be, with references followed."""
    found = []
    for node in nodes:
        if "$ref" in node:
            found += _variants([schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]], schema)
        elif "anyOf" in node or "oneOf" in node:
            found += _variants(node.get("anyOf", []) + node.get("oneOf", []), schema)
        else:
            found.append(node)
    return found
