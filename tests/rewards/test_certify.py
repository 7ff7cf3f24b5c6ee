"""Certification: sound rewards pass, each planted fault is refused by the name of the check that is meant to find it."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import subprocess
import sys

import numpy as np
import planted_rewards as planted
import pytest
import torch
from PIL import Image

from flowsteer.rewards.certify.certificate import CHECKS, Refused
from flowsteer.rewards.certify.certificate import certify as certify_fully
from flowsteer.rewards.certify.inputs import built_in_inputs, read_folder
from flowsteer.rewards.pixels import to_uint8
from flowsteer.rewards.registry import load_reward
from flowsteer.rewards.scorers.diversity import PixelDiversity
from flowsteer.rewards.scorers.step_preference import StepPreference

# what takes seconds is the matter of test_certify_deeper.py; here each sound reward is held to all of it once
QUICK = {name: check for name, check in CHECKS.items() if name not in ("another process", "many pictures")}
certify = functools.partial(certify_fully, checks=QUICK)

pytestmark = pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")


@pytest.fixture(autouse=True)
def restored_process(tmp_path, monkeypatch):
    """Some of the planted rewards change the process; the next test must not see it."""
    monkeypatch.chdir(tmp_path)
    state, threads, dtype = random.getstate(), torch.get_num_threads(), torch.get_default_dtype()
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    for name in ("benchmark", "deterministic", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, False)
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)
    random.setstate(state)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


class TestSound:
    @pytest.mark.parametrize(
        "reward", [planted.Sound, planted.SoundParts, planted.SoundNetwork, planted.SoundGroup, PixelDiversity]
    )
    def test_it_is_certified(self, reward):
        certificate = certify_fully(reward, name="sound")
        assert certificate.ok, certificate.text()
        assert not certificate.warned, certificate.text()
        assert [check.name for check in certificate.checks] == list(CHECKS)

    def test_what_is_said_of_it(self):
        certificate = certify_fully(planted.Sound, name="sound")
        images, prompts = built_in_inputs()
        expected = [planted.score_pair(*pair) for pair in zip(images, prompts)]
        assert certificate.scores == pytest.approx(expected)
        assert f"16 scores from {min(expected):.6g} to {max(expected):.6g}" in certificate["answer"].message
        assert {check.name for check in certificate.checks if check.status == "not applicable"} == {
            "fingerprint",
            "sees the columns",
            "missing pictures",
        }
        text = certificate.text()
        assert text.startswith("reward 'sound': certified\n16 images of 64x64")
        assert len(text.splitlines()) <= 60  # one page
        assert max(map(len, text.splitlines())) <= 120
        with pytest.raises(ValueError, match="no check 'orders'; there are: load, call"):
            certificate["orders"]

    def test_what_groups_are_spared(self):
        certificate = certify(planted.SoundGroup, name="group")
        spared = {check.name for check in certificate.checks if check.status == "not applicable"}
        assert spared == {
            *("fingerprint", "pairing", "all against all", "batch independence"),
            *("words of the prompt", "sees the columns", "levels", "remembers", "missing pictures"),
        }
        assert certificate["odd batches"].message == "takes groups of 2, 3 and 7; a group of 1 has no score"

    def test_a_function_for_trl(self):
        def red(prompts, completions, **kwargs):
            return [planted.score_pair(np.asarray(image), prompt) for image, prompt in zip(completions, prompts)]

        from flowsteer.rewards.functions import FunctionReward

        certificate = certify(lambda: FunctionReward(red), name="red")
        # a list of frames is no image to it, which nobody promised
        assert certificate.ok, certificate.text()

    def test_what_it_holds_open_is_closed(self):
        closed = []

        class Open(planted.Sound):
            def close(self):
                closed.append(self)

        assert certify(Open, name="open").ok
        assert len(set(closed)) == 2  # the instance under examination, and the second one


# reward -> the checks that refuse it, and what the first of them says
PLANTED = {
    planted.ArgumentsSwapped: (["call"], "are its arguments in the other order"),
    planted.PromptsOfOtherRows: (["pairing"], "prompts of other rows .*the whole batch"),
    planted.FirstPromptForAll: (["pairing"], "prompts of other rows"),
    planted.KeyedByPrompt: (["pairing"], "one prompt for all images"),
    planted.BatchMixedUp: (["order"], "at the rows of other images"),
    planted.OrderLostUnderThreads: (["order", "duplicates"], "at the rows of other images"),
    planted.MeanOverAllPrompts: (["all against all"], "over all prompts.*take the diagonal"),
    planted.MeanOverAllImages: (["all against all"], "over all images"),
    planted.NotANumber: (["answer"], "gave nan for image 0 of the batch; a score is a finite number"),
    planted.NotANumberOnBlack: (["plain images"], "black: .*gave nan"),
    planted.WrongLength: (["answer"], "gave 15 scores, expected 16"),
    planted.OneNumberForTheBatch: (["answer"], "expected a list of 16 numbers"),
    planted.NeverAScore: (["answer"], "only 0 of 16 images got a score"),
    planted.ZeroInPlaceOfErrors: (["silent zero", "impossible images"], "all 16 scores are exactly 0"),
    planted.ZeroOnError: (["impossible images"], "gives the score 0 to floats that are all NaN: an error in disguise"),
    planted.MinusOneOnError: (["impossible images"], "gives the score -1 to images with two channels and to floats"),
    planted.ZeroOnLongPrompts: (["odd prompts"], "10,000 characters scores exactly 0"),
    planted.ZeroForSomePrompts: (
        ["silent zero"],
        "exactly 0 under the prompt '.* circle.*', while other scores are real",
    ),
    planted.ZeroForTallImages: (["sizes"], "^48x64: each image scores exactly 0, as no ordinary one does; raise[^;]*$"),
    planted.HalfForOddPrompts: (["odd prompts"], "^4 of 4 odd prompts get the score 0.5, whatever the image"),
    planted.RaisesOnEmptyPrompts: (["odd prompts"], "an empty prompt: raised IndexError"),
    planted.OddPromptSpoilsTheBatch: (["odd prompts"], "an empty prompt changes the score of the image beside it"),
    planted.BatchNorm: (["batch independence"], "their own image and prompt only"),
    planted.DependsOnBatchSize: (["batch independence"], "batches of 7"),
    planted.FirstOfEqualsWins: (["duplicates"], "twice in one call get two scores"),
    planted.NewNoiseEachCall: (["determinism"], "the same instance, asked again, gives other scores"),
    planted.EachInstanceItsOwn: (["determinism"], "a second instance gives other scores"),
    planted.IgnoresThePrompt: (["sees the prompt"], "declare uses_prompt = False"),
    planted.SaysItIgnoresThePrompt: (["sees the prompt"], "but the prompt moves the score"),
    planted.IgnoresTheImage: (["sees the image", "impossible images"], "the image makes no difference"),
    planted.RaisesOnNothing: (["odd batches"], "raised ValueError: need at least one array"),
    planted.SquareOnly: (["sizes"], "48x64: raised ValueError: no square; 64x48: .*256x16"),
    planted.SaysItTakesVideos: (["video"], "declares video = True, but raised ValueError: no images"),
    planted.SaysItMixesNoFrames: (["video"], "declares video = True, but reward 'planted' gave 6 scores, expected 2"),
    planted.CutsOff: (["grey levels"], "from the one below: 1;.*round before"),
    planted.DividesBy256: (["grey levels"], "from the one below: 1;"),
    planted.LabOf8Bits: (["grey levels"], r"from the one below: \d+, .*8 bits, such as OpenCV's Lab"),
    planted.BeyondFloat32: (["as the trainer asks"], "beyond what float32 holds"),
    planted.WritesIntoImages: (["inputs untouched"], "changes the images"),
    planted.SortsPrompts: (["inputs untouched"], "changes the prompts"),
    planted.ThreadsInConstructor: (["load"], "the constructor changes torch's number of threads"),
    planted.GradientInScores: (["no gradient"], "scores carry an autograd graph"),
    planted.KeepsGraph: (["no gradient"], "keeps an autograd graph"),
    planted.SharedBetweenThreads: (["threads"], "four threads at once get other scores"),
    planted.RaisesUnderThreads: (["threads"], "fails: RuntimeError: called twice at once"),
    planted.ScoresALoneImage: (["odd batches"], "a score to a group of one"),
    planted.OrderMattersInGroup: (["order", "duplicates"], "a group in another order gets other scores"),
}


class TestPlanted:
    @pytest.mark.parametrize("reward", PLANTED, ids=lambda reward: reward.__name__)
    def test_a_fault_is_refused_by_name(self, reward):
        names, message = PLANTED[reward]
        certificate = certify(reward, name="planted")
        assert list(certificate.refused) == names, certificate.text()
        assert re.search(message, certificate[names[0]].message), certificate[names[0]].message
        assert f"REFUSED by: {', '.join(names)}" in certificate.text()

    @pytest.mark.parametrize(
        ("effect", "changed"),
        [
            ("seeds torch", "torch's random state"),
            ("seeds numpy", "numpy's random state"),
            ("seeds python", "python's random state"),
            ("gradients off", "torch's gradient mode"),
            ("changes folder", "working folder"),
            ("double", "torch's default type"),
            ("threads", "torch's number of threads"),
            ("precision", "torch's float32 matmul precision"),
            ("precision by its new name", "torch's float32 matmul precision"),
            ("deterministic", "torch's deterministic algorithms"),
            ("benchmark", "cudnn.benchmark"),
            ("deterministic cudnn", "cudnn.deterministic"),
            ("tf32", "cudnn.allow_tf32"),
        ],
    )
    def test_what_a_call_changes_is_named(self, effect, changed):
        make = functools.partial(planted.WithSideEffect, effect)
        certificate = certify(make, name="effect")
        assert certificate.refused == ("surroundings",)
        assert f"a call changes {changed}, on which" in certificate["surroundings"].message

    def test_certifying_draws_from_nobody_s_random_numbers(self):
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        assert certify(planted.Sound, name="sound").ok
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])
        assert before[2] == random.getstate()

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    @pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5), (0.48145466, 0.26862954), (0.456, 0.224)])
    def test_cut_off_levels_are_found_and_rounded_ones_pass(self, dtype, mean, std):
        only = {name: CHECKS[name] for name in ("answer", "grey levels")}
        for rounds in (False, True):
            make = functools.partial(planted.CutsOff, dtype, mean, std, rounds)
            certificate = certify(make, name="levels", checks=only)
            assert certificate.refused == (() if rounds else ("grey levels",)), certificate.text()

    def test_a_column_without_a_value_is_no_zero(self):
        images, prompts = built_in_inputs()
        columns = {"factor": np.linspace(1, 2, 16).tolist()}
        certificate = certify(planted.ZeroWithoutFactor, name="factor", images=images, prompts=prompts, columns=columns)
        assert certificate.refused == ("impossible images",)
        assert (
            "gives each image the score 0 where a column 'factor' is None" in certificate["impossible images"].message
        )
        assert certificate.scores[15] == pytest.approx(2 * planted.score_pair(images[15], prompts[15]))
        constant = certify(
            planted.MinusOneWithoutFactor, name="factor", images=images, prompts=prompts, columns=columns
        )
        assert constant.refused == ("impossible images",)
        assert "gives each image the score -1 where a column 'factor' is None" in constant["impossible images"].message

    def test_columns_that_a_score_can_do_without_are_no_fault(self):
        images, prompts = built_in_inputs()
        columns = {"factor": [1.0, 2.0] * 8, "note": list("abcdefghijklmnop"), "other": [1] * 16}
        certificate = certify(planted.FactorIsOptional, name="factor", images=images, prompts=prompts, columns=columns)
        assert certificate.ok, certificate.text()
        assert "a column 'note' of None" in certificate["impossible images"].message

    def test_columns_are_not_taken_for_prompts(self):
        images, prompts = built_in_inputs()
        given = {"images": images, "prompts": prompts, "columns": {"thing": prompts[::-1]}}
        silent = certify(planted.ReadsOnlyColumns, name="columns", **given)
        assert silent.ok, silent.text()
        assert silent["sees the prompt"].message == "the columns make a difference, the prompt without them makes none"
        declared = certify(planted.ReadsOnlyColumns, name="columns", uses_prompt=False, **given)
        assert declared.ok, declared.text()
        assert declared["sees the prompt"].message == "plays no part, as declared"
        neither = certify(planted.IgnoresThePrompt, name="neither", **given)
        assert neither.refused == ("sees the prompt",)

    def test_a_group_keeps_its_columns_under_another_prompt(self):
        class OfColumns(planted.SoundGroup):
            def __call__(self, images, prompts, *, thing, **columns):
                scores = super().__call__(images, prompts)
                return [score and score * (1 + planted.weights_of(own)[0]) for score, own in zip(scores, thing)]

        images, prompts = built_in_inputs()
        certificate = certify(OfColumns, name="group", images=images, prompts=prompts, columns={"thing": prompts})
        assert certificate.ok, certificate.text()

    def test_numbers_for_videos_that_nobody_promised_are_no_fault(self):
        certificate = certify(planted.MixesVideoFrames, name="frames")
        assert certificate.ok, certificate.text()
        message = certificate["video"].message
        assert message.startswith("takes no videos: reward 'frames' gave 6 scores, expected 2")

    def test_zeros_are_counted_and_those_of_a_picture_pass(self):
        class Warmth(planted.Sound):
            """0 for each picture without colour, whatever the prompt."""

            def __call__(self, images, prompts, **columns):
                scores = super().__call__(images, prompts)
                return [score * bool(np.ptp(image, axis=-1).any()) for score, image in zip(scores, images)]

        images, _ = built_in_inputs()
        grey = sum(not np.ptp(image, axis=-1).any() for image in images)
        certificate = certify(Warmth, name="warmth", checks={name: CHECKS[name] for name in ("answer", "silent zero")})
        assert certificate.ok, certificate.text()
        assert certificate["answer"].message.endswith(f", {grey} of 16 are exactly 0")

    @pytest.mark.parametrize("steps", [1, 2, 3, 7, 15, 100])
    def test_zeros_of_a_coarse_score_pass(self, steps):
        class Coarse(planted.ZeroForSomePrompts):
            """A share of some things, as won comparisons or letters; 0 under some prompts for each image."""

            def __call__(self, images, prompts, **columns):
                return [float(np.ceil(steps * (score % 1))) / steps for score in super().__call__(images, prompts)]

        certificate = certify(Coarse, name="coarse", checks={name: CHECKS[name] for name in ("answer", "silent zero")})
        assert certificate.ok, certificate.text()

    @pytest.mark.parametrize(
        ("fingerprint", "message"),
        [
            ("version 1", "fingerprint is a str; it must be a mapping"),
            ({"mean": (0.5, 0.5), "version": "1"}, "something else for mean; give names"),
            ({1: "one"}, "something else for 1; give names"),
            ({"mean": np.float32(0.5)}, "JSON cannot hold the fingerprint: Object of type float32"),
            ({"mean": float("nan")}, "JSON cannot hold the fingerprint: Out of range float"),
        ],
    )
    def test_a_fingerprint_that_cannot_be_kept(self, fingerprint, message):
        sound = planted.Sound()
        sound.fingerprint = fingerprint
        certificate = certify(lambda: sound, name="sound")
        assert certificate.refused == ("fingerprint",)
        assert message in certificate["fingerprint"].message

    def test_no_fingerprint_is_none(self, tmp_path):
        sound = planted.Sound()
        sound.fingerprint = None
        certificate = certify(lambda: sound, name="sound")
        assert certificate.ok, certificate.text()
        assert certificate["fingerprint"].message == "declares none"
        certificate.golden(tmp_path / "golden.json")
        assert certify(lambda: sound, name="sound", golden=tmp_path / "golden.json").ok

    def test_after_a_failed_gate_nothing_is_compared(self):
        certificate = certify(planted.NotANumber, name="nan")
        after = list(QUICK)[list(QUICK).index("answer") + 1 :]
        assert {certificate[name].message for name in after} == {"not tried, since 'answer' was refused"}
        assert certificate.scores == ()

    def test_a_constructor_that_raises(self):
        certificate = certify(functools.partial(load_reward, "ocr", mode="wrong"), name="ocr")
        assert certificate.refused == ("load",)
        assert "raised ValueError: mode must be auto, detect or recognize" in certificate["load"].message


class TestBuiltIns:
    def test_composition(self):
        for score in ("graded", "tolerant", "strict"):
            certificate = certify(functools.partial(load_reward, "composition", score=score), name="composition")
            assert certificate.ok, certificate.text()

    @pytest.mark.parametrize("name", ["jpeg_compressibility", "jpeg_incompressibility"])
    def test_jpeg(self, name):
        certificate = certify(functools.partial(load_reward, name), name=name)
        assert certificate.ok, certificate.text()
        assert certificate["video"].status == "passed"

    def test_step_preference(self, tmp_path):
        from tiny_preference import tiny_model

        tiny_model(perturbed=True).save(tmp_path / "model")
        make = functools.partial(StepPreference, str(tmp_path / "model"), device="cpu")
        certificate = certify(make, name="step_preference")
        assert certificate.ok, certificate.text()
        # at other noise levels, which come as a column
        images, prompts = built_in_inputs()
        columns = {"sigma": list(np.linspace(0, 1, 16))}
        noisy = certify(make, name="step_preference", images=images, prompts=prompts, columns=columns)
        assert noisy.ok, noisy.text()
        assert noisy.scores[0] == pytest.approx(certificate.scores[0], rel=1e-5)
        assert noisy.scores[15] != pytest.approx(certificate.scores[15], rel=1e-3)


class TestInputs:
    def test_the_built_in_images_are_always_the_same(self):
        images, prompts = built_in_inputs()
        assert images.shape == (16, 64, 64, 3)
        assert images.dtype == np.uint8
        assert len(set(prompts)) == len({image.tobytes() for image in images}) == 16
        code = (
            "import hashlib; from flowsteer.rewards.certify.inputs import built_in_inputs\n"
            "print(hashlib.sha256(built_in_inputs()[0].tobytes()).hexdigest())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == hashlib.sha256(images.tobytes()).hexdigest()

    def test_float_images_arrive_level_by_level(self):
        levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
        for dtype in (torch.float16, torch.float32, torch.float64):
            floats = torch.from_numpy(levels).movedim(-1, 1).to(dtype) / 255
            assert np.array_equal(to_uint8(floats), levels)

    def test_a_folder_of_images(self, tmp_path):
        colors = {"a_red_square.png": "red", "b.jpg": "blue", "c.webp": "green", "d.png": "white"}
        for place, (name, color) in enumerate(colors.items()):
            Image.new("RGB", (40 + place, 30), color).save(tmp_path / name)
        (tmp_path / "notes.txt").write_text("no image")
        images, prompts, columns = read_folder(tmp_path)
        assert images.shape == (4, 30, 40, 3)
        assert images[0, 0, 0].tolist() == [255, 0, 0]
        assert prompts == ["a red square", "b", "c", "d"]
        assert columns == {}
        assert certify(planted.Sound, name="sound", images=images, prompts=prompts).ok

    def test_a_folder_with_metadata(self, tmp_path):
        Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "x.png")
        Image.new("L", (20, 10), 7).save(tmp_path / "y.png")
        rows = [{"file_name": f"{name}.png", "prompt": f"a {name}", "tag": name} for name in ("y", "x")]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        images, prompts, columns = read_folder(tmp_path)
        assert images[0, 0, 0].tolist() == [7, 7, 7]
        assert (prompts, columns) == (["a y", "a x"], {"tag": ["y", "x"]})
        for line, message in [
            ("{", "line 2: not JSON"),
            ('{"file_name": "x.png"}', "line 2: wants file_name, prompt and the columns of the first line"),
            (json.dumps({**rows[0], "more": 1}), "line 2: wants"),
            (json.dumps({**rows[0], "file_name": "z.png"}), "cannot read an image of .*z.png"),
        ]:
            (tmp_path / "metadata.jsonl").write_text(f"{json.dumps(rows[0])}\n{line}")
            with pytest.raises(ValueError, match=message):
                read_folder(tmp_path)

    def test_folders_and_inputs_that_cannot_be(self, tmp_path):
        with pytest.raises(ValueError, match="there is no folder"):
            read_folder(tmp_path / "nothing")
        with pytest.raises(ValueError, match="there are no images in"):
            read_folder(tmp_path)
        images, prompts = built_in_inputs()
        for given, message in [
            ({"images": images}, "give both, or neither"),
            ({"images": images[:3], "prompts": prompts[:3]}, "B at least 4"),
            ({"images": images / 255, "prompts": prompts}, "must be uint8"),
            ({"images": images, "prompts": prompts[1:]}, "16 images need 16 prompts, got 15"),
            ({"columns": {"color": ["red"]}}, "16 images need 16 color, got 1"),
        ]:
            with pytest.raises(ValueError, match=message):
                certify(planted.Sound, name="sound", **given)

    def test_one_prompt_for_all_says_nothing_about_prompts(self):
        images, _ = built_in_inputs()
        certificate = certify(planted.IgnoresThePrompt, name="one", images=images, prompts=["a"] * 16)
        assert certificate.ok, certificate.text()
        assert certificate["sees the prompt"].message == "all images have the same prompt"

    def test_half_precision_needs_the_tolerance_that_it_is_given(self):
        class Half(planted.SoundNetwork):
            """Between batch sizes half precision differs by its steps, 2^-10 of the value."""

            def __call__(self, images, prompts, **columns):
                return super().__call__(images, prompts) * (1 + 2.0**-10 * (len(images) > 4))

        assert certify(Half, name="half").refused == ("batch independence",)
        assert certify(Half, name="half", tolerance=1e-2).ok


class TestGolden:
    class Versioned(planted.Sound):
        """Sound, with an option that changes the score and is declared."""

        def __init__(self, scale: float = 1.0, version: str = "1") -> None:
            self.scale, self.fingerprint = scale, {"version": version, "reward": "versioned"}

        def __call__(self, images, prompts, **columns):
            return [self.scale * score for score in super().__call__(images, prompts)]

    def test_scores_are_held_against_the_file(self, tmp_path):
        path = tmp_path / "golden.json"
        first = certify(self.Versioned, name="versioned")
        first.golden(path)
        assert "golden scores" not in [check.name for check in first.checks]
        same = certify(self.Versioned, name="versioned", golden=path)
        assert same.ok
        assert same["golden scores"].message == "as in the golden file; the fingerprint is the same"
        assert "declares: version 1, reward versioned" in same.text()

        other = certify(functools.partial(self.Versioned, 1.01), name="versioned", golden=path)
        assert other.refused == ("golden scores",)
        assert other["golden scores"].message.endswith("in the golden file; the fingerprint is the same")
        newer = certify(functools.partial(self.Versioned, 1.01, "2"), name="versioned", golden=path)
        assert newer["golden scores"].message.endswith("the fingerprint differs: version 1 -> 2")

        content = json.loads(path.read_text())
        assert content["scores"] == pytest.approx([planted.score_pair(*pair) for pair in zip(*built_in_inputs())])
        content["environment"]["numpy"] = "1.0"
        path.write_text(json.dumps(content))
        moved = certify(self.Versioned, name="versioned", golden=path)
        assert moved.ok
        assert moved["golden scores"].message == (
            f"as in the golden file; the fingerprint differs: numpy 1.0 -> {np.__version__}"
        )

    def test_missing_scores_are_kept(self, tmp_path):
        certify(planted.SoundParts, name="parts").golden(tmp_path / "golden.json")
        scores = json.loads((tmp_path / "golden.json").read_text())["scores"]
        assert [score is None for score in scores] == ["sign" in prompt for prompt in built_in_inputs()[1]]
        assert certify(planted.SoundParts, name="parts", golden=tmp_path / "golden.json").ok

    def test_other_images_are_no_comparison(self, tmp_path):
        certify(planted.Sound, name="sound").golden(tmp_path / "golden.json")
        images, prompts = built_in_inputs()
        certificate = certify(
            planted.Sound, name="sound", images=images[:8], prompts=prompts[:8], golden=tmp_path / "golden.json"
        )
        assert certificate.refused == ("golden scores",)
        assert "other images, prompts or columns" in certificate["golden scores"].message

    def test_files_that_cannot_be(self, tmp_path):
        path = tmp_path / "golden.json"
        with pytest.raises(ValueError, match=r"no golden file: .*No such file"):
            certify(planted.Sound, name="sound", golden=path)
        path.write_text("{}")
        with pytest.raises(ValueError, match="lacks environment, fingerprint, inputs, scores"):
            certify(planted.Sound, name="sound", golden=path)
        with pytest.raises(ValueError, match="exists already"):
            certify(planted.Sound, name="sound").golden(path)
        with pytest.raises(ValueError, match=r"not certified \(odd prompts\)"):
            certify(planted.ZeroOnLongPrompts, name="zero").golden(tmp_path / "new.json")


def test_a_check_of_one_s_own():
    def in_range(trial):
        """Scores lie in [0, 1]."""
        if trial.own.max() > 1:
            raise Refused(f"gives up to {trial.own.max():.3g}")
        return "in [0, 1]"

    certificate = certify(planted.Sound, name="sound", checks={**CHECKS, "range": in_range})
    assert certificate.refused == ("range",)
    assert certificate["range"].message.startswith("gives up to ")
