"""A column that a reward requires is asked for by name: by the certificate, and at a run's start before anything is loaded."""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import numpy as np
import pytest
from inprocess import fresh_process

from flowsteer.rewards.certify.certificate import certify
from flowsteer.rewards.certify.inputs import built_in_inputs
from flowsteer.rewards.columns import check_columns, required_columns
from flowsteer.rewards.registry import load_reward
from flowsteer.rl.config import parse_config
from flowsteer.rl.start import start

pytestmark = pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")

MODULE = """
import numpy as np

class Count:
    uses_prompt = False

    def __init__(self, scale=1.0):
        raise RuntimeError("loaded")

    def __call__(self, images, prompts, *, count, unit="cm", **columns):
        return [float(image.mean()) * own for image, own in zip(images, count)]

def for_trl(completions, count, weight, log_metric, **kwargs):
    return [float(np.mean(image)) * own * weight for image, own in zip(completions, count)]

def brightness(images, prompts, *, scale=1.0, **columns):
    return [scale * float(image.mean()) for image in images]

brightness.uses_prompt = False

def brightness_for_trl(completions, scale=1.0, **kwargs):
    return [scale * float(np.asarray(image).mean()) for image in completions]

brightness_for_trl.uses_prompt = False

def silent(images, prompts, **columns):
    return [float(image.mean()) for image in images]

def silent_for_trl(completions, **kwargs):
    return [float(np.asarray(image).mean()) for image in completions]
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """The name of an importable module with the rewards above."""
    (tmp_path / "column_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "column_rewards"
    sys.modules.pop("column_rewards", None)


def test_what_a_signature_requires(rewards):
    assert required_columns(load_reward(f"{rewards}:for_trl", weight=2.0)) == ("count",)
    assert required_columns(load_reward("jpeg_compressibility")) == ()
    module = sys.modules[rewards]
    assert required_columns(module.Count) == ("count",)
    assert required_columns(module.for_trl) == ("count", "weight")
    assert required_columns(module.brightness) == ()


def test_a_prompt_file_that_lacks_it_is_refused_before_anything_is_loaded(rewards):
    files = {"prompts.train=own.jsonl": ["tag"]}
    with pytest.raises(ValueError, match=r"Count' requires the column 'count', which prompts.train=own.jsonl lacks"):
        check_columns({f"{rewards}:Count": {}}, files)
    with pytest.raises(ValueError, match=r'each line with it: {"prompt": ..., "count": ...}'):
        check_columns({f"{rewards}:for_trl": {"weight": 1.0}}, files)
    check_columns({f"{rewards}:Count": {}}, {"own": ["count"]})
    check_columns({f"{rewards}:for_trl": {"weight": 1.0}}, {"own": ["count"]})


def test_a_run_names_the_column_at_its_start(rewards, tmp_path, make_config):
    prompts = tmp_path / "own.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"a {color} circle"}) for color in ("red", "blue")))
    output = tmp_path / "run"
    config = make_config(prompts={"train": str(prompts)}, rewards={f"{rewards}:Count": {}}, output=str(output))
    with fresh_process(), pytest.raises(ValueError, match="requires the column 'count'"):  # not "loaded"
        start(parse_config(config), quiet=True)
    assert not output.exists()


def test_the_certificate_says_how_to_give_it(rewards):
    def count(images, prompts, *, count, **columns):
        return [float(image.mean()) * own for image, own in zip(images, count)]

    certificate = certify(lambda: count, name="count", uses_prompt=False)
    assert certificate.refused == ("call",)
    message = certificate["call"].message
    assert message.startswith("requires the column 'count', which these inputs lack")
    assert "--images DIR: a folder whose metadata.jsonl has a line for each" in message
    assert '{"file_name": ..., "prompt": ..., "count": ...}' in message
    lines = certificate.text().splitlines()
    assert not [line for line in lines if line.startswith("not applicable")]  # those that follow are one sentence
    assert sum("not tried, since 'call' was refused: answer, " in line for line in lines) == 1
    images, prompts = built_in_inputs()
    given = certify(
        lambda: count,
        name="count",
        images=images,
        prompts=prompts,
        columns={"count": np.linspace(1, 2, 16).tolist()},
        uses_prompt=False,
    )
    assert "call" not in given.refused


@pytest.mark.parametrize("name", ["brightness", "brightness_for_trl"])
def test_a_function_says_that_its_prompt_plays_no_part(rewards, name):
    for options in ({}, {"scale": 2.0}):
        certificate = certify(functools.partial(load_reward, f"{rewards}:{name}", **options), name=name)
        assert certificate.ok, certificate.text()
        assert certificate["sees the prompt"].message == "plays no part, as declared"


@pytest.mark.parametrize("name", ["silent", "silent_for_trl"])
def test_a_function_that_does_not_say_so_is_told_what_to_write(rewards, name):
    certificate = certify(functools.partial(load_reward, f"{rewards}:{name}"), name=name)
    assert certificate.refused == ("sees the prompt",)
    assert f"`{name}.uses_prompt = False` below it" in certificate["sees the prompt"].message


def test_the_brightness_of_the_readme_is_certified(pytestconfig):
    text = (pytestconfig.rootpath / "README.md").read_text(encoding="utf-8")
    space: dict[str, Any] = {}
    exec(text.split("# my_package/rewards.py\n")[1].split("```")[0], space)
    certificate = certify(space["Brightness"], name="brightness")
    assert certificate.ok, certificate.text()
