"""Curves of a report as small inline SVG.

The SVG keeps text as text and takes its colours from CSS variables of the page (``--ink``, ``--faint``, ``--curve1`` ...),
so that it follows the reader's light or dark mode.

Letters: N training steps.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MAX_POINTS = 400  # more cannot be told apart in a picture this wide
_SMOOTH_FROM = 30  # points; shorter curves are read as they are
_COLOURS = ("#c10001", "#c20002", "#c30003", "#c40004", "#c50005", "#c60006")  # placeholders for --curve1 ... --curve6
_INK, _FAINT = "#0a0a0a", "#0b0b0b"  # placeholders for --ink and --faint
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)"} | {
    colour: f"var(--curve{number})" for number, colour in enumerate(_COLOURS, start=1)
}


def draw_line(
    steps: Sequence[int],
    values: Sequence[float],
    *,
    salt: str,
    band: Sequence[float] | None = None,
    guide: float | None = None,
) -> str:
    """A curve over training steps, with the band ``values ± band`` and a dashed line at ``guide``.

    Args:
        steps: N, increasing.
        values: N, NaN where there is none.
        salt: another one for each drawing of a page, so that their ids differ.
        band: N, drawn on both sides.
        guide: a value worth a line of its own.
    """
    x, y = thin(steps), thin(values)
    figure, axes = _figure()
    if band is not None:
        half = thin(band)
        axes.fill_between(x, y - half, y + half, color=_COLOURS[0], alpha=0.15, linewidth=0)
    if len(y) >= _SMOOTH_FROM:
        axes.plot(x, y, color=_COLOURS[0], linewidth=0.8, alpha=0.4)
        axes.plot(x, smooth(y), color=_COLOURS[0], linewidth=1.6)
    else:
        axes.plot(x, y, color=_COLOURS[0], linewidth=1.4, marker=".", markersize=5)
    if guide is not None:
        axes.axhline(guide, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    return _svg(figure, salt)


def draw_intervals(steps: Sequence[int], estimates: Sequence[tuple[float, float, float]], *, salt: str) -> str:
    """Means with bars, (mean, low, high) each (NaN: no bar), over training steps."""
    means, lows, highs = np.asarray(estimates, dtype=np.float64).T
    bars = np.clip(
        np.nan_to_num([means - lows, highs - means]), 0, None
    )  # rounding may leave a mean beyond its interval
    figure, axes = _figure()
    axes.errorbar(
        steps, means, yerr=bars, color=_COLOURS[0], linewidth=1.4, marker="o", markersize=3.5,
        elinewidth=1, capsize=2.5,
    )  # fmt: skip
    return _svg(figure, salt)


def draw_stack(steps: Sequence[int], parts: Mapping[str, Sequence[float]], *, salt: str) -> str:
    """Named series, one on top of the other; NaN counts as 0."""
    figure, axes = _figure(height=2.4)
    x = thin(steps)
    width = float(np.min(np.diff(x))) if len(x) > 1 else 1.0
    edges = np.append(x - width / 2, x[-1] + width / 2)
    floor = np.zeros_like(x)
    for number, (name, values) in enumerate(parts.items()):
        top = floor + np.nan_to_num(thin(values))
        axes.stairs(top, edges, baseline=floor, fill=True, color=_COLOURS[number % len(_COLOURS)], label=name)
        floor = top
    axes.set_ylim(bottom=0)
    axes.set_ylabel("seconds")
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8, borderaxespad=0.2, handlelength=1,
        columnspacing=1.2,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(_INK)
        text.set_parse_math(False)  # a name is no formula
    return _svg(figure, salt)


def thin(values: Sequence[float]) -> np.ndarray:
    """Means of as many neighbours each as it takes to be left with at most 400 points; float64, NaN entries are left out."""
    array = np.asarray(values, dtype=np.float64)
    size = points_per_mean(len(array))
    padded = np.pad(array, (0, -len(array) % size), constant_values=np.nan).reshape(-1, size)
    return _mean(np.where(np.isfinite(padded), padded, 0).sum(1), np.isfinite(padded).sum(1))


def points_per_mean(count: int) -> int:
    """How many of ``count`` points `thin` makes one of."""
    return max(1, math.ceil(count / _MAX_POINTS))


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over about a fifteenth of the points, shorter at the ends; NaN entries are left out."""
    window = np.ones(2 * max(1, len(values) // 30) + 1)
    finite = np.isfinite(values)
    return _mean(np.convolve(np.where(finite, values, 0), window, "same"), np.convolve(finite, window, "same"))


def _mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _figure(height: float = 2.1):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("training step")
    for item in (axes.xaxis, axes.yaxis):
        item.label.set(color=_FAINT, fontsize=8)
        item.set_tick_params(color=_FAINT, labelcolor=_FAINT, labelsize=8, length=2.5, width=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.grid(axis="y", color=_FAINT, alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=_FAINT, linewidth=0.6)
    return figure, axes


def _svg(figure, salt: str) -> str:
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": salt,
    }
    file = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # they repeat from drawing to drawing
    text = re.sub(r"<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's
    text = re.sub(r'^<svg .*?viewBox="([^"]*)".*?>', r'<svg viewBox="\1" aria-hidden="true">', text, flags=re.DOTALL)
    text = re.sub(r' d="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match.group()), text)
    text = re.sub(r"\s*\n\s*", " ", text).replace("xlink:href", "href")
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    return text
