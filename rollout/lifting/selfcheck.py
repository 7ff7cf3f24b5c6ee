"""Can this pipeline be trusted? A few network calls that say so on one screen.

The lifted loop evaluates steps by themselves, in any order, on any rows. That is right only where the loop keeps nothing
from one step to the next besides latents. ``check`` finds out: key-value caches, noise drawn inside the loop, guiders
with momentum, and prompts without an effect all show here, and so does any difference from the pipeline itself.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from flowsteer.rollout.data.inputs import Value
from flowsteer.rollout.lifting.conditioning import Attribute, Conditioning, Key, UnlikeConditioning, same
from flowsteer.rollout.lifting.loop import fixed_randomness
from flowsteer.rollout.lifting.pipeline import FlowPipeline, as_tensor
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.several import Prepared, Several, join
from flowsteer.rollout.lifting.step import StepOutput, finish
from flowsteer.rollout.steps.solvers import euler
from flowsteer.rollout.types import Schedule

PROMPTS = ("a red circle", "two blue squares", "a photo of a cat")
# A row's velocity depends on its batch only by rounding, where another batch size is served by other kernels: 4e-5 of its
# deviation was the largest difference over 60 pipelines on a CPU; convolutions in TF32 are coarser. A wrong row is off by 1.
ROW_TOLERANCE = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 1e-1}
PURE_NOISE = 0.9  # sigma; variance-preserving schedules start at .996 to 1, flows at 1 or just below
# Of images in [0, 1]. The same calls in the same order: equal to the last bit, unless a kernel is not deterministic.
PARITY_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a check found."""

    title: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """True where every finding is."""
        return all(finding.ok for finding in self.findings)

    def with_findings(self, findings: Iterable[Finding]) -> Report:
        """The report with more lines."""
        return replace(self, findings=(*self.findings, *findings))

    def text(self) -> str:
        """One screen: a verdict and a line per finding."""
        width = max((len(finding.name) for finding in self.findings), default=0)
        verdict = "can be trained" if self.ok else "must not be trained: see FAIL"
        lines = [f"  {'ok  ' if f.ok else 'FAIL'}  {f.name:<{width}}  {f.detail}" for f in self.findings]
        return "\n".join([f"{self.title}: {verdict}", *lines])


def check(
    pipeline: Pipeline,
    *,
    prompts: Sequence[str] = PROMPTS,
    num_inference_steps: int = 3,
    guidance_scale: float = 1.0,
    negative_prompt: str | None = None,
    inputs: Sequence[Mapping[str, Value]] | None = None,
) -> Report:
    """Prepare, step and decode a pipeline at small cost, and say what holds.

    ``inputs`` are further arguments of each prompt's row, such as its picture. Costs about ten network passes at batch 3
    (``len(prompts)``, at least 2 different ones). Never raises for a pipeline that does not hold: the report says so.
    Raises ValueError for fewer than two different prompts.
    """
    if len(set(prompts)) < 2:
        raise ValueError(f"a check needs at least two different prompts, got {list(prompts)}")
    settings: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }
    title = type(pipeline.pipe).__name__ if isinstance(pipeline, FlowPipeline) else type(pipeline).__name__
    report = Report(title=title, findings=(_lifted(pipeline),))
    try:
        given: list[dict[str, Any]] = [{"inputs": [own]} for own in inputs] if inputs else [{}] * len(prompts)
        rows = [pipeline.prepare([prompt], **settings, **own) for prompt, own in zip(prompts, given, strict=True)]
        conditioning, axes = _together(rows)
        report = report.with_findings([axes, _levels(conditioning, isinstance(pipeline, FlowPipeline))])
        noise = torch.randn((len(conditioning), *conditioning.latent_shape), generator=torch.Generator().manual_seed(0))
        unstarted = conditioning
        latents, conditioning = conditioning.start(noise.to(_device(pipeline), conditioning.latent_dtype))
        with torch.no_grad():
            report = report.with_findings([_live(pipeline, latents, rows), _pure(pipeline, latents, conditioning)])
            report = report.with_findings([_rows(pipeline, latents, conditioning)])
            if unstarted is not conditioning:
                report = report.with_findings([_before_the_step(pipeline, latents, unstarted, conditioning)])
            if inputs is not None and any(own != inputs[0] for own in inputs):
                swapped = pipeline.prepare([prompts[0]] * len(prompts), inputs=inputs, **settings)  # type: ignore[call-arg]
                report = report.with_findings([_seen(pipeline, noise, swapped, inputs)])
            if isinstance(pipeline, FlowPipeline):
                report = report.with_findings([_parity(pipeline, prompts[0], inputs[0] if inputs else {}, settings)])
            else:
                report = report.with_findings([_layout(rows[0]), _pictures(pipeline.decode(latents, conditioning))])
    except Exception as error:  # whatever an adapter does, the report says it
        report = report.with_findings([Finding(name="runs", ok=False, detail=f"{type(error).__name__}: {error}")])
    return report


def _device(pipeline: Pipeline) -> torch.device:
    return next(parameter.device for network in pipeline.denoisers.values() for parameter in network.parameters())


def _lifted(pipeline: Pipeline) -> Finding:
    if not isinstance(pipeline, FlowPipeline):
        return Finding(name="lifts", ok=True, detail="not lifted: a hand-written adapter")
    body = pipeline.lifted.body.__code__
    tail = "nothing after the step" if pipeline.lifted.tail_is_idle else "with code after the step"
    networks = ", ".join(pipeline.denoisers)
    where = f"{body.co_filename.rsplit('/', 1)[-1]}:{body.co_firstlineno}"
    media = pipeline.preparer.arguments.media
    takes = f"; besides prompts it takes {', '.join(media)}" if media else ""
    return Finding(name="lifts", ok=True, detail=f"one loop at {where}, {tail}; it calls {networks}{takes}")


def _together(rows: list[Prepared]) -> tuple[Prepared, Finding]:
    """All prompts in one conditioning, or where they do not join the first one repeated."""
    singles = [part for row in rows for part in (row.parts if isinstance(row, Several) else (row,))]
    if singles[0].alone:
        return join(singles), Finding(
            name="batch axes", ok=True, detail="none: one row at a time, a pass for each sample"
        )
    carried = ", ".join(sorted(map(str, rows[0].layout))) or "none"
    try:
        return join(singles), Finding(name="batch axes", ok=bool(rows[0].layout), detail=f"rows in {carried}")
    except UnlikeConditioning:
        detail = f"rows in {carried}; prompts of different lengths need batches of their own"
        return rows[0].take([0] * len(rows)), Finding(name="batch axes", ok=bool(rows[0].layout), detail=detail)


def _levels(conditioning: Prepared, lifted: bool) -> Finding:
    """The noise levels, and what samples start from.

    An adapter's schedule that begins late needs something to begin with. What a lifted pipeline begins with is its own.
    """
    schedule, base = conditioning.schedule, conditioning.base
    levels = " ".join(f"{sigma:.4g}" for sigma in schedule.sigma.tolist())
    late = float(schedule.sigma[0]) <= PURE_NOISE and base is None and not lifted
    start = "from noise alone" if base is None else "from noise on what the pipeline prepares"
    if late:
        start += f"; the first level must then be above {PURE_NOISE}"
    return Finding(name="noise levels", ok=not late, detail=f"{levels} ({schedule.prediction}); samples start {start}")


def _live(pipeline: Pipeline, latents: Tensor, rows: list[Prepared]) -> Finding:
    """Different prompts must give different velocities, or parity and learning would both be void."""
    first, second = (pipeline.begin(latents[:1], 0, row).velocity for row in rows[:2])
    scale, difference = first.float().std().item(), _difference(first, second)
    ok = scale > 0 and difference > 0 and bool(torch.isfinite(first).all())
    return Finding(
        name="prompts", ok=ok, detail=f"std of the velocity {scale:.3g}, two prompts differ by {difference:.3g}"
    )


def _before_the_step(pipeline: Pipeline, latents: Tensor, unstarted: Prepared, started: Prepared) -> Finding:
    """A rollout keeps rows without their noise: a loop may use its noise again after a step, but not before."""
    difference = _difference(*(pipeline.begin(latents, 0, rows).velocity for rows in (unstarted, started)))
    detail = "is used after the step only" if difference == 0 else f"changes the velocity by {difference:.3g}"
    return Finding(name="its noise", ok=difference == 0, detail=detail)


def _seen(pipeline: Pipeline, noise: Tensor, rows: Prepared, inputs: Sequence[Mapping[str, Value]]) -> Finding:
    """Rows of one prompt with different inputs must start or go on differently."""
    other = next(place for place, own in enumerate(inputs) if own != inputs[0])
    latents, rows = rows.start(noise[:1].expand_as(noise).to(_device(pipeline), rows.latent_dtype))
    two = [0, other]
    step = pipeline.begin(latents[two], 0, rows.take(two))
    after = step.finish(_step(step.velocity, latents[two], rows.schedule, 0))
    difference = max(_difference(own[:1], own[1:]) for own in (step.velocity, latents[two], after))
    names = ", ".join(inputs[0].keys() | inputs[other].keys())
    what = "differ by" if difference else "make no difference: is the pipeline's strength too high for so few steps?"
    detail = f"two rows with other {names} {what}" + (f" {difference:.3g}" if difference else "")
    return Finding(name="inputs", ok=difference > 0, detail=detail)


def _pure(pipeline: Pipeline, latents: Tensor, conditioning: Prepared) -> Finding:
    """Velocities in order, in the loop's own company, against velocities by themselves in reverse order: bit for bit."""
    if isinstance(pipeline, FlowPipeline) and isinstance(conditioning, Conditioning):
        visited, velocities, changed = _carried(pipeline, latents, conditioning)
    else:
        visited, velocities, changed = _visited(pipeline, latents, conditioning)
    worst = 0.0
    for index in reversed(range(len(visited))):
        again = pipeline.begin(visited[index], index, conditioning).velocity
        worst = max(worst, _difference(again, velocities[index]))
    twice = _difference(*(pipeline.begin(visited[0], 0, conditioning).velocity for _ in range(2)))
    if worst == 0 and twice == 0:
        return Finding(
            name="purity", ok=True, detail=f"{len(visited)} steps by themselves equal the steps in order, bit for bit"
        )
    if twice > 0:
        cause = "the same call twice differs: noise drawn inside the loop, a cache or dropout in a network"
    elif changed:
        cause = f"the loop changes {', '.join(changed)}"
    else:
        cause = "a component keeps something from one step to the next"
    return Finding(name="purity", ok=False, detail=f"steps by themselves differ by {max(worst, twice):.3g}; {cause}")


def _layout(row: Prepared) -> Finding:
    """Of an adapter: a layout for a value that is not there would be passed over, and its rows never taken."""
    unknown = "" if isinstance(row, Several) else ", ".join(sorted(map(str, row.layout.keys() - row.values.keys())))
    detail = f"layout names {unknown}, of which there is no value" if unknown else "every layout has its value"
    return Finding(name="layout", ok=not unknown, detail=detail)


def _pictures(images: Tensor) -> Finding:
    """Of an adapter: what `decode` gives is what rewards are shown."""
    shape = tuple(images.shape)
    low, high = (value.item() for value in torch.aminmax(images.float()))
    ok = images.is_floating_point() and images.dim() in (4, 5) and shape[-3] == 3 and low >= -0.01 and high <= 1.01
    wanted = "" if ok else "; expected floats [B, 3, H, W] or [B, T, 3, H, W] in [0, 1]"
    return Finding(name="pictures", ok=ok, detail=f"{images.dtype} {shape} from {low:.3g} to {high:.3g}{wanted}")


Visited = tuple[list[Tensor], list[Tensor], list[str]]  # latents and velocity at each index, names of changed locals


def _visited(pipeline: Pipeline, latents: Tensor, conditioning: Prepared) -> Visited:
    """The deterministic path through the protocol alone."""
    visited, velocities = [], []
    for index in range(conditioning.schedule.num_steps):
        step = pipeline.begin(latents, index, conditioning)
        visited.append(latents)
        velocities.append(step.velocity)
        latents = step.finish(_step(step.velocity, latents, conditioning.schedule, index))
    return visited, velocities, []


def _carried(pipeline: FlowPipeline, latents: Tensor, conditioning: Conditioning) -> Visited:
    """The deterministic path with every local carried from one iteration to the next, as the pipeline's loop does."""
    lifted = pipeline.lifted
    visited, velocities, changed = [], [], set()
    carried: dict[str, Any] = {}
    states = {*lifted.states}
    for index in range(conditioning.schedule.num_steps):
        generator = pipeline.enter(latents, index, conditioning, carried)
        velocity = pipeline.predicted(generator, index, conditioning)
        visited.append(latents.clone())
        velocities.append(velocity)
        latents = _step(velocity, latents, conditioning.schedule, index)
        if len(states) == 1:
            left = finish(generator, latents)
            if lifted.whole:
                latents = left[lifted.states[0]]
            elif _difference(left[lifted.states[0]], pipeline.loop.states(latents, conditioning)[lifted.states[0]]):
                changed.add(f"{lifted.states[0]} beside what it steps")
        else:
            left = finish(generator, velocity)  # its states are taken from here, not from there
        carried = {local: left[local] for local in lifted.body_reads & left.keys() - states} | {"self": left["self"]}
        now: dict[Key, Any] = {**carried, **{Attribute(name): value for name, value in vars(left["self"]).items()}}
        before = conditioning.values
        changed |= {str(key) for key, value in now.items() if key in before and not same(value, before[key])}
    return visited, velocities, sorted(changed)


def _rows(pipeline: Pipeline, latents: Tensor, conditioning: Prepared) -> Finding:
    """Rows taken out of a batch, in another order, must have the velocities that they had in it."""
    order = [len(conditioning) - 1, 0]
    index = min(1, conditioning.schedule.num_steps - 1)
    whole = pipeline.begin(latents, index, conditioning).velocity
    part = pipeline.begin(latents[order], index, conditioning.take(order)).velocity
    difference = _difference(whole[order], part) / max(whole.float().std().item(), 1e-12)
    allowed = ROW_TOLERANCE.get(whole.dtype, 1e-2)
    detail = f"rows {order} by themselves differ by {difference:.2g} of the velocity's std (allowed {allowed:g})"
    return Finding(name="sub-batch", ok=difference <= allowed, detail=detail)


def _parity(pipeline: FlowPipeline, prompt: str, inputs: Mapping[str, Value], settings: dict[str, Any]) -> Finding:
    """The picture by lifted steps against the picture by the pipeline's own ``__call__``, from what it starts with itself."""
    pipe, owner = pipeline.pipe, type(pipeline.pipe).__name__
    current, row = pipeline.own_start(prompt, inputs=inputs, **settings)
    private = copy.copy(pipe)
    own_step = row.schedule.rising or not isinstance(pipe.scheduler, (FlowMatchEulerDiscreteScheduler, DDIMScheduler))
    private.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
    if own_step:
        private.scheduler.step = _Stepper(row.schedule)
    if getattr(pipe, "guider", None) is not None:
        private.__dict__["guider"] = copy.deepcopy(pipe.guider)
        private.guider.guidance_scale = settings["guidance_scale"]
    private.__dict__.update(pipeline.loop.places.stand_ins())
    private.__dict__.update({"_progress_bar_config": {"disable": True}, **pipeline.loop.unchecked})
    for index in range(row.schedule.num_steps):
        step = pipeline.begin(current, index, row)
        current = step.finish(_step(step.velocity, current, row.schedule, index))
    drawn = pipeline.decode(current, row)
    with fixed_randomness(current.device), pipeline.loop.places.visit():  # as the prologue had it
        expected = as_tensor(private(**pipeline.call_arguments([prompt], inputs=[inputs], **settings)), owner)
    difference = _difference(drawn, expected)
    note = f", with Euler steps in place of {type(pipe.scheduler).__name__}'s" if own_step else ""
    allowed = PARITY_TOLERANCE.get(current.dtype, 1e-3)
    equal = "bit for bit" if difference == 0 else f"to {difference:.2g} (allowed {allowed:g})"
    return Finding(name="parity", ok=difference <= allowed, detail=f"equals {owner}(...){note} {equal}")


class _Stepper:
    """A scheduler's ``step`` that takes our deterministic step."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.index = schedule, -1

    def __call__(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> StepOutput:
        self.index += 1
        velocity = -model_output if self.schedule.rising else model_output
        return StepOutput(_step(velocity, sample, self.schedule, self.index))


def _step(velocity: Tensor, latents: Tensor, schedule: Schedule, index: int) -> Tensor:
    """One deterministic step, in the precision that diffusers' scheduler would return."""
    return euler(velocity, latents, schedule, index)[0].to(velocity.dtype)


def _difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, infinite where shapes differ or numbers are missing."""
    if a.shape != b.shape:
        return float("inf")
    return torch.nan_to_num((a.float() - b.float()).abs(), nan=float("inf")).max().item()
