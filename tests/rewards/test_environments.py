"""Environments of their own: built whole or not at all, refused where a hash differs, and nothing of ours is touched.

Without a network: the recipe of these tests installs a package of ten lines from a local folder.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from flowsteer.rewards.envs import environments
from flowsteer.rewards.envs.environments import (
    check,
    create,
    environments_folder,
    find,
    list_environments,
    locate,
    remove,
)
from flowsteer.rewards.envs.recipe import FOLDER, load_recipe, recipe_names

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


def make_wheel(folder: Path, name: str = "tinypackage") -> str:
    """An installable package with a data file; returns its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": "VALUE = 7\n",
        f"{name}/data.txt": "some data\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-to-be-had\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_recipe(folder: Path, *, sha256: str = "0" * 64, number: float = 0.25, python: str = VERSION) -> Path:
    """The recipe ``tiny`` with everything that a recipe can have."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.txt").write_text(f"tinypackage==1.0 --hash=sha256:{sha256}\n")
    (folder / "tiny_golden.py").write_text(
        "import json, tinypackage\nprint(json.dumps({'share': tinypackage.VALUE / 28}))\n"
    )
    (folder / "tiny_scorer.py").write_text("def score(images, prompts, **columns):\n    return [1.0] * len(prompts)\n")
    data = hashlib.sha256(b"some data\n").hexdigest()
    path = folder / "tiny.toml"
    path.write_text(
        f'about = "a test"\npython = ["{python}", "{python}"]\nsmoke = "import tinypackage, tiny_shim"\n'
        '[[install]]\nrequirements = "tiny.txt"\n'
        f'[[asset]]\nsource = "tinypackage/data.txt"\ntarget = "tinypackage/copy.txt"\nsha256 = "{data}"\n'
        '[files]\n"tiny_shim.py" = "import tinypackage"\n'
        '[scorers]\nones = "tiny_scorer.py:score"\n'
        '[golden]\nscript = "tiny_golden.py"\ntolerance = 1e-5\n'
        f"numbers = {{ share = {number} }}\n"
    )
    return path


def installed_here() -> tuple[dict[str, str], list[str]]:
    """What this environment holds: packages with versions, and the names in its folder."""
    packages = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    return packages, sorted(path.name for path in Path(sysconfig.get_path("purelib")).iterdir())


@dataclass
class Built:
    recipe: Path
    root: Path
    path: Path
    lines: list[str]
    after_kill: list[str]  # what the build that was killed left
    before: tuple[dict[str, str], list[str]]
    elsewhere: Path


@pytest.fixture(scope="module")
def pip_at_home(tmp_path_factory) -> Iterator[tuple[Path, Path, str]]:
    """A folder of ours is all that pip knows, and its environment variables lead it astray: (folder, elsewhere, sha256)."""
    folder, elsewhere = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("astray") / "elsewhere"
    sha256 = make_wheel(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(folder))
        patch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
        patch.setenv("PIP_TARGET", str(elsewhere))
        patch.setenv("PIP_USER", "1")
        (folder / "constraints.txt").write_text("tinypackage==2.0\n")
        patch.setenv("PIP_CONSTRAINT", str(folder / "constraints.txt"))
        paths = [sysconfig.get_path("purelib"), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        yield folder, elsewhere, sha256


@pytest.fixture(scope="module")
def built(pip_at_home, tmp_path_factory) -> Built:
    """The recipe's environment, built after a build that was killed."""
    _, elsewhere, sha256 = pip_at_home
    folder = tmp_path_factory.mktemp("environments")
    recipe, root = write_recipe(folder / "recipes", sha256=sha256), folder / "root"
    before = installed_here()
    code = (
        "import pathlib, sys\nfrom flowsteer.rewards.envs.environments import create\n"
        "create(sys.argv[1], root=pathlib.Path(sys.argv[2]), progress=lambda line: print(line, flush=True))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(recipe), str(root)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert child.stdout is not None
    assert "an empty environment" in child.stdout.readline()
    deadline = time.monotonic() + 20
    while not list(root.glob(".tiny-*/bin/python")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    after_kill = sorted(path.name for path in root.iterdir())
    assert [row for row in list_environments(root=root) if row.built] == []
    lines: list[str] = []
    path = create(str(recipe), root=root, progress=lines.append)
    return Built(recipe, root, path, lines, after_kill, before, elsewhere)


def test_it_is_there_with_what_the_recipe_says(built):
    code = "import tinypackage, pathlib; print(pathlib.Path(tinypackage.__file__).with_name('copy.txt').read_text())"
    python = built.path / "bin" / "python"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "some data"
    assert built.path.parent == built.root
    assert re.fullmatch(r"tiny-[0-9a-f]{12}", built.path.name)
    assert [line.split(":")[0] for line in built.lines] == ["tiny"] * 4 + ["tiny is built"]


def test_nothing_in_it_remembers_the_name_under_which_it_was_built(built, monkeypatch):
    monkeypatch.delenv("PIP_USER")
    code = "import sys, tinypackage; print(sys.prefix, tinypackage.__file__)"
    python = built.path / "bin" / "python"
    prefix, file = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True).stdout.split()
    assert prefix == str(built.path)
    assert file.startswith(f"{prefix}{os.sep}")
    listed = subprocess.run([python, "-I", "-m", "pip", "list", "-v"], capture_output=True, text=True).stdout
    assert re.search(rf"tinypackage +1\.0 +{re.escape(prefix)}", listed)


def test_a_killed_build_leaves_nothing_that_counts(built):
    left = [name for name in built.after_kill if not name.endswith(".lock")]
    assert [name.startswith(".tiny-") for name in left] == [True], "the unfinished folder, under a hidden name"
    assert {path.name for path in built.root.iterdir() if path.suffix != ".lock"} == {built.path.name}


def test_this_environment_is_untouched_and_pip_is_not_led_astray(built):
    assert installed_here() == built.before
    assert not built.elsewhere.exists()
    assert "tinypackage" not in installed_here()[0]


def test_what_is_built_is_not_built_again(built, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    lines: list[str] = []
    assert create(str(built.recipe), root=built.root, progress=lines.append) == built.path
    assert lines == [f"tiny is already built: {built.path}"]


def test_a_second_builder_waits_for_the_first(built):
    lines: list[str] = []
    waiting = threading.Event()

    def progress(line: str) -> None:
        lines.append(line)
        waiting.set()

    with FileLock(built.root / f".{built.path.name}.lock"):
        second = threading.Thread(
            target=create, args=[str(built.recipe)], kwargs={"root": built.root, "progress": progress}
        )
        second.start()
        assert waiting.wait(10)
        second.join(0.2)
        assert second.is_alive()
    second.join(10)
    assert not second.is_alive()
    assert lines == [
        f"another process is building or removing {built.path.name}; waiting for it",
        f"tiny is already built: {built.path}",
    ]


def test_another_file_than_the_recipes_is_refused(pip_at_home, tmp_path):
    recipe = write_recipe(tmp_path / "recipes", sha256="ab" * 32)
    with pytest.raises(
        RuntimeError, match=r"pip install -r tiny.txt failed with the exit code 1:\n(.|\n)*hash"
    ) as caught:
        create(str(recipe), root=tmp_path / "root", progress=lambda line: None)
    assert pip_at_home[2] in str(caught.value), "pip's last lines, with the hash that was found"
    assert "pip config list" in str(caught.value)
    assert [path.name for path in (tmp_path / "root").iterdir() if path.suffix != ".lock"] == []


def test_an_asset_with_another_hash_is_refused(tmp_path):
    (tmp_path / "source").write_text("changed")
    recipe = load_recipe(str(write_recipe(tmp_path / "recipes")))
    asset = recipe.asset[0].model_copy(update={"source": "source"})
    with pytest.raises(
        RuntimeError, match=f"source has the sha256 {hashlib.sha256(b'changed').hexdigest()}; the recipe"
    ):
        environments._copy(asset, tmp_path)
    assert not (tmp_path / asset.target).exists()


def test_the_list_says_what_is_built_and_what_was_tried(built):
    rows = {row.name: row for row in list_environments(root=built.root)}
    assert set(rows) == {*recipe_names(), "tiny"}
    tiny = rows["tiny"]
    assert (tiny.built, tiny.path, tiny.python, tiny.current) == (True, built.path, VERSION, None)
    assert tiny.packages["tinypackage"] == "1.0"
    assert "pip" in tiny.packages
    assert tiny.size >= sum(file.lstat().st_size for file in built.path.rglob("*.py"))
    assert not any(row.built for row in rows.values() if row.name != "tiny")
    assert "parity" in (rows["originals"].tried or "")
    assert rows["hpsv3"].tried is None
    assert rows["geneval_detector"].tried is None


def test_a_worker_is_told_the_python_and_the_file(built):
    python, target = locate(str(built.recipe), "ones", root=built.root)
    assert python == built.path / "bin" / "python"
    assert target == f"{built.recipe.parent / 'tiny_scorer.py'}:score"
    with pytest.raises(ValueError, match="has no scorer 'twos'; it has: ones"):
        locate(str(built.recipe), "twos", root=built.root)


def test_check_runs_the_golden_numbers(built, tmp_path):
    lines: list[str] = []
    check(str(built.recipe), root=built.root, progress=lines.append)
    assert lines[-1] == "share: 0.2500000, stored 0.2500000, difference 0.0e+00"
    sha256 = re.findall("sha256:([0-9a-f]{64})", built.recipe.with_name("tiny.txt").read_text())[0]
    other = write_recipe(tmp_path, sha256=sha256, number=0.2501)
    with pytest.raises(RuntimeError, match=r"share is 0.25, and was 0.2501 .*not comparable"):
        check(str(other), root=built.root, progress=lines.append)


def test_check_and_remove_see_what_somebody_changed(built, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(built.root, root, symlinks=True)
    path = root / built.path.name
    packages = next(path.glob("lib/python*/site-packages"))
    (packages / "tinypackage-1.0.dist-info").rename(packages / "gone")
    with pytest.raises(RuntimeError, match=r"tinypackage was 1\.0 and is not there; build it again"):
        check(str(built.recipe), root=root, progress=lambda line: None)
    assert remove("tiny", root=root, progress=lambda line: None) == [path]
    assert [left.name for left in root.iterdir() if left.suffix != ".lock"] == []
    lines: list[str] = []
    assert remove(str(built.recipe), root=root, progress=lines.append) == []
    assert lines == [f"nothing is built of 'tiny' in {root}"]
    assert built.path.is_dir(), "only in the folder that was given"


def test_an_environment_of_an_older_recipe_is_not_taken_for_this_one(built, tmp_path):
    recipe = write_recipe(tmp_path / "recipes", sha256="cd" * 32)
    with pytest.raises(ValueError, match=r"'tiny' is not built for this version of its recipe in .*env create"):
        find(str(recipe), root=built.root)
    with pytest.raises(ValueError, match=r"'tiny' is not built in .*build it: flowsteer rewards env create"):
        find(str(recipe), root=tmp_path)


def test_a_record_names_what_made_it(built):
    record = json.loads((built.path / "environment.json").read_text())
    assert record["recipe"] == load_recipe(str(built.recipe)).digest
    assert record["packages"] == {"tinypackage": "1.0", **record["packages"]}


@pytest.mark.parametrize("given", [None, sys.executable])
def test_no_python_in_the_recipes_range(tmp_path, given):
    recipe = write_recipe(tmp_path, python="3.2")
    own = re.escape(f"{sys.executable}: {sys.version.split()[0]}")
    with pytest.raises(
        ValueError, match=rf"tiny needs a python from 3.2 to 3.2, and there is none \({own}.*python=PATH"
    ):
        create(str(recipe), root=tmp_path / "root", python=given)
    assert not (tmp_path / "root").exists()


def test_a_python_that_does_not_run_is_passed_over(tmp_path, monkeypatch):
    broken = tmp_path / "bin" / "python3.2"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(broken.parent))
    with pytest.raises(ValueError, match=r"python3.2: does not run\); install one"):
        create(str(write_recipe(tmp_path / "recipes", python="3.2")), root=tmp_path / "root")


def test_the_digest_is_of_what_is_built(tmp_path):
    path = write_recipe(tmp_path)
    digest = load_recipe(str(path)).digest
    path.write_text(path.read_text().replace("a test", "another text").replace("0.25", "0.5"))
    assert load_recipe(str(path)).digest == digest
    path.with_name("tiny.txt").write_text("tinypackage==1.1\n")
    assert load_recipe(str(path)).digest != digest


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('about = "a test"', 'abuot = "a test"', "abuot"),
        ('"tiny.txt"', '"tny.txt"', "names the file tny.txt, which is not beside it"),
        (f'["{VERSION}", "{VERSION}"]', '["3.12", "3.9"]', "the oldest python comes first"),
        (f'["{VERSION}", "{VERSION}"]', '["3", "4"]', "a python version looks like 3.11, got '3'"),
        ("smoke =", "smoke", "tiny.toml: "),
        ("tolerance = 1e-5", "tolerance = 0", "golden.tolerance"),
    ],
)
def test_a_recipe_that_cannot_be_understood(tmp_path, old, new, message):
    path = write_recipe(tmp_path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(str(path))


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match="there is no recipe 'orignals'; did you mean 'originals'"):
        create("orignals")


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_is_pinned(name):
    recipe = load_recipe(name)
    compile(recipe.smoke, name, "exec")
    for step in recipe.install:
        text = (FOLDER / step.requirements).read_text()
        assert "://" not in text
        for line in re.sub(r"#.*|\\\n", " ", text).strip().splitlines():
            package, *hashes = line.split()
            assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+(;.*)?", package), line
            assert bool(hashes) == step.hashes
            assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", each) for each in hashes)
    for target in recipe.scorers.values():
        file, _, attribute = target.partition(":")
        tree = ast.parse((FOLDER / file).read_text())
        assert attribute in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_where_environments_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWSTEER_CACHE", str(tmp_path))
    assert environments_folder() == tmp_path / "reward-envs"
    monkeypatch.delenv("FLOWSTEER_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert environments_folder() == tmp_path / "xdg" / "flowsteer" / "reward-envs"
