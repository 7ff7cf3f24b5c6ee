"""What the documents tell readers to copy does what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from inprocess import finished

from flowsteer.rl.check.page import check_algorithm, trials_of

ROOT = Path(__file__).resolve().parents[2]


def block(document: str, begins: str) -> str:
    """The only code block of a document that holds this line."""
    blocks = re.findall(r"```\w+\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [text for text in blocks if begins in text]
    return found


def test_the_configuration_of_the_readme_trains_and_plain_diffusers_loads_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config: dict[str, Any] = yaml.safe_load(block("README.md", "# my.yaml"))
    finished(config)
    lines = [json.loads(line) for line in Path("runs/mine/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    Path("runs/mine").rename("runs/first")
    space: dict[str, Any] = {}
    exec(block("README.md", 'files("flowsteer.rollout")'), space)
    assert space["image"].size == (32, 32)


def test_the_algorithm_of_the_page_passes_all_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_algorithm.py").write_text(block("docs/algorithms.md", "# my_algorithm.py"), encoding="utf-8")
    (trial,) = trials_of("./my_algorithm.py:Reinforce", {"algorithm": {"scale": 2.0}}).values()
    page = check_algorithm("Reinforce", trial)
    assert page.ok, page.text()
