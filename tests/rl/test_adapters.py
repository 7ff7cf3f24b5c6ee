"""Pipelines from outside: found, called with the arguments of the section ``model``, and refused if they are none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowsteer.rl.adapters import load_pipeline, name_of, tail_is_idle
from flowsteer.rl.config import parse_config
from flowsteer.rl.export import WEIGHTS_FILE, export_weights, load_into
from flowsteer.rl.start import start
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.selfcheck import check

SOURCE = '''
from dataclasses import replace
import torch
from torch import nn
from flowsteer.rollout.lifting.loading import load_diffusers
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.step import LiftedStep

class Wrapped:
    """The lifted pipeline, by the protocol alone."""
    def __init__(self, *, path, dtype, device, height, width, call):
        self.given = (path, dtype, device, height, width, call)
        self.inner = FlowPipeline.load("embedded", dtype=dtype, device=device)
        for name in ("route", "prepare", "begin", "decode"):
            setattr(self, name, getattr(self.inner, name))
    @property
    def denoisers(self):
        return self.inner.denoisers

class Pasting(Wrapped):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        begin = self.inner.begin
        self.begin = lambda latents, index, conditioning: LiftedStep(
            begin(latents, index, conditioning).velocity, lambda next_latents: next_latents * (index < 1)
        )

class Signed(Wrapped):
    """Its pictures are in [-1, 1]."""
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.decode = lambda latents, conditioning: 2 * self.inner.decode(latents, conditioning) - 1

class Misspelt(Wrapped):
    """A layout of a value that is not there."""
    def __init__(self, **arguments):
        super().__init__(**arguments)
        def prepare(*given, **settings):
            row = self.inner.prepare(*given, **settings)
            return replace(row, layout={**row.layout, "embed": next(iter(row.layout.values()))})
        self.prepare = prepare

class Broken(Wrapped):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.begin = lambda latents, index, conditioning: not_there(latents)

class Stateful(Wrapped):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.count = 0
    @property
    def begin(self):
        self.count += 1
        return lambda *arguments: LiftedStep(self.inner.begin(*arguments).velocity + 0.01 * self.count)
    @begin.setter
    def begin(self, value): ...

def make(path, dtype, device, height, width, call):
    return Wrapped(path=path, dtype=dtype, device=device, height=height, width=width, call=call)

class Short(Wrapped):
    def __init__(self, path, dtype):
        pass

class Empty:
    def __init__(self, **arguments): ...
    def route(self, call): ...
    def decode(self, latents, conditioning): ...

class Networks(Wrapped):
    denoisers = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}

class NoNetworks(Wrapped):
    denoisers = []

value = 3
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipes.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(name: str, **changes: Any) -> Any:
    given = {"path": "here", "dtype": torch.float32, "device": "cpu"} | changes
    return load_pipeline(adapter=name, **given)


@pytest.mark.parametrize("name", ["./pipes.py:Wrapped", "pipes.py:make", "pipes:Wrapped"])
def test_it_is_called_with_the_section_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    made = load(name, height=32, call={"a": 1})
    assert made.given == ("here", torch.float32, "cpu", 32, None, {"a": 1})
    assert name_of(made) == "Wrapped"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipes.py:Short", "pipeline adapter 'pipes.py:Short' takes (path, dtype), but is called with path, dtype, device"),
        ("pipes.py:Empty", "Empty has no prepare, begin; a pipeline has denoisers, route, prepare, begin, decode"),
        ("pipes.py:Networks", "denoisers are a, b; one network can be trained and exported, and a second one by the name tran"),
        ("pipes.py:NoNetworks", "denoisers must be a dict of networks by name, it is []"),
        ("pipes.py:value", "pipeline adapter 'pipes.py:value' is a int; it must be a class, or a function that makes one"),
        ("pipes.py:Wraped", "pipeline adapter 'pipes.py:Wraped': pipes.py has no 'Wraped'; did you mean Wrapped"),
        ("pipes.py", "'pipes.py' does not say which class or function of the file is the pipeline adapter; write pipes.py:"),
        ("nothing", "there is no pipeline adapter 'nothing'; there are: "),
    ],
)  # fmt: skip
def test_what_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load(name)


def test_whether_it_leaves_the_latents_alone_is_tried() -> None:
    for name, idle in (("pipes.py:Wrapped", True), ("pipes.py:Pasting", False)):
        made = load(name)
        assert tail_is_idle(made, made.prepare(["a"], num_inference_steps=3, guidance_scale=1.0)) == idle
    lifted = FlowPipeline.load("embedded")
    assert tail_is_idle(lifted, lifted.prepare(["a"], num_inference_steps=3, guidance_scale=1.0))


def config(folder: Path, adapter: str, **changes: Any) -> Any:
    rollout = {"prompts_per_step": 2, "group_size": 4, "batch_size": 4, "num_inference_steps": 3}
    given = {"num_steps": 1, "output": str(folder / "run"), "rewards": "jpeg_compressibility", "evaluation": None}
    given |= {
        "algorithm": {"name": "flow_grpo"},
        "model": {"adapter": adapter, "lora": {"rank": 2}},
        "rollout": rollout,
    }
    return parse_config({**given, "trackers": [], **changes})


@pytest.mark.parametrize(
    ("name", "name_of_finding", "detail"),
    [
        ("Signed", "pictures", "expected floats [B, 3, H, W] or [B, T, 3, H, W] in [0, 1]"),
        ("Misspelt", "layout", "layout names embed, of which there is no value"),
        ("Broken", "runs", "NameError: name 'not_there' is not defined"),
        ("Wrapped", None, ""),
    ],
)
def test_the_check_of_a_pipeline_finds_what_an_adapter_gets_wrong(
    name: str, name_of_finding: str | None, detail: str
) -> None:
    report = check(load(f"pipes.py:{name}"))
    wrong = {finding.name: finding.detail for finding in report.findings if not finding.ok}
    assert list(wrong) == ([name_of_finding] if name_of_finding else [])
    assert detail in wrong.get(str(name_of_finding), "")


def test_a_run_checks_it_as_every_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"FAIL  purity .* the same call twice differs"):
        start(config(tmp_path, "pipes.py:Stateful"), quiet=True)
    branching = {"batch_size": 4, "group_size": 4, "prompts_per_step": 2, "num_inference_steps": 3, "branching": {}}
    with pytest.raises(ValueError, match=r"Pasting does something to the latents after each denoising step"):
        start(config(tmp_path, "pipes.py:Pasting", rollout=branching), quiet=True)
    assert not (tmp_path / "run").exists()


def test_full_weights_of_a_network_that_is_no_model_of_diffusers_come_back(tmp_path: Path) -> None:
    network = nn.Linear(2, 3)
    network.weight.requires_grad_(False)

    class Whole:
        is_main, best = True, "current"
        denoisers = {"net": network}  # noqa: RUF012

        def using(self, name: str) -> Any:
            return torch.no_grad()

        def full(self, parameter: Any) -> Any:
            return parameter

        def wait(self) -> None: ...

    one: Any = Whole()
    export_weights(one, one, tmp_path / "export")
    assert (tmp_path / "export" / "net" / WEIGHTS_FILE).is_file()
    other = nn.Linear(2, 3)
    load_into({"net": other}, tmp_path / "export")
    assert torch.equal(other.weight, network.weight)
    with pytest.raises(ValueError, match=r"export holds nothing of the network other; a run writes it when it ends"):
        load_into({"other": other}, tmp_path / "export")
