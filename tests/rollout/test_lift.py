"""The cut through ``__call__``: what is found, what is kept, and what is refused."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import traceback
from contextlib import contextmanager

import diffusers
import pytest
import zoo

from flowsteer.rollout.lifting.lift import LiftError, lift, show_loop
from flowsteer.rollout.lifting.step import StepOutput, finish


class Scheduler:
    def step(self, output, timestep, sample, return_dict=True):
        assert return_dict is False
        return (sample - output,)


class Bar:
    count = 0

    def update(self):
        self.count += 1


def decorated(function):
    def never(*args, **kwargs):
        raise AssertionError("the decorator is left behind")

    never.__wrapped__ = function
    return never


class Toy:
    """A pipeline without a network: every construct that the cut has to get right, in numbers."""

    def __init__(self):
        self.scheduler, self.bar, self.skip = Scheduler(), Bar(), None
        self.model = lambda x, scale: scale * x

    @contextmanager
    def progress_bar(self):
        yield self.bar

    @decorated
    def __call__(self, start, steps: int | None = 3, callback_on_step_end=None):
        latents, table = start, [0]
        scale = 0.25
        with self.progress_bar() as progress_bar:
            for i, t in enumerate(range(steps)):
                if self.skip == i:
                    continue
                table[0] = i
                output = self.model(latents, scale)
                parts = [output + offset for offset in (0, 1)]
                latents = self.scheduler.step(parts[0], t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(latents)
                progress_bar.update()
            latents = latents + 1
        if steps:
            latents = 10 * latents
        return (latents,)


def test_the_parts_do_what_the_whole_does():
    whole = inspect.unwrap(Toy.__call__)(Toy(), start=8.0)[0]
    lifted, toy = lift(Toy), Toy()
    local, items, around = lifted.prologue(toy, start=8.0)
    assert around == ()
    latents = local["latents"]
    assert latents == 8.0
    assert local["scale"] == 0.25
    for item in items:
        bound = {name: local[name] for name in lifted.body_reads}
        generator = lifted.body(item, self=toy, **{**bound, "latents": latents})
        (output, timestep, sample), keywords = next(generator)
        assert (timestep, sample, keywords) == (item[1], latents, {"return_dict": False})
        latents = finish(generator, StepOutput(sample - output).prev_sample)["latents"]
    epilogue = {name: local[name] for name in lifted.epilogue_reads}
    assert lifted.epilogue(self=toy, **{**epilogue, "latents": latents})[0] == whole == 10 * (8 * 0.75**3 + 1)
    assert toy.bar.count == 3


def test_what_is_known_about_the_toy():
    lifted = lift(Toy)
    assert lifted.states == ("latents",)
    assert lifted.body_reads == {"latents", "table", "scale", "progress_bar", "callback_on_step_end"}
    assert lifted.epilogue_reads == {"latents", "steps"}
    assert lifted.written_in_place == {"table"}
    assert lifted.tail_is_idle
    assert "model" in lifted.attributes


def test_an_iteration_that_is_skipped_takes_no_step():
    toy = Toy()
    toy.skip = 0
    assert next(lift(Toy).body((0, 0), self=toy, latents=1.0, table=[0], scale=1.0), "none") == "none"


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_real_pipelines(name):
    cls = type(zoo.shared(name).pipe)
    lifted = lift(cls)
    assert lifted.states == ("latents",)
    assert lifted.tail_is_idle, "none of these does anything after the step"
    networks = {"wan": {"transformer", "transformer_2"}, "sdxl": {"unet"}}.get(name, {"transformer"})
    assert set(zoo.shared(name).denoisers) == networks


@pytest.mark.parametrize("name", ["FluxKontextInpaintPipeline", "MochiPipeline", "ChromaInpaintPipeline"])
def test_code_after_the_step_is_noticed(name):
    assert not lift(getattr(diffusers, name)).tail_is_idle


def test_a_traceback_points_into_the_pipelines_file():
    cls = diffusers.StableDiffusion3Pipeline
    with pytest.raises(AttributeError) as caught:
        next(lift(cls).body((0, None), self=object()))
    frame = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert frame.filename == inspect.getfile(cls)
    assert frame.line == "if self.interrupt:"


def test_show_loop_is_the_pipelines_own_source():
    text = show_loop(diffusers.FluxPipeline)
    source = inspect.getsource(inspect.unwrap(diffusers.FluxPipeline.__call__))
    loop = text[text.index("for i, t in enumerate(timesteps):") :]
    assert [line.strip() for line in loop.splitlines()] == [
        line.strip() for line in source[source.index("for i, t in enumerate(timesteps):") :].splitlines()
    ][: len(loop.splitlines())]
    assert "pipeline_flux.py" in text
    assert "prompt_embeds" in text


def test_lifting_leaves_the_module_as_it_was():
    module = sys.modules[diffusers.AuraFlowPipeline.__module__]
    before = set(vars(module))
    lift(diffusers.AuraFlowPipeline)
    assert set(vars(module)) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FluxPriorReduxPipeline", r"FluxPriorReduxPipeline.__call__ has no loop around scheduler.step"),
        ("LTX2DFRPipeline", r"no loop around scheduler.step; it steps in denoise;"),
        ("StableUnCLIPPipeline", r"has 2 denoising loops: line \d+ \(for i, t in .*\), line \d+ \(for i, t in"),
        ("VersatileDiffusionPipeline", r"VersatileDiffusionPipeline has no __call__ written in Python"),
    ],
)
def test_what_cannot_be_lifted_is_refused_by_name(name, message):
    cls = getattr(diffusers, name)
    with pytest.raises(LiftError, match=message):
        lift(cls)
    assert issubclass(LiftError, ValueError)


def test_a_loop_around_the_loop_is_passed_through_once():
    assert [line.split(" ", 2)[2] for line in lift(diffusers.WanAnimatePipeline).outer] == [
        "(for _ in range(num_segments):)"
    ]
    for passes in (1, 3):
        toy = Sections()
        local, items, around = lift(Sections).prologue(toy, passes)
        assert [len(list(outer)) for outer in around] == [passes]
        assert (local["latents"], list(items)) == (1.0, [0, 1])
    epilogue = lift(Sections).epilogue
    assert epilogue(self=Sections(), latents=5.0, sections=[]) == inspect.unwrap(Sections.__call__)(Sections(), 1, 5.0)


class Sections:
    scheduler = Scheduler()

    def __call__(self, passes, start=1.0):
        sections = []
        for _ in range(passes):
            latents = start
            for t in range(2):
                latents = self.scheduler.step(0, t, latents, return_dict=False)[0]
            sections.append(latents)
        return sum(sections)


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("LTX2Pipeline", ("latents", "audio_latents")),
        ("CogVideoXPipeline", ("latents",)),  # the other branch of its step has a memory, and hands on two values
        ("CogView3PlusPipeline", ("latents",)),
    ],
)
def test_what_is_stepped(name, states):
    lifted = lift(getattr(diffusers, name))
    assert lifted.states == states
    assert lifted.tail_is_idle == (name == "LTX2Pipeline")


class WhileLoop:
    def __call__(self, latents):
        while latents > 1:
            latents = self.scheduler.step(1, 2, latents)[0]
        return latents


def test_a_while_loop_is_refused():
    with pytest.raises(
        LiftError, match=r"WhileLoop.__call__ denoises in a while loop: line \d+ \(while latents > 1:\)"
    ):
        lift(WhileLoop)


def test_a_class_without_source_is_refused():
    namespace: dict = {}
    exec("class Typed:\n    def __call__(self):\n        pass\n", namespace)
    with pytest.raises(LiftError, match=r"Typed.__call__ has no source file"):
        lift(namespace["Typed"])


@pytest.mark.slow  # imports every pipeline
def test_most_flow_pipelines_of_diffusers_lift():
    lifted, refused = 0, []
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        if "deprecated" in module.name or module.name.rsplit(".", 1)[-1].startswith(("_", "onnx")):
            continue
        try:
            members = vars(importlib.import_module(module.name)).values()
        except (ImportError, RuntimeError):  # an optional dependency
            continue
        for cls in members:
            own = (
                inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline) and cls.__module__ == module.name
            )
            if own and "__call__" in vars(cls) and "FlowMatch" in inspect.getsource(sys.modules[cls.__module__]):
                try:
                    lift(cls)
                    lifted += 1
                except LiftError as error:
                    refused.append(str(error))
    assert lifted >= 100  # 0.42.1: of 130, most others are made section by section or draw picture and sound at once
    assert len(refused) <= 25, refused
