"""A run's folder as one page for people: ``report.html``, a single offline file without scripts.

It is made to be passed on: it names versions, but no machine, no user and no absolute path.

Letters: P evaluation prompts, S noise seeds of each.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import jinja2
import numpy as np
import torch
import yaml
from PIL import Image

from flowsteer.rl.export import LORA_FILE, SECOND
from flowsteer.rl.intervals import Estimate, mean_and_interval
from flowsteer.rl.metrics import read_metrics
from flowsteer.rl.report.panels import evaluation_panels, is_act, learning_panels, number, reward_panels, time_panel
from flowsteer.rl.report.sheets import cut_films, embed, embed_tile, read_picture, sheets_of
from flowsteer.rollout.lifting.loading import EMBEDDED, SHIPPED

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "deepspeed")
_MAX_TILE = 256
_CHANGED = 6  # prompts that are shown for each direction
_COMPARED = 24  # prompts whose pictures are shown side by side
_COMPARED_PIXELS = 4e6  # of all their pictures together: with many evaluations they get smaller
_MIN_TILE = 64


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One evaluation as `Evaluations._keep` wrote it."""

    step: int  # training steps that had been done
    prompts: list[str]  # P
    summary: dict[str, Estimate]  # name -> mean and 95 % interval, NaN where there is none
    scores: dict[str, torch.Tensor]  # name -> [P, S] float64, NaN where missing
    picture: Path


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures of the same prompts and seeds after several evaluations, N of them, to be laid side by side."""

    names: list[str]  # N, "before" and "after 20 steps"
    prompts: list[str]
    scores: list[list[float]]  # of each prompt N totals, means over its seeds, NaN where missing
    images: list[list[str]]  # likewise, data URIs
    num_prompts: int  # of the evaluation, of which these are some
    left_out: int  # evaluations of other prompts, or whose pictures are not there or cannot be cut


@dataclass(frozen=True, kw_only=True)
class Changed:
    """A prompt whose score changed, with its pictures where they could be cut out."""

    prompt: str
    before: float
    after: float
    pictures: tuple[str, str] | None


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder, finished or not, and return its path.

    Reads ``config.json``, ``metrics.jsonl``, ``evaluations/`` and, where they are, ``results.json`` (title -> ``columns``,
    ``rows`` and ``note`` of a further table) and ``pictures/*.png`` (the file's name is the caption).

    Raises:
        ValueError: the folder is not a run's, has no metrics yet, or one of these files cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no config.json")
    config = _read_json(folder / "config.json")
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise ValueError(
            f"{folder} has no metrics yet (metrics.jsonl is missing or empty); wait for the first step to end"
        )
    evaluations = read_evaluations(folder)
    steps = [line["step"] + 1 for line in lines]  # as in evaluations: steps that have been done
    values = _columns(lines)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "signed": signed, "duration": duration}
    template = environment.from_string(
        resources.files("flowsteer.rl.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    text = template.render(
        name=folder.resolve().name,
        config=config,
        model=_public(config["model"]["path"]),
        steps_done=steps[-1],
        num_updates=_last(values.get("num_updates", [])),
        seconds=sum(np.nansum(column) for name, column in values.items() if is_act(name)),
        has_missing=bool(np.nansum(values.get("reward_missing", [0.0]))),
        evaluations=evaluations,
        difference=difference(evaluations),
        changed=changed_prompts(evaluations),
        compared=compared_pictures(evaluations),
        pictures=_extra_pictures(folder),
        results=_results(folder),
        evaluation_panels=evaluation_panels([e.step for e in evaluations], [e.summary for e in evaluations]),
        reward_panels=reward_panels(steps, values),
        learning_panels=learning_panels(steps, values),
        time=time_panel(steps, values),
        configuration=yaml.safe_dump(_public(config), sort_keys=False, allow_unicode=True),
        environment=environment_facts(),
        loading=loading_snippet(config, folder, evaluations),
        exported=(folder / "export" / LORA_FILE).exists(),
    )
    path = folder / "report.html"
    temporary = folder / ".report.html.part"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


# ---- evaluations


def read_evaluations(folder: Path) -> list[Evaluated]:
    """Every evaluation of a run in the order of its steps."""
    found = []
    for path in sorted((folder / "evaluations").glob("step_*.json")):
        table = _read_json(path)
        try:
            found.append(
                Evaluated(
                    step=table["step"],
                    prompts=table["prompts"],
                    summary={name: _estimate(own) for name, own in table["summary"].items()},
                    scores={
                        name: torch.tensor([[_float(score) for score in row] for row in rows], dtype=torch.float64)
                        for name, rows in table["scores"].items()
                    },
                    picture=path.with_suffix(".png"),
                )
            )
            found[-1].scores["total"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is not an evaluation of a run ({error!r}); remove it to go on without it"
            ) from None
    return sorted(found, key=lambda evaluation: evaluation.step)


def difference(evaluations: Sequence[Evaluated]) -> tuple[float, float, str] | None:
    """Last minus first total, paired over prompts and seeds, or None where the two are not of the same prompts.

    Returns:
        The mean, half of its 95 % interval over prompts, and what the two say in words.
    """
    if len(evaluations) < 2:
        return None
    first, last = evaluations[0], evaluations[-1]
    before, after = first.scores["total"], last.scores["total"]
    if first.prompts != last.prompts or before.shape != after.shape:
        return None
    mean, half = mean_and_interval(after - before)
    if math.isnan(half):
        return mean, half, "too few scores to tell it from noise"
    if abs(mean) <= half:
        return mean, half, "within the noise of this evaluation"
    return mean, half, f"{'a gain' if mean > 0 else 'a loss'} beyond the noise of this evaluation"


def changed_prompts(evaluations: Sequence[Evaluated]) -> tuple[list[Changed], list[Changed]]:
    """The prompts that gained most and that lost most between the first evaluation and the last."""
    if difference(evaluations) is None:
        return [], []
    first, last = evaluations[0], evaluations[-1]
    before, after = (evaluation.scores["total"].nanmean(1) for evaluation in (first, last))  # [P]
    gains = (after - before).tolist()
    order = sorted((place for place, gain in enumerate(gains) if not math.isnan(gain)), key=lambda place: -gains[place])
    tiles = _pairs(first, last)

    def entry(place: int) -> Changed:
        pair = (embed_tile(tiles[0][place], _MAX_TILE), embed_tile(tiles[1][place], _MAX_TILE)) if tiles else None
        return Changed(
            prompt=first.prompts[place], before=float(before[place]), after=float(after[place]), pictures=pair
        )

    gained = [entry(place) for place in order[:_CHANGED] if gains[place] > 0]
    lost = [entry(place) for place in order[::-1][:_CHANGED] if gains[place] < 0]
    return gained, lost


def _pairs(first: Evaluated, last: Evaluated) -> list[list[list[Image.Image]]] | None:
    if not (first.picture.exists() and last.picture.exists()):
        return None
    return cut_films([sheets_of(first.picture), sheets_of(last.picture)], len(first.prompts))


def compared_pictures(evaluations: Sequence[Evaluated]) -> Pictures | None:
    """At most 24 of the last evaluation's prompts, spread evenly, with the pictures of all evaluations of these prompts."""
    if not evaluations:
        return None
    prompts = evaluations[-1].prompts
    alike = [own for own in evaluations if own.prompts == prompts and own.picture.exists()]
    sheets = [sheets_of(own.picture) for own in alike]
    usable = [place for place, own in enumerate(sheets) if own[0].size == sheets[-1][0].size]
    tiles = cut_films([sheets[place] for place in usable], len(prompts)) if usable else None
    if tiles is None:
        return None
    shown = [alike[place] for place in usable]
    count = min(_COMPARED, len(prompts))
    chosen = [place * len(prompts) // count for place in range(count)]
    first = tiles[0][0][0]
    pixels = _COMPARED_PIXELS / (count * len(shown)) * first.width / first.height  # a tile's width, squared
    width = max(_MIN_TILE, min(_MAX_TILE, int(math.sqrt(pixels))))
    totals = [own.scores["total"].nanmean(1).tolist() for own in shown]
    return Pictures(
        names=["before" if own.step == 0 else f"after {own.step} step{'' if own.step == 1 else 's'}" for own in shown],
        prompts=[prompts[place] for place in chosen],
        scores=[[total[place] for total in totals] for place in chosen],
        images=[[embed_tile(pictures[place], width) for pictures in tiles] for place in chosen],
        num_prompts=len(prompts),
        left_out=len(evaluations) - len(shown),
    )


# ---- the rest of the page


def loading_snippet(config: dict[str, Any], folder: Path, evaluations: Sequence[Evaluated]) -> str:
    """Python that draws with the result in diffusers."""
    settings = {"height": None, "width": None, "call": {}, "dtype": "float32", **config["model"]}
    model, output = settings["path"], Path(config.get("output", folder))
    name = output.name if output.is_absolute() else output.as_posix()  # no paths of a machine: the page may travel
    section = config.get("evaluation") or config["rollout"]
    prompt = evaluations[-1].prompts[0] if evaluations else "a prompt"
    arguments = {key: section.get(key) for key in ("num_inference_steps", "guidance_scale", "negative_prompt")}
    arguments |= {"height": settings["height"], "width": settings["width"], **settings["call"]}
    if model in SHIPPED:
        arguments = {**arguments, **SHIPPED[model], **settings["call"]}
    call = ", ".join(f"{key}={value!r}" for key, value in arguments.items() if value is not None)
    picture = f"image = pipe({prompt!r}, {call}).images[0]"  # some pipelines name guidance otherwise, or give frames
    dtype = "" if settings["dtype"] == "float32" else f", dtype=torch.{settings['dtype']}"
    torch_import = "import torch\n" if dtype else ""
    if config["model"]["lora"] is None:
        return (
            f"# once, in a terminal: flowsteer export {name} tuned-pipeline\n"
            f"{torch_import}from diffusers import DiffusionPipeline\n\n"
            f"pipe = DiffusionPipeline.from_pretrained('tuned-pipeline'{dtype})\n{picture}"
        )
    load = f"DiffusionPipeline.from_pretrained({_public(model)!r}{dtype})"
    source = f"{torch_import}from diffusers import DiffusionPipeline"
    if model in SHIPPED:
        absent = ", text_encoder_3=None, tokenizer_3=None" if model == EMBEDDED else ""
        load = f"DiffusionPipeline.from_pretrained(str(files('flowsteer.rollout') / {model!r}){absent})"
        source = "from importlib.resources import files\n\nfrom diffusers import DiffusionPipeline"
    weights = f"pipe.load_lora_weights({f'{name}/export'!r})"
    if (folder / "export" / SECOND).exists():
        weights += f"\npipe.load_lora_weights({f'{name}/export/{SECOND}'!r}, load_into_{SECOND}=True)"
    return f"{source}\n\npipe = {load}\n{weights}\n{picture}"


def environment_facts() -> dict[str, str]:
    """Versions of what the report was made with, which is what the run used unless it was written elsewhere."""
    facts = {"python": platform.python_version()}
    facts |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    facts |= {"platform": f"{platform.system()} {platform.machine()}", "threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name(0)
    return facts


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"+{number(value)}" if value > 0 else number(value)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "results.json"
    if not path.exists():
        return {}
    tables = _read_json(path)
    for title, table in tables.items():
        if not isinstance(table, dict) or not {"columns", "rows"} <= table.keys():
            raise ValueError(f"{path}: the table {title!r} needs 'columns' and 'rows' (and may have a 'note')")
        if any(len(row) != len(table["columns"]) for row in table["rows"]):
            raise ValueError(
                f"{path}: every row of the table {title!r} needs {len(table['columns'])} cells, one per column"
            )
    return {title: {"note": "", **table} for title, table in tables.items()}


def _extra_pictures(folder: Path) -> list[tuple[str, str]]:
    paths = sorted((folder / "pictures").glob("*.png"))
    return [(re.sub(r"[_-]+", " ", path.stem).strip(), embed(read_picture(path))) for path in paths]


def _public(value: Any) -> Any:
    """The value without what is nobody else's business: hosts, folders of this machine, secrets."""
    if isinstance(value, dict):
        secret = re.compile(r"(^|_)(key|token|secret|password)$", re.IGNORECASE)
        return {k: "(hidden)" if secret.search(k) and isinstance(v, str) else _public(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if scheme := re.match(r"\w+://", value):
        return f"{scheme.group()}…"
    if PureWindowsPath(value).is_absolute():
        return f"…/{PureWindowsPath(value).name}"
    return f"…/{PurePosixPath(value).name}" if value.startswith(("/", "~", "../")) else value


def _columns(lines: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Name -> a number per line, NaN where it is null or missing; in the order of their first appearance."""
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    return {name: [_float(line.get(name)) for line in lines] for name in names}


def _last(values: Sequence[float]) -> int:
    return int(max((value for value in values if not math.isnan(value)), default=0))


def _estimate(table: dict[str, float | None]) -> Estimate:
    """Of an evaluation's table; older ones have no ``low`` and ``high``."""
    mean, half = _float(table["mean"]), _float(table["interval"])
    return Estimate(mean, _float(table.get("low", mean - half)), _float(table.get("high", mean + half)))


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping, it holds a {type(data).__name__}")
    return data
