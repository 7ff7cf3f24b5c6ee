"""Every pipeline class of the installed diffusers that denoises in a loop, found by reading its files.

A class denoises if one of its methods, or of its bases', has a loop around the ``step`` of a scheduler. No class is named here.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import diffusers
import diffusers.utils

from flowsteer.rollout.data.inputs import kind_of
from flowsteer.rollout.lifting.arguments import CallArguments

ROOT = Path(diffusers.__file__).parent / "pipelines"
Kind = Literal[
    "Text to picture",
    "Picture to picture",
    "Several pictures to picture",
    "Inpainting",
    "Control",
    "Video",
    "Sound",
    "Other",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
_UNNEEDED = ("torch_xla", "torch_npu", "bitsandbytes", "accelerate", "invisible_watermark")
"""Packages without which a pipeline draws the same."""
_STEP = re.compile(r"scheduler[\w\[\]]*\.step\(")
"""``scheduler.step(...)``, ``self.scheduler.step(...)``, ``schedulers[i].step(...)``."""
_CONTROLS = re.compile(r"(controlnet|adapter|t2i_adapter|control_(image|video|mask))\w*")


class _Found(NamedTuple):
    module: str
    bases: tuple[str, ...]
    has_loop: bool


@functools.cache
def denoising_classes() -> dict[str, str]:
    """The modules of the classes, by the names of the classes, in the order of the files. Imports nothing."""
    read = {name: found for file in sorted(ROOT.rglob("*.py")) for name, found in _classes(file)}
    chosen = (name for name in read if _inherits(name, read, "DiffusionPipeline") and _denoises(name, read))
    return {name: read[name].module for name in chosen}


def class_of(name: str) -> type:
    """The class itself. Raises ImportError where its module needs what is not installed."""
    return getattr(importlib.import_module(denoising_classes()[name]), name)


def _classes(file: Path) -> Iterator[tuple[str, _Found]]:
    text = file.read_text(encoding="utf-8")
    if "Pipeline" not in text:
        return
    module = ".".join(("diffusers.pipelines", *file.relative_to(ROOT).with_suffix("").parts))
    steps = [number for number, line in enumerate(text.splitlines(), 1) if _STEP.search(line)]
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            bases = tuple(ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases)
            loops = _loops(node) if steps else ()
            has_loop = any(loop.lineno <= step <= (loop.end_lineno or 0) for loop in loops for step in steps)
            yield node.name, _Found(module, bases, has_loop)


def _inherits(name: str, read: dict[str, _Found], base: str) -> bool:
    return name in read and any(own == base or _inherits(own, read, base) for own in read[name].bases)


def _denoises(name: str, read: dict[str, _Found]) -> bool:
    return name in read and (read[name].has_loop or any(_denoises(own, read) for own in read[name].bases))


def _loops(node: ast.AST) -> Iterator[ast.For | ast.While]:
    """The loops in a class or statement. Expressions, which are most of a file, are passed over."""
    if isinstance(node, (ast.For, ast.While)):
        yield node
    for block in ("body", "orelse", "finalbody", "handlers"):
        for statement in getattr(node, block, ()):
            yield from _loops(statement)


def is_deprecated(cls: type) -> bool:
    return any(base.__name__ == "DeprecatedPipelineMixin" for base in cls.__mro__) or ".deprecated." in cls.__module__


def missing_packages(cls: type) -> list[str]:
    """Packages that the class's file asks for and does not find, by their names in diffusers' questions."""
    file = inspect.getsourcefile(cls)
    asked = set(re.findall(r"\bis_(\w+)_available\(\)", Path(file).read_text(encoding="utf-8"))) if file else set()
    answers = {name: getattr(diffusers.utils, f"is_{name}_available", None) for name in asked - {*_UNNEEDED}}
    return sorted(name for name, answer in answers.items() if answer is not None and not answer())


# --- what a class is for ---


def media_of(cls: type) -> tuple[str, ...]:
    """The arguments for pictures, masks, videos and sounds; not those of an IP-Adapter, which is loaded apart."""
    media = CallArguments(cls, size={}, call_kwargs={}, counts_from_zero=False, has_guider=False).media
    return tuple(name for name in media if not name.startswith(("ip_adapter", "negative")))


def has_prompt(cls: type) -> bool:
    return "prompt" in inspect.signature(inspect.unwrap(cls.__call__)).parameters


def kind_of_class(cls: type, given: Iterable[str] | None = None, *, several: bool = False) -> Kind:
    """What a class draws and from what, by its arguments and by what it returns.

    Args:
        cls: the class.
        given: the arguments with pictures that it is called with; None: all that it has.
        several: one of them is a list of pictures.
    """
    results, media = _results(cls), media_of(cls) if given is None else tuple(given)
    if results & {"frames", "videos", "video"}:
        return "Video"
    if results & {"audios", "audio"}:
        return "Sound"
    if results and not results & {"images", "image"}:
        return "Other"
    if any(_CONTROLS.fullmatch(name) for name in (*inspect.signature(cls.__init__).parameters, *media)):
        return "Control"
    if any(kind_of(name) == "mask" for name in media):
        return "Inpainting"
    if several or any(kind_of(name) == "images" for name in media):
        return "Several pictures to picture"
    if media:
        return "Picture to picture"
    return "Text to picture" if has_prompt(cls) else "Other"


def _results(cls: type) -> set[str]:
    """The names of what ``__call__`` returns: ``images`` of ``return FluxPipelineOutput(images=image)``."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.__call__))))
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    calls = [value for value in returned if isinstance(value, ast.Call)]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg}
