"""Reading and writing configurations: YAML files, and ``key.sub=value`` overrides on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flowsteer.rewards.doors import nearest_of
from flowsteer.rl.config.foreign import config_for
from flowsteer.rl.config.messages import explain
from flowsteer.rl.config.schema import Config, by_names
from flowsteer.rl.config.section import by_name


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number (as in YAML 1.2) and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<" and keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here more than once", key.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: the text "1e-4" in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or the name of one that is shipped) and apply ``key.sub=value`` overrides in order.

    Raises ValueError for a file that is missing or not a mapping, an override without ``=``, and every key or value that
    the configuration does not allow, all of them in one message, each with its nearest allowed key.
    """
    source = f"{path} with the settings of the command line" if overrides else str(path)
    return parse_config(parse_overrides(overrides, _read(path)), source=source)


def parse_overrides(
    overrides: Sequence[str], onto: dict[str, Any] | None = None, *, example: str = "rollout.num_inference_steps=8"
) -> dict[str, Any]:
    """``["a.b=1", "c=x"]`` to ``{"a": {"b": 1}, "c": "x"}``, on top of a mapping, which is changed.

    A value is read as YAML, so ``rollout.plan={name: none}`` replaces a whole section. Raises ValueError for an override
    without ``=`` (with the ``example``), a value that is not YAML, and a path through something that is not a section.
    """
    data = onto if onto is not None else {}
    for override in overrides:
        if "=" not in override[1:]:
            raise ValueError(f"{override!r} is not of the form key=value, such as {example}")
        _apply(data, override)
    return data


def parse_config(data: dict[str, Any], source: str = "the configuration") -> Config:
    """Validate a mapping. Raises ValueError with one line per fault."""
    try:
        cls = config_for(data)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        faults = "\n".join(f"  {explain(fault, cls)}" for fault in error.errors())
        raise ValueError(f"flowsteer cannot run {source}:\n{faults}") from None


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration, every default spelled out, as YAML that `load_config` reads back."""
    text = yaml.dump(json.loads(config.model_dump_json()), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def shipped_configs() -> list[str]:
    """The names of the configurations in `flowsteer.configs`."""
    return sorted(
        entry.name for entry in resources.files("flowsteer.configs").iterdir() if entry.name.endswith(".yaml")
    )


def read_text(path: str | Path) -> str:
    """The text of a YAML file, or of a configuration that is shipped. Raises ValueError if there is none."""
    name = str(path)
    file = Path(name)
    shipped = name if name.endswith(".yaml") else f"{name}.yaml"
    if file.is_file():
        source = file.read_bytes()
    elif shipped in shipped_configs():
        source = resources.files("flowsteer.configs").joinpath(shipped).read_bytes()
    elif (file / "config.yaml").is_file():
        raise ValueError(f"{name} is the folder of a run; give {file / 'config.yaml'}")
    else:
        names = [other.removesuffix(".yaml") for other in shipped_configs()]
        raise ValueError(
            f"there is no configuration {name!r}; give a YAML file, or the name of a shipped one; {nearest_of(name, names)}"
        )
    try:
        return source.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 ({error.reason} at byte {error.start}); save the file in UTF-8"
        ) from None


def _read(path: str | Path) -> dict[str, Any]:
    name, text = str(path), read_text(path)
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{name} must hold a mapping of keys to values, it holds a {type(data).__name__}")
    return data


def _section(name: str, given: Any) -> Any:
    """What an override goes into: a section that was written in short, or not at all, is written out."""
    if given is None:
        return {}
    if name == "rewards":
        return by_names(given)
    return by_name(given) if name in ("algorithm", "plan", "kernel") else given


def _apply(data: dict[str, Any], override: str) -> None:
    key, _, text = override.partition("=")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {override!r} is not YAML: {error}") from None
    parts = key.split(".")
    while parts:
        known = [".".join(parts[:end]) for end in range(len(parts), 1, -1)]  # a reward's name may have dots
        name = next((name for name in known if name in data), parts[0])
        parts = parts[name.count(".") + 1 :]
        if not parts:
            data[name] = value
            return
        data[name] = data = _section(name, data.get(name))
        if not isinstance(data, dict):
            raise ValueError(f"the override {override!r} goes through {name!r}, which is not a section")
