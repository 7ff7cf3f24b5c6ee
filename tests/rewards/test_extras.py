"""Packages that only some rewards need may be missing: the rest works, and what needs them says what to install."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from flowsteer.rewards.extras import need
from flowsteer.rewards.registry import load_reward
from flowsteer.rewards.scorers import world

OPTIONAL = ("cv2", "rapidocr", "onnxruntime", "tensorboard")


@pytest.mark.parametrize(
    ("reward", "missing", "package", "extra"),
    [
        ("composition", "cv2", "cv2", "composition"),
        ("ocr", "cv2", "cv2", "ocr"),
        ("ocr", "rapidocr", "rapidocr", "ocr"),
        ("ocr", "onnxruntime", "onnxruntime", "ocr"),
    ],
)
def test_a_reward_names_the_extra_that_it_lacks(monkeypatch, reward, missing, package, extra):
    monkeypatch.setitem(sys.modules, missing, None)  # what `import` then raises is ModuleNotFoundError
    message = rf"the reward '{reward}' needs the package {package}, which is not installed; .*'flowsteer\[{extra}\]'"
    with pytest.raises(ValueError, match=message):
        load_reward(reward)


def test_drawing_the_world_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    caption = world.parse_caption("a red circle")
    with pytest.raises(ValueError, match=r"drawing the world of shapes needs .*'flowsteer\[composition\]'"):
        world.draw(caption, np.random.default_rng(0))


def test_a_package_that_is_there_and_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_extra.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        need("broken_extra", extra="ocr", what="a test")


def test_the_embedded_pipeline_is_drawn_and_scored_without_any_extra(tmp_path):
    """In a process of its own, where none of them can be imported: all rewards are listed, a picture has a score."""
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL}))\n"
        "from flowsteer.rewards.registry import list_rewards\n"
        "print([entry.name for entry in list_rewards() if 'cannot be imported' in entry.doc])\n"
        "from flowsteer.rl.command.main import app\n"
        f"picture = {str(tmp_path / 'picture.png')!r}\n"
        "app(['sample', 'a red circle', '-o', picture, '--num-inference-steps', '2'], standalone_mode=False)\n"
        "app(['score', picture, '-p', 'a red circle', '-r', 'jpeg_compressibility'], standalone_mode=False)\n"
        f"print([name for name in {OPTIONAL} if sys.modules[name] is not None])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("[]", "[]")
    assert "jpeg_compressibility" in done.stdout
