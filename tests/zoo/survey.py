"""What is found out about one pipeline: is it lifted, what does it need, how near does it come, is it trained and exported?

`scripts/survey_pipelines.py` asks this of every pipeline and makes docs/pipelines.md of the answers.
"""

from __future__ import annotations

import importlib
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from flowsteer.rl.command.check_model import trainable_findings
from flowsteer.rl.export import how_to_load
from flowsteer.rollout.data.inputs import kind_of
from flowsteer.rollout.data.prompts import Row
from flowsteer.rollout.lifting.arguments import Settings
from flowsteer.rollout.lifting.lift import lift
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.selfcheck import Report
from zoo.checks import report_of
from zoo.classes import Kind, class_of, has_prompt, is_deprecated, kind_of_class, media_of, missing_packages
from zoo.entries import MODULES, Entry, built, entries, lifted
from zoo.training import GROUP, RANK, trained

Verdict = Literal["lifted", "refused", "left out", "not built"]
Found = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was found out about one tiny pipeline, or about a class of which there is none.

    Example: ``Answer(name="sd", cls="StableDiffusionPipeline", kind="Text to picture", verdict="lifted", parity=0.0,
    microbatch=2.1e-07, gradient="64 of 64", algorithm="flow_grpo", redrawn=0.0)``.
    """

    name: str  # of the entry of the zoo, or of the class
    cls: str
    kind: Kind
    verdict: Verdict
    tried: bool = False  # with a tiny pipeline
    said: str = ""  # why it is refused, left out or not built
    needs: tuple[str, ...] = ()  # arguments without which it cannot be called
    takes: tuple[str, ...] = ()  # further arguments for pictures and the like
    parity: float | None = None  # largest difference between what lifted steps draw and what the pipeline draws
    solver: str = ""  # of the pipeline, where both took Euler steps in its place
    alone: bool = False  # it takes one row at a time
    microbatch: float | None = None  # how much a row depends on its batch, in deviations of the velocity
    gradient: str = ""  # tensors of the LoRA that a gradient reached: ``30 of 32``
    algorithm: str = ""  # by which it was trained; empty where it was not
    batch_size: int | None = None  # samples of a rollout batch, where fewer than a whole group had to be taken
    redrawn: float | None = None  # largest difference between what the policy and plain diffusers with its export draw
    failed: str = ""  # why it was not trained
    loads: str = ""  # what a user of diffusers writes to load the export
    seconds: float = 0.0


def survey_entry(name: str) -> Answer:
    """Build a tiny pipeline, and ask it everything."""
    begun = time.perf_counter()
    entry = entries()[name]
    cls, given = type(built(entry)), entry.inputs(0)
    several = any(_is_several(value) and kind_of(argument) != "video" for argument, value in given.items())
    kind = kind_of_class(cls, [argument for argument in given if argument in media_of(cls)], several=several)
    found: Found = {"name": name, "cls": cls.__name__, "kind": kind, "tried": True} | _lifted(entry, given)
    if (
        found["verdict"] == "refused"
        and entry.guided
        and _lifted(replace(entry, guided=None), given)["verdict"] == "lifted"
    ):
        found["said"] += "; without guidance (guidance_scale=1) it is lifted"
    found |= _needs(entry, cls)
    if found["verdict"] == "lifted":
        found |= _learns(entry)
    return Answer(**found, seconds=round(time.perf_counter() - begun, 2))


def survey_class(name: str) -> Answer:
    """What can be said of a class without a pipeline of it."""
    try:
        cls = class_of(name)
    except ImportError as error:
        return Answer(name=name, cls=name, kind="Other", verdict="not built", said=f"cannot be imported: {error}")
    found: Found = {"name": name, "cls": name, "kind": kind_of_class(cls), "takes": media_of(cls)}
    try:
        lift(cls)
    except ValueError as error:
        return Answer(**found, verdict="refused", said=str(error))
    return Answer(**found, verdict="not built", said=why_not_built(cls))


def why_not_built(cls: type) -> str:
    """The zoo's own reason, or what the class says of itself."""
    modules = ("zoo.entries", *MODULES)
    reasons = [vars(importlib.import_module(module)).get("NOT_BUILT", {}) for module in modules]
    if own := [reason[cls.__name__] for reason in reasons if cls.__name__ in reason]:
        return own[0]
    if is_deprecated(cls):
        return "deprecated by diffusers"
    if missing := missing_packages(cls):
        return f"uses {', '.join(missing)}, not installed"
    return "no tiny pipeline yet"


# --- lifted, or why not ---


def _lifted(entry: Entry, given: Mapping[str, Any]) -> Found:
    try:
        lifted(entry)
    except ValueError as error:
        return {"verdict": "refused", "said": str(error)}
    if foreign := _foreign(entry, given):
        return {"verdict": "left out", "said": ", ".join(foreign)}
    try:
        report = report_of(entry, entry.guided or 1.0)
    except ValueError as error:
        return {"verdict": "refused", "said": str(error)}
    if not report.ok:
        failed = next(finding for finding in report.findings if not finding.ok)
        named = "" if failed.name == "runs" else f"{failed.name}: "  # an exception says by itself what it is about
        return {"verdict": "refused", "said": f"{named}{failed.detail}"}
    return {"verdict": "lifted"} | numbers_of(report)


def numbers_of(report: Report) -> Found:
    """What a report says in numbers: parity, the solver that Euler steps stood for, and how much a row depends on its batch."""
    said = {finding.name: finding.detail for finding in report.findings}
    apart = re.search(r"to (\S+) \(allowed", said["parity"])
    solver = re.search(r"with Euler steps in place of (\w+)'s", said["parity"])
    rows = re.search(r"differ by (\S+) of the velocity's std", said["sub-batch"])
    assert rows is not None, said["sub-batch"]
    assert apart or "bit for bit" in said["parity"], said["parity"]
    return {
        "parity": float(apart[1]) if apart else 0.0,
        "solver": solver[1] if solver else "",
        "microbatch": float(rows[1]),
        "alone": said["batch axes"].startswith("none"),
    }


def _foreign(entry: Entry, given: Mapping[str, Any]) -> list[str]:
    """What no prompt file can hold."""
    kinds = {name: type(value).__name__ for name, value in given.items() if not _in_a_file(value)}
    prompt = [f"its prompt is called {entry.prompt_name}"] if entry.prompt_name != "prompt" else []
    return [*(f"{name} is a {kind}" for name, kind in kinds.items()), *prompt]


def _in_a_file(value: Any) -> bool:
    """Whether a prompt file can hold a value."""
    tensors = value if isinstance(value, (list, tuple)) else [value]
    if all(isinstance(own, torch.Tensor) for own in tensors):
        return True  # a .npy or a WAV file each
    return isinstance(value, (Image.Image, int, float, str)) or _is_several(value)


def _is_several(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(own, Image.Image) for own in value)


# --- inputs ---


def _needs(entry: Entry, cls: type) -> Found:
    """Of what the entry is given, what the pipeline's prologue fails without; and what else it takes."""
    given, media = entry.inputs(0), media_of(cls)
    needs = [argument for argument in given if not _prepares_without(entry, argument)]
    first = ["prompt"] if has_prompt(cls) else []
    return {"needs": (*first, *needs), "takes": tuple(name for name in media if name not in needs)}


def _prepares_without(entry: Entry, argument: str) -> bool:
    try:
        pipeline, inputs, negative = lifted(entry)
        row = {name: value for name, value in (inputs or [{}])[0].items() if name != argument}
        pipeline.preparer.run([Row.of(entry.prompts[0], row)], Settings(3, entry.guided or 1.0, negative))
    except Exception:  # whatever a pipeline says that is not given what it needs
        return False
    return True


# --- learning ---


def _learns(entry: Entry) -> Found:
    pipeline, inputs, negative = lifted(entry)
    found: Found = {"loads": how_to_load(pipeline.pipe, pipeline.denoisers)}
    return found | _gradient(pipeline, entry, (inputs or [{}])[0], negative) | _trained(entry)


def _gradient(pipeline: FlowPipeline, entry: Entry, inputs: dict[str, Any], negative: str | None) -> Found:
    own: dict[str, Any] = {"prompt": entry.prompts[0], "negative_prompt": negative, "inputs": inputs}
    try:
        findings = trainable_findings(pipeline, "auto", entry.guided or 1.0, rank=RANK, **own)
    except Exception as error:  # of the network's backward pass
        return {"failed": _said(error)}
    reached = re.search(r"reached (\d+ of \d+) LoRA tensors", findings[-1].detail)
    return {"gradient": reached[1]} if reached else {"failed": findings[-1].detail}


def _trained(entry: Entry) -> Found:
    """One step with whole groups in a batch, or if that fails with a batch for each sample."""
    failed = ""
    for batch_size in (GROUP, 1):
        try:
            with tempfile.TemporaryDirectory() as folder:
                done = trained(entry, Path(folder), batch_size=batch_size)
        except Exception as error:  # what stops a run is an answer, too
            failed = failed or _said(error)
            continue
        if not done.changed:
            return {"failed": "the step changed nothing that is drawn"}
        smaller = {} if batch_size == GROUP else {"batch_size": batch_size, "failed": failed}
        return {"algorithm": done.algorithm, "redrawn": done.apart, **smaller}
    return {"failed": failed}


def _said(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
