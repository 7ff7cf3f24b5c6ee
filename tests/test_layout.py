"""The house keeps its order: who imports whom, what is packaged, what an import costs, and the page stays a page."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import inspect
import math
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flowsteer.rl.build import build_algorithm, build_plan
from flowsteer.rl.config import Config, check_config, load_config, shipped_configs
from flowsteer.rl.train import train

ROOT = Path(__file__).parents[1]
FOLDERS = ("rl", "rewards", "rollout", "configs")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = (
    "deepspeed", "rapidocr", "onnxruntime", "cv2", "hpsv2", "ImageReward", "tensorboard", "wandb", "matplotlib", "trl",
    "datasets", "pandas", "pyarrow", "scipy", "sklearn", "torchvision",
    "flowsteer.rl.report.page", "flowsteer.rewards.certify",
)  # fmt: skip


def files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("flowsteer", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere in it, also inside functions."""
    modules = {name_of(file) for file in files()}
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & modules) or {node.module or ""}
    return {name for name in found if name.split(".")[0] == "flowsteer"}


GRAPH = {name_of(path): imports(path) - {name_of(path)} for path in files()}


def test_the_graph_is_read_right():
    assert "flowsteer.rollout.sample" in GRAPH["flowsteer.rollout.worker"]
    assert "flowsteer.rl.start" in GRAPH["flowsteer.rl.command.training"], "imports inside functions count"
    assert "flowsteer.rollout.steps.kernels" in GRAPH["flowsteer.rl.algorithms.transitions"], "from a import module"


@pytest.mark.parametrize("folder", ["rewards", "rollout"])
def test_rewards_and_rollout_know_only_themselves(folder):
    for module, imported in GRAPH.items():
        if module.startswith(f"flowsteer.{folder}"):
            assert all(name.startswith(f"flowsteer.{folder}") for name in imported), (module, imported)


ROLLOUT_FLOORS = {  # a file imports from its own floor and from those below
    "types": 0,
    "imports": 0,
    "steps": 1,
    "data": 1,
    "lifting": 2,
    "sample": 3,
    "branches": 4,
    "share": 4,
    "worker": 5,
    "offline": 5,
}


def test_order_inside_rollout():
    """Types <- steps, data <- lifting <- sample <- branches, share <- worker, offline."""
    for module, imported in GRAPH.items():
        if not module.startswith("flowsteer.rollout."):
            continue
        room = module.split(".")[2]
        rooms = {name.split(".")[2] for name in imported if name.count(".") > 1}
        above = {name for name in rooms if ROLLOUT_FLOORS[name] > ROLLOUT_FLOORS[room]}
        assert not above, f"{module} imports {above} from a floor above"
        read = {"flowsteer.rollout.data.files", "flowsteer.rollout.data.batches"} & imported
        assert not read or room in ("data", "share", "worker", "offline"), f"{module} reads prompt files"


def test_order_inside_rl():
    family = {f"flowsteer.rl.algorithms.{name}" for name in ("losses", "transitions", "forward", "pairs")}
    algorithms = {name for name in GRAPH if name.startswith("flowsteer.rl.algorithms.")} - family
    assert len(algorithms) >= 9
    for module in algorithms | family:
        allowed = family | {"flowsteer.rl.types", "flowsteer.rl.advantage"}
        own = {name for name in GRAPH[module] if name.startswith("flowsteer.rl.")}
        assert own <= allowed, f"{module} imports {own - allowed}: algorithms stand by themselves, without the engine"
    top = ("train", "start", "fit", "prompt_files", "run", "build", "build_rewards", "command", "config")
    rooms = ("algorithms", "engine", "advantage", "policy", "compare", "scoring", "types", "checkpoint", "export")
    for module, imported in GRAPH.items():
        if module.startswith("flowsteer.rl.") and module.split(".")[2] in rooms:
            found = {name for name in imported if name.startswith("flowsteer.rl.") and name.split(".")[2] in top}
            assert module == "flowsteer.rl.checkpoint" or not found, f"{module} imports {found}"
    reads = "flowsteer.rl.config"
    readers = {module.split(".")[2] for module, names in GRAPH.items() if any(name.startswith(reads) for name in names)}
    building = {"build", "build_rewards", "start", "fit", "prompt_files", "run"}
    assert readers <= building | {"check", "command", "config", "checkpoint", "plan"}
    users = {module for module, imported in GRAPH.items() if "flowsteer.rl.train" in imported}
    assert users == {"flowsteer.rl.command.training"}


def test_no_circles():
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError with the circle


def test_packages_are_the_folders_with_python_files():
    folders = {".".join(("flowsteer", *path.parent.relative_to(ROOT).parts)) for path in files()}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == folders


def test_the_source_distribution_is_the_whole_project(tmp_path):
    """Setuptools' own list of what it would pack: documents, scripts, examples and tests too, and nothing compiled."""
    code = "from setuptools import setup; setup()"
    command = [sys.executable, "-c", code, "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    listed = (tmp_path / "flowsteer.egg-info" / "SOURCES.txt").read_text(encoding="utf-8").splitlines()
    packed = {line.removeprefix("./") for line in listed}
    folders = (*FOLDERS, "docs", "examples", "scripts", "tests")
    compiled = re.compile(r"__pycache__|\.pyc$|\.egg-info/|^examples/[^/]+/build/")
    there = {
        path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()
    }
    assert {path for path in there if not compiled.search(path)} - packed == set()
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "constraints.txt", "pyproject.toml"} <= packed
    assert not [path for path in packed if compiled.search(path) and not path.startswith(str(tmp_path))]


def test_python_versions_agree():
    """What is promised, linted for and installed with is one thing."""
    project = PYPROJECT["project"]
    lowest = re.search(r">=3\.(\d+)", project["requires-python"])
    assert lowest
    named = [int(text) for text in re.findall(r"Python :: 3\.(\d+)", "\n".join(project["classifiers"]))]
    assert named == list(range(int(lowest[1]), named[-1] + 1))
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py3{lowest[1]}"
    assert f"(3.{named[0]} to 3.{named[-1]})" in (ROOT / "scripts" / "environment.sh").read_text(encoding="utf-8")
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft"):
        needs = importlib.metadata.metadata(package)["Requires-Python"]
        least = re.search(r">=\s*3\.(\d+)", needs)
        assert least is None or int(least[1]) <= int(lowest[1]), f"{package} needs Python {needs}"


def test_all_extras_are_installed_with_the_tests():
    extras = PYPROJECT["project"]["optional-dependencies"]
    everything = re.fullmatch(r"flowsteer\[(.*)\]", extras["all"][0])
    assert everything
    apart = {"quantization"}  # scripts/test.sh runs its tests by themselves
    assert set(everything[1].split(",")) == set(extras) - {"all", "test"} - apart
    assert "flowsteer[all]" in extras["test"]


def test_every_folder_is_typed_and_its_data_are_packaged():
    for folder in FOLDERS:
        assert (ROOT / folder / "py.typed").is_file()
    patterns = [pattern for own in PYPROJECT["tool"]["setuptools"]["package-data"].values() for pattern in own]
    suffixes = {path.suffix for folder in ("rl", "configs") for path in (ROOT / folder).rglob("*.*") if path.is_file()}
    assert suffixes - {".py", ".typed", ".pyc"} <= {Path(pattern).suffix for pattern in patterns}


@pytest.mark.parametrize("group", ["flowsteer.rewards", "console_scripts"])
def test_entry_points_are_the_installed_ones(group):
    project = PYPROJECT["project"]
    written = project["scripts"] if group == "console_scripts" else project["entry-points"][group]
    points = importlib.metadata.entry_points(group=group)
    installed = {point.name: point.value for point in points if point.dist is None or point.dist.name == "flowsteer"}
    assert installed == written, "pyproject.toml has changed: install the project again (pip install -e .)"


def test_an_import_is_light():
    """Neither a command's help nor a reward's own environment may have to wait for, or even have, the heavy packages."""
    rest = [name for name in GRAPH if name.startswith("flowsteer.rollout.")]
    rest += [
        "flowsteer.rewards.registry",
        "flowsteer.rewards.combine",
        "flowsteer.rl.start",
        "flowsteer.rl.train",
        "flowsteer.rl.command.options",
    ]
    code = (
        "import gc, importlib, sys\n"
        "import flowsteer.rl.command.main, flowsteer.rewards.registry\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))\n"
        "passes = []\n"
        "gc.callbacks.append(lambda phase, about: passes.append(about['generation']))\n"
        "try: flowsteer.rl.command.training.train('no_such_configuration')\n"
        "except ValueError: pass\n"
        "print(passes.count(2), gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
        f"for name in {rest}: importlib.import_module(name)\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    nothing_heavy, collections = "[]", "0 True True"  # as `flowsteer train` imports: nobody looks for garbage meanwhile
    assert done.stdout.splitlines() == [nothing_heavy, collections, nothing_heavy]


def header_of(name: str) -> tuple[str, list[str]]:
    """A configuration's opening comment, and the arguments of ``flowsteer train`` in its command."""
    lines = (ROOT / "configs" / name).read_text(encoding="utf-8").splitlines()
    end = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    header = "\n".join(lines[:end])
    header = re.sub(r"\\\n#", "", header)  # a command over two lines
    found = re.search(r"Command: (.+)", header)
    assert found, f"{name}: the header gives no command"
    return header, shlex.split(found[1])


@pytest.mark.parametrize("name", shipped_configs())
def test_every_configuration_is_runnable(name):
    header, command = header_of(name)
    assert re.search(r"Hardware: \S", header), "the header says what hardware it is for"
    after = command[command.index("train") + 1 :]
    assert after[0] == name.removesuffix(".yaml")
    config = load_config(after[0], after[1:])
    processes = math.prod(
        int(command[command.index(key) + 1]) for key in ("--nnodes", "--nproc_per_node") if key in command
    )
    assert "--nproc_per_node" not in command or int(command[command.index("--nproc_per_node") + 1]) <= 8, "a node has 8"
    check_config(config, processes)
    processes: Any = SimpleNamespace(gather=None)
    build_algorithm(config, build_plan(config.rollout.plan, config), processes)
    assert config.output == f"runs/{after[0]}"


def test_the_name_says_model_algorithm_reward():
    called = {  # algorithms that are another one with other rollouts have names of their own
        "flow_grpo": ("flow_grpo", "mixgrpo", "dance_grpo", "g2rpo", "ddpo"),
        "diffusion_nft": ("nft",),
        "step_dpo": ("step_dpo", "spo"),
        "weighted_sft": ("raft", "sft"),
        "diffusion_dpo": ("diffusion_dpo", "offline_dpo"),
    }
    for name in shipped_configs():
        config: Config = load_config(name)
        algorithm = config.algorithm.name
        assert any(f"_{word}_" in name for word in called.get(algorithm, (algorithm,)))
        sources = config.rewards if config.prompts.pictures is None else ["pictures"]
        assert any(f"_{source}" in name for source in sources)


def test_no_paths_of_a_machine():
    place = re.compile(r"(?<![\w.~])/(home|Users|root|mnt|work|workspace)/\w")
    texts = {".py", ".yaml", ".toml", ".md", ".sh", ".txt", ".jinja"}
    own = [path for folder in (*FOLDERS, "scripts", "docs", "tests") for path in (ROOT / folder).rglob("*")]
    for path in [*own, *ROOT.iterdir()]:
        if path.is_file() and path.suffix in texts:
            found = place.search(path.read_text(encoding="utf-8"))
            # tests may need one that nobody has, to see that it is hidden
            assert not found or ("tests" in path.parts and str(ROOT) not in path.read_text()), (path, found)


def test_the_page_is_a_page():
    source = inspect.getsource(train)
    assert len(source.splitlines()) <= 50
    acts = re.findall(r"# (\d\. \w+)", source)
    assert acts == ["1. sample", "2. score", "3. compare", "4. improve"]


def test_files_and_functions_are_short():
    """What is longer has more than one subject. A function is counted without its signature, in which commands have options."""
    for path in [*files(), *sorted((ROOT / "scripts").glob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]:
        source = path.read_text(encoding="utf-8")
        most = 450 if path.parent.name == "scripts" else 400
        assert len(source.splitlines()) <= most, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.body[0].lineno < 80, f"{path}: {node.name}"


def test_the_readme_says_how_far_each_configuration_was_verified():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| published settings |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
