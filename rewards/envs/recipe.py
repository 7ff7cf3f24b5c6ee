"""A recipe: how the environment of a reward is built that cannot live in this one.

A recipe is a TOML file; beside it lie the requirement files that it names. Those that are shipped are known by their name
(``originals``), a user's own by its path (``folder/mine.toml``)::

    about = "what it is for"
    python = ["3.9", "3.11"]            # the oldest and the newest that will do
    tried = "when, where, with what result"  # left out: nobody has built it yet
    smoke = "import some_package"       # must run in the finished environment

    [[install]]                         # pip, one call after another
    requirements = "mine.txt"           # versions pinned with ==
    hashes = true                       # the default: every file with its --hash
    dependencies = false                # the default: nothing but what the file lists
    build_isolation = true              # the default; false: packages are built with what is installed already

    [[asset]]                           # a file that a package forgot, from another one; below site-packages
    source = "one_package/vocab.gz"
    target = "some_package/vocab.gz"
    sha256 = "..."

    [files]                             # written below site-packages
    "some_shim.py" = "import sys ..."

    [scorers]                           # name -> file beside the recipe : class, for the worker of a reward
    mine = "scorers/mine.py:Mine"

    [golden]                            # what the environment must still compute
    script = "scorers/mine_golden.py"   # prints one JSON object of numbers
    tolerance = 1e-5
    numbers = { mine = 0.25 }

No recipe names an index or a host: packages come from where the user's pip is configured to look.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, field_validator

FOLDER = Path(__file__).parent


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Install(_Table):
    """One call of ``pip install``."""

    requirements: str
    hashes: bool = True
    dependencies: bool = False
    build_isolation: bool = True


class Asset(_Table):
    """A file that is copied inside of site-packages."""

    source: str
    target: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Golden(_Table):
    """Numbers that the environment gave when the recipe was written."""

    script: str
    tolerance: PositiveFloat
    numbers: dict[str, float] = Field(min_length=1)


class Recipe(_Table):
    """A recipe as its file says; ``name`` and ``folder`` are where it was found."""

    name: str
    folder: Path
    about: str
    python: tuple[str, str]
    smoke: str
    tried: str | None = None
    install: tuple[Install, ...] = ()
    asset: tuple[Asset, ...] = ()
    files: dict[str, str] = {}
    scorers: dict[str, str] = {}
    golden: Golden | None = None

    @field_validator("python")
    @classmethod
    def _two_versions(cls, value: tuple[str, str]) -> tuple[str, str]:
        if version_numbers(value[0]) > version_numbers(value[1]):
            raise ValueError(f"the oldest python comes first, got {list(value)}")
        return value

    @cached_property
    def digest(self) -> str:
        """Hash of all that the environment's content depends on; what is only said about it does not count."""
        content = self.model_dump(include={"install", "asset", "files", "smoke"}, mode="json")
        content["requirements"] = [(self.folder / step.requirements).read_text("utf-8") for step in self.install]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def takes(self, version: str) -> bool:
        """Whether a python of this version, such as ``3.11.7``, is in the recipe's range."""
        return version_numbers(self.python[0]) <= version_numbers(version) <= version_numbers(self.python[1])


def version_numbers(version: str) -> tuple[int, int]:
    """``3.11.7`` to (3, 11)."""
    parts = version.split(".")
    if len(parts) < 2 or not all(part.isdecimal() for part in parts[:2]):
        raise ValueError(f"a python version looks like 3.11, got {version!r}")
    return int(parts[0]), int(parts[1])


def recipe_names() -> list[str]:
    """The recipes that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """The shipped recipe of that name, or the one in a user's file ``folder/NAME.toml``.

    Raises:
        ValueError: there is none of that name, or its file cannot be understood.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no recipe {name!r}{hint} There are: {', '.join(recipe_names())}; one of your own is given as the "
            "path of its .toml file"
        )
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        recipe = Recipe(name=path.stem, folder=path.resolve().parent, **table)
    except (tomllib.TOMLDecodeError, ValidationError, TypeError) as error:
        raise ValueError(f"the recipe {path}: {error}") from error
    named = [step.requirements for step in recipe.install] + [
        place.partition(":")[0] for place in recipe.scorers.values()
    ]
    for file in named + ([recipe.golden.script] if recipe.golden else []):
        if not (recipe.folder / file).is_file():
            raise ValueError(f"the recipe {path} names the file {file}, which is not beside it")
    return recipe


__all__ = ["FOLDER", "Asset", "Golden", "Install", "Recipe", "load_recipe", "recipe_names", "version_numbers"]
