"""What flowsteer says of a pipeline of the zoo: the report of its own check, or the message that refuses it."""

from __future__ import annotations

from typing import Any

from flowsteer.rollout.lifting.selfcheck import Report, check
from zoo.entries import Entry, lifted


def report_of(entry: Entry, guidance_scale: float) -> Report:
    """The report of `flowsteer check-model`. Raises ValueError where the pipeline cannot be lifted at all."""
    pipeline, inputs, negative = lifted(entry)
    arguments: dict[str, Any] = {"guidance_scale": guidance_scale, "negative_prompt": negative, "inputs": inputs}
    return check(pipeline, prompts=entry.prompts, **arguments)


def verdict_of(report: Report) -> str:
    """``bits``, a distance, or why the pipeline must not be trained."""
    if not report.ok:
        return report.text()
    parity = next(finding.detail for finding in report.findings if finding.name == "parity")
    return "bits" if "bit for bit" in parity else parity


def verdict(entry: Entry, guidance_scale: float) -> str:
    """``bits``, a distance, or why the pipeline is refused."""
    try:
        return verdict_of(report_of(entry, guidance_scale))
    except ValueError as error:
        return str(error)
