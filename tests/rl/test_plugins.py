"""Algorithms from outside: named by module, file or entry point, checked, and refused if they are none."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flowsteer.rewards.types import Scores
from flowsteer.rl.algorithms.flow_grpo import FlowGRPO
from flowsteer.rl.algorithms.pairs import best_and_worst
from flowsteer.rl.check.checks import Trial
from flowsteer.rl.check.page import check_algorithm, parse_settings, trials_of
from flowsteer.rl.check.toy import ToyRun
from flowsteer.rl.command.main import app
from flowsteer.rl.config import check_config, load_config, parse_config, save_config
from flowsteer.rl.config.keys import find_keys
from flowsteer.rl.plugins import BUILT_IN, find_algorithm, list_algorithms

SOURCE = '''"""Plain: REINFORCE over denoising steps (a paper)."""
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from flowsteer.rl.algorithms.forward import ForwardAlgorithm
from flowsteer.rl.algorithms.losses import Terms
from flowsteer.rl.algorithms.transitions import TransitionAlgorithm, TransitionTerms

class Plain(TransitionAlgorithm):
    """Its settings."""
    strength: PositiveFloat = 1.0
    """Multiplies the loss."""
    def per_sample(self, step: TransitionTerms) -> Terms:
        return Terms(loss=-self.strength * step.advantage * step.log_prob, metrics={})

class Swapped(Plain):
    def per_sample(self, step):
        loss = super().per_sample(step).loss
        return Terms(loss=-loss, metrics={"kl": torch.ones(len(loss))})

class Wrong(Plain):
    kl_coef: NonNegativeFloat = 1
    @property
    def anchors(self):
        return {"reference": -self.kl_coef}

class Narrow(Plain):
    share: float = Field(default=0.25, ge=0, le=1)
    @property
    def anchors(self):
        return {"reference": 0.5 * self.share}

class Always(Plain):
    @property
    def anchors(self):
        return {"reference": 0.1}

class ToEMA(Plain):
    @property
    def anchors(self):
        return {"ema": 1.0}

class Lacks(Plain):
    def per_sample(self, step):
        return Terms(loss=super().per_sample(step).loss + step.kl_to_old)

class Reports(Plain):
    def per_sample(self, step):
        return Terms(loss=super().per_sample(step).loss, metrics={"loss": step.log_prob})

class Refuses(Plain):
    def check(self, setting):
        raise ValueError("only on Sundays")

class Pairs(TransitionAlgorithm):
    on_pairs = True
    keeps_means = True
    kl_coef: NonNegativeFloat = 0.0
    @property
    def anchors(self):
        return {"reference": self.kl_coef}
    def logits(self, step):
        win, lose = (step.log_prob - step.old_log_prob + 0 * step.kl_to_old).chunk(2)
        return win - lose

class Bare(Plain):
    def per_sample(self, step):
        return super().per_sample(step).loss

class OneNumber(Plain):
    def per_sample(self, step):
        return Terms(loss=super().per_sample(step).loss.mean())

class Pulls(Plain):
    def per_sample(self, step):
        return Terms(loss=super().per_sample(step).loss + step.log_prob**2)

class Crashes(Plain):
    def per_sample(self, step):
        return step.likelihood

class Random(Plain):
    def per_sample(self, step):
        loss = super().per_sample(step).loss
        return Terms(loss=loss * torch.rand(len(loss)), metrics={})

class Matching(ForwardAlgorithm):
    def per_sample(self, terms):
        return Terms(loss=terms.advantage * terms.error(), metrics={})

class NoLoss(TransitionAlgorithm): ...

class NoLogits(Matching):
    on_pairs = True

def function(): ...
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(algorithm: Any, **changes: Any) -> Any:
    return parse_config({"num_steps": 1, "rewards": "jpeg_compressibility", "algorithm": algorithm, **changes})


def page_of(name: str, *settings: str) -> dict[str, str]:
    (trial,) = trials_of(name, parse_settings(settings)).values()
    return {line.check: line.status for line in check_algorithm(name, trial).lines}


def test_a_file_names_one_and_the_saved_configuration_names_it_again(tmp_path: Path) -> None:
    made = config({"name": "./mine.py:Plain", "strength": 2})
    assert made.algorithm.strength == 2
    assert made.algorithm.label == "./mine.py:Plain"
    assert made.rollout.plan.name == "all"  # it learns from transitions
    assert config("mine.py:Matching").rollout.plan.name == "none"
    save_config(made, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == made
    assert parse_config(json.loads(made.model_dump_json())) == made
    assert load_config(tmp_path / "config.yaml", ["algorithm.strength=3"]) != made


def test_a_module_names_one_and_a_built_in_one_goes_through_the_same_door() -> None:
    made = config({"name": "flowsteer.rl.algorithms.flow_grpo:FlowGRPO", "clip_range": 0.5})
    assert isinstance(made.algorithm, FlowGRPO)
    assert find_algorithm("flow_grpo") is FlowGRPO
    assert type(config({"name": "flow_grpo"})).__mro__[1].__name__ == "Section"  # no class of its own


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"name": "./mine.py:Plain", "strenght": 1}, "algorithm.strenght: unknown key for name=./mine.py:Plain; did you mean "),
        ({"name": "./mine.py:Plain", "strength": 0}, "algorithm.strength: Input should be greater than 0, got 0"),
        ("./mine.py", "'./mine.py' does not say which class of the file is the algorithm; write ./mine.py:Plain or"),
        ("./no.py:Plain", "algorithm './no.py:Plain': there is no file "),
        ("./mine.py:Plane", "algorithm './mine.py:Plane': mine.py has no 'Plane'; did you mean Plain"),
        ("nowhere.at_all:X", "algorithm 'nowhere.at_all:X': there is no module 'nowhere' among the installed packages or"),
        ("mine.py:function", "algorithm 'mine.py:function' is a function; it must be a class, a subclass of flowsteer.rl"),
        ("pathlib:Path", "algorithm 'pathlib:Path': the class Path is no algorithm; an algorithm is a subclass of flowste"),
        ("mine.py:TransitionAlgorithm", "the class TransitionAlgorithm is the base of a family; an algorithm is a subclass"),
        ("mine.py:NoLoss", "the class NoLoss learns from single samples and needs a method per_sample(self, terms)"),
        ("mine.py:NoLogits", "the class NoLogits compares pairs (on_pairs = True) and needs a method logits(self, terms)"),
    ],
)  # fmt: skip
def test_what_is_refused(algorithm: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(algorithm)


def test_other_faults_are_still_told_beside_a_foreign_algorithm() -> None:
    with pytest.raises(ValueError, match=r"rollout.group_sise: unknown key; did you mean 'group_size'\?"):
        config("mine.py:Plain", rollout={"group_sise": 2})


def test_a_foreign_algorithm_has_demands_like_a_built_in_one() -> None:
    with pytest.raises(ValueError, match=r"algorithm.name=mine.py:Plain learns from stochastic transitions, but"):
        check_config(config("mine.py:Plain", rollout={"plan": "none"}), 1)


def test_entry_points_are_listed_with_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    group = "flowsteer.algorithms"
    points = [
        EntryPoint("plain", "mine:Plain", group),
        EntryPoint("no_loss", "mine:NoLoss", group),
        EntryPoint("gone", "nowhere:X", group),
        EntryPoint("awm", "mine:Plain", group),
    ]
    monkeypatch.setattr("flowsteer.rewards.doors.entry_points", lambda group: points)
    monkeypatch.syspath_prepend(Path.cwd())
    entries = list_algorithms()
    assert [entry.name for entry in entries[: len(BUILT_IN)]] == list(BUILT_IN)
    assert all("arXiv" in entry.about or entry.name == "weighted_sft" for entry in entries[: len(BUILT_IN)])
    assert all(entry.distribution == "flowsteer" for entry in entries[: len(BUILT_IN)])
    assert [(entry.name, entry.about) for entry in entries[len(BUILT_IN) :]] == [
        ("awm", "hidden by the built-in awm: name it mine:Plain"),
        ("gone", "cannot be used: ModuleNotFoundError: No module named 'nowhere'"),
        ("no_loss", "cannot be used: ValueError: algorithm 'no_loss': the class NoLoss learns from single samples and needs a "
                    "method per_sample(self, terms)"),
        ("plain", "Plain: REINFORCE over denoising steps (a paper)."),
    ]  # fmt: skip
    assert config({"name": "plain", "strength": 2}).algorithm.strength == 2
    with pytest.raises(
        ValueError, match=r"allowed: .*weighted_sft, gone, no_loss, plain\. A new entry point is visible"
    ):
        config("plane")


@pytest.mark.parametrize("name", ["./mine.py:Plain", "./mine.py:Matching"])
def test_a_right_one_passes(name: str) -> None:
    found = page_of(name)
    assert found.pop("start") == found.pop("distances") == "not applicable"  # no metrics, no anchors
    assert set(found.values()) == {"passed"}


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("./mine.py:Swapped", {"start", "first update", "learns"}),
        ("./mine.py:Random", {"repeatable", "no weight"}),
        ("./mine.py:Wrong", {"distances"}),
        ("./mine.py:Always", {"distances", "equal scores"}),
    ],
)
def test_a_wrong_one_fails_where_it_is_wrong(name: str, failed: set[str]) -> None:
    assert {check for check, status in page_of(name).items() if status == "failed"} == failed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Bare", "per_sample must return Terms(loss=..., metrics={...}) of flowsteer.rl.algorithms.losses, got a Tensor"),
        ("OneNumber", "per_sample must give one number per sample: loss has the shape (), expected (8,)"),
        ("Pulls", "a pull towards another policy belongs in `anchors`, not in the loss"),
    ],
)  # fmt: skip
def test_a_common_mistake_is_told_with_what_to_do(name: str, message: str) -> None:
    (trial,) = trials_of(f"./mine.py:{name}", {}).values()
    assert message in check_algorithm(name, trial).text()


def test_a_weight_that_is_bounded_or_taken_in_part_is_tried_within_its_bounds() -> None:
    assert page_of("./mine.py:Narrow")["distances"] == "passed"


def test_pairs_have_the_old_steps_of_their_own_samples() -> None:
    """Before an update the current policy is the one that drew: also of the pairs' samples, in whatever order they stand."""
    (trial,) = trials_of("./mine.py:Pairs", {}).values()
    run = trial.run()
    rollouts = run.rollouts()
    comparisons, _ = run.compare(rollouts, [Scores(total=torch.arange(float(len(own))).flip(0)) for own in rollouts])
    seen = []
    for batch in run.algorithm.batches(rollouts, comparisons, 0):
        pairs = best_and_worst(batch.rollout.group, batch.comparison)
        seen.append(run.algorithm._terms(run.policy, replace(batch, rows=pairs.sides())).kl_to_old)
    assert torch.cat(seen).abs().max() == 0


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"name": "./mine.py:Pairs", "kl_coef": 0.1}, "whose loss has no distances; `anchors` must be empty"),
        ({"name": "./mine.py:ToEMA"}, "cannot be held near to ema (`anchors`), only to reference"),
        ({"name": "./mine.py:Refuses"}, "'./mine.py:Refuses' cannot be made: ValueError: only on Sundays"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_do_is_refused_at_its_start(algorithm: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ToyRun({"algorithm": algorithm})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Lacks", "kl_to_old needs the means of the rollouts' steps: set keeps_means = True in the class"),
        ("Reports", "per_sample reports loss itself, which is reported anyway; choose another name"),
    ],
)
def test_what_is_not_there_is_told(name: str, message: str) -> None:
    (trial,) = trials_of(f"./mine.py:{name}", {}).values()
    assert message in check_algorithm(name, trial).text()


def test_overrides_of_one_trial_do_not_change_another() -> None:
    def trunks(*settings: str) -> list[str]:
        trials = trials_of("step_dpo", parse_settings(settings)).values()
        return [trial.run().config.rollout.branching.trunk for trial in trials]

    before = trunks()
    assert "deterministic" in before
    assert set(trunks("rollout.branching.trunk=resampled")) == {"resampled"}
    assert trunks() == before


def test_other_ways_to_combine_rewards_can_be_tried() -> None:
    assert page_of("./mine.py:Plain", "advantage.combine=gdpo")["learns"] == "passed"


def test_its_keys_are_listed_once_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("plain", "mine:Plain", "flowsteer.algorithms"),
        EntryPoint("gone", "nowhere:X", "flowsteer.algorithms"),
    ]
    monkeypatch.setattr("flowsteer.rewards.doors.entry_points", lambda group: points)
    monkeypatch.syspath_prepend(Path.cwd())
    (key,) = find_keys("strength", installed=True)
    assert (key.path, key.variant, key.about) == ("algorithm.strength", "plain", "Multiplies the loss.")
    with pytest.raises(ValueError, match="no key of the configuration matches"):
        find_keys("strength")
    with pytest.raises(
        ValueError, match=r"no algorithm 'plan'; did you mean 'plain'\? There are: .*, awm, .*, gone, plain\."
    ):
        find_algorithm("plan")


def test_what_it_raises_is_a_failure_of_the_check() -> None:
    (trial,) = trials_of("./mine.py:Crashes", {}).values()
    page = check_algorithm("Crashes", trial)
    assert not page.ok
    assert "learns        AttributeError: 'TransitionTerms' object has no attribute 'likelihood'" in page.text()


def test_the_command_prints_a_page_and_its_exit_code_is_the_verdict() -> None:
    done = CliRunner().invoke(app, ["algorithms", "check", "./mine.py:Plain", "algorithm.strength=2"])
    assert done.exit_code == 0, done.output
    assert "algorithm './mine.py:Plain': passes all checks" in done.output
    done = CliRunner().invoke(app, ["algorithms", "check", "./mine.py:Crashes"])
    assert done.exit_code == 1
    assert "algorithm './mine.py:Crashes': fails 7 of 10 checks" in done.output


def test_a_built_in_one_is_tried_in_all_its_variants() -> None:
    assert list(trials_of("awm", {})) == ["awm", "awm off-policy"]
    trials = trials_of("awm", {"algorithm.noise_levels_per_sample": 1, "advantage.ddof": 1})
    assert all(trial.run().config.algorithm.noise_levels_per_sample == 1 for trial in trials.values())
    assert all(trial.run().config.advantage.ddof == 1 for trial in trials.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["strength=2"], "'strength=2' is not of the form section.key=value, such as algorithm.updates_per_rollout=2"),
        (
            ["algorithm.strenght=2"],
            "algorithm.strenght: unknown key for name=./mine.py:Plain; did you mean 'strength'?",
        ),
        (["rollout.group_size=4"], "the toy's own rollout.group_size=8 stays as it is; leave it out"),
        (["rollout.plan=none"], "algorithm.name=./mine.py:Plain learns from stochastic transitions"),
    ],
)
def test_settings_that_it_cannot_be_tried_with(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trials_of("./mine.py:Plain", parse_settings(settings))


def test_a_trial_finds_the_weights_of_distances_by_what_they_do() -> None:
    trial = Trial(overrides={"algorithm": {"name": "grpo_guard", "kl_coef": 0.1}})
    assert trial.coefficients() == [("kl_coef", "reference")]
