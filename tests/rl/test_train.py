"""The page, `rl/train.py`: that each act has the policy it is meant for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import launch
import torch
from conftest import Make
from inprocess import fresh_process
from torch import Tensor

from flowsteer.rl.config import parse_config
from flowsteer.rl.fit import of_all_lengths
from flowsteer.rl.start import start
from flowsteer.rl.train import train
from flowsteer.rollout.data.prompts import Prompts


def test_the_acting_policy_draws_and_the_old_one_follows_after_each_step(make_config: Make, tmp_path: Path) -> None:
    """DiffusionNFT with two updates a step: after n updates the old policy keeps min(0.1 n, 0.5) of itself."""
    nft = launch.nft(updates_per_rollout=2, old_decay_slope=0.1)
    config = make_config(tmp_path / "run", num_steps=3, **nft, **{"model.lora": None})
    with fresh_process():
        run = start(parse_config(config), quiet=True)
        sample, report = run.worker.sample, run.report
        drew: list[str] = []
        after: list[dict[str, Tensor]] = []

        def weights() -> dict[str, Tensor]:
            found = {}
            for name in ("current", "old"):
                with run.policy.using(name), torch.no_grad():
                    found[name] = torch.cat([parameter.flatten() for parameter in run.policy.parameters().values()])
            return found

        def sampling(*arguments: Any, **more: Any) -> Any:
            drew.append(run.policy.active)
            return sample(*arguments, **more)

        def reporting(step: int, statistics: dict[str, float]) -> None:
            after.append(weights())
            report(step, statistics)

        run.worker.sample, run.report = sampling, reporting  # type: ignore[method-assign]
        old = weights()["old"]
        try:
            train(run)
        finally:
            run.close()
    assert drew == ["old"] * 3
    for now, decay in zip(after, (0.2, 0.4, 0.5), strict=True):
        old = decay * old + (1 - decay) * now["current"]
        assert (now["current"] - old).abs().max() > 1e-4
        torch.testing.assert_close(now["old"], old)


def test_a_start_prepares_prompts_of_all_lengths_and_not_the_whole_file():
    """Which prompts cannot stand in one batch shows in a few: the shortest, the longest, and some in between."""
    texts = ("x" * 50, *("y" * length for length in range(10, 40)), "z" * 3)
    chosen = [row.text for row in of_all_lengths(Prompts(texts=texts))]
    assert len(chosen) == 8
    assert (chosen[0], chosen[-1]) == ("z" * 3, "x" * 50)
    assert [row.text for row in of_all_lengths(Prompts(texts=("one",)))] == ["one"]
    assert sorted(row.text for row in of_all_lengths(Prompts(texts=("b", "aa", "ccc")))) == ["aa", "b", "ccc"]
