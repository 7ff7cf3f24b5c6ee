"""What a prompt file gives a pipeline besides prompts: every kind read, every fault with its line, and seen by pipelines."""

from __future__ import annotations

import io
import json
import wave
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from diffusers import (
    FluxInpaintPipeline,
    FluxKontextPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image

from flowsteer.rollout.data.inputs import Input, Media, kind_of, read_inputs
from flowsteer.rollout.data.prompts import Prompts, Row, read_prompts
from flowsteer.rollout.lifting.beginning import Prologue, beginning_of, find_beginning
from flowsteer.rollout.lifting.conditioning import Conditioning
from flowsteer.rollout.lifting.lift import LiftError
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.selfcheck import check
from flowsteer.rollout.sample import prepare_rows
from flowsteer.rollout.types import Schedule

SETTINGS = {"num_inference_steps": 3, "guidance_scale": 1.0}


def picture(path: Path, colour: tuple[int, ...], size: tuple[int, int] = (16, 16)) -> str:
    """A gradient in a colour; returns the file's name."""
    ramp = np.linspace(0, 1, size[0] * size[1]).reshape(size[1], size[0], 1)
    Image.fromarray((ramp * np.array(colour)).astype(np.uint8)).save(path)
    return path.name


def sound(path: Path, samples: np.ndarray) -> str:
    """A WAV file of whole numbers [samples, channels]; returns its name."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(8000)
        file.writeframes(samples.tobytes())
    return path.name


def read(folder: Path, kind: str, *values: object) -> list:
    """The values of one input, read and loaded."""
    inputs = {"x": Input(column="c", kind=kind)}  # type: ignore[arg-type]
    where = [f"file.jsonl, line {n}" for n, _ in enumerate(values, 1)]
    found = read_inputs(inputs, {"c": list(values)}, where=where, folder=folder)["x"]
    return [value.load() if isinstance(value, Media) else value for value in found]


def test_each_kind_is_read(tmp_path: Path) -> None:
    red, blue = picture(tmp_path / "red.png", (255, 0, 0)), picture(tmp_path / "blue.png", (0, 0, 255), (8, 16))
    (image, none) = read(tmp_path, "image", red, None)
    assert (image.mode, image.size, none) == ("RGB", (16, 16), None)
    assert image.getpixel((15, 15)) == (255, 0, 0)
    (mask,) = read(tmp_path, "mask", red)
    assert mask.mode == "L"
    (two,) = read(tmp_path, "images", [red, blue])
    assert [one.size for one in two] == [(16, 16), (8, 16)]
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 100, 200)]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:], lossless=True)
    for film in read(tmp_path, "video", "film.webp", [red, red, red]):
        assert len(film) == 3
    assert read(tmp_path, "video", "film.webp")[0][2].getpixel((0, 0))[0] == 200
    whole = np.array([[0, -(2**15)], [2**14, 2**15 - 1]], dtype=np.int16)
    (heard,) = read(tmp_path, "audio", sound(tmp_path / "a.wav", whole))
    assert torch.equal(heard, torch.tensor([[0.0, 0.5], [-1.0, 1 - 2**-15]]))
    numbers = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    np.save(tmp_path / "a.npy", numbers)
    np.save(tmp_path / "b.npy", numbers[..., :1])
    (array,) = read(tmp_path, "tensor", "a.npy")
    assert np.array_equal(array, numbers)
    for given, shapes in (("a.npy", [(1, 2, 3)]), (["a.npy", "b.npy"], [(1, 2, 3), (1, 2, 1)])):
        (arrays,) = read(tmp_path, "tensors", given)
        assert [one.shape for one in arrays] == shapes
    assert read(tmp_path, "number", 3, 0.5, None, "") == [3, 0.5, None, None]
    assert read(tmp_path, "text", "blurry", None, 2024) == ["blurry", None, "2024"]


def test_a_picture_of_a_data_set_is_bytes(tmp_path: Path) -> None:
    kept = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 8, 7)).save(kept, "PNG")
    (image,) = read(tmp_path, "image", {"bytes": kept.getvalue(), "path": None})
    assert image.getpixel((0, 0)) == (9, 8, 7)


def test_equal_content_is_equal(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        picture(tmp_path / name, (255, 0, 0))
    picture(tmp_path / "c.png", (0, 255, 0))
    inputs = {"x": Input(column="c", kind="image")}
    a, b, c = read_inputs(inputs, {"c": ["a.png", "b.png", "c.png"]}, where=["1", "2", "3"], folder=tmp_path)["x"]
    assert a == b
    assert a != c
    assert len({a, b, c}) == 2


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("image", "none.png", r"file.jsonl, line 1, column 'c' \(inputs.x\): there is no file .*none.png"),
        ("image", "text.png", r"line 1, .*text.png is no picture that can be read"),
        ("image", 3, r"a path is needed, got a int"),
        ("image", ["a.png"], r"one image is needed, got a list of 1"),
        ("images", [], r"an empty list; give at least one file"),
        ("tensor", ["a.npy"], r"one tensor is needed, got a list of 1"),
        ("tensor", "text.png", r"text.png is no .npy file of numbers"),
        ("tensor", "words.npy", r"words.npy is no .npy file with one array of numbers"),
        ("image", "half.png", r"half.png is no picture that can be read"),
        ("mask", "deep.png", r"deep.png has more than 8 bits a colour; save it with 8"),
        ("video", "text.png", r"no video that can be read"),
        ("audio", "text.png", r"no WAV file of 16 or 32 bits"),
        ("number", "3", r"a number is needed, got '3'"),
        ("number", True, r"a number is needed, got True"),
        ("text", [3], r"a text is needed, got \[3\]"),
    ],
)
def test_a_bad_value_is_refused_with_its_line(tmp_path: Path, kind: str, value: object, message: str) -> None:
    (tmp_path / "text.png").write_text("no picture")
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    picture(tmp_path / "whole.png", (255, 0, 0), (64, 64))
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=message):
        read(tmp_path, kind, value)


@pytest.mark.parametrize("value", [-1, 1.5, 2**32, 10**400, float("inf"), float("nan")])
def test_a_seed_is_a_whole_number(tmp_path: Path, value: float) -> None:
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": "a cat", "s": 3}) + "\n" + json.dumps({"prompt": "b", "s": value})
    )
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2, column 's' \(inputs.seed\): a seed is a whole number"):
        read_prompts(str(tmp_path / "rows.jsonl"), inputs={"seed": Input(column="s", kind="number")})


def test_a_seed_is_not_told_to_the_pipeline(tmp_path: Path) -> None:
    lines = [{"prompt": "a cat", "s": 3}, {"prompt": "a cat", "s": 4.0}, {"prompt": "a cat"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = read_prompts(str(tmp_path / "rows.jsonl"), inputs={"seed": Input(column="s", kind="number")})
    assert [prompts.row(place) for place in range(3)] == [Row.of("a cat", {})] * 3
    assert [prompts.seed(place) for place in range(3)] == [3, 4, None]
    assert prompts.num_duplicates == 0
    assert kind_of("seed") == "number"


def test_kinds_are_read_off_names() -> None:
    named = {
        "image": "image",
        "control_image": "image",
        "mask_image": "mask",
        "reference_images": "images",
        "video": "video",
        "initial_audio_waveforms": "audio",
        "height": "number",
        "negative_prompt": "text",
        "num_frames": "number",
        "strength": "number",
        "image_guidance_scale": "number",
        "image_embeds": "tensor",
        "hint": "tensor",
    }
    assert {name: kind_of(name) for name in named} == named


def test_a_prompt_file_with_inputs(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (255, 0, 0))
    rows = [{"prompt": "x", "source": "a.png"}, {"prompt": "y"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    inputs = {"image": Input(column="source", kind="image")}
    prompts = read_prompts(file, inputs=inputs)
    first, second = prompts.row(0), prompts.row(1)
    assert dict(first.inputs)["image"].load().size == (16, 16)  # type: ignore[union-attr]
    assert second.inputs == ()
    before = prompts.fingerprint()
    assert before != read_prompts(file).fingerprint()
    picture(tmp_path / "a.png", (0, 255, 0))
    assert read_prompts(file, inputs=inputs).fingerprint() != before  # another picture is other data
    with pytest.raises(ValueError, match=r"inputs.mask.column=hole: .*rows.jsonl has no such column; it has source"):
        read_prompts(file, inputs={"mask": Input(column="hole", kind="mask")})


# --- pipelines ---


@pytest.fixture
def two_rows(tmp_path: Path) -> Prompts:
    picture(tmp_path / "a.png", (255, 0, 0))
    picture(tmp_path / "b.png", (0, 255, 255))
    rows = [{"prompt": text, "image": name} for text, name in (("a red circle", "a.png"), ("a blue field", "b.png"))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_prompts(tmp_path / "rows.jsonl", inputs={"image": Input(column="image", kind="image")})


def kontext() -> FlowPipeline:
    """A picture along the sequence; the class also draws without one."""
    components = {**zoo.build("flux").components, "image_encoder": None, "feature_extractor": None}
    call = {"max_sequence_length": 48, "max_area": 256, "_auto_resize": False}
    return FlowPipeline(FluxKontextPipeline(**components), height=16, width=16, call_kwargs=call)


def image_to_image() -> FlowPipeline:
    """A picture that the samples start from."""
    pipe = StableDiffusion3Img2ImgPipeline(**zoo.build("sd3").components)
    return FlowPipeline(pipe, height=16, width=16, call_kwargs={"max_sequence_length": 32, "strength": 0.5})


@pytest.mark.parametrize("make", [kontext, image_to_image])
def test_the_picture_of_its_row_is_seen(make, two_rows: Prompts) -> None:
    pipeline = make()
    rows = [two_rows.row(0), two_rows.row(1)]
    report = check(pipeline, prompts=[row.text for row in rows], inputs=[dict(row.inputs) for row in rows])
    assert report.ok, report.text()
    assert "bit for bit" in report.text()
    swapped = [rows[0], rows[0]._replace(inputs=rows[1].inputs)]  # one prompt, two pictures
    conditioning = prepare_rows(pipeline, [*swapped, swapped[0]], **SETTINGS)
    noise = torch.randn((1, *conditioning.latent_shape), generator=torch.Generator().manual_seed(0))
    latents, conditioning = conditioning.start(noise.repeat(3, *[1] * len(conditioning.latent_shape)))
    velocity = pipeline.velocity(latents, 0, conditioning)
    assert torch.equal(velocity[0], velocity[2])
    assert (velocity[0] - velocity[1]).abs().max() > 1e-3
    alone = prepare_rows(pipeline, swapped[1:], **SETTINGS)
    start, alone = alone.start(noise)
    assert (pipeline.velocity(start, 0, alone)[0] - velocity[1]).abs().max() < 1e-4 * velocity.std()


def inpainting() -> FlowPipeline:
    """The loop pastes the picture back after each step, with the noise that the sample started with."""
    components = {**zoo.build("flux").components, "image_encoder": None, "feature_extractor": None}
    call = {"max_sequence_length": 48, "strength": 0.7, "padding_mask_crop": None}
    return FlowPipeline(FluxInpaintPipeline(**components), height=16, width=16, call_kwargs=call)


def test_what_is_sampled_is_what_the_pipeline_draws_from_the_same_noise(tmp_path: Path) -> None:
    """From the pipeline's own noise, `start` gives the pipeline's own start, and its loop uses that noise again."""
    for name, half in (("image", False), ("mask_image", True)):
        pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        pixels[:, :8] = 0 if half else pixels[:, :8]
        Image.fromarray(pixels if not half else 255 * (pixels > 0).astype(np.uint8)).save(tmp_path / f"{name}.png")
    kinds = {"image": "image", "mask_image": "mask"}
    inputs = read_inputs(
        {name: Input(column=name, kind=kind) for name, kind in kinds.items()},  # type: ignore[arg-type]
        {name: [f"{name}.png"] for name in kinds},
        where=["1"],
        folder=tmp_path,
    )
    one, settings = (
        {name: value for name, (value,) in inputs.items()},
        {"num_inference_steps": 6, "guidance_scale": 1.0},
    )
    pipeline = inpainting()
    row = pipeline.prepare(["a red circle"], inputs=[one], **settings)
    assert isinstance(row, Conditioning)
    (name,) = row.noise_names
    own, drawn = pipeline.own_start("a red circle", inputs=one, **settings)
    noise = drawn.values[name]
    latents, started = row.start(noise)
    assert torch.equal(latents, own)
    assert torch.equal(started.values[name], noise)  # type: ignore[union-attr]
    other = row.start(torch.randn(noise.shape, generator=torch.Generator().manual_seed(9)))
    ends = [pipeline.begin(own, 0, given).finish(own.clone()) for given in (started, drawn, other[1])]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_rows_of_other_strengths_start_each_in_its_own_way(two_rows: Prompts) -> None:
    """Whichever was prepared first."""
    inputs = [dict(two_rows.row(0).inputs) | {"strength": strength} for strength in (1.0, 0.5)]
    pipe = StableDiffusion3Img2ImgPipeline(**zoo.build("sd3").components)
    settings = {"num_inference_steps": 8, "guidance_scale": 1.0}
    starts = []
    for order in ([0, 1], [1, 0]):
        pipeline = FlowPipeline(pipe, height=16, width=16, call_kwargs={"max_sequence_length": 32})
        rows = {place: pipeline.prepare(["a"], inputs=[inputs[place]], **settings) for place in order}
        assert rows[0].base is None
        assert rows[1].base is not None
        starts.append(rows[1])
    assert torch.equal(starts[0].base, starts[1].base)
    assert starts[0].gain == starts[1].gain == starts[0].schedule.sigma[0]


@pytest.mark.parametrize("sigma", [0.8, 0.6, 0.3])
def test_the_start_is_read_in_half_precision(sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 16, 32, 32, generator=generator).bfloat16() for _ in range(2))
    schedule = Schedule(
        sigma=torch.tensor([sigma, 0]), alpha=torch.tensor([1 - sigma, 1]), timesteps=torch.tensor([sigma])
    )

    def run(draws: frozenset[int], value: float) -> Prologue:
        drawn = torch.full_like(noise, value) if draws else noise
        state = sigma * drawn + (1 - sigma) * clean
        return Prologue(state=state, values={}, schedule=schedule, drawn=(drawn,))

    found = find_beginning(run, "Toy")
    assert not found.plain
    assert found.gain == pytest.approx(sigma)


def test_what_is_made_of_the_noise_is_known_or_refused() -> None:
    """The noise itself and the start itself are handed to the loop again; anything else cannot be."""
    schedule = Schedule(sigma=torch.tensor([0.5, 0]), alpha=torch.tensor([0.5, 1]), timesteps=torch.tensor([500.0]))

    def prologue(value: float, **more: torch.Tensor) -> Prologue:
        noise, clean = torch.full((1, 4), value), torch.arange(4.0).reshape(1, 4)
        state = 0.5 * clean + 0.5 * noise
        values = {"noise": noise, "kept": state.clone(), "clean": clean, **more}
        return Prologue(state=state, values=values, schedule=schedule, drawn=(noise,))

    draws = frozenset({0})
    found = beginning_of(draws, prologue(0.0), prologue(1.0), "Toy")
    assert (found.noise_names, found.start_names, found.gain) == ({"noise"}, {"kept"}, 0.5)
    half = {value: prologue(value, half=torch.full((1, 4), value / 2)) for value in (0.0, 1.0)}
    with pytest.raises(LiftError, match="the loop of Toy uses half, which is made of the noise"):
        beginning_of(draws, half[0.0], half[1.0], "Toy")

    row = zoo.shared("sd3").prepare(["a"], **SETTINGS)
    assert isinstance(row, Conditioning)
    noise = torch.ones((1, *row.latent_shape))
    row = replace(row, values={**row.values, "kept": noise}, start_names=frozenset({"kept"}), base=noise, gain=0.5)
    latents, started = row.start(noise)
    assert torch.equal(latents, 1.5 * noise)
    assert torch.equal(started.values["kept"], latents)


def test_rows_that_are_handled_alike() -> None:
    """A pipeline is asked once for all of them, so texts and pictures play no part, numbers do."""
    media = [Media("image", digest, ()) for digest in "ab"]
    row = Row.of("a", {"strength": 0.5, "image": media[0], "negative_prompt": "x"})
    assert row.inputs == (("image", media[0]), ("negative_prompt", "x"), ("strength", 0.5))
    assert row.signature == Row.of("b", {"image": media[1], "negative_prompt": "y", "strength": 0.5}).signature
    assert row.signature != Row.of("a", {"image": media[0], "negative_prompt": "x", "strength": 0.6}).signature
    assert row.signature != Row.of("a", {"image": media[0], "strength": 0.5}).signature


def test_a_pipeline_that_needs_a_picture_says_so() -> None:
    with pytest.raises(
        ValueError,
        match=r"StableDiffusion3Img2ImgPipeline cannot prepare 'a' .*It was not given image.*"
        r"inputs=\{image: \{column: image, kind: image\}\}",
    ):
        image_to_image().prepare(["a"], **SETTINGS)


def test_inputs_that_cannot_be(two_rows: Prompts) -> None:
    pipeline = zoo.shared("sd3")
    with pytest.raises(ValueError, match=r"inputs.image: StableDiffusion3Pipeline.__call__ has no argument 'image'"):
        prepare_rows(pipeline, [two_rows.row(0)], **SETTINGS)
    with pytest.raises(ValueError, match=r"inputs.latents: 'latents' is not for a row to set"):
        pipeline.prepare(["a"], inputs=[{"latents": 1}], **SETTINGS)
    with pytest.raises(ValueError, match=r"1 rows of inputs for 2 prompts"):
        pipeline.prepare(["a", "b"], inputs=[{}], **SETTINGS)
    with pytest.raises(ValueError, match=r"the call argument 'image' takes what a file holds, .*inputs=\{image:"):
        FlowPipeline(StableDiffusion3Img2ImgPipeline(**zoo.build("sd3").components), call_kwargs={"image": "in.png"})


def test_a_row_may_have_settings_of_its_own() -> None:
    pipe = StableDiffusion3Pipeline(**zoo.build("sd3").components)
    pipeline = FlowPipeline(pipe, height=16, width=16, call_kwargs={"max_sequence_length": 32})
    guided = {"num_inference_steps": 3, "guidance_scale": 4.0}
    plain = pipeline.prepare(["a", "a"], inputs=[{}, {"negative_prompt": "blur"}], **guided)
    same = pipeline.prepare(["a"], negative_prompt="blur", **guided)
    noise = torch.randn((2, *plain.latent_shape), generator=torch.Generator().manual_seed(0))
    velocity = pipeline.velocity(noise, 0, plain)
    assert torch.allclose(velocity[1:], pipeline.velocity(noise[1:], 0, same), atol=1e-4)
    assert (pipeline.velocity(noise[1:], 0, plain.take([0])) - velocity[1:]).abs().max() > 1e-3
    wide = pipeline.prepare(["a"], inputs=[{"height": 16, "width": 32}], **guided)
    assert wide.latent_shape[-2:] == (8, 16)
