"""Configurations: overrides, types, and messages that name the key, the value and what would work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowsteer.rl.algorithms import ALGORITHMS
from flowsteer.rl.algorithms.transitions import TransitionAlgorithm
from flowsteer.rl.config import (
    Config,
    check_config,
    load_config,
    parse_config,
    parse_overrides,
    save_config,
    shipped_configs,
)
from flowsteer.rl.config.schema import ModelConfig, NonePlan, RolloutConfig, WindowPlan


def whole(**sections: Any) -> dict[str, Any]:
    """The least that a run must say, with sections added or replaced."""
    return {
        "num_steps": 2,
        "rewards": {"jpeg_compressibility": {}},
        "algorithm": {"name": "flow_grpo"},
        "rollout": {"plan": {"name": "all"}},
        **sections,
    }


def faults(**sections: Any) -> list[str]:
    """The lines of the message, without its first."""
    with pytest.raises(ValueError, match="flowsteer cannot run the configuration:") as caught:
        parse_config(whole(**sections))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


# --- overrides


def test_overrides_reach_into_sections_in_order():
    config = load_config(
        "embedded_nft_composition",
        ["rollout.group_size=8", "rollout.group_size=4", "model.lora=null", "evaluation=null", "output=runs/a=b"],
    )
    assert config.rollout.group_size == 4, "the later one wins"
    assert config.rollout.prompts_per_step == 64, "its neighbours stay"
    assert config.model.lora is None
    assert config.evaluation is None
    assert config.output == "runs/a=b", "only the first = separates"


def test_overrides_make_sections_and_replace_them():
    config = load_config(
        "embedded_nft_composition",
        ["rollout.kernel.noise_level=0.5", "rollout.plan={name: window, size: 3}", "model.lora.targets=[to_q, to_k]"],
    )
    assert config.rollout.kernel.noise_level == 0.5
    assert config.rollout.plan == WindowPlan(size=3)
    assert config.model.lora is not None
    assert config.model.lora.targets == ("to_q", "to_k")


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4", "+1e-04"])
def test_numbers_as_people_write_them(text, tmp_path):
    """YAML 1.1 takes 1e-4 for a text."""
    assert parse_overrides([f"a={text}"]) == {"a": 1e-4}
    config = load_config("embedded_nft_composition", [f"optimizer.learning_rate={text}"])
    assert config.optimizer.learning_rate == 1e-4
    file = tmp_path / "run.yaml"
    data = yaml.safe_dump(whole()).replace("jpeg_compressibility: {}", f"ocr: {{options: {{threshold: {text}}}}}")
    file.write_text(data, encoding="utf-8")
    assert load_config(file).rewards["ocr"].options == {"threshold": 1e-4}, "also where no type is declared"


def test_overrides_leave_texts_alone():
    assert parse_overrides(["a=1e", "b=e4", "c=4-5", "d=to_out.0", "e=none", "f='1e4'", "g=~"]) == {
        "a": "1e", "b": "e4", "c": "4-5", "d": "to_out.0", "e": "none", "f": "1e4", "g": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_steps", "'num_steps' is not of the form key=value, such as rollout"),
        ("=3", "'=3' is not of the form"),
        ("num_steps.more=3", "goes through 'num_steps', which is not a section"),
        ("rollout.plan={name", "the value of 'rollout.plan={name' is not YAML"),
    ],
)
def test_overrides_that_cannot_be_read(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("embedded_nft_composition", [override])


# --- unknown keys and names


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"num_stepz": 3}, "num_stepz: unknown key; did you mean 'num_steps'?"),
        ({"rollot": {}}, "rollot: unknown key; did you mean 'rollout'?"),
        ({"model": {"lora": {"rnk": 4}}}, "model.lora.rnk: unknown key; did you mean 'rank'?"),
        (
            {"algorithm": {"name": "flow_grpo", "clip_rage": 0.1}},
            "algorithm.clip_rage: unknown key for name=flow_grpo; did you mean 'clip_range'?",
        ),
        (
            {"algorithm": {"name": "diffusion_nft", "clip_range": 0.1}},
            "algorithm.clip_range: unknown key for name=diffusion_nft; allowed here: "
            "beta, end_level, first_level, kl_coef, name, noise_levels_per_sample, old_decay_max, old_decay_slope, "
            "old_decay_start, updates_per_rollout",
        ),
        (
            {"rollout": {"plan": {"name": "window", "sise": 2}}},
            "rollout.plan.sise: unknown key for name=window; did you mean 'size'?",
        ),
        (
            {"rollout": {"plan": {"name": "none", "indices": [1]}}},
            "rollout.plan.indices: unknown key for name=none; allowed here: name",
        ),
        (
            {"rollout": {"kernel": {"noise_lvl": 0.1}}},
            "rollout.kernel.noise_lvl: unknown key; did you mean 'noise_level'?",
        ),
        (
            {"rewards": {"my.reward:f": {"wieght": 1}}},
            "rewards.my.reward:f.wieght: unknown key; did you mean 'weight'?",
        ),
        ({"evaluation": {"num_seed": 1}}, "evaluation.num_seed: unknown key; did you mean 'num_seeds'?"),
    ],
)
def test_an_unknown_key_names_the_nearest(sections, message):
    assert faults(**sections) == [message]


def test_a_key_that_is_near_to_nothing_lists_all():
    (line,) = faults(model={"xyzzy": 1})
    allowed = ", ".join(sorted(ModelConfig.model_fields))
    assert {"adapter", "lora", "width"} <= set(ModelConfig.model_fields)
    assert line == f"model.xyzzy: unknown key; allowed here: {allowed}"


NAMES = ", ".join(config.model_fields["name"].default for config in ALGORITHMS)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"algorithm": {"name": "ppo"}},
            f"algorithm.name: unknown name 'ppo'; allowed: {NAMES}. A new entry point is visible only after its project has "
            "been installed again (pip install -e .); a class of your own can also be given as package.module:attribute or "
            "path/to/file.py:attribute",
        ),
        (
            {"algorithm": {"name": "difusion_nft"}},
            f"algorithm.name: unknown name 'difusion_nft'; did you mean 'diffusion_nft'?; allowed: {NAMES}. A new entry point "
            "is visible only after its project has been installed again (pip install -e .); a class of your own can also be "
            "given as package.module:attribute or path/to/file.py:attribute",
        ),
        ({"algorithm": {}}, f"algorithm.name: this key is required; allowed: {NAMES}"),
        (
            {"rollout": {"plan": {"name": "some"}}},
            "rollout.plan.name: unknown name 'some'; allowed: all, none, steps, window",
        ),
        (
            {"rollout": {"kernel": {"name": "sde"}}},
            "rollout.kernel.name: Input should be 'flow_sde', 'dance_sde', 'cps' or 'ddim', got 'sde'",
        ),
        (
            {"engine": {"zero_stage": 0}},
            "engine.zero_stage: this key is engine.strategy now; set engine.strategy=plain for zero_stage=0",
        ),
        ({"trackers": ["mlflow"]}, "trackers.0: Input should be 'tensorboard' or 'wandb', got 'mlflow'"),
    ],
)
def test_an_unknown_name_lists_the_right_ones(sections, message):
    assert faults(**sections) == [message]


# --- values


@pytest.mark.parametrize(
    ("sections", "start", "value"),
    [
        ({"num_steps": "many"}, "num_steps: Input should be a valid integer", "'many'"),
        ({"num_steps": 0}, "num_steps: Input should be greater than 0", "0"),
        ({"rollout": {"group_size": 0}}, "rollout.group_size: Input should be greater than 0", "0"),
        ({"rollout": {"batch_size": 2.5}}, "rollout.batch_size: Input should be a valid integer", "2.5"),
        ({"optimizer": {"learning_rate": -1e-4}}, "optimizer.learning_rate: Input should be greater than 0", "-0.0001"),
        ({"optimizer": {"learning_rate": float("nan")}}, "optimizer.learning_rate: Input should be a finite", "nan"),
        ({"rewards": {"ocr": {"weight": float("inf")}}}, "rewards.ocr.weight: Input should be a finite", "inf"),
        ({"ema_decay": 1}, "ema_decay: Input should be less than 1", "1"),
        ({"rewards": {}}, "rewards: Dictionary should have at least 1 item", "{}"),
        ({"model": {"lora": {"targets": []}}}, "model.lora.targets: auto, or a list of names", "[]"),
        ({"model": {"lora": {"targets": "to_q"}}}, "model.lora.targets: auto, or a list of names", "'to_q'"),
        ({"output": 5}, "output: Input should be a valid string", "5"),
        ({"engine": {"strategy": "zero4"}}, "engine.strategy: Input should be 'plain', 'zero1', 'zero2'", "'zero4'"),
        ({"num_steps": None}, "num_steps: Input should be a valid integer", "None"),
        ({"optimizer": {"betas": [0.9, 2.0]}}, "optimizer.betas.1: Input should be less than 1", "2.0"),
    ],
)
def test_a_wrong_value_names_key_and_value(sections, start, value):
    (line,) = faults(**sections)
    assert line.startswith(start)
    assert line.endswith(f", got {value}")


def test_all_faults_in_one_message():
    lines = faults(
        nonsense=1, num_steps="x", algorithm={"name": "flow_grpo", "clip_rage": 1}, rollout={"group_size": 0}
    )
    assert [line.split(":")[0] for line in lines] == [
        "num_steps", "rollout.group_size", "algorithm.clip_rage", "nonsense",
    ]  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda cls: cls.model_fields["name"].default)
def test_the_default_plan_follows_the_algorithm(algorithm):
    """Three keys make a run: its number of steps, its rewards and its algorithm."""
    name = algorithm.model_fields["name"].default
    expected = "all" if issubclass(algorithm, TransitionAlgorithm) else "none"
    data = {"num_steps": 1, "rewards": {"composition": {}}, "algorithm": {"name": name}}
    kept = json.loads(json.dumps(data))
    config = parse_config(data)
    assert config.rollout.plan.name == expected
    assert data == kept
    if name != "step_dpo":  # which needs branches, and says so
        check_config(config, 1)
    assert parse_config({**data, "rollout": RolloutConfig(group_size=4)}).rollout.plan.name == expected
    chosen = parse_config({**data, "rollout": {"plan": {"name": "window"}}})
    assert chosen.rollout.plan.name == "window", "what is given stays"


def test_a_name_stands_for_its_section():
    short = {"num_steps": 1, "rewards": ["composition", "ocr"], "algorithm": "flow_grpo"}
    written = {"num_steps": 1, "rewards": {"composition": {}, "ocr": None}, "algorithm": {"name": "flow_grpo"}}
    more = {"plan": "window", "kernel": "cps"}, {"plan": {"name": "window"}, "kernel": {"name": "cps"}}
    assert parse_config({**short, "rollout": more[0]}) == parse_config({**written, "rollout": more[1]})
    assert parse_config({**short, "rewards": "ocr"}).rewards == parse_config({**short, "rewards": {"ocr": {}}}).rewards


def test_an_override_reaches_a_reward_whose_name_has_dots():
    config = load_config(
        "embedded_nft_composition", ["rewards={./my.py:f: {}, a.b:C: {}}", "rewards../my.py:f.weight=2"]
    )
    assert config.rewards["./my.py:f"].weight == 2.0


def test_what_must_be_given():
    with pytest.raises(
        ValueError, match="num_steps: this key is required\n  rewards: this key is required\n  algorithm"
    ):
        parse_config({})


# --- files


def test_files_that_cannot_be_read(tmp_path):
    def load(data: bytes) -> Config:
        (tmp_path / "run.yaml").write_bytes(data)
        return load_config(tmp_path / "run.yaml")

    with pytest.raises(
        ValueError,
        match=r"no configuration 'runn.yaml'; give a YAML file, or the name of a shipped one; there are: embedded_",
    ):
        load_config("runn.yaml")
    with pytest.raises(ValueError, match="is not YAML"):
        load(b"a: [1")
    with pytest.raises(ValueError, match="must hold a mapping of keys to values, it holds a list"):
        load(b"- a")
    with pytest.raises(ValueError, match="it holds a NoneType"):
        load(b"")
    with pytest.raises(ValueError, match=r"is not UTF-8 .* save the file in UTF-8"):
        load("output: café".encode("latin-1"))


def test_a_key_that_stands_twice_is_not_dropped_silently(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("num_steps: 3\nrollout: {group_size: 2}\nnum_steps: 4\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the key 'num_steps' stands here more than once"):
        load_config(file)


@pytest.mark.parametrize("name", shipped_configs())
def test_saved_and_loaded_again_it_is_the_same(name, tmp_path):
    config = load_config(name, ["output='1e5'", "seed=7", "model.call={a: '1e-4', b: 1e-4, c: none, d: é}"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert "betas:" in (tmp_path / "config.yaml").read_text(encoding="utf-8"), "defaults are spelled out"


def test_every_variant_survives_saving(tmp_path):
    for plan in ({"name": "none"}, {"name": "steps", "indices": [1, 2]}, {"name": "window", "high": 5}):
        config = parse_config(whole(rollout={"plan": plan}, model={"lora": None}, advantage={"clip": None}))
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", shipped_configs())
def test_a_saved_configuration_runs_again(name, tmp_path):
    """It spells out every key, also those that mean nothing to the chosen strategy."""
    config = load_config(name)
    save_config(config, tmp_path / "config.yaml")
    check_config(load_config(tmp_path / "config.yaml"), 1 if "embedded" in name else 4)


def test_a_configuration_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        parse_config(whole()).seed = 3


# --- combinations


def check(processes: int = 1, **sections: Any) -> None:
    check_config(parse_config(whole(**sections)), processes)


def test_combinations_that_contradict():
    nft = {"name": "diffusion_nft"}
    with pytest.raises(
        ValueError, match=r"flow_grpo learns from stochastic transitions.*plan.name=none.*all, window or"
    ):
        check(rollout={"plan": {"name": "none"}})
    with pytest.raises(
        ValueError, match=r"diffusion_nft noises the final latents again.*set 'rollout.plan=\{name: none\}"
    ):
        check(algorithm=nft)
    with pytest.raises(ValueError, match=r"all weights in bfloat16 needs float32 master copies.*set engine.strategy"):
        check(model={"lora": None, "dtype": "bfloat16"})
    check(model={"lora": None, "dtype": "bfloat16"}, engine={"strategy": "zero2"})
    check(algorithm=nft, rollout={"plan": {"name": "none"}})


def test_the_advice_of_a_message_works():
    """What the message about the plan says can be typed as it stands."""
    fixed = load_config(
        "embedded_flow_grpo_sde_composition", ["rollout.plan={name: none}", "algorithm={name: diffusion_nft}"]
    )
    assert fixed.rollout.plan == NonePlan()


def test_all_contradictions_in_one_message():
    with pytest.raises(ValueError, match="cannot be shared evenly, in samples") as caught:
        check(
            rollout={"plan": {"name": "none"}, "prompts_per_step": 5, "group_size": 3},
            model={"lora": None, "dtype": "bfloat16"},
            processes=2,
        )
    assert "learns from stochastic transitions" in str(caught.value)
    assert "float32 master copies" in str(caught.value)


def test_a_setting_without_effect_is_a_warning(caplog):
    none, kernel = {"name": "none"}, {"noise_level": 0.3}
    check(algorithm={"name": "diffusion_nft"}, rollout={"plan": none})
    assert not caplog.records
    check(algorithm={"name": "diffusion_nft"}, rollout={"plan": none, "kernel": kernel})
    assert "rollout.kernel has no effect" in caplog.text


def test_a_learning_rate_that_is_never_reached_is_a_warning(caplog):
    check(num_steps=3, optimizer={"warmup_updates": 3 * parse_config(whole()).algorithm.updates_per_rollout})
    assert not caplog.records
    check(num_steps=3, optimizer={"warmup_updates": 300, "learning_rate": 1.0})
    assert re.search(r"warmup_updates=300, but the run ends after \d updates.*only comes to 0.0", caplog.text)


def test_what_can_teach_nothing_or_has_no_effect_is_refused():
    none = {"name": "none"}
    with pytest.raises(ValueError, match="draws one picture for a whole group: nothing can be compared"):
        check(algorithm={"name": "diffusion_nft"}, rollout={"plan": none, "shared_noise": True})
    check(rollout={"plan": {"name": "window", "strategy": "progressive", "stride": 2}})
    with pytest.raises(ValueError, match="strategy=random has no iterations and no stride; leave them out"):
        check(rollout={"plan": {"name": "window", "strategy": "random", "stride": 2, "iterations": 7}})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"algorithm": {"name": "step_dpo"}},
            "step_dpo compares candidates that leave the same state; set rollout.branching",
        ),
        (
            {"algorithm": {"name": "grpo_guard"}, "rollout": {"kernel": {"log_prob_weight": "variance"}}},
            "grpo_guard normalises Gaussian log densities",
        ),
        (
            {"algorithm": {"name": "awm"}, "rollout": {"plan": {"name": "none"}}, "advantage": {"clip": None}},
            "awm scales advantages by their clip",
        ),
        (
            {"algorithm": {"name": "pso"}, "rollout": {"batch_size": 8}},
            "needs whole groups.*: 8 do, and .*group_size is 16",
        ),
        (
            {"algorithm": {"name": "dgpo"}, "rollout": {"plan": {"name": "none"}}, "advantage": {"best_and_worst": 4}},
            "dgpo needs advantages that sum to 0 in a group; leave advantage.best_and_worst out",
        ),
        (
            {"rollout": {"plan": {"name": "all"}, "solver": "dpmpp_2m"}},
            "which takes it as euler does; leave rollout.solver",
        ),
        (
            {"rollout": {"negative_prompt": "grey"}},
            "rollout.negative_prompt does nothing with rollout.guidance_scale=1",
        ),
        (
            {"rollout": {"negative_prompt": "grey", "guidance_scale": 0}},
            "rollout.negative_prompt does nothing with rollout.guidance_scale=0; set that above 1",
        ),
        (
            {"evaluation": {"negative_prompt": "grey"}},
            "evaluation.negative_prompt does nothing with evaluation.guidance",
        ),
        ({"rollout": {"branching": {}, "batch_size": 8}}, "rollout.branching needs whole groups"),
        ({"rollout": {"branching": {}, "shared_noise": True}}, "shares the noise of a group anyway"),
        ({"rollout": {"branching": {"first": 2}, "plan": {"name": "window"}}}, "first needs a plan whose steps stay"),
        (
            {"algorithm": {"name": "awm"}, "rollout": {"branching": {}, "plan": {"name": "none"}}},
            "parts groups at stochastic steps, but",
        ),
        ({"rollout": {"branching": {}, "tail_fraction": 0.5}}, "no rollout.branching"),
        (
            {"algorithm": {"name": "awm"}, "rollout": {"plan": {"name": "none"}, "tail_fraction": 0.5}},
            "it needs a window or single steps as a plan",
        ),
        ({"rollout": {"train_guidance_scale": 1.0}}, "trains the very steps that were drawn, with their guidance"),
        ({"rollout": {"kernel": {"keep_budget": True}}}, "decay=constant has no keep_budget; leave"),
        ({"rollout": {"kernel": {"decay": "linear", "decay_rate": 3.0}}}, "decay=linear has no decay_rate; leave"),
        ({"rollout": {"tail_fraction": 0.5, "plan": {"name": "all"}}}, "it needs a window or single steps as a plan"),
        ({"advantage": {"best_and_worst": 16}}, "best_and_worst=16 leaves nothing out of groups of 16"),
        (
            {"algorithm": {"name": "flow_grpo", "transitions_per_sample": 1}, "rollout": {"branching": {}}},
            "trains every pool, each of one step; leave algorithm.transitions_per_sample out",
        ),
        ({"algorithm": {"name": "weighted_sft", "temperature": 2.0}}, "weights=best has no temperature"),
        (
            {"algorithm": {"name": "dgpo", "clip_range": None, "old_decay_max": 0.5}},
            "reference=reference has no old policy; leave old_decay",
        ),
        ({"algorithm": {"name": "awm", "old_coef": 0.0, "old_decay_max": 0.5}}, "old_coef=0 has no old policy"),
        (
            {"rollout": {"plan": {"name": "window", "strategy": "linear_decay", "decay_rate": 0.5}}},
            "strategy=linear_decay has no decay_rate; leave them out",
        ),
    ],
)
def test_what_algorithms_and_ways_of_drawing_do_not_go_with(sections, message):
    with pytest.raises(ValueError, match=message):
        check(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"rollout": {"guidance_scale": 4.5}},
        {"model": {"call": {"true_cfg_scale": 4.5}}},
        {"model": {"call": {"guidance_scale": 4.5}}},
        {"algorithm": {"name": "awm"}, "rollout": {"plan": {"name": "none"}, "train_guidance_scale": 4.5}},
    ],
)
def test_a_negative_prompt_goes_with_guidance_wherever_that_is_set(sections):
    rollout = {"plan": {"name": "all"}, **sections.get("rollout", {}), "negative_prompt": "grey"}
    check(**sections | {"rollout": rollout})


def test_a_group_of_dgpo_may_be_shared_among_processes_that_train_at_the_same_time():
    sections = {"algorithm": {"name": "dgpo"}, "rollout": {"plan": {"name": "none"}, "batch_size": 8, "group_size": 16}}
    check(2, **sections)
    with pytest.raises(ValueError, match="needs whole groups in the samples that pass the network together: 8 do"):
        check(1, **sections)


def test_the_quick_start_runs_on_its_processes():
    """What `scripts/quickstart.sh` starts can be shared out over the processes on which it starts it."""
    script = (Path(__file__).resolve().parents[2] / "scripts" / "quickstart.sh").read_text(encoding="utf-8")
    processes, name = re.search(r"--nproc_per_node (\d+) .* train (\w+)", script).groups()
    check_config(load_config(name), int(processes))


@pytest.mark.parametrize(
    ("short", "override", "section", "expected"),
    [
        ({"algorithm": "awm"}, "algorithm.kl_coef=0.1", "algorithm", {"name": "awm", "kl_coef": 0.1}),
        ({"rewards": ["ocr"]}, "rewards.ocr.weight=2", "rewards", {"ocr": {"weight": 2}}),
        ({"rewards": {"ocr": None}}, "rewards.ocr.weight=2", "rewards", {"ocr": {"weight": 2}}),
        ({"rollout": {"plan": "window"}}, "rollout.plan.size=2", "rollout", {"plan": {"name": "window", "size": 2}}),
        ({"evaluation": None}, "evaluation.num_prompts=2", "evaluation", {"num_prompts": 2}),
    ],
)
def test_an_override_goes_into_a_section_that_is_written_in_short(short, override, section, expected):
    assert parse_overrides([override], short)[section] == expected
