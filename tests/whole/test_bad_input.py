"""What cannot work ends at once, with one message that says what to do, and nothing on disk has changed."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import zoo
from inprocess import finished, fresh_process
from safetensors.torch import load_file, save_file

from flowsteer.rl.checkpoint import _is_free_of_a_reward
from flowsteer.rl.compare import TooFewScores
from flowsteer.rl.config import check_config, parse_config
from flowsteer.rl.metrics import read_metrics
from flowsteer.rl.start import start
from flowsteer.rl.train import train

REWARDS = '''
"""Rewards that break in one way each."""

import threading

calls, fails_from, release = 0, None, threading.Event()


def bright(images, prompts, **columns):
    return [float(image.mean()) / 255 for image in images]


def too_few(images, prompts, **columns):
    return bright(images, prompts)[:-1]


def not_a_number(images, prompts, **columns):
    return [float("nan")] * len(images)


def dislikes_cats(images, prompts, **columns):
    if "a cat" in prompts:
        raise RuntimeError("no cats in here")
    return bright(images, prompts)


def served(images, prompts, **columns):
    global calls
    calls += 1
    if fails_from is not None and calls > fails_from:
        raise ConnectionError("the server is down")
    return bright(images, prompts)


def gets_stuck(images, prompts, **columns):
    global calls
    calls += 1
    if calls > 4:
        release.wait(60)
    return bright(images, prompts)


class Ranks:
    groupwise = True

    def __call__(self, images, prompts, **columns):
        return [float(rank) for rank in images.reshape(len(images), -1).mean(1).argsort().argsort()]
'''


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with fresh_process():
        yield


@pytest.fixture
def rewards(tmp_path_factory, monkeypatch) -> ModuleType:
    """A module with rewards of its own, as a user has one in the current folder."""
    folder = tmp_path_factory.mktemp("plugin")
    name = f"odd_rewards_{folder.name}".replace("-", "_")
    (folder / f"{name}.py").write_text(REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module(name)
    del sys.modules[name]


def disk(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def refused(folder: Path, config: dict[str, Any], *, resume: bool = False) -> str:
    """The message with which a run is refused, once nothing below ``folder`` has changed."""
    before = disk(folder)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the tests look at the message)
        start(parse_config(config), resume=resume, quiet=True)
    assert disk(folder) == before
    return str(caught.value)


# --- before anything is loaded


def test_numbers_that_do_not_divide(tmp_path, make_config):
    """The message proposes numbers; each of them works."""
    config = {"rollout.prompts_per_step": 3, "rollout.group_size": 5}
    message = refused(tmp_path, make_config(tmp_path / "run", **config))
    assert "prompts_per_step=3 groups of rollout.group_size=5 cannot be shared evenly, in samples" in message
    assert "among 1 processes x 2 updates" in message
    proposals = re.findall(r"(rollout\.\w+)=(\d+(?: or \d+)*)", message.split("one of these works: ")[1])
    assert {name for name, _ in proposals} == {"rollout.prompts_per_step", "rollout.group_size"}
    for name, values in proposals:
        for value in values.split(" or "):
            check_config(parse_config(make_config(tmp_path / "run", **config | {name: int(value)})), 1)


@pytest.mark.parametrize("key", ["prompts.train", "evaluation"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no prompt file"),
        (b"", "holds no prompt; write one per line"),
        (b" \n\n", "holds no prompt"),
        ("a café".encode("latin-1"), "line 1: not UTF-8"),
    ],
)
def test_prompt_files(tmp_path, make_config, key, content, message):
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    value = {"prompts": str(file)} if key == "evaluation" else str(file)
    found = refused(tmp_path, make_config(tmp_path / "run", **{key: value}))
    assert message in found
    assert str(file) in found


def test_rewards_that_are_not_there(tmp_path, make_config):
    def of(name: str, **section: Any) -> str:
        return refused(tmp_path, make_config(tmp_path / "run", rewards={name: section}))

    assert "there is no reward 'jpg_compressibility'; did you mean 'jpeg_compressibility'?" in of("jpg_compressibility")
    assert "no module 'nowhere'" in of("nowhere:reward")
    assert "has no option 'quallity'; did you mean 'quality'?" in of("jpeg_compressibility", options={"quallity": 3})
    assert "at least one needs a weight that is not 0" in of("jpeg_compressibility", weight=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.plan": {"name": "none"}}, "rollout.plan.name=none draws none"),
        (
            {"rollout.plan": {"name": "steps", "indices": [9]}},
            "different indices between 0 and 3, at least one of them; got [9]",
        ),
        ({"rollout.plan": {"name": "window", "size": 7}}, "has a size from 1 to 3, got 7"),
        ({"rollout.kernel": {"noise_level": 0}}, "noise_level=0 makes no step stochastic"),
        ({"algorithm": {"name": "diffusion_nft", "noise_levels_per_sample": 2}}, "set 'rollout.plan={name: none}'"),
        (
            {"algorithm": {"name": "diffusion_nft"}, "rollout.plan": {"name": "none"}},
            "noise_levels_per_sample=9 is more than the 3 that can be trained",
        ),
        (
            {
                "algorithm": {"name": "diffusion_nft", "noise_levels_per_sample": 2},
                "rollout.plan": {"name": "none"},
                "advantage": {"clip": None},
            },
            "set advantage.clip",
        ),
        (
            {"algorithm": {"name": "pso"}, "advantage": {"combine": "gdpo", "best_and_worst": 2}},
            "asks for no advantage; leave advantage.best_and_worst and advantage.combine out",
        ),
        ({"advantage": {"deviation": "none", "ddof": 1}}, "divides by nothing; leave advantage.ddof out"),
        (
            {"algorithm": {"name": "grpo_guard"}, "rollout.kernel": {"name": "ddim", "log_prob_weight": "gaussian"}},
            "which rollout.kernel.name=ddim has not",
        ),
        (
            {"engine": {"device": "cpu", "zero_stage": 2}},
            "engine.zero_stage: this key is engine.strategy now; set engine.strategy=zero2 for zero_stage=2",
        ),
    ],
)
def test_settings_that_contradict(tmp_path, make_config, changes, message):
    assert message in refused(tmp_path, make_config(tmp_path / "run", **changes))


# --- the output folder


def test_a_folder_with_something_in_it(tmp_path, make_config):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        message = refused(tmp_path, make_config(tmp_path / "run"), resume=resume)
        assert message.endswith("run is not empty; choose another with output=FOLDER")


@pytest.fixture(scope="module")
def used(tmp_path_factory, make_config) -> Path:
    """A run of one step, finished. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("used") / "run"
    finished(make_config(folder, num_steps=1))
    return folder


@pytest.fixture
def again(used, tmp_path) -> Path:
    """A copy of that run, for a test's own."""
    return Path(shutil.copytree(used, tmp_path / "run"))


def test_a_folder_with_a_run(again, tmp_path, make_config):
    message = refused(tmp_path, make_config(again, num_steps=1))
    assert "holds a run already; continue it with --resume, or choose another with output=FOLDER" in message


def test_other_settings_are_named(again, tmp_path, make_config):
    changed = {"seed": 3, "rollout.group_size": 8, "algorithm": {"name": "flow_grpo", "kl_coef": 0.2}}
    message = refused(tmp_path, make_config(again, num_steps=5, **changed), resume=True)
    assert message.splitlines()[1:] == [
        "  algorithm.kl_coef: 0.1 then, 0.2 now",
        "  rollout.group_size: 4 then, 8 now",
        "  seed: 0 then, 3 now",
    ]
    message = refused(tmp_path, make_config(again, engine={"device": "cpu", "strategy": "zero2"}), resume=True)
    assert "engine.strategy: 'plain' then, 'zero2' now" in message


def test_a_run_of_an_earlier_version_says_why_it_cannot_go_on(again, tmp_path, make_config):
    saved = json.loads((again / "config.json").read_text())
    del saved["engine"]["strategy"]
    (again / "config.json").write_text(json.dumps(saved | {"engine": saved["engine"] | {"zero_stage": None}}))
    message = refused(tmp_path, make_config(again, num_steps=5), resume=True)
    assert "was started by an earlier version and cannot go on with this one" in message
    assert "set engine.strategy=plain for zero_stage=null" in message


def test_a_reward_s_own_option_called_host_is_no_address_that_may_change():
    moved, option = "rewards.judge.host.url", "rewards.judge.options.host.url"
    assert _is_free_of_a_reward(moved)
    assert _is_free_of_a_reward("rewards.my_package.rewards:Judge.host.deadline_s")
    assert not _is_free_of_a_reward(option)
    assert not _is_free_of_a_reward("rewards.judge.host.environment")


def test_fewer_steps_than_are_done(tmp_path, make_config):
    config = make_config(tmp_path / "run", num_steps=2)
    finished(config)
    message = refused(tmp_path, config | {"num_steps": 1}, resume=True)
    assert "has done 2 training steps already, more than num_steps=1" in message


def test_a_damaged_configuration_is_named(again, tmp_path, make_config):
    (again / "config.json").write_text('{"num_st')
    assert "config.json is damaged" in refused(tmp_path, make_config(again), resume=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_processes", 2, "the number of processes has changed since"),
        ("strategy", "zero2", "(zero2 then, plain now)"),
        ("model", "feedc0ffee", "(feedc0ffee then, "),
        ("format", 99, "format has changed since"),
    ],
)
def test_checkpoints_of_another_kind(again, tmp_path, make_config, key, value, message):
    file = again / "checkpoints" / "step_000001" / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    found = refused(tmp_path, make_config(again, num_steps=2), resume=True)
    assert message in found
    assert "start a new one in another output folder" in found


def test_a_checkpoint_of_another_model(tmp_path, make_config, tiny_sd3):
    """The same path, but somebody has put other weights there."""
    model = Path(shutil.copytree(tiny_sd3, tmp_path / "model"))
    config = make_config(tmp_path / "run", **{"num_steps": 1, "model.path": str(model)})
    finished(config)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"] = weights["proj_out.weight"] + 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    assert "the model of model.path has changed" in refused(tmp_path, config | {"num_steps": 2}, resume=True)


# --- the model


def test_a_model_that_is_not_there(tmp_path, make_config):
    message = refused(tmp_path, make_config(tmp_path / "run", **{"model.path": str(tmp_path / "no-model")}))
    assert "there is no diffusers pipeline" in message
    assert "give a folder with a model_index.json" in message


def test_lora_targets_that_match_nothing(tmp_path, make_config):
    config = make_config(tmp_path / "run", **{"model.lora": {"targets": ["to_q", "query", "to_out"]}})
    message = refused(tmp_path, config)
    assert "model.lora.targets: 'query', 'to_out' match no linear layer of transformer; its layers end in" in message
    assert "to_out.0" in message.split("end in")[1]


def test_an_argument_that_the_pipeline_does_not_have(tmp_path, make_config):
    message = refused(tmp_path, make_config(tmp_path / "run", **{"model.call": {"max_sequence_lenght": 32}}))
    assert "max_sequence_lenght" in message


def test_a_kernel_that_does_not_fit_the_model(tmp_path, make_config):
    message = refused(tmp_path, make_config(tmp_path / "run", **{"rollout.kernel": {"name": "ddim"}}))
    assert "ddim" in message
    assert "flow_sde" in message


def test_a_pipeline_without_a_loop(tmp_path, tmp_path_factory, make_config, monkeypatch):
    place = tmp_path_factory.mktemp("variants")
    pipe = zoo.build_variant(place, "stepless", (zoo.STEP, "                latents = noise_pred\n"))
    monkeypatch.setattr("flowsteer.rollout.lifting.pipeline.load_diffusers", lambda *args, **more: pipe)
    message = refused(tmp_path, make_config(tmp_path / "run"))
    assert "StableDiffusion3Pipeline.__call__ has no loop around scheduler.step" in message


# --- rewards that break while the run goes on


@pytest.mark.parametrize(
    ("function", "message"),
    [("too_few", "gave 3 scores, expected 4, one per image"), ("not_a_number", "a score is a finite number, or None")],
)
def test_a_reward_that_breaks_its_contract(tmp_path, make_config, rewards, function, message):
    name = f"{rewards.__name__}:{function}"
    run = start(parse_config(make_config(tmp_path / "run", rewards={name: {}})), quiet=True)
    before = {key: value.detach().clone() for key, value in run.policy.parameters().items()}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        train(run)
    run.close()
    assert f"reward '{name}'" in str(caught.value)
    assert run.engine.num_updates == 0
    assert all(torch.equal(value, before[key]) for key, value in run.policy.parameters().items())
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "export").exists()


def test_a_reward_that_raises_on_some_samples(tmp_path, make_config, rewards, prompt_file):
    """Those scores are missing, all others are used, and every step says how many."""
    name = f"{rewards.__name__}:dislikes_cats"
    config = make_config(tmp_path / "run", rewards={name: {}}, advantage={"min_scored": 0.5})
    config["rollout"]["batch_size"] = 8  # cats beside others: the reward is asked again, one by one
    run = finished(config)
    cat = prompt_file.read_text().splitlines().index("a cat")
    expected = [sum(batch.rows.count(cat) for batch in run.worker.batches(step)) for step in range(3)]
    assert max(expected) == 4, "a whole group"
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["reward_missing"] for line in lines] == expected
    assert [line["incomparable_groups"] for line in lines] == [missing / 4 for missing in expected]
    assert all(line["reward_mean"] is not None and line["loss"] is not None for line in lines)


def test_too_few_scores_stop_the_run_and_it_goes_on_later(tmp_path, make_config, rewards):
    """With the reward mended, the rest is bit for bit what it would have been."""
    name = f"{rewards.__name__}:served"
    whole = finished(make_config(tmp_path / "whole", rewards={name: {}}))

    config = make_config(tmp_path / "run", rewards={name: {}})
    rewards.calls, rewards.fails_from = 0, 4  # the four batches of the first step
    run = start(parse_config(config), quiet=True)
    with pytest.raises(TooFewScores) as caught:
        train(run)
    run.close()
    assert "only 0.0% of the samples have a score, advantage.min_scored asks for 90.0%" in str(caught.value)
    assert f"reward '{name}' raised ConnectionError: the server is down" in str(caught.value)
    assert run.saving.checkpoints.steps() == [1]

    rewards.fails_from = None
    mended = finished(config, resume=True)
    assert mended.start == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]
    ours, theirs = (load_file(run.folder / "export" / "pytorch_lora_weights.safetensors") for run in (mended, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(value.any() for key, value in ours.items() if "lora_B" in key), "something was learned"


def test_a_reward_that_gets_stuck_ends_the_run_in_time_with_everything_saved(tmp_path, make_config, rewards):
    name = f"{rewards.__name__}:gets_stuck"
    rewards.calls = 0
    run = start(parse_config(make_config(tmp_path / "run", rewards={name: {}}, **{"engine.timeout_s": 6})), quiet=True)
    began = time.monotonic()
    with pytest.raises(TooFewScores, match=rf"'{name}' raised RewardTimeout: .* '{name}' may be stuck"):
        train(run)
    assert time.monotonic() - began < 60
    rewards.release.set()
    run.close()
    assert run.saving.checkpoints.steps() == [1]


def test_a_reward_that_compares_needs_whole_groups_in_a_batch(tmp_path, make_config, rewards):
    name = f"{rewards.__name__}:Ranks"
    config = make_config(tmp_path / "run", rewards={name: {}}, **{"rollout.batch_size": 2})
    with pytest.raises(ValueError, match=r"batch_size=2 cuts groups of rollout.group_size=4 apart; .* a multiple of 4"):
        start(parse_config(config), quiet=True)
    assert not (tmp_path / "run").exists()
    run = finished(make_config(tmp_path / "run", rewards={name: {}}, num_steps=1))
    (line,) = read_metrics(run.folder / "metrics.jsonl")
    assert line["reward_mean"] == 1.5  # the ranks 0 to 3 in every group


def test_less_can_be_asked_of_the_scores_when_going_on(again, make_config):
    """What stops a run may be changed, what shapes it may not."""
    config = make_config(again, **{"num_steps": 1, "advantage": {"min_scored": 0.1}, "save_every": 5, "keep": 1})
    run = start(parse_config(config), resume=True, quiet=True)
    run.close()
    assert run.start == 1
