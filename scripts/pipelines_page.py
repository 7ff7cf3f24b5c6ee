"""docs/pipelines.md: made of the answers of `scripts/survey_pipelines.py`, and read again by the test that holds it in step."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from zoo.classes import KINDS
from zoo.survey import Answer

PAGE = "docs/pipelines.md"
ALGORITHMS = {"flow_grpo": "Flow-GRPO", "diffusion_nft": "DiffusionNFT"}
REFUSED, LEFT_OUT, NOT_BUILT = "Refused", "No prompt file can hold their inputs", "Not tried"

INTRODUCTION = """\
# Pipelines

Every pipeline class of diffusers that has a denoising loop, and what flowsteer does with it. Made by
`python scripts/survey_pipelines.py --write` with diffusers {release} on {date}. Do not edit it by hand.

The pipelines are tiny: real classes with random weights (`tests/zoo`), in float32 on a CPU. Nothing here was tried with
published weights. `flowsteer check-model` makes the same check on yours. Modular pipelines of diffusers are not listed.

{words}

A second name after a class is that of its tiny pipeline. A class may have several, with other schedulers, sizes or inputs.
"""
WORDS = {
    "needs": "arguments of the pipeline's `__call__` without which it cannot be called; map a column of the prompt file to "
    "them ([inputs.md](inputs.md))",
    "takes": "other arguments for pictures, masks, videos and sound",
    "equal": "a picture that is drawn by lifted steps against the pipeline's own: *bit for bit*, or the largest difference of "
    "values in [0, 1]. *Euler*: both take Euler steps in place of the pipeline's solver",
    "batch": "how much a row's prediction depends on the other rows of its batch, in standard deviations; *one by one*: the "
    "pipeline takes one row at a time, so each sample takes a network pass of its own",
    "gradient": "how many tensors of a LoRA (`model.lora.targets: auto`) a gradient reaches",
    "trained": "the algorithm of one training step of two samples; `batch_size=1`: only with `rollout.batch_size=1`, see "
    "[below](#only-one-sample-in-a-batch)",
    "redrawn": "what plain diffusers draws with the exported LoRA against what the trained policy draws, as in *equal*",
    "loads": "by which call diffusers loads the LoRA: *pipeline* is `pipe.load_lora_weights`, *network* is the network's "
    "`load_lora_adapter`, *whole* is `flowsteer export`, which writes a whole pipeline "
    "([inputs.md](inputs.md#loading-the-result))",
}

NOTES = {
    "Totals": "A class with several tiny pipelines may be lifted with one of them and refused with another.",
    "Only one sample in a batch": "Larger batches end with this error.",
    "Lifted, but not trained": "A training step ends with this error.",
    REFUSED: "What flowsteer says, before anything is trained. Some are refused for a setting of the scheduler, which can be "
    "changed. A class without a second name is refused for its source alone, or has one tiny pipeline.",
    LEFT_OUT: "Arguments that the pipeline needs, and what they must be. A prompt file holds texts, numbers, pictures, lists "
    "of them, videos and sounds.",
    NOT_BUILT: "Their loops can be lifted, as far as their source tells; there is no tiny pipeline of them that could be "
    "asked more. `flowsteer check-model` says what holds for yours.",
}
HEAD = ("pipeline", "needs", "takes", "equal", "batch", "gradient", "trained", "redrawn", "loads")


def page(answers: Iterable[Answer], release: str, date: datetime.date | None = None) -> str:
    """The page as Markdown."""
    given = sorted(answers, key=lambda answer: (answer.cls.lower(), answer.name))
    words = "\n".join(map(_line, (("word", "what it means"), ("---", "---"), *WORDS.items())))
    parts = [INTRODUCTION.format(release=release, date=date or datetime.date.today(), words=words), totals(given)]
    for kind in KINDS:
        lifted = [answer for answer in given if answer.kind == kind and answer.verdict == "lifted"]
        parts += section(kind, HEAD, [row(answer) for answer in lifted])
    alone = [answer for answer in given if answer.failed and answer.algorithm]
    parts += sentences("Only one sample in a batch", alone, lambda answer: answer.failed)
    failed = [answer for answer in given if answer.failed and not answer.algorithm]
    parts += sentences("Lifted, but not trained", failed, lambda answer: answer.failed)
    for title, verdict in ((REFUSED, "refused"), (LEFT_OUT, "left out"), (NOT_BUILT, "not built")):
        own = [answer for answer in given if answer.verdict == verdict]
        parts += sentences(title, own, lambda answer: answer.said)
    return "\n".join(parts)


def totals(given: Sequence[Answer]) -> str:
    """How many of what, in classes and in tiny pipelines."""
    tiny = [answer for answer in given if answer.tried]
    lifted = [answer for answer in given if answer.verdict == "lifted"]
    counted: list[tuple[str, Collection[Answer]]] = [
        ("with a denoising loop", given),
        ("tried with a tiny pipeline", tiny),
        ("lifted", lifted),
        ("lifted, equal bit for bit", [answer for answer in lifted if answer.parity == 0]),
        ("trained", [answer for answer in lifted if answer.algorithm]),
        ("trained, redrawn bit for bit", [answer for answer in lifted if answer.redrawn == 0]),
        ("refused", [answer for answer in given if answer.verdict == "refused"]),
        ("inputs that no prompt file can hold", [answer for answer in given if answer.verdict == "left out"]),
        ("not tried", [answer for answer in given if answer.verdict == "not built"]),
    ]
    rows = [(what, len({answer.cls for answer in own}), sum(answer.tried for answer in own)) for what, own in counted]
    return "\n".join(section("Totals", ("", "classes", "tiny pipelines"), rows))


def section(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A heading and a table; nothing where there are no rows."""
    if not rows:
        return []
    note = [f"{NOTES[title]}\n"] if title in NOTES else []
    return [f"## {title}\n", *note, *map(_line, (head, ["---"] * len(head), *rows)), ""]


def sentences(title: str, own: Sequence[Answer], said: Callable[[Answer], str]) -> list[str]:
    return section(title, ("pipeline", "why"), [(named(answer), plain(said(answer))) for answer in own])


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def named(answer: Answer) -> str:
    """The class, and its tiny pipeline where that has a name of its own."""
    return f"`{answer.cls}`" + (f" {answer.name}" if answer.name != answer.cls else "")


def row(answer: Answer) -> tuple[str, ...]:
    equal = apart(answer.parity) + (", Euler" if answer.solver else "")
    gradient = answer.gradient
    batch = "one by one" if answer.alone else f"{answer.microbatch:.0e}" if answer.microbatch else "0"
    smaller = f", `batch_size={answer.batch_size}`" if answer.batch_size else ""
    trained = ALGORITHMS[answer.algorithm] + smaller if answer.algorithm else "no"
    cells = (named(answer), code(answer.needs), code(answer.takes), equal, batch, plain(gradient), trained)
    return (*cells, apart(answer.redrawn), loads(answer.loads))


def apart(difference: float | None) -> str:
    if difference is None:
        return ""
    return f"to {difference:.0e}" if difference else "bit for bit"


def loads(written: str) -> str:
    if "load_lora_weights" in written:
        return "pipeline"
    return "network" if "load_lora_adapter" in written else "whole"


def code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def plain(sentence: str) -> str:
    """On one line, with nothing that a table would take for its own; flowsteer's own errors without their type."""
    own = re.sub(r"^(ValueError|LiftError): ", "", sentence)
    return re.sub(r"\s+", " ", own).replace("|", "\\|").strip()


# --- read again ---


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the page's tables.

    Example: ``Line(cls="WanPipeline", name="wan_21", verdict="lifted", equal="bit for bit")``.
    """

    cls: str
    name: str  # of the tiny pipeline; of the class where that has none, or the same
    verdict: str
    equal: str  # empty unless it is lifted


def read_page(text: str) -> tuple[str, list[Line]]:
    """The release of diffusers that the page was made with, and its pipelines."""
    release = re.search(r"with diffusers (\S+) on", text)
    assert release is not None, f"{PAGE} names no release of diffusers"
    return release[1], list(_lines(text))


def _lines(text: str) -> Iterator[Line]:
    verdicts = {REFUSED: "refused", LEFT_OUT: "left out", NOT_BUILT: "not built", **dict.fromkeys(KINDS, "lifted")}
    title = ""
    for line in text.splitlines():
        title = line.removeprefix("## ") if line.startswith("## ") else title
        if title in verdicts and (found := re.match(r"\| `(\w+)`(?: (\w+))? \|", line)):
            equal = re.split(r" (?<!\\)\| ", line)[HEAD.index("equal")] if title in KINDS else ""
            yield Line(cls=found[1], name=found[2] or found[1], verdict=verdicts[title], equal=equal)
