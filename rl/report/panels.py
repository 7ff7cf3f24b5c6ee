"""What a report shows of a run's numbers: which curves there are, what each means, and what is healthy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from flowsteer.rl.intervals import Estimate
from flowsteer.rl.report import curves


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a number is, and what it looks like in a run that goes well."""

    title: str
    meaning: str
    healthy: str
    guide: float | None = None  # a value worth a line of its own


REWARD = Meaning(
    title="Reward",
    meaning="Mean of the total score over the pictures of a training step; the band is their standard deviation.",
    healthy="rises, then levels off. Only the evaluation, on fixed prompts and seeds, tells progress from luck.",
)
REWARD_PART = Meaning(
    title="",
    meaning="Mean of this score alone, before its weight.",
    healthy="rises or stays. One that falls while the total rises is paying for the others.",
)
EVALUATION = Meaning(
    title="",
    meaning="Mean over the evaluation's prompts, on fixed seeds; the bars are 95 % intervals over prompts.",
    healthy="rises by more than the bars. A fall while the training reward rises is over-fitting to the training prompts.",
)
TIME = Meaning(
    title="Where the time went",
    meaning="Seconds of each training step by act, one on top of the other.",
    healthy="even. Growing bars mean a leak or a shared machine; much “score” (waiting for rewards) wants faster ones.",
)
UNKNOWN = Meaning(title="", meaning="Reported by the algorithm or a reward; there is no explanation here.", healthy="")

MEANINGS: dict[str, Meaning] = {
    "gradient_agreement": Meaning(
        title="Gradient agreement",
        meaning="Cosine between the gradients of two halves of an update's samples: how much of it is signal?",
        healthy="0.1 (dashed) or more is mostly signal, though not all of the reward: a pull that all samples share counts. "
        "Near 0 it is mostly noise and needs many updates, larger groups, a denser reward or other denoising steps. It grows "
        "with the batch: compare runs of equal size.",
        guide=0.1,
    ),
    "kl": Meaning(
        title="Distance to the reference (kl)",
        meaning="How far the policy is from its start: the KL of a step's Gaussians per latent dimension where transitions "
        "are trained, else the squared distance of the predictions.",
        healthy="grows slowly and levels off. A sudden climb: look at the pictures, and raise kl_coef.",
    ),
    "clip_fraction": Meaning(
        title="Clip fraction",
        meaning="Part of the transitions whose ratio has left the clip range.",
        healthy="between 0 and about a half. Always 0: the steps are small and the clip does nothing; near 1: most samples "
        "no longer count, so lower the learning rate.",
    ),
    "ratio_deviation": Meaning(
        title="Ratio deviation",
        meaning="Mean size of the log ratio between the policy now and the one that drew the samples.",
        healthy="of the clip range's order. A first update has exactly 0, since rollout and training compute the same.",
    ),
    "ratio": Meaning(
        title="Ratio",
        meaning="Mean ratio of the densities under the policy now and under the one that drew the samples.",
        healthy="very close to 1.",
        guide=1.0,
    ),
    "old_distance": Meaning(
        title="Distance to the old policy",
        meaning="Squared distance between the predictions of the policy now and of the one that drew the samples.",
        healthy="small and steady. Growth without end: the old policy does not follow (old_decay_slope, old_decay_max).",
    ),
    "margin": Meaning(
        title="Margin of preferences",
        meaning="Mean logit of the pairs: how much more than the reference the policy prefers what the judge prefers.",
        healthy="rises from 0. Beyond about 2 the pairs are learnt and teach little more: a lower beta, a newer reference.",
        guide=0.0,
    ),
    "accuracy": Meaning(
        title="Accuracy of preferences",
        meaning="Of the pairs, how many the policy prefers as the judge does, relative to the reference.",
        healthy="above a half (dashed), which is where it starts.",
        guide=0.5,
    ),
    "pairs": Meaning(
        title="Groups that make a pair",
        meaning="Part of the groups whose best and worst samples differ by more than the threshold.",
        healthy="high. A low one wastes samples: take a denser reward, larger groups, or a lower threshold.",
    ),
    "group_weight": Meaning(
        title="Weight of groups (DGPO)",
        meaning="Mean of the sigmoid that weighs each group; near 0 where the policy already prefers its better samples.",
        healthy="starts at a half and falls. Near 0 nothing is left to learn at this beta.",
        guide=0.5,
    ),
    "matching_loss": Meaning(
        title="Matching error",
        meaning="Mean squared error of the prediction on the policy's own samples, noised again.",
        healthy="steady, or slowly falling. Growth: the policy leaves what it can predict; lower the learning rate.",
    ),
    "grad_norm": Meaning(
        title="Gradient norm",
        meaning="Length of the gradient before it is clipped, mean over the step's updates.",
        healthy="steady. Growth, or single peaks far above the rest, ask for a lower learning rate.",
    ),
    "learning_rate": Meaning(
        title="Learning rate",
        meaning="Of the step's last update, with warm-up and schedule.",
        healthy="as configured.",
    ),
    "loss": Meaning(
        title="Loss",
        meaning="What the optimiser sees. Its level says little, since the samples change with the policy.",
        healthy="finite, without jumps.",
    ),
    "reward_group_std": Meaning(
        title="Deviation within groups",
        meaning="How much the scores of one prompt's pictures differ, mean over groups: the raw material of learning.",
        healthy="clearly above 0. A fall towards 0 means that the pictures of a prompt have become alike.",
    ),
    "zero_deviation_fraction": Meaning(
        title="Groups of equal scores",
        meaning="Part of the groups whose scores are all equal, so that they teach nothing.",
        healthy="low. Above a half, most of the sampling is wasted: take a denser reward or larger groups.",
    ),
    "reward_missing": Meaning(
        title="Missing scores",
        meaning="Pictures of a step that no reward could score; they are left out, never counted as 0.",
        healthy="0.",
    ),
    "incomparable_groups": Meaning(
        title="Incomparable groups",
        meaning="Groups with fewer than two scores, which cannot be compared.",
        healthy="0.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A curve with its explanation, or the sentence that says it is constant."""

    title: str
    name: str
    about: Meaning
    now: str
    svg: Markup | None
    note: str = ""


def evaluation_panels(steps: Sequence[int], summaries: Sequence[dict[str, Estimate]]) -> list[Panel]:
    """One panel per score of the evaluations; a part that is the total itself is left out.

    Args:
        steps: after which the evaluations were made.
        summaries: of each, name -> mean and 95 % interval, NaN where there is none.
    """
    panels = []
    names = dict.fromkeys(name for summary in summaries for name in summary)
    series = {name: [summary.get(name, Estimate(*[math.nan] * 3)) for summary in summaries] for name in names}
    for name in sorted(names, key=lambda name: (name != "total", name)):
        means = [own.mean for own in series[name]]
        shown = [place for place, mean in enumerate(means) if not math.isnan(mean)]
        if not shown or (name != "total" and _same(means, [own.mean for own in series.get("total", [])])):
            continue
        last = series[name][shown[-1]]
        svg = curves.draw_intervals(
            [steps[place] for place in shown],
            [series[name][place] for place in shown],
            salt=f"evaluation {name}",
        )
        panels.append(
            Panel(
                title="Total score" if name == "total" else name,
                name="evaluation",
                about=EVALUATION,
                now=f"{number(last.mean)} ({number(last.low)} to {number(last.high)})",
                svg=Markup(svg) if len(shown) > 1 else None,
                note="" if len(shown) > 1 else "One evaluation so far.",
            )
        )
    return panels


def reward_panels(steps: Sequence[int], values: dict[str, list[float]]) -> list[Panel]:
    """The reward's mean with its deviation, and each of its parts."""
    panels = []
    if "reward_mean" in values:
        panels.append(_panel("reward_mean", REWARD, steps, values["reward_mean"], band=values.get("reward_std")))
    for name in sorted(name for name in values if name.startswith("reward/")):
        if not _same(values[name], values.get("reward_mean", [])):
            panels.append(_panel(name, REWARD_PART, steps, values[name], title=name.removeprefix("reward/")))
    return panels


def learning_panels(steps: Sequence[int], values: dict[str, list[float]]) -> list[Panel]:
    """Everything else that was measured: first what `MEANINGS` explains, in its order."""
    drawn = {"reward_mean", "reward_std", "num_updates"}
    rest = sorted(n for n in values if n not in drawn and n not in MEANINGS and "/" not in n)
    names = [name for name in MEANINGS if name in values] + rest
    panels = [_panel(name, MEANINGS.get(name, UNKNOWN), steps, values[name]) for name in names]
    return sorted(
        panels, key=lambda panel: panel.svg is None
    )  # those without a drawing are small: at the end, together


def time_panel(steps: Sequence[int], values: dict[str, list[float]]) -> dict[str, Any] | None:
    """Seconds per act as a stack and as a table of (act, seconds, part of the whole), or None without any."""
    acts = {name.removeprefix("seconds/"): column for name, column in values.items() if is_act(name)}
    totals = {act: float(np.nansum(column)) for act, column in acts.items()}
    whole = sum(totals.values())
    if not whole:
        return None
    svg = Markup(curves.draw_stack(steps, acts, salt="time"))
    rows = [(act, seconds, seconds / whole) for act, seconds in totals.items()]
    return {"svg": svg, "about": TIME, "rows": rows, "per_step": whole / len(steps)}


def _panel(
    name: str, about: Meaning, steps: Sequence[int], values: Sequence[float], *, title: str = "", band: Any = None
) -> Panel:
    finite = [value for value in values if not math.isnan(value)]
    constant = len(set(finite)) <= 1
    svg = "" if constant else curves.draw_line(steps, values, salt=name, band=band, guide=about.guide)
    notes = []
    if not finite:
        notes.append("No finite number so far.")
    elif constant:
        notes.append(f"The same at {'the one step' if len(steps) == 1 else f'all {len(steps)} steps'} so far.")
    if len(steps) > len(finite) > 0:
        notes.append(f"Of {len(steps)} steps, {len(steps) - len(finite)} without a finite number.")
    size = curves.points_per_mean(len(steps))
    if size > 1 and not constant:
        notes.append(f"Each point is the mean of {size} steps.")
    return Panel(
        title=title or about.title or name,
        name=name,
        about=about,
        now=number(finite[-1]) if finite else "–",
        svg=Markup(svg) if svg else None,
        note=" ".join(notes),
    )


def number(value: Any) -> str:
    """A cell's text: three decimals of a float, or three digits where it is small or large; – for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        text = f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"
        return text.replace("-", "−", 1) if text.startswith("-") else text
    return str(value)


def is_act(name: str) -> bool:
    return name.startswith("seconds/")


def _same(values: Sequence[float], others: Sequence[float]) -> bool:
    """Equal up to the rounding of a weighted sum in float32."""
    return len(values) == len(others) and np.allclose(values, others, rtol=1e-5, atol=1e-7, equal_nan=True)
