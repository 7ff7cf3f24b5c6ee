"""Finding rewards, functions written for TRL, several rewards at once, scoring beside sampling, JPEG sizes."""

import functools
import io
import json
import math
import subprocess
import sys
import threading
import time
from importlib.metadata import EntryPoint
from importlib.util import spec_from_file_location

import numpy as np
import pytest
import torch
from PIL import Image

from flowsteer.rewards import pixels as shown_pixels
from flowsteer.rewards.combine import Normalise, RewardSet
from flowsteer.rewards.functions import FunctionReward
from flowsteer.rewards.hosts.inprocess import Scorer, collect
from flowsteer.rewards.hosts.worker import load_target
from flowsteer.rewards.pixels import to_uint8
from flowsteer.rewards.registry import GROUP, label_of, list_rewards, load_reward, target_of
from flowsteer.rewards.scorers.jpeg import JPEGCompressibility, JPEGIncompressibility
from flowsteer.rewards.types import Reward
from flowsteer.rollout import types as rollout_types
from flowsteer.rollout.types import kept


def random_images(size: int, *, seed: int = 0) -> torch.Tensor:
    return torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def mean_level(images, prompts, **columns):
    """Mean of the 8-bit values, of each image."""
    return images.reshape(len(images), -1).mean(1).tolist()


def red_level(images, prompts, **columns):
    return images[..., 0].reshape(len(images), -1).mean(1)


class Brightness:
    """Mean level, times a factor.

    More text.
    """

    def __init__(self, factor: float, *, shift: float = 0.0) -> None:
        self.factor, self.shift = factor, shift

    def __call__(self, images, prompts, **columns):
        return [self.factor * value + self.shift for value in mean_level(images, prompts)]


# As in TRL's documentation: keyword arguments, a dataset column, None for samples that it does not apply to, extra logs.
def trl_reward(prompts, completions, color, log_extra=None, log_metric=None, **kwargs):
    rewards = []
    for prompt, image, wanted in zip(prompts, completions, color):
        red = np.asarray(image)[..., 0].mean()
        rewards.append(float(red) if wanted == "red" and "circle" in prompt else None)
    if log_extra:
        log_extra("width", [image.width for image in completions])
        log_extra("caption", list(prompts))
    if log_metric:
        log_metric("applies", sum(reward is not None for reward in rewards) / len(rewards))
    return rewards


async def trl_async_reward(completions, **kwargs):
    return [float(np.asarray(image).mean()) for image in completions]


class TestRegistry:
    def test_every_shipped_reward_is_listed_with_a_line_of_its_own(self):
        entries = {entry.name: entry for entry in list_rewards()}
        assert {"ocr", "jpeg_compressibility", "jpeg_incompressibility"} <= set(entries)
        assert entries["ocr"].target == "flowsteer.rewards.scorers.ocr:OCRReward"
        assert entries["ocr"].distribution == "flowsteer"
        assert entries["ocr"].doc.startswith("How much of the quoted text")
        assert "\n" not in entries["ocr"].doc

    def test_listing_imports_no_reader(self):
        code = "import sys, flowsteer.rewards.registry as r; r.list_rewards(); print('rapidocr' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"

    def test_a_name_gives_a_reward(self):
        reward = load_reward("jpeg_compressibility", quality=80)
        assert isinstance(reward, JPEGCompressibility)
        assert isinstance(reward, Reward)

    def test_a_wrong_name_lists_the_right_ones_nearest_first(self):
        with pytest.raises(
            ValueError, match="no reward 'jpeg_compresibility'; did you mean 'jpeg_compressibility'\\? There are: "
        ) as error:
            load_reward("jpeg_compresibility")
        assert "ocr" in str(error.value)
        assert "installed again" in str(error.value)

    def test_a_wrong_option_names_the_key_and_the_accepted_ones(self):
        with pytest.raises(ValueError, match=r"no option 'qualty'; did you mean 'quality'\? It accepts: quality"):
            load_reward("jpeg_compressibility", qualty=80)

    @pytest.fixture
    def plugin(self, tmp_path, monkeypatch):
        """A module in the current folder, whose folder is on no path."""
        (tmp_path / "my_plugin.py").write_text(
            "class Bright:\n"
            "    def __init__(self, factor, shift=0.0):\n"
            "        self.factor, self.shift = factor, shift\n"
            "    def __call__(self, images, prompts, **columns):\n"
            "        return [self.factor + self.shift] * len(images)\n"
            "def for_trl(completions, threshold=1, **kwargs):\n"
            "    return [float(image.width > threshold) for image in completions]\n"
            "def plain(images, prompts, **columns):\n"
            "    return [1.0] * len(images)\n"
            "def no_columns(images, prompts):\n"
            "    return [1.0] * len(images)\n"
            "def other(x):\n"
            "    return x\n"
            "NUMBER = 3\n"
        )
        (tmp_path / "my_broken_plugin.py").write_text("import a_module_that_is_not_there\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
        yield
        for name in ("my_plugin", "my_broken_plugin"):
            sys.modules.pop(name, None)

    @pytest.mark.usefixtures("plugin")
    def test_a_class_or_function_of_the_user_in_the_current_folder(self):
        images, prompts = np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"]
        assert load_reward("my_plugin:Bright", factor=2.0, shift=0.5)(images, prompts) == [2.5, 2.5]
        assert load_reward("my_plugin:plain")(images, prompts) == [1.0, 1.0]
        assert load_reward("my_plugin:for_trl")(images, prompts) == [1.0, 1.0]
        assert load_reward("my_plugin:for_trl", threshold=8)(images, prompts) == [0.0, 0.0]

    @pytest.mark.usefixtures("plugin")
    def test_a_file_s_path_names_one_too(self, tmp_path):
        images, prompts = np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"]
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "json.py").write_text(
            "from neighbour import level\n\n\ndef f(images, prompts, **columns):\n    return [level] * len(images)\n"
        )
        (tmp_path / "deep" / "neighbour.py").write_text("level = 7.0\n")
        for name in ("my_plugin.py:plain", "./my_plugin.py:plain", str(tmp_path / "my_plugin.py:plain")):
            assert load_reward(name)(images, prompts) == [1.0, 1.0]
        assert load_reward("./my_plugin.py:Bright", factor=2.0)(images, prompts) == [2.0, 2.0]
        assert load_reward("deep/json.py:f")(images, prompts) == [7.0, 7.0]
        assert json.__file__ != str(tmp_path / "deep" / "json.py")
        sys.modules.pop("neighbour")
        assert label_of("./deep/json.py:f") == "json.py:f"
        assert label_of("package.module:f") == "package.module:f"
        assert target_of("deep/json.py:f") == "deep/json.py:f"

    @pytest.mark.usefixtures("plugin")
    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("my_plugin:Brigt", {}, "my_plugin has no 'Brigt'; did you mean Bright"),
            ("my_plugn:Bright", {}, "no module 'my_plugn' among the installed packages or in "),
            ("my_plugin:", {}, "write package.module:attribute"),
            ("./my_plugin.py:Brigt", {}, "my_plugin.py has no 'Brigt'; did you mean Bright"),
            ("./my_plugin.py", {}, "which function or class .*; write ./my_plugin.py:Bright or ./my_plugin.py:for_trl"),
            ("my_plugin.py:", {}, "write my_plugin.py:Bright or "),
            ("mine/my_plugin.py:f", {}, "there is no file /.*/mine/my_plugin.py"),
            ("./my_plugin:f", {}, "a file's path ends in .py, as in ./my_plugin.py:f"),
            ("./my_plugin", {}, "write path/to/file.py:NAME"),
            ("my_plugin:Bright", {}, "needs the option 'factor'. It accepts: factor, shift"),
            ("my_plugin:Bright", {"factor": 1.0, "scale": 2}, "no option 'scale'"),
            ("my_plugin:for_trl", {"treshold": 2}, "no option 'treshold'. It accepts: threshold"),
            ("my_plugin:for_trl", {"completions": []}, "no option 'completions'"),
            ("my_plugin:other", {}, r"takes \(x\); a reward takes \(images, prompts, \*\*columns\)"),
            ("my_plugin:no_columns", {}, r"lacks \*\*columns"),
            ("my_plugin:NUMBER", {}, "is a int; it must be a class or a function"),
        ],
    )
    def test_what_cannot_be_a_reward_is_refused(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            load_reward(name, **options)

    @pytest.mark.usefixtures("plugin")
    def test_a_module_that_lacks_something_itself_says_what(self):
        message = (
            r"reward 'my_broken_plugin:Bright' cannot be imported: ModuleNotFoundError: No module named "
            r"'a_module_that_is_not_there' \(.*my_broken_plugin.py, line 1\)"
        )
        with pytest.raises(ValueError, match=message):
            load_reward("my_broken_plugin:Bright")

    def test_a_fault_of_its_constructor_or_file_has_its_name_and_place(self, tmp_path):
        file = tmp_path / "broken.py"
        file.write_text(
            "class Heavy:\n    def __init__(self):\n        raise RuntimeError('cannot load weights')\n"
            "    def __call__(self, images, prompts, **columns): ...\n"
        )
        message = (
            r"reward '.*:Heavy' cannot be made: RuntimeError: cannot load weights \(.*broken.py, line 3\); FLOWSTEER_TR"
        )
        with pytest.raises(ValueError, match=message):
            load_reward(f"{file}:Heavy")
        (tmp_path / "unfinished.py").write_text("x = 1\ndef f(:\n")
        with pytest.raises(ValueError, match=r"cannot be imported: SyntaxError: .* \(.*unfinished.py, line 2\)"):
            load_reward(f"{tmp_path / 'unfinished.py'}:f")
        (tmp_path / "typo.py").write_text("1 / 0\n")
        with pytest.raises(
            ValueError, match=r"cannot be imported: ZeroDivisionError: division by zero \(.*typo.py, line 1\)"
        ):
            load_reward(f"{tmp_path / 'typo.py'}:f")

    def test_an_entry_point_of_a_broken_package_has_its_name(self, tmp_path, monkeypatch):
        points = [
            EntryPoint("gone", "nowhere_at_all:Reward", "flowsteer.rewards"),
            EntryPoint("renamed", "renamed_rewards:Old", "flowsteer.rewards"),
        ]
        (tmp_path / "renamed_rewards.py").write_text("class New: ...\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr("flowsteer.rewards.doors.entry_points", lambda group: points)
        with pytest.raises(ValueError, match="reward 'gone': there is no module 'nowhere_at_all'"):
            load_reward("gone")
        with pytest.raises(ValueError, match="reward 'renamed': renamed_rewards has no 'Old'"):
            load_reward("renamed")

    def test_a_folder_here_does_not_hide_an_installed_package(self, tmp_path, monkeypatch):
        """The outer folder of a project that is installed with `pip install -e`, whose finder is asked after all folders."""
        name = "installed_rewards"
        source = tmp_path / name / name / "__init__.py"
        source.parent.mkdir(parents=True)
        source.write_text("def reward(images, prompts, **columns):\n    return [1.0] * len(images)\n")

        class Finder:
            @staticmethod
            def find_spec(fullname, path=None, target=None):
                return spec_from_file_location(fullname, source) if fullname == name else None

        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
        monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
        points = [EntryPoint("theirs", f"{name}:reward", "flowsteer.rewards")]
        monkeypatch.setattr("flowsteer.rewards.doors.entry_points", lambda group: points)
        monkeypatch.chdir(tmp_path)
        for given in ("theirs", f"{name}:reward"):
            assert load_reward(given)(np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"]) == [1.0, 1.0]
            sys.modules.pop(name)

    def test_a_folder_that_hides_the_module_itself_is_named(self, tmp_path, monkeypatch):
        """A project's outer folder, from beside it: Python takes it for the package, which is one folder deeper."""
        (tmp_path / "their_rewards" / "their_rewards").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        message = r"their_rewards has no 'Reward': it is the folder \S*/their_rewards here, not an installed package; run from"
        with pytest.raises(ValueError, match=message):
            load_reward("their_rewards:Reward")
        sys.modules.pop("their_rewards")

    def test_a_folder_that_has_a_package_s_name_is_named(self, tmp_path, monkeypatch):
        """Such as the folder of a cloned repository, from beside it: Python takes it for a package without files."""
        (tmp_path / "their_package").mkdir()
        monkeypatch.chdir(tmp_path)
        message = r"no their_package.rewards: Python takes the folder \S*/their_package for the package their_package; install"
        with pytest.raises(ValueError, match=message):
            load_reward("their_package.rewards:f")
        sys.modules.pop("their_package")
        with pytest.raises(ValueError, match=message):
            load_target("their_package.rewards:f")
        sys.modules.pop("their_package")

    def test_two_packages_with_one_name(self, monkeypatch):
        from importlib.metadata import EntryPoint

        points = [EntryPoint("twice", target, GROUP) for target in ("one:A", "two:B", "one:A")]
        monkeypatch.setattr("flowsteer.rewards.doors.entry_points", lambda group: points)
        with pytest.raises(ValueError, match="several packages bring a reward 'twice': one:A and two:B"):
            load_reward("twice")


class TestFunctions:
    def test_a_function_written_for_trl_works_unmodified(self, caplog):
        images = random_images(3)
        prompts = ["a red circle", "a red square", "a blue circle"]
        scores = RewardSet([("trl", FunctionReward(trl_reward), 1.0)]).score(
            images, prompts, {"color": ("red", "red", "blue"), "shape": ("circle", "square", "circle")}
        )
        expected = np.asarray(to_uint8(images)[0, ..., 0], float).mean()
        assert scores.total[0].item() == pytest.approx(expected, rel=1e-6)  # float32
        assert scores.missing.tolist() == [False, True, True]
        assert scores.failures == {row: "reward 'trl' gave no score (None)" for row in (1, 2)}
        assert scores.parts["trl/width"].tolist() == [8, 8, 8]
        assert scores.parts["trl/applies"].tolist() == pytest.approx([1 / 3] * 3)
        assert "'caption', which is not numbers" in caplog.text

    def test_asynchronous_functions_objects_and_partials(self):
        class Asynchronous:
            async def __call__(self, completions, **kwargs):
                return await trl_async_reward(completions)

        images = random_images(2)
        expected = mean_level(to_uint8(images), [])
        for function in (trl_async_reward, Asynchronous(), functools.partial(trl_async_reward, unused=1)):
            assert FunctionReward(function)(to_uint8(images), ["a", "b"]) == pytest.approx(expected)

    def test_an_asynchronous_function_keeps_its_event_loop(self):
        import asyncio

        async def loop_id(completions, **kwargs):
            return [float(id(asyncio.get_running_loop()) % 2**20) for _ in completions]

        reward = FunctionReward(loop_id)
        assert reward(np.zeros((1, 8, 8, 3), np.uint8), ["a"]) == reward(np.zeros((1, 8, 8, 3), np.uint8), ["a"])

    def test_a_function_without_kwargs_gets_what_it_names(self):
        def size(completions, factor):
            return [image.height * value for image, value in zip(completions, factor)]

        assert FunctionReward(size)(np.zeros((2, 4, 8, 3), np.uint8), ["a", "b"], factor=[1, 2], other=[0, 0]) == [4, 8]

    def test_a_video_is_a_list_of_frames(self):
        def frames(completions, **kwargs):
            return [len(video) + isinstance(video[0], Image.Image) for video in completions]

        assert FunctionReward(frames)(np.zeros((2, 5, 8, 8, 3), np.uint8), ["a", "b"]) == [6, 6]

    def test_what_only_texts_have_is_refused(self):
        def needs_tokens(completions, completion_ids, **kwargs):
            return [len(ids) for ids in completion_ids]

        with pytest.raises(ValueError, match="'needs_tokens' requires 'completion_ids'"):
            FunctionReward(needs_tokens)


class TestRewardSet:
    def test_the_total_is_the_weighted_sum_of_normalised_scores(self):
        images = random_images(4)
        pixels = to_uint8(images).astype(float)
        rewards = RewardSet(
            [("mean", mean_level, 2.0), ("red", red_level, -0.5), ("watched", Brightness(3.0), 0.0)],
            normalise={"mean": Normalise(scale=1 / 26, offset=100.0)},
        )
        scores = rewards.score(images, list("abcd"))
        mean, red = pixels.mean((1, 2, 3)), pixels[..., 0].mean((1, 2))
        # float32 has 24 bits: relative error 6e-8 of values up to 1e2
        assert scores.parts["mean"].tolist() == pytest.approx(((mean - 100) / 26).tolist(), abs=1e-5)
        assert scores.parts["red"].tolist() == pytest.approx(red.tolist(), abs=1e-4)
        assert scores.parts["watched"].tolist() == pytest.approx((3 * mean).tolist(), abs=1e-3)
        assert scores.total.tolist() == pytest.approx((2 * (mean - 100) / 26 - 0.5 * red).tolist(), abs=1e-4)
        assert scores.total.dtype == torch.float32
        assert not scores.failures

    def test_pixels_are_rounded_not_cut_off(self):
        levels = torch.arange(256) / 255
        images = (levels + 0.4 / 255).clamp(max=1).view(1, 1, 16, 16).expand(1, 3, 16, 16)
        assert to_uint8(images)[0, ..., 0].ravel().tolist() == list(range(256))
        images = (levels - 0.4 / 255).clamp(min=0).view(1, 1, 16, 16).expand(1, 3, 16, 16)
        assert to_uint8(images)[0, ..., 0].ravel().tolist() == list(range(256))  # cutting off would give level - 1

    def test_the_pixels_are_those_of_a_saved_image(self):
        from diffusers.image_processor import VaeImageProcessor

        images = random_images(3)
        saved = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
        np.testing.assert_array_equal(to_uint8(images), np.stack([np.asarray(image) for image in saved]))

    def test_a_video_keeps_its_frames(self):
        video = torch.rand(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(1))
        pixels = to_uint8(video)
        assert pixels.shape == (2, 5, 4, 6, 3)
        np.testing.assert_array_equal(pixels[:, 2], to_uint8(video[:, 2]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_a_rollout_keeps_is_what_rewards_are_shown(self, dtype):
        """Bit for bit the same, values halfway between two levels and slightly out of range included."""
        halves = (torch.arange(256) + 0.5) / 255
        images = torch.cat([halves, torch.linspace(-0.005, 1.005, 512)]).view(1, 3, 16, 16).to(dtype)
        assert kept(images).dtype == torch.uint8
        np.testing.assert_array_equal(to_uint8(kept(images)), to_uint8(images))
        video = torch.rand(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
        np.testing.assert_array_equal(to_uint8(kept(video)), to_uint8(video))
        rewards = RewardSet([("mean", mean_level, 1.0), ("red", red_level, 1.0)])
        assert torch.equal(rewards.score(kept(images), ["a"]).total, rewards.score(images, ["a"]).total)

    def test_what_a_rollout_cannot_keep_in_8_bits_stays_for_the_rewards_to_judge(self):
        images, rewards = random_images(3), RewardSet([("mean", mean_level, 1.0)])
        images[1, 0, 0, 0] = math.nan
        assert kept(images).dtype == torch.float32
        assert rewards.score(kept(images), ["a"] * 3).missing.tolist() == [False, True, False]
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            rewards.score(kept(random_images(3) * 2), ["a"] * 3)
        sound = torch.rand(2, 2, 100)
        assert torch.equal(kept(sound), sound)
        assert rollout_types.RANGE_TOLERANCE == shown_pixels.RANGE_TOLERANCE

    def test_none_is_missing_in_the_total_and_only_there(self):
        def second_missing(images, prompts, **columns):
            return {"score": [1.0, None, 3.0], "detail": [None, 5.0, 6.0]}

        scores = RewardSet([("some", second_missing, 1.0), ("mean", mean_level, 1.0)]).score(
            random_images(3), list("abc")
        )
        assert scores.missing.tolist() == [False, True, False]
        assert scores.failures == {1: "reward 'some' gave no score (None)"}
        assert not torch.isnan(scores.parts["mean"]).any()
        assert torch.isnan(scores.parts["some/detail"]).tolist() == [True, False, False]

    def test_a_reward_that_is_only_watched_makes_nothing_missing(self):
        def nothing(images, prompts, **columns):
            return [None] * len(images)

        scores = RewardSet([("nothing", nothing, 0.0), ("mean", mean_level, 1.0)]).score(random_images(2), ["a", "b"])
        assert not scores.missing.any()
        assert not scores.failures

    def test_a_reward_that_raises_costs_only_the_bad_images(self):
        calls = []

        def picky(images, prompts, **columns):
            calls.append(len(images))
            if "bad" in prompts:
                raise RuntimeError("cannot look at this")
            return {"score": mean_level(images, prompts), "row": list(columns["row"])}

        images = random_images(4)
        scores = RewardSet([("picky", picky, 1.0)]).score(images, ["a", "bad", "b", "c"], {"row": [0, 1, 2, 3]})
        assert calls == [4, 1, 1, 1, 1]
        assert scores.missing.tolist() == [False, True, False, False]
        assert scores.failures == {1: "reward 'picky' raised RuntimeError: cannot look at this"}
        assert scores.parts["picky/row"][[0, 2, 3]].tolist() == [0, 2, 3]
        assert scores.total[2].item() == pytest.approx(mean_level(to_uint8(images), [])[2], rel=1e-6)

    def test_a_connection_that_is_down_is_not_tried_for_every_image(self):
        calls = []

        def down(images, prompts, **columns):
            calls.append(len(images))
            raise ConnectionRefusedError("port 80")

        scores = RewardSet([("down", down, 1.0)]).score(random_images(5), list("abcde"))
        assert calls == [5]
        assert scores.missing.all()
        assert scores.failures[4] == "reward 'down' raised ConnectionRefusedError: port 80"

    def test_an_image_that_is_no_image_is_missing_and_shown_to_nobody(self):
        images = random_images(3)
        images[1, 2, 3, 4] = math.nan
        seen = []

        def watch(images, prompts, **columns):
            seen.append((len(images), list(prompts), list(columns["row"])))
            return [1.0] * len(images)

        scores = RewardSet([("watch", watch, 1.0)]).score(images, ["a", "b", "c"], {"row": [0, 1, 2]})
        assert seen == [(2, ["a", "c"], [0, 2])]
        assert scores.missing.tolist() == [False, True, False]
        assert scores.failures == {1: "the image holds NaN or inf"}
        nothing = RewardSet([("watch", watch, 1.0)]).score(images[1:2], ["b"], {"row": [1]})
        assert nothing.missing.tolist() == [True]
        assert len(seen) == 1

    def test_one_reward_cannot_change_what_the_next_one_sees(self):
        def vandal(images, prompts, **columns):
            images[:] = 0
            return [0.0] * len(images)

        images = random_images(2)
        alone = RewardSet([("mean", mean_level, 1.0)]).score(images, ["a", "b"])
        after = RewardSet([("vandal", vandal, 1.0), ("mean", mean_level, 1.0)]).score(images, ["a", "b"])
        assert torch.equal(after.parts["mean"], alone.parts["mean"])

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ([1.0, 2.0], "reward 'x' gave 2 scores, expected 3"),
            ([1.0, math.nan, 2.0], "gave nan for image 1 of the batch; a score is a finite number, or None"),
            (np.array([1.0, 2.0, np.inf]), "gave inf for image 2"),
            (torch.ones(3, 1), r"gave \[1.0\] for image 0 of the batch; expected a number or None"),
            (np.float64(1.0), "expected a list of 3 numbers|gave a single number"),
            (1.0, "gave a float; expected a list of 3 numbers"),
            (None, "gave a NoneType; expected a list of 3 numbers"),
            (["1.0", "2.0", "3.0"], "gave '1.0' for image 0"),
            ({"total": [1.0, 2.0, 3.0]}, r"gave the parts \['total'\]; one of them must be called 'score'"),
            ({"score": [1.0, 2.0, 3.0], "part": [1.0]}, "reward 'x/part' gave 1 scores, expected 3"),
            ([1.0, 1e39, 1.0], "beyond what float32 holds"),
        ],
    )
    def test_a_broken_contract_ends_the_run_with_its_name(self, answer, message):
        rewards = RewardSet([("x", lambda images, prompts, **columns: answer, 1.0)])
        with pytest.raises(ValueError, match=message):
            rewards.score(random_images(3), list("abc"))

    @pytest.mark.parametrize(
        ("images", "prompts", "columns", "message"),
        [
            (random_images(2), ["a"], {}, "2 images need 2 prompts, got 1"),
            (random_images(2), ["a", "b"], {"color": ["red"]}, "column 'color' has 1 values for 2 images"),
            (random_images(2), ["a", "b"], {"images": [1, 2]}, "may not be called 'images'"),
            (random_images(2) * 2 - 1, ["a", "b"], {}, r"must lie in \[0, 1\], got values from -"),
            (random_images(2) * 255, ["a", "b"], {}, r"must lie in \[0, 1\]"),
            (torch.zeros(2, 4, 4, 3), ["a", "b"], {}, r"got torch.float32 of the shape \(2, 4, 4, 3\)"),
            (torch.zeros(2, 3, 4, 4, dtype=torch.int16), ["a", "b"], {}, "got torch.int16"),
            (torch.zeros(2, 3, 4, dtype=torch.uint8), ["a", "b"], {}, "float sound"),
        ],
    )
    def test_what_does_not_fit_together_is_refused(self, images, prompts, columns, message):
        with pytest.raises(ValueError, match=message):
            RewardSet([("mean", mean_level, 1.0)]).score(images, prompts, columns)

    @pytest.mark.parametrize(
        ("rewards", "normalise", "message"),
        [
            ([], {}, "at least one needs a weight that is not 0"),
            ([("a", mean_level, 0.0)], {}, "at least one needs a weight that is not 0"),
            ([("a", mean_level, 1.0), ("a", red_level, 1.0)], {}, "'a' is used twice"),
            ([("a/b", mean_level, 1.0)], {}, "without '/'"),
            ([("a", mean_level, math.nan)], {}, "has the weight nan"),
            ([("a", 3, 1.0)], {}, "is a int, which cannot be called"),
            ([("a", mean_level, 1.0)], {"b": Normalise()}, "normalise names b, which is not among the rewards"),
        ],
    )
    def test_a_set_that_cannot_be_is_refused(self, rewards, normalise, message):
        with pytest.raises(ValueError, match=message):
            RewardSet(rewards, normalise=normalise)

    def test_constants_that_cannot_be(self):
        with pytest.raises(ValueError, match="scale not 0"):
            Normalise(scale=0.0)
        with pytest.raises(ValueError, match="finite"):
            Normalise(offset=math.inf)


class TestScorer:
    def test_scores_are_those_of_scoring_at_once_in_order(self):
        rewards = RewardSet([("mean", mean_level, 1.0), ("red", FunctionReward(trl_async_reward), 0.5)])
        batches = [random_images(4, seed=seed) for seed in range(5)]
        with Scorer(rewards) as scorer:
            pending = [scorer.submit(images, list("abcd")) for images in batches]
            results = [scores.result() for scores in reversed(pending)][::-1]
        for images, scores in zip(batches, results):
            at_once = rewards.score(images, list("abcd"))
            assert torch.equal(scores.total, at_once.total)
            assert scores.parts.keys() == at_once.parts.keys()

    def test_the_caller_goes_on_and_may_reuse_its_images(self):
        release, order = threading.Event(), []

        def slow(images, prompts, **columns):
            assert release.wait(10)
            order.append(prompts[0])
            return mean_level(images, prompts)

        images = random_images(1)
        expected = mean_level(to_uint8(images), [])[0]
        with Scorer(RewardSet([("slow", slow, 1.0)])) as scorer:
            first, second = scorer.submit(images, ["first"]), scorer.submit(images, ["second"])
            images.zero_()
            assert not first.done()
            release.set()
            assert second.result(10).total.item() == pytest.approx(expected, rel=1e-6)
            assert first.result(10).total.item() == pytest.approx(expected, rel=1e-6)
            assert order == ["first", "second"]

    def test_what_scoring_raises_comes_out_at_the_result(self):
        with Scorer(RewardSet([("x", lambda images, prompts, **columns: [], 1.0)])) as scorer:
            pending = scorer.submit(random_images(2), ["a", "b"])
            with pytest.raises(ValueError, match="gave 0 scores, expected 2"):
                pending.result()

    def test_a_reward_that_is_stuck_leaves_scores_missing_and_keeps_nobody(self):
        release = threading.Event()

        def stuck(images, prompts, **columns):
            release.wait(30)
            return [1.0]

        rewards = RewardSet([("quick", mean_level, 1.0), ("stuck", stuck, 1.0)])
        with Scorer(rewards) as scorer:
            images = random_images(1)
            began = time.monotonic()
            scores = scorer.submit(images, ["a"]).result(0.2)
            assert time.monotonic() - began < 5
            assert scores.missing.tolist() == [True]
            assert "'stuck' raised RewardTimeout" in scores.failures[0]
            assert scores.parts["quick"].item() == pytest.approx(mean_level(to_uint8(images), [])[0], rel=1e-6)
            later = scorer.submit(images, ["a"])
            release.set()
            assert not later.result(10).missing.any()

    def test_what_waits_behind_a_stuck_batch_is_dropped_with_it(self):
        release, seen = threading.Event(), []

        def stuck(images, prompts, **columns):
            seen.append(prompts[0])
            if prompts[0] == "first":
                release.wait(30)
            return [1.0]

        with Scorer(RewardSet([("stuck", stuck, 1.0)])) as scorer:
            images = random_images(1)
            pending = [scorer.submit(images, [prompt]) for prompt in ("first", "second", "third")]
            began = time.monotonic()
            assert all(scores.missing.all() for scores in collect(pending, 0.3))
            assert time.monotonic() - began < 0.3 * 3, "one limit for all of them"
            release.set()
            assert not scorer.submit(images, ["fourth"]).result(10).missing.any()
        assert seen == ["first", "fourth"]

    def test_several_rewards_score_at_once(self):
        both = threading.Barrier(2, timeout=10)

        def waits_for_the_other(images, prompts, **columns):
            both.wait()
            return [1.0] * len(images)

        rewards = RewardSet([("one", waits_for_the_other, 1.0), ("other", waits_for_the_other, 1.0)])
        with Scorer(rewards) as scorer:
            assert scorer.submit(random_images(2), ["a", "b"]).result(20).total.tolist() == [2, 2]


class TestFingerprints:
    def test_they_are_as_json_gives_them_back(self):
        """A checkpoint holds JSON: what is compared with it must be the same after that."""

        def reward(images, prompts, **columns):
            return [0.0] * len(images)

        reward.fingerprint = {"mean": (0.5, 0.25), "version": 2}
        rewards = RewardSet([("theirs", reward, 1.0), ("silent", mean_level, 1.0)])
        assert rewards.fingerprints == {"theirs": {"mean": [0.5, 0.25], "version": 2}, "silent": {}}
        for value in (math.nan, object()):
            reward.fingerprint = {"value": value}
            with pytest.raises(ValueError, match="the fingerprint of reward 'theirs' must map names to texts"):
                rewards.fingerprints  # noqa: B018

    def test_all_are_closed_also_where_one_raises(self):
        closed = []

        class Closes:
            def __init__(self, name):
                self.name = name

            def __call__(self, images, prompts, **columns):
                return [0.0] * len(images)

            def close(self):
                closed.append(self.name)
                if self.name == "b":
                    raise RuntimeError("cannot")

        rewards = RewardSet([(name, Closes(name), 1.0) for name in "abc"])
        with pytest.raises(RuntimeError, match="cannot"):
            rewards.close()
        assert sorted(closed) == ["a", "b", "c"]


class TestFailuresOfOthers:
    def test_a_reward_that_only_reports_is_heard_of_when_it_fails(self, caplog):
        rewards = RewardSet([("counts", mean_level, 1.0), ("reports", lambda images, prompts, **c: [None, 1.0], 0.0)])
        scores = rewards.score(random_images(2), ["a", "b"])
        assert not scores.missing.any()
        assert "reward 'reports', of weight 0, gave no score of 1: it gave no score (None)" in caplog.text

    def test_a_connection_that_breaks_while_images_are_asked_one_by_one_ends_the_asking(self):
        asked = []

        def reward(images, prompts, **columns):
            asked.append(list(prompts))
            if len(images) > 1:
                raise RuntimeError("one of these is odd")
            if prompts == ["b"]:
                raise ConnectionError("gone")
            return [1.0]

        scores = RewardSet([("theirs", reward, 1.0)]).score(random_images(4), list("abcd"))
        assert scores.missing.tolist() == [False, True, True, True]
        assert asked == [list("abcd"), ["a"], ["b"]]
        assert "ConnectionError: gone" in scores.failures[3]


class Ranks:
    """Groupwise: each image's place in its group by mean level; it raises where a group's images are all black."""

    groupwise = True

    def __init__(self):
        self.calls = []

    def __call__(self, images, prompts, **columns):
        assert len(set(prompts)) == 1
        self.calls.append((prompts[0], len(images), columns))
        if not images.any():
            raise RuntimeError("nothing to see")
        levels = images.reshape(len(images), -1).mean(1)
        ranks = levels.argsort().argsort().tolist()
        return {"score": ranks if len(images) > 1 else [None], "level": levels.tolist()}


class TestGroupwise:
    def test_each_call_gets_one_group_and_scores_find_their_places(self):
        reward = Ranks()
        images = torch.linspace(0.1, 0.9, 6).view(6, 1, 1, 1).expand(6, 3, 4, 4)[[3, 0, 5, 1, 4, 2]]
        group = [7, 9, 7, 9, 9, 7]  # levels 3 5 2 and 0 1 4
        prompts = ["a" if own == 7 else "b" for own in group]
        rewards = RewardSet([("ranks", reward, 1.0)])
        assert rewards.groupwise == ("ranks",)
        scores = rewards.score(images, prompts, {"n": range(6)}, group)
        assert scores.total.tolist() == [1, 0, 2, 1, 2, 0]
        assert [(prompt, size) for prompt, size, _ in reward.calls] == [("a", 3), ("b", 3)]
        assert reward.calls[0][2] == {"n": [0, 2, 5]}
        by_prompt = rewards.score(images, prompts, {})  # without group numbers, equal prompts are a group
        assert by_prompt.total.tolist() == scores.total.tolist()

    def test_a_failure_is_of_its_group_and_a_broken_image_of_nobody(self):
        images = torch.linspace(0.1, 0.9, 5).view(5, 1, 1, 1).repeat(1, 3, 4, 4)
        images[:2] = 0
        images[4] = torch.nan
        scores = RewardSet([("ranks", Ranks(), 1.0)]).score(images, list("aabbb"), {}, [0, 0, 1, 1, 1])
        assert scores.missing.tolist() == [True, True, False, False, True]
        assert scores.total[2:4].tolist() == [0, 1]
        assert "RuntimeError: nothing to see" in scores.failures[1]
        assert "NaN" in scores.failures[4]
        assert scores.parts["ranks/level"].isnan().tolist() == [True, True, False, False, True]

    def test_groups_need_a_number_for_each_image(self):
        with pytest.raises(ValueError, match="2 images need 2 group numbers, got 1"):
            RewardSet([("ranks", Ranks(), 1.0)]).score(torch.zeros(2, 3, 4, 4), ["a", "a"], {}, [0])


class TestJPEG:
    def test_the_size_is_that_of_the_file_in_kilobytes(self):
        images = to_uint8(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)))
        sizes = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image, "RGB").save(buffer, "JPEG", quality=95)
            sizes.append(len(buffer.getvalue()) / 1000)
        assert JPEGIncompressibility()(images, ["", ""]) == sizes
        assert JPEGCompressibility()(images, ["", ""]) == [-size for size in sizes]

    def test_plain_images_compress_better_than_noise_and_low_quality_better_still(self):
        plain = np.full((1, 32, 32, 3), 128, np.uint8)
        noise = to_uint8(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)))
        assert JPEGCompressibility()(plain, [""])[0] > JPEGCompressibility()(noise, [""])[0]
        assert JPEGCompressibility(50)(noise, [""])[0] > JPEGCompressibility(95)(noise, [""])[0]

    def test_channels_are_red_green_blue(self):
        # JPEG spends more bits on green than on blue detail, so an image and its mirror in the channels differ
        image = np.zeros((1, 32, 32, 3), np.uint8)
        image[..., 1] = to_uint8(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4)))[..., 0]
        blue = np.roll(image, 1, axis=-1)
        assert JPEGIncompressibility()(image, [""])[0] > JPEGIncompressibility()(blue, [""])[0]

    def test_a_video_is_the_mean_of_its_frames(self):
        video = to_uint8(torch.rand(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(5)))
        assert JPEGIncompressibility()(video, [""])[0] == pytest.approx(
            np.mean(JPEGIncompressibility()(video[0], [""] * 4))
        )

    def test_a_quality_that_cannot_be(self):
        with pytest.raises(ValueError, match="quality must be from 1 to 95, got 100"):
            JPEGCompressibility(100)
