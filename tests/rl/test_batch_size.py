"""`rollout.batch_size` is the most: every shipped configuration finds one that its number of processes can share."""

import itertools
import re

import pytest

from flowsteer.rl.config import check_config, fitted, load_config, shipped_configs
from flowsteer.rollout.data.batches import batch_sizes, check_divisible

REAL = [name for name in shipped_configs() if not name.startswith("embedded")]
PROCESSES = (1, 2, 4, 8, 16, 32, 64)
FEWER_GROUPS_THAN_PROCESSES = {  # groups must be whole, or a step has no multiple of as many samples: the first such number
    "flux1dev_g2rpo_ocr.yaml": 32,
    "flux1dev_mixgrpo_ocr.yaml": 64,
    "flux1dev_mixgrpo_flash_ocr.yaml": 64,
    "sd15_spo_step_preference.yaml": 16,
    "sd35m_diffusion_dpo_ocr.yaml": 32,
    "sd35m_raft_ocr.yaml": 16,
}


@pytest.mark.parametrize("name", REAL)
def test_every_real_configuration_runs_on_every_number_of_processes(name):
    """Or says which number of prompts does, where not even one group is left for each process and update."""
    config = load_config(name)
    rollout = config.rollout
    for processes in PROCESSES:
        if processes < FEWER_GROUPS_THAN_PROCESSES.get(name, 1000):
            check_config(config, processes)
            used = fitted(config, processes).rollout.batch_size
            assert used <= rollout.batch_size
            sizes = {"prompts_per_step": rollout.prompts_per_step, "group_size": rollout.group_size}
            updates = config.algorithm.updates_per_rollout
            check_divisible(**sizes, batch_size=used, num_processes=processes, updates_per_rollout=updates)
            continue
        with pytest.raises(ValueError, match="cannot be shared evenly") as refused:
            check_config(config, processes)
        assert "\n" not in str(refused.value), "one fault, one sentence"
        for value in re.search(r"rollout\.prompts_per_step=([\d or]+\d)[;.]?", str(refused.value).split("works:")[1])[
            1
        ].split(" or "):
            check_config(load_config(name, [f"rollout.prompts_per_step={value}"]), processes)


@pytest.mark.parametrize(
    ("name", "used"), [("sd35m_flow_grpo_ocr", (8, 8, 8, 8, 6, 6, 3)), ("sd35m_dgpo_ocr", (16, 16, 16, 16, 8, 4, 2))]
)
def test_the_largest_that_can_be_shared_is_used(name, used):
    """1152 samples among 16 processes x 2 updates are 36 each; DGPO's groups may lie over processes."""
    assert tuple(fitted(load_config(name), processes).rollout.batch_size for processes in PROCESSES) == used


def test_it_is_the_largest_that_divides():
    keys = ("prompts_per_step", "group_size", "batch_size", "num_processes", "updates_per_rollout")
    for numbers in itertools.product((1, 3, 6), (2, 4), (1, 5, 9), (1, 3), (1, 2)):
        sizes = dict(zip(keys, numbers))
        found = batch_sizes(**sizes)
        works = []
        for size in range(1, sizes["batch_size"] + 1):
            try:
                check_divisible(**{**sizes, "batch_size": size})
                works.append(size)
            except ValueError:
                pass
        assert found == sorted(works, reverse=True)


def test_the_run_uses_it_says_it_and_keeps_what_was_given(tmp_path, make_config, capsys):
    from flowsteer.rl.config import parse_config
    from flowsteer.rl.start import start

    run = start(parse_config(make_config(tmp_path / "run", **{"rollout.batch_size": 7})))
    assert len(run.worker.sample(0)[0]) == 4, "groups of four, two batches of them in each update"
    assert "of 4 (rollout.batch_size=7 at most) on 1 process" in capsys.readouterr().out
    assert load_config(tmp_path / "run" / "config.yaml").rollout.batch_size == 7
