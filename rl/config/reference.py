"""The reference of all configuration keys as a page of Markdown, made from the schema.

`flowsteer config keys --markdown > docs/configuration.md` writes the page; a test says when it is out of date.
"""

from __future__ import annotations

from collections.abc import Sequence

from flowsteer.rl.config.keys import NAME, OF_ITS_KEYS, Key

INTRODUCTION = f"""\
# Configuration keys

A run is one YAML file. Only `num_steps`, `rewards` and `algorithm` are required. `key.sub=value` on the command line
replaces a value. An unknown key is an error that names the nearest one.

- A table lists the keys of one section, with their full path.
- `{NAME}` stands for a name that you choose: `rewards.composition.weight` is one of `rewards.{NAME}.weight`.
- Some sections come in variants: `rollout.plan` and `algorithm`. Their key `name` chooses the variant. A text stands for
  the variant of that name: `algorithm: awm` is `algorithm: {{name: awm}}`.
- `rewards: composition` and `rewards: [composition, ocr]` are rewards with their default settings.
- `null` means none. A section that may be `null` is switched off by it.

`flowsteer config keys PART` prints the keys whose path contains PART.

This page is made from the schema. Do not edit it: `flowsteer config keys --markdown > docs/configuration.md`
"""


def markdown(keys: Sequence[Key]) -> str:
    """The page: an introduction, then a table for each section and for each variant, in the order of their first keys."""
    tables: dict[str, list[str]] = {}
    for key in keys:
        tables.setdefault(_title(key), []).append(_row(key))
    parts = [INTRODUCTION]
    for title, rows in tables.items():
        parts.append(
            "\n".join([f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])
        )
    return "\n".join(parts)


def _title(key: Key) -> str:
    section, _, rest = key.path.partition(".")
    if not rest and section not in ("rewards", "algorithm"):
        return "The run"
    *above, _ = key.path.split(".")
    return f"`{'.'.join(above)}` with `name: {key.variant}`" if key.variant else f"`{section}`"


def _row(key: Key) -> str:
    kind = key.kind.replace(" | ", " or ")
    default = {"": "required", OF_ITS_KEYS: OF_ITS_KEYS}.get(key.default, f"`{key.default}`")
    about = key.about.replace("``", "`").replace("|", "\\|")
    return f"| `{key.path}` | {kind} | {default} | {about} |"
