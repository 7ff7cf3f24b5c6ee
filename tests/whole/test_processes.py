"""Neither the number of processes nor the engine under it changes what is learned.

The same configuration runs on one process and on two, under each strategy, from torchrun and from accelerate.
Samples are the same bits everywhere; what is added up over processes or partitions may be added in another order.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
import zoo
from conftest import Make
from safetensors.torch import load_file
from variants import VARIANTS

from flowsteer.rl.algorithms.forward import NoiseLevels
from flowsteer.rl.metrics import read_metrics

# Sums of float32 numbers in another order differ by some 1e-7 of the largest term. Norms, divergences and scores are sums
# of terms of one sign: relative. Ratios are exp(differences of log densities of size 1), and the loss is a sum of terms of
# size 1 (advantage times ratio) that cancel to 1e-5: absolute.
# Preferences are 5 to 10 times the difference of errors of size 1.
RELATIVE = 5e-6
ABSOLUTE = {"ratio": 5e-7, "ratio_deviation": 5e-7, "loss": 5e-7, "margin": 2e-6}
# A KL and the distance to the old policy are mean squares d^2 of a difference d of two predictions of size 1. Each of
# them is known to half the float32 epsilon e, so d is known to e, and d^2 to 2 d e + e^2, however small d is.
SQUARED = ("kl", "old_distance")
# An update moves an element by learning_rate * g / (|g| + epsilon), whose slope is at most learning_rate / epsilon = 30.
# Elements of the gradient are sums of terms up to 1e-3 that cancel: rounding leaves 1e-10, which six updates make 2e-8.
# They move elements by 1e-2. The export holds lora_B times alpha / rank = 3, and so 6e-8.
WEIGHTS = 5e-7

# Of each process's own halves of an update; only comparable between runs with equally many processes.
AGREEMENT = "gradient_agreement"

# Rewards see 8-bit pixels, and the size of a JPEG jumps. After an update two runs draw pictures that differ by rounding.
# A pixel on the boundary between two grey levels, which many pictures have, may change the size of the file by some bytes.
# From there on the runs learn from other scores. Such a pair says nothing, and the test takes the next seed.
BYTES = 16
KILOBYTE = 1000  # the reward's unit

Runs = Callable[..., Path]


class RoundedApart(Exception):
    """A pixel of one run is another grey level in the other run."""


def refuse_other_pixels(mine: list[dict[str, float]], other: list[dict[str, float]], *, samples: int = 16) -> None:
    """Raise RoundedApart where scores differ by so little that it was a pixel; other differences are not excused."""
    for one, two in zip(mine[1:], other[1:]):  # the first step is drawn with equal weights
        difference = abs(one["reward_mean"] - two["reward_mean"]) * samples * KILOBYTE
        if 0 < difference <= BYTES:
            raise RoundedApart


def over_seeds(test: Callable[..., None]) -> Callable[..., None]:
    """Give a test runs of another seed when those of one were rounded apart."""

    @functools.wraps(test)
    def tried(**fixtures: Any) -> None:
        for seed in range(5):
            made = {name: fixtures[name] for name in ("runs", "make_config") if name in fixtures}
            try:
                test(**fixtures | {name: functools.partial(fixture, seed=seed) for name, fixture in made.items()})
                return
            except RoundedApart:
                continue
        pytest.fail("the runs were rounded apart with every seed: that is no accident")

    return tried


def test_a_pixel_is_excused_and_nothing_else() -> None:
    first = [{"reward_mean": -0.6}]
    refuse_other_pixels([*first, {"reward_mean": -0.6}], [*first, {"reward_mean": -0.6}])
    refuse_other_pixels([*first, {"reward_mean": -0.6}], [*first, {"reward_mean": -0.6 + 0.002}])  # 32 bytes: compared
    refuse_other_pixels([{"reward_mean": -0.6}], [{"reward_mean": -0.6001}])  # drawn with equal weights: compared
    with pytest.raises(RoundedApart):
        refuse_other_pixels([*first, {"reward_mean": -0.6}], [*first, {"reward_mean": -0.6 + 0.0001}])


@pytest.fixture(scope="module")
def runs(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """``runs(name, processes=1, launcher=None, **overrides)``: the folder of a run; each is made once."""
    root, done = tmp_path_factory.mktemp("runs"), {}

    def folder(
        name: str, *, processes: int = 1, launcher: list[str] | None = None, seed: int = 0, **overrides: Any
    ) -> Path:
        name = f"{name}, seed {seed}"
        if name not in done:
            config = make_config(root / name, seed=seed, **overrides)
            done[name] = launch.run_under(launcher, config) if launcher else launch.run(config, processes=processes)
        return done[name]

    return folder


def lines(folder: Path, *, without: tuple[str, ...] = ()) -> list[dict[str, float]]:
    """The run's metrics without times."""
    return [
        {key: value for key, value in line.items() if not key.startswith("seconds/") and key not in without}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "export").rglob("*.safetensors"))  # one for each denoiser
    assert files
    return {f"{file.name} {key}": value for file in files for key, value in load_file(file).items()}


def absolute(key: str, value: float) -> float:
    """How far a metric may be from this value because sums were added in another order."""
    if key in SQUARED:
        error = torch.finfo(torch.float32).eps
        return 2 * error * value**0.5 + error**2
    return ABSOLUTE.get(key, 0.0)


def assert_equal_runs(first: Path, second: Path) -> None:
    """Bit for bit."""
    assert lines(first) == lines(second)
    mine, other = weights(first), weights(second)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


def assert_close_runs(first: Path, second: Path) -> None:
    """Up to the order of sums."""
    mine, other = lines(first, without=(AGREEMENT,)), lines(second, without=(AGREEMENT,))
    assert len(mine) == len(other) > 1
    assert mine[0]["reward_mean"] == other[0]["reward_mean"]  # the same bits were drawn
    assert mine[0]["reward_std"] == other[0]["reward_std"] > 0
    refuse_other_pixels(mine, other)
    for one, two in zip(mine, other):
        assert one.keys() == two.keys()
        for key in one:
            assert one[key] == pytest.approx(two[key], rel=RELATIVE, abs=absolute(key, two[key])), key
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=WEIGHTS)


# At every commit the first variant of every algorithm, those that draw in ways of their own, and a reference that is renewed.
FIRST = {overrides["algorithm"]["name"]: name for name, overrides in reversed(VARIANTS.items())}
CHOSEN = {*FIRST.values(), "dance_grpo", "mix_grpo flash", "g2rpo", "step_dpo resampled", "diffusion_dpo online"}


@pytest.mark.parametrize(
    "name", [name if name in CHOSEN else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
@over_seeds
def test_two_processes_under_zero_2_are_one_and_resume_bit_for_bit(
    runs: Runs, make_config: Make, tmp_path: Path, name: str
) -> None:
    """One process without DeepSpeed against two with it; and these two, resumed before the last step, against unbroken."""
    steps = (
        VARIANTS[name]["algorithm"].get("refresh_every", 1) + 1
    )  # the policy that draws has been renewed before the stop
    overrides = {"num_steps": steps, "ema_decay": 0.9, **VARIANTS[name]}
    one = runs(f"{name} on one", **overrides)
    zero = {**overrides, "engine.strategy": "zero2", "save_every": 1, "keep": 2}
    two = runs(f"{name} on two", processes=2, **zero)
    assert_close_runs(one, two)
    assert all(line["grad_norm"] > 0 for line in lines(one))

    config = make_config(tmp_path / "resumed", **zero)
    stopped = shutil.copytree(two, tmp_path / "resumed")  # and then as it was before the last step's end
    shutil.rmtree(stopped / "export")
    shutil.rmtree(stopped / "checkpoints" / f"step_{steps:06d}")
    assert_equal_runs(launch.run(config, processes=2, resume=True), two)


@pytest.mark.parametrize("strategy", ["zero2", "zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
@over_seeds
def test_denoisers_that_share_the_steps_are_asked_alike_by_all_processes(
    runs: Runs, tmp_path: Path, strategy: str
) -> None:
    """Wan 2.2 has a transformer for high noise levels and one for low ones; ZeRO's processes meet in every pass."""
    zoo.build("wan").save_pretrained(tmp_path / "wan")  # again for every seed
    overrides = {
        "num_steps": 2,
        **VARIANTS["weighted_sft"],
        "model": {
            "path": str(tmp_path / "wan"),
            "lora": {"rank": 4, "alpha": 12, "targets": ["to_q", "to_k", "to_v"]},
            "height": 16,
            "width": 16,
            "call": {"num_frames": 1},
        },
        "rewards": {"brightness:Brightness": {}},
        "optimizer.learning_rate": 3e-3,  # its gradient is a hundred times the other model's
    }
    levels = NoiseLevels(4, count=2, seed=0, common=True)
    assert [set(levels.spread(step)) for step in (0, 1)] == [{0, 2}, {0, 1}]  # both transformers, then only the first
    one = runs("wan on one", **overrides)
    two = runs(f"wan under {strategy}", processes=2, **overrides, **{"engine.strategy": strategy})
    assert_close_runs(one, two)


@over_seeds
def test_a_group_of_dgpo_may_lie_on_two_processes(runs: Runs) -> None:
    """Batches of half a group on each of two processes, against whole groups on one: the sum over the group is the same."""
    overrides = {"num_steps": 2, **VARIANTS["dgpo"]}
    whole = runs("dgpo in whole groups", **overrides)
    halves = runs("dgpo in halves", processes=2, **overrides, **{"rollout.batch_size": 2})
    mine, other = lines(whole, without=(AGREEMENT,)), lines(halves, without=(AGREEMENT,))
    refuse_other_pixels(mine, other)
    for one, two in zip(mine, other):
        for key in one:  # passes over two rows and over four: other kernels, other roundings than those of sums alone
            assert one[key] == pytest.approx(two[key], rel=2e-4, abs=1e-6), key
    left, right = weights(whole), weights(halves)
    assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-5
    assert max(float(value.abs().max()) for key, value in left.items() if "lora_B" in key) > 1e-3


@pytest.mark.parametrize("strategy", ["zero3", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["lora", "full"])
@over_seeds
def test_three_policies_are_plain(runs: Runs, kind: str, strategy: str) -> None:
    """DGPO with its KL asks the current, the old and the reference policy in every pass."""
    overrides = {"num_steps": 2, **VARIANTS["dgpo old"]} | ({"model.lora": None} if kind == "full" else {})
    assert_close_runs(
        runs(f"three {kind}", **overrides),
        runs(f"three {kind} {strategy}", **overrides, **{"engine.strategy": strategy}),
    )


@over_seeds
def test_two_processes_are_one_over_several_updates(runs: Runs) -> None:
    one, two = runs("flow_grpo"), runs("flow_grpo_two", processes=2)
    assert_close_runs(one, two)
    curve = lines(one)
    assert [line["num_updates"] for line in curve] == [2, 4, 6]
    assert all(line["grad_norm"] > 5e-3 for line in curve)  # clipping took part
    assert curve[-1]["kl"] > curve[0]["kl"] > 0  # something was learned


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "fsdp2"])
@over_seeds
def test_every_strategy_is_plain(runs: Runs, strategy: str) -> None:
    plain = runs("flow_grpo")
    other = runs(strategy, **{"engine.strategy": strategy})
    assert_close_runs(plain, other)
    ours, theirs = ([line[AGREEMENT] for line in lines(folder)] for folder in (plain, other))
    assert ours == pytest.approx(theirs, abs=1e-4)  # a cosine of the same gradients; the hooks fire alike


LAUNCHERS = {"torchrun": launch.torchrun, "accelerate": launch.accelerate_launch}


@pytest.mark.parametrize("name", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
@over_seeds
def test_two_processes_of_a_launcher_are_those_of_the_tests(runs: Runs, name: str) -> None:
    """And so all that holds for the others here holds under the launchers that users start runs with."""
    stage = {"engine.strategy": "zero2"}
    launched = runs(name, launcher=LAUNCHERS[name](2), **stage)
    assert_equal_runs(runs("zero_2 on two", processes=2, **stage), launched)
    assert_close_runs(runs("flow_grpo"), launched)


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
@over_seeds
def test_all_weights_on_two_processes_are_plain(runs: Runs, strategy: str) -> None:
    """Policies are copies of all weights here; each process keeps and exchanges its share of them."""
    full = {"model.lora": None, "ema_decay": 0.5, "num_steps": 2}
    assert_close_runs(
        runs("full", **full), runs(f"full_{strategy}", processes=2, **full, **{"engine.strategy": strategy})
    )


PICTURES = {
    "sft": ({"image": "best"}, {"name": "weighted_sft", "weights": "all"}, 1),
    "dpo": ({"chosen": "best", "rejected": "worst"}, VARIANTS["diffusion_dpo"]["algorithm"], 2),
}


@pytest.mark.parametrize("name", PICTURES)
def test_two_processes_learn_from_pictures_as_one_does(
    runs: Runs, make_config: Make, picture_file: Path, tmp_path: Path, name: str
) -> None:
    """Rounded alike, whatever the seed: pictures of a file are not drawn. Each process encodes its own, with one folder."""
    pictures, algorithm, group_size = PICTURES[name]
    overrides: dict[str, Any] = {
        "num_steps": 2,
        "prompts": {"train": str(picture_file), "pictures": {**pictures, "cache": str(tmp_path / "cache")}},
        "rollout.plan": {"name": "none"},
        "rollout.prompts_per_step": 16 // group_size,
        "rollout.group_size": group_size,
        "algorithm": {"updates_per_rollout": 2, "noise_levels_per_sample": 2, **algorithm},
    }
    one, two = runs(f"{name} of pictures", **overrides), runs(f"{name} of pictures on two", processes=2, **overrides)
    mine, other = (lines(folder, without=(AGREEMENT,)) for folder in (one, two))
    for first, second in zip(mine, other, strict=True):
        assert first.keys() == second.keys()
        assert first["grad_norm"] > 0
        for key, value in first.items():
            assert value == pytest.approx(second[key], rel=RELATIVE, abs=absolute(key, second[key])), key
    left, right = weights(one), weights(two)
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=0, atol=WEIGHTS)
    assert len([*(tmp_path / "cache").rglob("*.safetensors")]) > 2


def poisoned(config: dict[str, Any], log: Path) -> None:
    """A run, in its own process, in which a gradient is not finite: writes whether the weights stayed, and the error."""
    from flowsteer.rl.config import parse_config
    from flowsteer.rl.engine.optimizer import NotFinite
    from flowsteer.rl.start import start
    from flowsteer.rl.train import train

    run = start(parse_config(config), quiet=True)
    parameters = list(run.policy.parameters().values())

    def values() -> list[torch.Tensor]:
        return [run.engine.full(parameter).clone() for parameter in parameters]

    before = values()
    watched = run.engine.backend.leaves.values() if run.engine.backend.strategy == "fsdp2" else parameters
    next(iter(watched)).register_hook(lambda gradient: gradient * float("nan"))
    message = "the run went on"
    try:
        train(run)
    except NotFinite as error:
        message = str(error)
    log.write_text(json.dumps([all(torch.equal(a, b) for a, b in zip(before, values())), message]))
    run.close()


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        ("zero2", "float32"),
        ("zero3", "bfloat16"),
        ("fsdp2", "bfloat16"),
        pytest.param("zero1", "bfloat16", marks=pytest.mark.slow),
        pytest.param("zero2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_change(
    make_config: Make, tmp_path: Path, strategy: str, dtype: str
) -> None:
    settings = {"engine.strategy": strategy, "model.dtype": dtype, "model.lora": None}
    process = launch.process(poisoned, make_config(tmp_path / "run", **settings), tmp_path / "log")
    process.start()
    assert launch.wait([process]) == [0]
    stayed, message = json.loads((tmp_path / "log").read_text())
    assert stayed
    assert "the gradient of update 1 is not finite" in message


@pytest.mark.parametrize(
    "strategy", ["zero3", "fsdp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero1", "zero2"))]
)
def test_half_precision_starts_at_the_reference_with_ratio_one(runs: Runs, strategy: str) -> None:
    """The proofs of test_proofs.py over the whole path: exchanged shares, DeepSpeed's own linear layers, bfloat16."""
    algorithm = {"name": "flow_grpo", "updates_per_rollout": 1, "kl_coef": 0.1}
    settings = {"model.lora": None, "model.dtype": "bfloat16", "engine.strategy": strategy}
    first, second = lines(runs(f"half {strategy}", algorithm=algorithm, num_steps=2, **settings))
    for line in (first, second):  # one update per rollout: every rollout is the current policy's
        assert (line["ratio"], line["ratio_deviation"], line["clip_fraction"]) == (1, 0, 0)
    assert first["kl"] == 0
    assert second["kl"] > 0
