"""The contract that every reward is held to: a certificate with a report of one page, and a helper for pytest.

``flowsteer rewards certify NAME`` runs it on a reward of ours or of anybody. In the tests of a plug-in::

    import pytest
    from flowsteer.rewards.certify.certificate import CHECKS, certify
    from my_package import MyReward

    @pytest.fixture(scope="module")
    def certificate():
        return certify(MyReward, name="my_reward")

    @pytest.mark.parametrize("name", CHECKS)
    def test_the_contract(certificate, name):
        assert certificate[name].status != "failed", certificate[name].message

The checks are functions, by name (``flowsteer.rewards.certify.checks``). More of them are
handed over with ``certify(..., checks={**CHECKS, "my check": function})``. Besides what `flowsteer.rewards.types.Reward`
lists, a class may declare ``video = True``: videos must then be taken; others are tried with one, which is only reported.

Letters: B images of the trial.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flowsteer.rewards.certify.checks import CHECKS, GATES, CheckFunction
from flowsteer.rewards.certify.inputs import built_in_inputs, check_inputs
from flowsteer.rewards.certify.trial import (
    TOLERANCE,
    NotApplicable,
    Refused,
    Suspected,
    Trial,
    error_text,
    largest_difference,
)
from flowsteer.rewards.types import Reward

Status = Literal["passed", "failed", "warning", "not applicable"]

LIMITS = (
    "not found by any check: whether the score measures what you mean; faults that show only on pictures, prompts or columns "
    "unlike these; swapped axes where pictures are resized anyway; a cut-off beyond the levels and scores seen here; memory "
    "that keeps less than the pictures, quotas beyond the pictures shown; times and seeds unlike the one tried."
)
NOT_TRIED = "not tried, since "
PACKAGES = (  # whose versions have been seen to change scores
    "numpy", "pillow", "opencv-python-headless", "torch", "torchvision", "transformers", "tokenizers", "onnxruntime",
    "rapidocr",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check found."""

    name: str
    status: Status
    message: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What all checks found. ``certificate["order"]`` is the check of that name."""

    name: str
    checks: tuple[Check, ...]
    shape: tuple[int, ...]  # of the images, [B, H, W, 3]
    inputs: str  # hash of the images, prompts and columns
    fingerprint: Mapping[str, Any]  # as the reward declares it
    environment: Mapping[str, str]  # versions
    scores: tuple[float | None, ...] = field(repr=False)  # B, empty where the reward never came to them

    @property
    def ok(self) -> bool:
        """Whether no check was refused."""
        return not self.refused

    @property
    def refused(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.status == "failed")

    @property
    def warned(self) -> tuple[str, ...]:
        """The names of the checks that suspect something that may be meant."""
        return tuple(check.name for check in self.checks if check.status == "warning")

    def __getitem__(self, name: str) -> Check:
        found = {check.name: check for check in self.checks}
        if name not in found:
            raise ValueError(f"there is no check {name!r}; there are: {', '.join(found)}")
        return found[name]

    def text(self) -> str:
        """The report, one page."""
        verdict = "certified" if self.ok else f"REFUSED by: {', '.join(self.refused)}"
        verdict += f"; look at the warnings of: {', '.join(self.warned)}" if self.warned else ""
        count, height, width = self.shape[:3]
        lines = [f"reward {self.name!r}: {verdict}", f"{count} images of {width}x{height}, inputs {self.inputs[:12]}"]
        lines += [
            f"{title}: {', '.join(f'{key} {value}' for key, value in values.items())}"
            for title, values in (("declares", self.fingerprint), ("environment", self.environment))
            if values
        ]
        page = [part for line in lines for part in textwrap.wrap(line, 120, subsequent_indent="    ")]
        tried = [check for check in self.checks if not check.message.startswith(NOT_TRIED)]
        for check in tried:
            head = f"{check.status:<15}{check.name:<20}{check.seconds:7.2f} s  "
            page += textwrap.wrap(
                check.message,
                120,
                initial_indent=head,
                subsequent_indent=" " * len(head),
                placeholder=" ...",
                max_lines=6,
            )
        skipped = [check for check in self.checks if check not in tried]
        if skipped:
            names = ", ".join(check.name for check in skipped)
            page += textwrap.wrap(f"{skipped[0].message}: {names}", 120, subsequent_indent="    ")
        if self.ok:
            page += textwrap.wrap(LIMITS, 120, subsequent_indent="    ")
        return "\n".join(page)

    def golden(self, path: str | Path) -> None:
        """Write the scores with all that they depend on, for ``certify(golden=path)``.

        Raises:
            ValueError: the reward is refused, or the file is there already.
        """
        if not self.ok or not self.scores:
            raise ValueError(
                f"reward {self.name!r} is not certified ({', '.join(self.refused)}): its scores are no reference"
            )
        path = Path(path)
        if path.exists():
            raise ValueError(f"{path} exists already; delete it first, or choose another file")
        names = ("inputs", "fingerprint", "environment", "scores")
        content = {"reward": self.name} | {name: getattr(self, name) for name in names}
        path.write_text(json.dumps(content, indent=1, default=str, allow_nan=False) + "\n", encoding="utf-8")


def certify(
    make: Callable[[], Reward],
    *,
    name: str,
    images: np.ndarray | None = None,
    prompts: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
    uses_prompt: bool | None = None,
    tolerance: float = TOLERANCE,
    golden: str | Path | None = None,
    checks: Mapping[str, CheckFunction] = CHECKS,
    folder: Path | None = None,
    progress: Callable[[str], object] = lambda title: None,
) -> Certificate:
    """Hold a reward to the contract.

    Args:
        make: makes an instance; called twice. ``functools.partial(load_reward, "ocr", mode="recognize")`` does.
        name: what messages call it.
        images: uint8 [B, H, W, 3] in RGB, at least four, with scores that differ; None: the built-in ones.
        prompts: B texts that the reward can judge; given with the images.
        columns: further columns, B values each. Of those that the reward declares as ``pictures``, paths or arrays; they are
            made of the images where there are none.
        uses_prompt: whether the prompt must matter; None: as the reward declares.
        tolerance: what scores may differ by and still be equal, relative to their spread.
        golden: a file of `Certificate.golden`, with which the scores must agree: one more check, ``golden scores``.
        checks: by name, in this order.
        folder: what paths in the columns are relative to.
        progress: is told the name of each check before it begins, so that it is known which one ended the process.

    Returns:
        Certificate: a check that raises has failed; those after a failed one of `GATES` are not tried.

    Raises:
        ValueError: images, prompts and columns do not fit together, or the golden file is none.
    """
    if (images is None) != (prompts is None):
        raise ValueError("images and prompts belong together: give both, or neither for the built-in ones")
    if images is None or prompts is None:
        images, prompts = built_in_inputs()
    check_inputs(images, prompts, columns or {})
    if golden is not None:
        checks = {**checks, "golden scores": golden_check(read_golden(golden))}
    trial = Trial(
        make,
        name=name,
        images=images,
        prompts=prompts,
        columns=columns or {},
        uses_prompt=uses_prompt,
        tolerance=tolerance,
        folder=folder,
    )
    results: list[Check] = []
    try:
        for title, check in checks.items():
            stopped = next((done.name for done in results if done.status == "failed" and done.name in GATES), None)
            if stopped is not None:
                message = f"{NOT_TRIED}{stopped!r} was refused"
                results.append(Check(name=title, status="not applicable", message=message, seconds=0.0))
            else:
                progress(title)
                results.append(run_check(title, check, trial))
        answered = any(check.name == "answer" and check.status == "passed" for check in results)
        return Certificate(
            name=name,
            checks=tuple(results),
            shape=images.shape,
            inputs=trial.inputs,
            fingerprint=trial.fingerprint if answered else {},
            environment=environment(),
            scores=tuple(None if np.isnan(score) else float(score) for score in trial.own) if answered else (),
        )
    finally:
        trial.close()


def run_check(name: str, check: Callable[[Trial], str], trial: Trial) -> Check:
    """One check, whatever the reward does in it."""
    started = time.perf_counter()
    status: Status = "failed"
    try:
        status, message = "passed", check(trial)
    except NotApplicable as reason:
        status, message = "not applicable", str(reason)
    except Suspected as reason:
        status, message = "warning", str(reason)
    except Refused as reason:
        status, message = "failed", str(reason)
    except Exception as error:  # the plug-in of somebody else: the other checks must still be made
        message = f"raised {error_text(error)}"
    return Check(name=name, status=status, message=message, seconds=time.perf_counter() - started)


def golden_check(golden: Mapping[str, Any]) -> CheckFunction:
    """The check that scores are those of a golden file."""

    def golden_scores(trial: Trial) -> str:
        if golden["inputs"] != trial.inputs:
            raise Refused("the golden file was made of other images, prompts or columns")
        now: dict[str, Any] = {**environment(), **trial.fingerprint}
        then: dict[str, Any] = {**golden["environment"], **golden["fingerprint"]}
        differing = [
            f"{key} {then.get(key, 'absent')} -> {now.get(key, 'absent')}"
            for key in sorted(then.keys() | now.keys())
            if str(then.get(key)) != str(now.get(key))
        ]
        why = f"the fingerprint differs: {', '.join(differing)}" if differing else "the fingerprint is the same"
        scores = np.array([np.nan if score is None else score for score in golden["scores"]], dtype=np.float64)
        if not trial.same(trial.own, scores):
            raise Refused(f"{largest_difference(trial.own, scores)} in the golden file; {why}")
        return f"as in the golden file; {why}"

    return golden_scores


def environment() -> dict[str, str]:
    """What is installed here that scores may depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_golden(path: str | Path) -> Mapping[str, Any]:
    """What `Certificate.golden` wrote. Raises ValueError where the file is something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no golden file: {error}; Certificate.golden writes one") from None
    lacking = {"inputs", "fingerprint", "environment", "scores"} - set(content if isinstance(content, dict) else ())
    if lacking:
        raise ValueError(
            f"{path} is no golden file: it lacks {', '.join(sorted(lacking))}; Certificate.golden writes one"
        )
    return content


__all__ = ["CHECKS", "Certificate", "Check", "NotApplicable", "Refused", "Suspected", "Trial", "certify"]
