"""The ``flowsteer`` command: every command teaches, does what it says on a tiny model, and refuses in one message."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer
import yaml
import zoo
from inprocess import finished, fresh_process
from PIL import Image

from flowsteer.rewards.certify.certificate import CHECKS, certify
from flowsteer.rl.command.main import app, main
from flowsteer.rl.config import load_config
from flowsteer.rl.config.keys import find_keys
from flowsteer.rl.config.reference import markdown
from flowsteer.rl.metrics import read_metrics

SIZE = ["--height", "16", "--width", "16", "--call", "max_sequence_length=32", "--device", "cpu"]


class Done(NamedTuple):
    code: int
    out: str
    err: str


def command(*arguments: object) -> Done:
    """What a shell would see of ``flowsteer ...``; an error with a traceback is raised."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["flowsteer", *map(str, arguments)]
    try:
        with fresh_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


def refusal(*arguments: object) -> str:
    """The one message of a command that ends with code 2."""
    done = command(*arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    return done.err.removeprefix("error: ").strip()


def commands() -> list[tuple[str, ...]]:
    def below(group, path):
        for name, child in group.commands.items():
            yield from below(child, (*path, name)) if hasattr(child, "commands") else [(*path, name)]

    return list(below(typer.main.get_command(app), ()))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, make_config, prompt_file) -> Path:
    """A configuration of two steps as a YAML file."""
    folder = tmp_path_factory.mktemp("cli")
    evaluation = {"prompts": str(prompt_file), "num_prompts": 3, "num_seeds": 2, "num_inference_steps": 3}
    steep = {"rewards": {"jpeg_compressibility": {}}, "optimizer": {"learning_rate": 0.03}}  # the pictures change
    steep["model.lora.alpha"] = 8  # twice the rank: then the export is exact (rl/export.py, folded)
    config = make_config(folder / "run", num_steps=2, evaluation=evaluation, **steep)
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def trained(run_file) -> tuple[Path, Done]:
    """The folder of a run by the command, and what the command said."""
    done = command("train", run_file)
    assert done.code == 0, done.err
    return run_file.parent / "run", done


# --- help


def test_every_command_is_known_here():
    assert {" ".join(path) for path in commands()} == {
        "train", "plan", "evaluate", "export", "sample", "score", "check-model", "show-loop", "report", "rewards list",
        "config keys", "config list", "config show", "rewards certify", "rewards serve", "rewards env list",
        "rewards env create", "rewards env check", "rewards env remove", "algorithms list", "algorithms check",
    }  # fmt: skip


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_teaches(path):
    done = command(*path, "--help")
    assert done.code == 0
    text = " ".join(done.out.split())
    assert f"Example: flowsteer {' '.join(path)}" in text


def test_without_a_command_it_lists_them():
    done = command()
    assert "Usage: flowsteer" in done.out + done.err
    assert "check-model" in done.out + done.err


def test_version():
    done = command("--version")
    assert done.code == 0
    assert done.out == f"flowsteer {metadata.version('flowsteer')}\n"


def test_config_keys():
    """Every key of the schema, with an explanation; those of sections, of variants and of what users name."""
    keys = find_keys()
    assert [key.path for key in keys if not key.about] == []
    paths = {key.path for key in keys}
    saved = json.loads(load_config("embedded_nft_composition").model_dump_json())
    flat = set(flat_keys({**saved, "rewards": {"NAME": saved["rewards"]["composition"] | {"options": {}}}}))
    known = {path for path in flat if not path.endswith(".name") or path == "rollout.kernel.name"}
    assert known <= paths, known - paths
    assert {key.variant for key in keys if key.path == "rollout.plan.size"} == {"window"}
    done = command("config", "keys", "optimizer.*")
    assert "optimizer.learning_rate\n    number > 0, default 0.0003\n    After the warm-up.\n" in done.out
    assert "rollout" not in done.out
    assert "section with name: all | none | steps | window, default name: none" in command("config", "keys", "plan").out
    assert "did you mean optimizer.learning_rate or " in refusal("config", "keys", "learning_rte")
    assert "flowsteer config keys" in command("train", "--help").out


def test_shipped_configurations_are_listed_and_shown():
    listed = command("config", "list").out
    assert "embedded_nft_composition" in listed
    assert "sd35m_flow_grpo_ocr" in listed
    shown = command("config", "show", "sd35m_flow_grpo_ocr").out
    assert shown == (Path(__file__).resolve().parents[2] / "configs" / "sd35m_flow_grpo_ocr.yaml").read_text("utf-8")
    assert "did you mean 'sd35m_nft_ocr'?" in refusal("config", "show", "sd35m_nftt_ocr")


def test_the_page_of_all_keys_is_up_to_date():
    page = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == markdown(find_keys()), (
        "the schema has changed: flowsteer config keys --markdown > docs/configuration.md"
    )


def test_config_keys_as_markdown():
    """Each key is one row, in the table of its section or variant."""
    text = command("config", "keys", "--markdown").out
    assert text == markdown(find_keys())
    assert sum(line.startswith("| `") for line in text.splitlines()) == len(find_keys())
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == len(set(headings))
    _, run = text.split("## The run")
    assert "| `ema_decay` |" in run.split("## ")[0]
    assert "## `algorithm` with `name: awm`\n" in text
    assert "| `rollout.plan` | section with name: all or none or steps or window | `name: none` |" in text
    part = command("config", "keys", "warmup", "--markdown").out
    assert [line for line in part.splitlines() if line.startswith("| `")] == [
        "| `optimizer.warmup_updates` | integer >= 0 | `0` | Updates in which the learning rate rises from 0. |"
    ]


def flat_keys(tree: dict[str, object], prefix: str = "") -> list[str]:
    keys = []
    for name, value in tree.items():
        keys += flat_keys(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [f"{prefix}{name}"]
    return keys


def test_installed_and_as_a_module():
    """Torchrun starts the module."""
    for start in (["flowsteer"], [sys.executable, "-m", "flowsteer.rl.command"]):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run([*start, "--help"], capture_output=True, text=True, env=os.environ | {"PATH": path})
        assert done.returncode == 0, done.stderr
        assert "train" in done.stdout


@pytest.mark.slow
def test_what_packages_say_of_their_unused_parts_is_not_shown():
    """The packages of the extra `quantization` are imported by diffusers, and complain of kernels for other machines."""
    show = [sys.executable, "-m", "flowsteer.rl.command", "show-loop", "embedded"]
    done = subprocess.run(show, capture_output=True, text=True)
    assert done.returncode == 0
    assert "scheduler.step" in done.stdout
    assert done.stderr == ""


# --- looking


def test_rewards_list():
    text = command("rewards", "list").out
    for name in ("composition", "ocr", "jpeg_compressibility", "jpeg_incompressibility"):
        assert re.search(rf"\b{name}\b", text)
    assert "flowsteer" in text


def test_show_loop(tiny_sd3):
    text = command("show-loop", "StableDiffusion3Pipeline").out
    assert "for i, t in enumerate(timesteps):" in text
    assert "noise_pred = self.transformer(" in text
    assert command("show-loop", tiny_sd3).out == text
    assert "diffusers has no pipeline class 'NoSuchPipeline'" in refusal("show-loop", "NoSuchPipeline")


def test_check_model(tiny_sd3):
    done = command("check-model", tiny_sd3, *SIZE, "--targets", "to_q,to_add_out,add_q_proj", "--guidance-scale", "4")
    lines = done.out.splitlines()
    assert done.code == 0, done.out
    assert lines[0] == "StableDiffusion3Pipeline: can be trained"
    assert len(lines) <= 24, "one screen"
    names = [line.split()[1] for line in lines[1:]]
    assert names == [
        "lifts",
        "batch",
        "noise",
        "prompts",
        "purity",
        "sub-batch",
        "parity",
        "encoding",
        "LoRA",
        "parameters",
        "gradient",
    ]
    found, parameters, gradient = lines[-3:]
    assert found.endswith("layers found: to_q 2, to_add_out 1, add_q_proj 2"), "the last block has no to_add_out"
    assert parameters.endswith(f"{5 * 2 * 32 * 32:,} are trained at rank 32"), "layers x two factors x rank x width"
    assert "reached 8 of 10 LoRA tensors" in gradient
    assert gradient.endswith("none those of transformer.transformer_blocks.1.attn.add_q_proj"), (
        "text queries of the last"
    )


def test_check_model_of_a_configuration_that_maps_nothing(tmp_path):
    """What a configuration maps is told, too: tests/whole/test_pictures.py."""
    said = refusal("check-model")
    assert "give either a pipeline or --config" in said
    assert said == refusal("check-model", "embedded", "--config", "embedded_nft_composition")
    text = (Path(files("flowsteer.configs")) / "embedded_edit_nft_edit_composition.yaml").read_text()
    file = tmp_path / "unmapped.yaml"
    file.write_text(text.replace("inputs: {image: {column: source, kind: image}}\n", ""))
    done = command("check-model", "--config", file)
    assert done.code == 0, done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith("  ok    inputs ")]
    assert line.split("inputs ")[1].strip().startswith("the configuration maps none; not mapped: image, ")


def test_check_model_that_would_not_learn(tiny_sd3):
    done = command("check-model", tiny_sd3, *SIZE, "--targets", "to_q,transformer_blocks.1.attn.add_q_proj")
    assert done.code == 1
    assert "must not be trained: see FAIL" in done.out
    (line,) = [line for line in done.out.splitlines() if "FAIL " in line]
    assert "no transformer_blocks.1.attn.add_q_proj of transformer would learn: leave it out of the targets" in line
    done = command("check-model", tiny_sd3, *SIZE, "--targets", "query")
    assert done.code == 1
    assert "'query' match no linear layer of transformer; its layers end in" in done.out


def test_check_model_that_cannot_be_lifted(tmp_path, monkeypatch):
    pipe = zoo.build_variant(tmp_path, "stepless", (zoo.STEP, "                latents = noise_pred\n"))
    monkeypatch.setattr("flowsteer.rollout.lifting.pipeline.load_diffusers", lambda *args, **more: pipe)
    assert "StableDiffusion3Pipeline.__call__ has no loop around scheduler.step" in refusal(
        "check-model", "mine", *SIZE
    )


# --- a run and what can be done with it


def test_train(trained, run_file):
    folder, done = trained
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "config.yaml", "metrics.jsonl", "evaluations", "checkpoints", "export", "report.html",
        "rewards.json",
    }  # fmt: skip
    assert load_config(folder / "config.yaml") == load_config(run_file)
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1]
    assert {path.name for path in (folder / "evaluations").iterdir()} == {
        "step_000000.json", "step_000000.png", "step_000002.json", "step_000002.png",
    }  # fmt: skip
    assert (folder / "checkpoints" / "step_000002" / "checkpoint.json").is_file()
    assert f"weights: {folder / 'export' / 'pytorch_lora_weights.safetensors'}\n" in done.out
    assert f"report:  {folder / 'report.html'}\n" in done.out
    for text in (
        "16 = 4 prompts x 4",
        "step 0 (1/2 done)  reward_mean",
        "step 1 (2/2 done)  reward_mean",
        "evaluation after 2 steps  ",
    ):
        assert text in done.out


def test_quiet(run_file, tmp_path):
    done = command("train", run_file, f"output={tmp_path / 'run'}", "num_steps=1", "evaluation=null", "--quiet")
    assert done.code == 0
    assert done.out == ""
    assert (tmp_path / "run" / "export").is_dir()


def summary(file: Path) -> dict[str, float]:
    return {name: entry["mean"] for name, entry in json.loads(file.read_text())["summary"].items()}


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def test_evaluate_with_a_run_is_the_run_s_evaluation(trained, tmp_path):
    """Its prompts, rewards, size, call arguments and exported weights, loaded by diffusers."""
    folder, _ = trained
    done = command(
        "evaluate", "--run", folder, "--num-seeds", 2, "--num-prompts", 3, "--output", tmp_path / "after.json"
    )
    assert done.code == 0, done.err
    assert summary(tmp_path / "after.json") == summary(folder / "evaluations" / "step_000002.json")
    assert np.array_equal(pixels(tmp_path / "after.png"), pixels(folder / "evaluations" / "step_000002.png"))
    assert not np.array_equal(pixels(tmp_path / "after.png"), pixels(folder / "evaluations" / "step_000000.png"))
    assert f"{summary(tmp_path / 'after.json')['total']:.4f}" in done.out
    table, own = (
        json.loads(file.read_text()) for file in (tmp_path / "after.json", folder / "evaluations/step_000002.json")
    )
    assert table["scores"] == own["scores"]
    assert len(table["scores"]["total"]) == len(table["prompts"]) == 3


def test_evaluate_by_hand(trained, tiny_sd3, prompt_file, tmp_path):
    folder, _ = trained
    by_hand = ["evaluate", prompt_file, "--model", tiny_sd3, *SIZE, "-r", "jpeg_compressibility", "--num-seeds", 2]
    by_hand += ["--num-prompts", 3, "--num-inference-steps", 3]
    assert command(*by_hand, "--output", tmp_path / "base.json").code == 0
    assert summary(tmp_path / "base.json") == summary(folder / "evaluations" / "step_000000.json")
    for number, lora in enumerate([folder / "export", folder / "export" / "pytorch_lora_weights.safetensors"]):
        file = tmp_path / f"tuned_{number}.json"
        assert command(*by_hand, "--lora", lora, "--output", file).code == 0
        assert summary(file) == summary(folder / "evaluations" / "step_000002.json")


def test_evaluate_without_any_score(tmp_path, tiny_sd3, prompt_file, monkeypatch):
    """What could never be scored is refused before it is drawn; and if nothing has a score, the exit code says so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def counted(images, prompts, count, **columns):\n    return [1.0] * len(images)\n\n"
        "def silent(images, prompts, **columns):\n    return [None] * len(images)\n"
    )
    evaluate = ["evaluate", prompt_file, "--model", tiny_sd3, *SIZE, "--num-prompts", 1, "--num-seeds", 2]
    evaluate += ["--num-inference-steps", 1]
    assert "requires the column 'count', which" in refusal(*evaluate, "-r", "mine.py:counted")
    done = command(*evaluate, "-r", "mine.py:silent")
    assert (done.code, done.err.strip().splitlines()[-1]) == (1, "no picture has a score")


def test_evaluate_refuses(trained, tmp_path, tiny_sd3):
    folder, _ = trained
    there = tmp_path / "there.json"
    there.write_text("precious")
    assert refusal("evaluate", "--run", folder, "--output", there) == f"{there} exists already; choose another file"
    there.rename(tmp_path / "pictures.png")
    assert "pictures.png exists already" in refusal("evaluate", "--run", folder, "--output", tmp_path / "pictures.json")
    assert (tmp_path / "pictures.png").read_text() == "precious"
    assert "is to be a JSON file" in refusal("evaluate", "--run", folder, "--output", tmp_path / "new.png")
    assert "does not exist; make it first" in refusal(
        "evaluate", "--run", folder, "--output", tmp_path / "no" / "a.json"
    )
    assert "--run brings its own model" in refusal("evaluate", "--run", folder, "--model", tiny_sd3)
    assert "is not the folder of a run" in refusal("evaluate", "--run", tmp_path)
    assert "holds no pytorch_lora_weights.safetensors" in refusal("evaluate", "--lora", tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert "is not called pytorch_lora_weights.safetensors" in refusal(
        "evaluate", "--lora", tmp_path / "other.safetensors"
    )
    assert "there is no file no.safetensors" in refusal("evaluate", "--lora", "no.safetensors")
    assert "'x' is not of the form key=value" in refusal("evaluate", "--run", folder, "--call", "x")


def test_sample(trained, tmp_path):
    folder, _ = trained
    file = tmp_path / "new.png"
    done = command("sample", "a [red] circle", "a cat", "a cat", "--run", folder, "--num-seeds", 2, "-o", file)
    assert done.code == 0, done.err
    assert done.out == f"6 pictures: {file}\n"
    sheet = np.asarray(Image.open(file))
    assert sheet.shape == (3 * 18 * 8, 2 * 18 * 8, 3), "lines of seeds; 16 pixels and a frame of 2, enlarged to 128"
    lines = sheet.reshape(3, 18 * 8, -1)
    assert np.array_equal(lines[1], lines[2]), "the same prompt and seeds"
    assert not np.array_equal(lines[0], lines[1])
    assert refusal("sample", "a cat", "--run", folder, "-o", file) == f"{file} exists already; choose another file"
    assert "must end in .png" in refusal("sample", "a cat", "--run", folder, "-o", tmp_path / "new.gif")


PLUGIN = """
from flowsteer.rl.algorithms.losses import Terms
from flowsteer.rl.algorithms.transitions import TransitionAlgorithm

class Plain(TransitionAlgorithm):
    def per_sample(self, step):
        return Terms(loss=-step.advantage * step.log_prob)
"""


def test_an_algorithm_in_a_file_is_needed_as_it_was_to_go_on_and_not_at_all_for_the_result(
    tmp_path, run_file, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PLUGIN)
    given = ["train", run_file, "output=run", "algorithm=mine.py:Plain", "evaluation=null"]
    assert command(*given, "num_steps=1").code == 0
    Path("mine.py").write_text(PLUGIN.replace("-step", "+step"))
    assert "the code of algorithm 'mine.py:Plain' has changed since" in refusal(*given, "--resume")
    Path("mine.py").write_text(PLUGIN)
    assert command(*given, "--resume").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = command("sample", "a cat", "--run", "../run", "-o", "a.png", "--num-seeds", 1)
    assert done.code == 0, done.err


def test_sample_writes_files_that_can_be_scored(trained, tmp_path):
    folder, _ = trained
    files = tmp_path / "files"
    done = command("sample", "a cat", "a dog", "--run", folder, "--num-seeds", 2, "-o", files)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (files / "metadata.jsonl").read_text().splitlines()]
    assert [(line["file_name"], line["prompt"]) for line in lines] == [
        ("0000.png", "a cat"),
        ("0001.png", "a cat"),
        ("0002.png", "a dog"),
        ("0003.png", "a dog"),
    ]
    assert Image.open(files / "0000.png").size == (16, 16)
    done = command("score", "--metadata", files / "metadata.jsonl", "-r", "jpeg_compressibility")
    assert done.code == 0, done.err
    assert "0003.png" in done.out
    assert "files exists already" in refusal("sample", "a cat", "--run", folder, "-o", files)


def test_a_run_that_trained_all_weights_is_sampled_from(tmp_path, make_config):
    run = tmp_path / "run"
    finished(make_config(run, num_steps=1, **{"model.lora": None, "optimizer": {"learning_rate": 0.01}}))
    assert command("sample", "a cat", "--run", run, "-o", tmp_path / "run_pictures").code == 0
    assert command("export", run, tmp_path / "tuned").code == 0
    for name, model in (
        ("tuned", tmp_path / "tuned"),
        ("base", json.loads((run / "config.json").read_text())["model"]["path"]),
    ):
        assert command("sample", "a cat", "--model", model, *SIZE, "-o", tmp_path / f"{name}_pictures").code == 0
    drawn, tuned, base = (pixels(tmp_path / f"{name}_pictures" / "0000.png") for name in ("run", "tuned", "base"))
    assert np.array_equal(drawn, tuned)
    assert not np.array_equal(drawn, base)
    assert "trained all weights, so it has no LoRA" in refusal("export", run, tmp_path / "lora", "--format", "kohya")


def test_score(tmp_path):
    flat, noise = tmp_path / "flat.png", tmp_path / "noise.png"
    Image.new("RGB", (64, 64), "white").save(flat)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(noise)
    done = command("score", flat, noise, "-p", "a cat", "-r", "jpeg_compressibility", "-r", "jpeg_incompressibility")
    assert done.code == 0, done.err
    values = [float(value) for value in re.findall(r"(-?\d+\.\d{4})", done.out)]
    assert values[0] == -values[1]
    assert values[2] == -values[3]
    assert values[0] > values[2], "a flat image is smaller"
    (tmp_path / "text.png").write_text("not an image")
    assert "text.png is not an image that can be read" in refusal(
        "score", tmp_path / "text.png", "-p", "x", "-r", "ocr"
    )
    assert "there is no reward 'jpg'" in refusal("score", flat, "-p", "x", "-r", "jpg")


SCORED_FILES = """
class Counted:
    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, images, prompts, count, **columns):
        return [self.factor * number / bool(number) for number in count]  # 0 raises


class Rank:
    groupwise = True

    def __call__(self, images, prompts, **columns):
        if len(images) < 2:
            return [None] * len(images)
        return [float(image.mean() > images.mean()) for image in images]
"""


def test_score_gives_columns_options_and_groups(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SCORED_FILES)
    for name, level in (("dark", 10), ("bright", 200)):
        Image.new("RGB", (8, 8), (level,) * 3).save(f"{name}.png")
    both = ["dark.png", "bright.png", "-p", "a cat"]

    def numbers(done: Done) -> list[float]:
        assert done.code == 0, done.err
        return [float(value) for value in re.findall(r"(-?\d+\.\d{4})", done.out)]

    counted = ["-r", "mine.py:Counted"]
    assert numbers(command("score", *both, *counted, "--column", "count=3", "--option", "factor=2")) == [6.0, 6.0]
    assert numbers(command("score", *both, "-r", "mine.py:Rank")) == [0.0, 1.0]
    named = ["--option", "mine.py:Counted.factor=2", "--column", "count=3"]
    assert numbers(command("score", *both, *counted, "-r", "mine.py:Rank", *named)) == [6.0, 0.0, 6.0, 1.0]
    rows = [
        {"file_name": "dark.png", "prompt": "a", "count": 3},
        {"file_name": "bright.png", "prompt": "b", "count": 4},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir("/")
    place = tmp_path / "metadata.jsonl"
    assert numbers(command("score", "--metadata", place, "-r", f"{tmp_path}/mine.py:Counted")) == [3.0, 4.0]


def test_one_image_of_each_prompt_for_a_reward_that_compares(run_file, tmp_path, monkeypatch, caplog):
    """The evaluation would say nan; the advice comes before it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SCORED_FILES)
    arguments = ["train", run_file, "rewards=mine.py:Rank", "num_steps=1", "--quiet"]
    advice = "compares the images of a prompt, but evaluation.num_seeds=1 draws one image of each"
    assert command(*arguments, "output=one", "evaluation.num_seeds=1").code == 0
    assert advice in caplog.text
    assert "Set evaluation.num_seeds to 2 or more" in caplog.text
    caplog.clear()
    assert command(*arguments, "output=two").code == 0
    assert advice not in caplog.text


def test_score_without_a_score_is_code_1_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SCORED_FILES)
    Image.new("RGB", (8, 8)).save("one.png")
    Image.new("RGB", (8, 9)).save("two.png")
    done = command("score", "one.png", "-p", "a cat", "-r", "mine.py:Counted", "--column", "count=0")
    assert done.code == 1
    assert "one.png has no score: reward 'mine.py:Counted' raised ZeroDivisionError: " in done.err
    assert "ZeroDivisionError" not in done.out, "an error is no score"
    lacking = refusal("score", "one.png", "-p", "a cat", "-r", "mine.py:Counted", "--column", "cuont=1")
    assert lacking == (
        "the reward 'mine.py:Counted' requires the column 'count'; give it as --column count=VALUE, or in the lines of "
        "--metadata (given: cuont)"
    )
    assert "such as count=1" in refusal("score", "one.png", "-p", "a cat", "--column", "count")
    done = command("score", "one.png", "-p", "a cat", "-r", "mine.py:Rank")
    assert done.code == 1
    assert "one.png has no score: reward 'mine.py:Rank' gave no score (None)" in done.err
    both = ["score", "one.png", "two.png", "-p", "x", "-r", "mine.py:Rank"]
    assert "compares images, which must have one size; these have 8x8, 8x9" in refusal(*both)
    assert "does not say of which reward it is an option" in refusal(
        *both, "-r", "mine.py:Counted", "--option", "factor=2"
    )
    assert "give image files and their prompt with -p" in refusal("score", "one.png")
    (tmp_path / "metadata.jsonl").write_text('{"prompt": "a"}')
    assert 'needs the image as "file_name"' in refusal("score", "--metadata", "metadata.jsonl")
    assert "leave out the images" in refusal("score", "one.png", "--metadata", "metadata.jsonl")


def test_export_writes_a_pipeline_that_needs_no_lora(trained, tmp_path, prompt_file):
    folder, _ = trained
    done = command("export", folder, tmp_path / "tuned")
    assert done.code == 0, done.err
    assert done.out.endswith(f"pipeline: {tmp_path / 'tuned'}\n")
    evaluate = ["evaluate", prompt_file, "--model", tmp_path / "tuned", *SIZE, "-r", "jpeg_compressibility"]
    evaluate += ["--num-seeds", 2, "--num-prompts", 3, "--num-inference-steps", 3, "--output", tmp_path / "tuned.json"]
    assert command(*evaluate).code == 0
    before, after = (pixels(folder / "evaluations" / f"step_{step:06d}.png") for step in (0, 2))
    # W + BA in one matrix rounds differently than W x + B (A x): a pixel may fall to the other side of a half
    assert np.abs(pixels(tmp_path / "tuned.png") - after).max() <= 1
    assert np.abs(before - after).max() > 5
    assert "tuned is not empty; choose another one" in refusal("export", folder, tmp_path / "tuned")
    assert "is not the folder of a run" in refusal("export", tmp_path, tmp_path / "other")


def test_report_again(trained):
    folder, _ = trained
    (folder / "report.html").unlink()
    assert command("report", folder).out == f"report: {folder / 'report.html'}\n"
    assert (folder / "report.html").is_file()
    assert "is not the folder of a run" in refusal("report", folder.parent)


# --- ends


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.group_size=3", "algorithm.updates_per_rollout=7"], "one of these works"),
        (["rollot.group_size=3"], "rollot: unknown key; did you mean 'rollout'?"),
        (["group_size"], "is not of the form key=value"),
        (["rewards=5"], "rewards: maps names to values, got 5; write {NAME: VALUE}"),
        (["rewards=[ocr, ocr]"], "rewards: 'ocr' is listed twice"),
        (
            ["model=embedded"],
            "model: this is a section, got the text 'embedded'; set its keys, as model.KEY=VALUE: adapter, attention,",
        ),
        (["rewards.jpeg_compressibility=1.0"], "jpeg_compressibility: this is a section, got 1.0; set its keys"),
        (["rollout.plan=al"], "rollout.plan.name: unknown name 'al'; allowed: all, none, steps, window"),
        (["model.lora.targets=[query]"], "'query' match no linear layer"),
    ],
)
def test_a_mistake_is_one_message(run_file, tmp_path, overrides, message):
    assert message in refusal("train", run_file, f"output={tmp_path / 'run'}", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_setting_with_dashes_and_a_run_s_folder_are_told(run_file, trained):
    for mistake in ("--num_steps=4", "--resme"):
        message = refusal("train", run_file, mistake)
        assert message.startswith(f"there is no option {mistake.partition('=')[0]}; settings are given without dashes")
    assert refusal("train", "--resme", run_file).startswith("there is no option --resme")
    folder, _ = trained
    assert refusal("train", folder) == f"{folder} is the folder of a run; give {folder / 'config.yaml'}"
    assert refusal("train", run_file, "num_stps=4").startswith(
        f"flowsteer cannot run {run_file} with the settings of the command line:\n  num_stps: unknown key"
    )


def test_mistakes_before_that():
    assert (
        "there is no configuration 'embeded_nft'; give a YAML file, or the name of a shipped one; did you mean 'embedded_"
        in refusal("train", "embeded_nft")
    )
    assert command("train").code == 2
    assert command("trian").code == 2


def test_a_traceback_where_somebody_has_to_look(run_file, tmp_path, monkeypatch):
    """A fault in the code of a plug-in is one line with its place; where more is asked for, or where the fault is ours, all."""
    (tmp_path / "their_reward.py").write_text(
        "class Reward:\n    def __init__(self):\n        raise ValueError('fault in here')\n"
        "    def __call__(self, images, prompts, **columns):\n        return [0.0] * len(images)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = ("train", run_file, f"output={tmp_path / 'run'}", "rewards={their_reward:Reward: {}}")
    assert re.match(
        r"reward 'their_reward:Reward' cannot be made: ValueError: fault in here \(.*their_reward.py, line 3\)",
        refusal(*broken),
    )

    def broken_report(run):
        raise ValueError("fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr("flowsteer.rl.report.page.write_report", broken_report)
        with pytest.raises(ValueError, match="fault of ours"):
            command("report", tmp_path)
    monkeypatch.setenv("FLOWSTEER_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown key"):
        command("train", run_file, "rollot=3")


@pytest.fixture
def plugin(tmp_path_factory, monkeypatch) -> Iterator[str]:
    """The name of a module whose rewards end a run."""
    folder = tmp_path_factory.mktemp("plugin")
    name = f"ending_rewards_{folder.name}"
    (folder / f"{name}.py").write_text(
        "import os, signal, time\n\n\n"
        "def terminated(images, prompts, **columns):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return [float(image.mean()) for image in images]\n\n\n"
        "def interrupted(images, prompts, **columns):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [float(image.mean()) for image in images]\n\n\n"
        "def interrupted_twice(images, prompts, **columns):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(1.2)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [float(image.mean()) for image in images]\n\n\n"
        "def moves(images, prompts, **columns):\n"
        "    os.chdir('/')\n"
        "    return [float(image.mean()) for image in images]\n\n\n"
        "def down(images, prompts, **columns):\n"
        "    raise ConnectionError('the server is down')\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize(("reward", "code"), [("terminated", 143), ("interrupted", 130)])
def test_sigterm_and_ctrl_c_save_and_say_how_to_go_on(run_file, tmp_path, plugin, reward, code, capfd):
    output = tmp_path / "run"
    arguments = ["train", run_file, f"output={output}", f"rewards={{{plugin}:{reward}: {{}}}}", "evaluation=null"]
    done = command(*arguments)
    assert done.code == code
    assert "starting at step 0\n" in done.out
    said = capfd.readouterr().err
    assert said.count("press Ctrl-C again to end it now") == (reward == "interrupted"), "four calls are one press"
    assert done.out.endswith("stopped after 1 of 2 steps; the same command with --resume goes on\n")
    assert (output / "checkpoints" / "step_000001").is_dir()
    assert not (output / "export").exists(), "the result of half a run is no result"
    done = command(*arguments, "--resume")
    assert done.code == 0, "it was asked to stop in the last step, which was the end anyway"
    assert "continuing with step 1 (1/2 done)" in done.out
    assert (output / "export").is_dir()


def test_a_second_ctrl_c_ends_the_run_now(run_file, tmp_path, plugin):
    output = tmp_path / "run"
    arguments = ["train", run_file, f"output={output}", "evaluation=null", "save_every=1"]
    arguments += [f"rewards={{{plugin}:interrupted_twice: {{}}}}"]
    done = command(*arguments)
    assert done.code == 130
    assert done.out.endswith("ended in the middle of a step, before the first checkpoint\n")
    assert not (output / "checkpoints").exists()
    done = command(*arguments, "--resume")
    assert f"--resume found no checkpoint in {output / 'checkpoints'}: starting at step 0\n" in done.out


def test_a_reward_that_changes_the_folder_moves_no_output(run_file, tmp_path, plugin, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("train", run_file, "output=run", f"rewards={{{plugin}:moves: {{}}}}", "evaluation=null")
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "run" / "checkpoints" / "step_000002").is_dir()


def test_a_reward_in_a_file(run_file, tmp_path, monkeypatch):
    """By its path, wherever a reward is named: in a configuration, for score and certify, and in an override."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "class Level:\n    uses_prompt = False\n    def __init__(self, factor=1.0):\n        self.factor = factor\n"
        "    def __call__(self, images, prompts, **columns):\n"
        "        return [self.factor * float(image.mean()) for image in images]\n"
    )
    Image.new("RGB", (8, 8), (10, 10, 10)).save("flat.png")
    done = command("score", "flat.png", "-p", "x", "-r", "./mine.py:Level")
    assert done.code == 0, done.err
    assert "10.0000" in done.out
    assert command("rewards", "certify", "mine.py:Level").code == 0
    assert "mine.py:Level" in refusal("score", "flat.png", "-p", "x", "-r", "mine.py")
    rewards = ["rewards={./mine.py:Level: {}}", "rewards../mine.py:Level.options={factor: 2.0}"]
    done = command("train", run_file, "output=run", *rewards, "evaluation=null")
    assert done.code == 0, done.err
    line = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert any("mine.py:Level" in name for name in line), line.keys()


def test_too_few_scores_say_how_to_go_on(run_file, tmp_path, plugin):
    message = refusal(
        "train", run_file, f"output={tmp_path / 'run'}", f"rewards={{{plugin}:down: {{}}}}", "evaluation=null"
    )
    assert "only 0.0% of the samples have a score" in message
    assert message.endswith("The state before this step is saved: once the reward works again, go on with --resume")
    assert (tmp_path / "run" / "checkpoints" / "step_000000").is_dir()


# --- rewards


def test_certify(tmp_path):
    """A sound reward's page and its golden scores; another quality's scores are refused by them."""
    golden = tmp_path / "golden.json"
    done = command("rewards", "certify", "jpeg_compressibility", "--write-golden", golden)
    assert done.code == 0, done.err
    assert "reward 'jpeg_compressibility': certified" in done.out
    assert command("rewards", "certify", "jpeg_compressibility", "--golden", golden).code == 0
    done = command("rewards", "certify", "jpeg_compressibility", "-o", "quality=50", "--golden", golden)
    assert done.code == 1
    assert "REFUSED by: golden scores" in done.out


def test_certify_names_the_check_that_ends_the_process(tmp_path):
    """On stderr, in a process of its own: no exception could be caught."""
    (tmp_path / "mine.py").write_text(
        "import os, signal\n\n\n"
        "def fragile(images, prompts, **columns):\n"
        "    if len(images) > 1:\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return [float(image.mean()) for image in images]\n"
    )
    start = [sys.executable, "-m", "flowsteer.rl.command", "rewards", "certify", "mine.py:fragile"]
    done = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGSEGV
    told, _, trace = done.stderr.partition("Fatal Python error: Segmentation fault")
    assert told.splitlines()[-1] == f"certifying mine.py:fragile: {first_with_several()}"
    assert "in fragile" in trace


def first_with_several() -> str:
    """The name of the first check that shows a reward more than one image."""
    sizes = []

    def seen(images, prompts, **columns):
        sizes.append((told[-1], len(images)))
        return [float(image.mean()) for image in images]

    told = [""]
    certify(lambda: seen, name="seen", checks=dict(list(CHECKS.items())[:6]), progress=told.append)
    return next(check for check, size in sizes if size > 1)


def test_certify_pictures_of_one_s_own(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("dim", 90), ("light", 160), ("bright", 250)):
        Image.fromarray(rng.integers(0, level, (24, 24, 3), dtype=np.uint8)).save(tmp_path / f"a_{name}_thing.png")
    done = command("rewards", "certify", "jpeg_compressibility", "--images", tmp_path)
    assert done.code == 0, done.out
    assert "4 images of 24x24" in done.out
    assert "there is no folder" in refusal("rewards", "certify", "jpeg_compressibility", "--images", tmp_path / "no")
    assert "there is no reward 'jpeg_compresibility'; " in refusal("rewards", "certify", "jpeg_compresibility")
    (tmp_path / "a_dim_thing.png").unlink()
    few = refusal("rewards", "certify", "jpeg_compressibility", "--images", tmp_path)
    assert few == f"--images {tmp_path} holds 3 images; at least 4 are needed"
    done = command("rewards", "certify", "jpeg_compressibility", "-o", "qualty=5")
    assert done.code == 1
    assert "has no option 'qualty'" in " ".join(done.out.split())


def test_environments_are_listed_built_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWSTEER_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "250")
    assert "originals" in command("rewards", "env", "list").out
    recipe = tmp_path / "empty.toml"
    recipe.write_text('about = "nothing"\npython = ["3.8", "3.99"]\nsmoke = "import json"\n', encoding="utf-8")
    assert "is not built" in refusal("rewards", "env", "check", recipe)
    assert command("rewards", "env", "create", recipe).code == 0
    assert "it runs: import json" in command("rewards", "env", "check", recipe).out
    recipe.write_text('about = "nothing"\npython = ["3.8", "3.99"]\nsmoke = "import jsom"\n', encoding="utf-8")
    done = command("rewards", "env", "create", recipe)
    assert done.code == 2
    assert "No module named 'jsom'" in done.err
    assert "removed" in command("rewards", "env", "remove", recipe).out
    assert "nothing is built" in refusal("rewards", "env", "remove", recipe)
