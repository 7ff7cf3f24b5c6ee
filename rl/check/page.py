"""Runs the checks over an algorithm, and prints one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flowsteer.rl.check.checks import CHECKS, Check, CheckFailed, NotApplicable, Trial
from flowsteer.rl.check.toy import FIXED
from flowsteer.rl.check.variants import VARIANTS
from flowsteer.rl.config import parse_overrides
from flowsteer.rl.plugins import find_algorithm

_MARKS = {"passed": "ok  ", "failed": "FAIL", "not applicable": "-   "}


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one check found."""

    check: str
    status: Literal["passed", "failed", "not applicable"]
    detail: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """What all checks found about one algorithm under one set of settings."""

    title: str
    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """True if no check failed."""
        return all(line.status != "failed" for line in self.lines)

    def text(self) -> str:
        """One screen: a verdict and a line per check."""
        width = max(len(line.check) for line in self.lines)
        failed = sum(line.status == "failed" for line in self.lines)
        verdict = "passes all checks" if self.ok else f"fails {failed} of {len(self.lines)} checks"
        rows = [f"  {_MARKS[line.status]}  {line.check:<{width}}  {line.detail}" for line in self.lines]
        return "\n".join([f"{self.title}: {verdict}", *rows])


def trials_of(name: str, overrides: Mapping[str, Any]) -> dict[str, Trial]:
    """The settings under which an algorithm is tried, by title.

    A built-in algorithm is tried in all its variants, which have settings for the toy; any other one with its defaults.
    ``overrides`` of the toy's configuration (``algorithm.beta``, ``rollout.plan``) change them.

    Raises:
        ValueError: there is no such algorithm, or it cannot be tried with these settings.
    """
    find_algorithm(name)
    for key, value in FIXED.items():
        if f"rollout.{key}" in overrides:
            raise ValueError(f"the toy's own rollout.{key}={value} stays as it is; leave it out")
    variants = {title: given for title, given in VARIANTS.items() if given["algorithm"]["name"] == name}
    trials = {}
    for title, given in (variants or {name: {"algorithm": {"name": name}}}).items():
        own = {
            key.removeprefix("algorithm."): value for key, value in overrides.items() if key.startswith("algorithm.")
        }
        rest = {key: value for key, value in overrides.items() if not key.startswith("algorithm.")}
        trials[title] = Trial(overrides={**given, **rest, "algorithm": {**given["algorithm"], **own}})
        trials[title].run()  # what is wrong with the settings is said once, and not by every check
    return trials


def check_algorithm(
    title: str,
    trial: Trial,
    *,
    checks: Mapping[str, Check] = CHECKS,
    progress: Callable[[str], None] = lambda name: None,
) -> Page:
    """Run the checks, some seconds each. What the algorithm raises in one is that check's failure."""
    lines: list[Line] = []
    for name, check in checks.items():
        progress(name)
        lines.append(_line(name, check, trial))
    return Page(title=f"algorithm {title!r}", lines=tuple(lines))


def _line(name: str, check: Check, trial: Trial) -> Line:
    try:
        return Line(check=name, status="passed", detail=check(trial))
    except NotApplicable as reason:
        return Line(check=name, status="not applicable", detail=str(reason))
    except CheckFailed as error:
        return Line(check=name, status="failed", detail=str(error))
    except Exception as error:  # somebody else's code: the other checks still say something
        return Line(check=name, status="failed", detail=f"{type(error).__name__}: {error}")


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """``["algorithm.beta=5", "rollout.plan=none"]`` to ``{"algorithm.beta": 5, "rollout.plan": "none"}``.

    Raises ValueError for something else than ``section.key=value``.
    """
    settings = {}
    for each in given:
        key, separator, value = each.partition("=")
        if not separator or "." not in key:
            raise ValueError(f"{each!r} is not of the form section.key=value, such as algorithm.updates_per_rollout=2")
        settings[key] = parse_overrides([f"value={value}"])["value"]
    return settings
