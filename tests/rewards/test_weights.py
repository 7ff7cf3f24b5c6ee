"""Where weights are found, their hashes, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import subprocess

import huggingface_hub.constants
import pytest
import tiny_rewards
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BlipVisionModel, CLIPModel

from flowsteer.rewards.scorers.heads import linear_layers
from flowsteer.rewards.scorers.weights import (
    file_sha256,
    find_file,
    find_folder,
    folder_sha256,
    load_pretrained,
    load_strictly,
    read_tensors,
)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_the_hash_is_that_of_the_files_bytes(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"abc" * 3_000_000)  # several blocks
    digest = hashlib.sha256(b"abc" * 3_000_000).hexdigest()
    assert file_sha256(file) == digest
    assert find_file(str(file), sha256=digest.upper()).sha256 == digest
    with pytest.raises(ValueError, match=f"has the sha256 {digest}, expected {'0' * 64}: these are other weights"):
        find_file(str(file), sha256="0" * 64)


def test_the_hash_of_a_folder_is_what_sha256sum_says_of_its_list(tmp_path):
    for name in ("model.safetensors", "config.json", "vocab.txt", "README.md", "pytorch_model.bin"):
        (tmp_path / name).write_text(name)
    # neither what nothing reads, nor the pickle beside safetensors
    listed = subprocess.run(
        "sha256sum config.json model.safetensors vocab.txt | sha256sum",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[0]
    assert folder_sha256(tmp_path) == listed
    assert find_folder(str(tmp_path), sha256=listed).path == tmp_path
    (tmp_path / "config.json").write_text("other")
    with pytest.raises(ValueError, match="these are other weights"):
        find_folder(str(tmp_path), sha256=listed)


def test_a_tokenizers_hash_does_not_read_weights(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    before = folder_sha256(tmp_path, weights=False)
    (tmp_path / "model.safetensors").write_text("x")
    assert folder_sha256(tmp_path, weights=False) == before
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        folder_sha256(tmp_path)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("find", "place", "message"),
    [
        (
            find_file,
            "/nowhere/x.pt",
            "there is no file /nowhere/x.pt; give the path of one, or owner/repository:file of",
        ),
        (find_file, "xswu/HPSv2", "there is no file xswu/HPSv2; give the path of one, or owner/repository:file"),
        (
            find_file,
            "xswu/HPSv2:HPS.pt",
            "run `hf download xswu/HPSv2 HPS.pt` and bring the file here; then give its path",
        ),
        (find_file, "a/b@v1:x.pt", "run `hf download a/b x.pt --revision v1` and bring the file here"),
        (
            find_folder,
            "./models/clip",
            "there is no folder ./models/clip; give the path of one, or owner/repository of",
        ),
        (find_folder, "a/b:x.pt", "there is no folder a/b:x.pt; give the path of one, or owner/repository of the hub"),
        (
            find_folder,
            "a/b@main",
            "run `hf download a/b --revision main` and bring the folder here; then give its path",
        ),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(find, place, message):
    with pytest.raises(ValueError, match=message):
        find(place)


@pytest.mark.usefixtures("offline")
def test_what_was_fetched_before_is_found_without_the_network(tmp_path):
    commit = "1" * 40
    stored = tmp_path / "cache" / "models--owner--name"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(commit)
    (stored / "snapshots" / commit).mkdir(parents=True)
    for name in ("x.pt", "config.json", "model.safetensors"):
        (stored / "snapshots" / commit / name).write_text(name)
    assert find_file("owner/name:x.pt").sha256 == hashlib.sha256(b"x.pt").hexdigest()
    assert find_file(f"owner/name@{commit}:x.pt").path.name == "x.pt"
    assert find_folder("owner/name").path == stored / "snapshots" / commit


def test_a_file_for_a_folder_and_a_folder_for_a_file(tmp_path):
    (tmp_path / "x.pt").write_text("x")
    with pytest.raises(ValueError, match="is a folder; give the file with the weights"):
        find_file(str(tmp_path))
    with pytest.raises(ValueError, match=r"x.pt is a file; give the folder"):
        find_folder(str(tmp_path / "x.pt"))


def test_both_formats_give_the_tensors(tmp_path):
    state = {"a": torch.randn(3), "b": torch.randn(2, 2).half()}
    torch.save(state, tmp_path / "x.pt")
    save_file(state, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        read = read_tensors(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


class Trap:
    """Unpickled by pickle itself, it would write a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"state_dict": Trap(tmp_path / "written")}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt cannot be read as tensors \(UnpicklingError\)"):
        read_tensors(tmp_path / "x.pt")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00garbage" * 10)
    with pytest.raises(ValueError, match=f"{name} cannot be read as tensors"):
        read_tensors(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, not tensors by name"):
        read_tensors(tmp_path / "list.pt")


def test_loading_is_key_for_key():
    module, state = nn.Linear(2, 3), {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    load_strictly(module, state, "w")
    assert module.weight.eq(1).all()
    with pytest.raises(ValueError, match="w lacks bias; these are weights of another model"):
        load_strictly(module, {"weight": state["weight"]}, "w")
    more = {f"x{number}": torch.zeros(1) for number in range(5)}
    with pytest.raises(ValueError, match="w has the unexpected x0, x1, x2 and 2 more"):
        load_strictly(module, state | more, "w")
    with pytest.raises(ValueError, match=r"w: bias has the shape \(1,\), expected \(3,\)"):
        load_strictly(module, state | {"bias": torch.zeros(1)}, "w")


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        return tiny_rewards.clip(tmp_path / "clip")

    def rewrite(self, folder, change):
        state = read_tensors(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    def test_half_precision_becomes_float32(self, folder):
        self.rewrite(folder, lambda state: state.update({key: value.half() for key, value in state.items()}))
        model = load_pretrained(CLIPModel, find_folder(str(folder)))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_a_missing_or_unexpected_key_is_named(self, folder):
        self.rewrite(folder, lambda state: state.pop("visual_projection.weight"))
        with pytest.raises(ValueError, match=r"clip lacks visual_projection.weight: it is no CLIPModel"):
            load_pretrained(CLIPModel, find_folder(str(folder)))
        self.rewrite(folder, lambda state: state.update({"visual_projection.weight": torch.zeros(24, 32)}))
        self.rewrite(folder, lambda state: state.update({"another.weight": torch.zeros(1)}))
        with pytest.raises(ValueError, match=r"clip has the unexpected another.weight: it is no CLIPModel"):
            load_pretrained(CLIPModel, find_folder(str(folder)))

    def test_keys_that_do_not_matter_may_be_missing_or_unexpected_and_no_others(self, folder):
        self.rewrite(folder, lambda state: state.update({"old.a": torch.zeros(1), "model.old.b": torch.zeros(1)}))
        self.rewrite(folder, lambda state: state.pop("visual_projection.weight"))
        found = find_folder(str(folder))
        both = {"missing": (r"visual_projection\.",), "unexpected": (r"old\.", r"model\.old\.")}
        assert isinstance(load_pretrained(CLIPModel, found, **both), CLIPModel)
        with pytest.raises(ValueError, match=r"lacks visual_projection\.weight"):
            load_pretrained(CLIPModel, found, **both | {"missing": ("projection",)})  # not the key's start
        with pytest.raises(ValueError, match=r"has the unexpected model\.old\.b: it"):
            load_pretrained(CLIPModel, found, **both | {"unexpected": (r"old\.",)})

    def test_another_model_is_refused(self, folder):
        with pytest.raises(ValueError, match="BlipVisionModel"):
            load_pretrained(BlipVisionModel, find_folder(str(folder)))

    def test_a_pickle_is_read_where_there_are_no_safetensors(self, folder):
        expected = load_pretrained(CLIPModel, find_folder(str(folder))).state_dict()
        torch.save(read_tensors(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        read = load_pretrained(CLIPModel, find_folder(str(folder))).state_dict()
        assert all(torch.equal(read[key], value) for key, value in expected.items())


class TestHeads:
    def test_layers_follow_their_numbers(self, tmp_path):
        state = read_tensors(tiny_rewards.aesthetic_head(tmp_path / "head.pth", 24))
        layers = linear_layers(state, "layers.", width=24, name="head")
        shown = torch.randn(5, 24)
        expected = shown
        for place in (0, 2, 4, 6, 7):
            expected = expected @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
        torch.testing.assert_close(layers(shown), expected, atol=1e-5, rtol=1e-5)

    def test_more_than_nine_layers_stay_in_order(self):
        sizes = [3, 5, 4, 6, 7, 3, 2, 9, 8, 4, 6, 1]
        state = {}
        for place, (width, out) in enumerate(itertools.pairwise(sizes)):
            state |= {f"h.{place}.weight": torch.randn(out, width), f"h.{place}.bias": torch.zeros(out)}
        assert [layer.out_features for layer in linear_layers(state, "h.", width=3, name="head")] == sizes[1:]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("layers.4.bias"), "head lacks 4.bias"),
            (lambda state: state.update({"scale": torch.ones(1)}), "head has the unexpected scale"),
            (
                lambda state: state.pop("layers.4.weight"),
                r"from 24 numbers.*to one; it has 24 to 1024, 1024 to 128, 64 to 16, 16 to 1",
            ),
            (lambda state: state.clear(), "it has none"),
        ],
    )
    def test_other_weights_are_refused(self, tmp_path, change, message):
        state = read_tensors(tiny_rewards.aesthetic_head(tmp_path / "head.pth", 24))
        change(state)
        with pytest.raises(ValueError, match=message):
            linear_layers(state, "layers.", width=24, name="head")

    def test_a_head_for_another_model_is_refused(self, tmp_path):
        state = read_tensors(tiny_rewards.aesthetic_head(tmp_path / "head.pth", 24))
        with pytest.raises(
            ValueError, match="from 32 numbers, which is what the model's embedding has, to one; it has 24"
        ):
            linear_layers(state, "layers.", width=32, name="head")
