"""Pictures become the latents that a pipeline would decode to them, whatever the pipeline does to its latents before."""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from PIL import Image
from torch import Tensor
from zoo.entries import entries, lifted

from flowsteer.rollout.data.inputs import Media
from flowsteer.rollout.lifting.conditioning import Conditioning
from flowsteer.rollout.lifting.encode import Encoder, hash_of, mode_of
from flowsteer.rollout.lifting.epilogue import decode_call, find_map
from flowsteer.rollout.lifting.kept import Kept
from flowsteer.rollout.lifting.pipeline import FlowPipeline

SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}
# plain, packed, with a picture beside them, with a batch norm, with means per channel, DC-AE, UNets; videos of several layouts
NAMES = [
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "FluxKontextPipeline",
    "Flux2Pipeline",
    "QwenImagePipeline",
    "SanaPipeline",
    "sd_euler",
    "sdxl_ddim",
    "wan_21",
    "animatediff",
    "cogvideox",
    "ltx",
]
# The line of Stable Diffusion 3's epilogue before it decodes, and what may come after it
UNSCALE = "            latents = (latents / self.vae.config.scaling_factor) + self.vae.config.shift_factor\n"
SPOILT = {
    "clamped": ("latents = latents.clamp(-1, 1)", "is not its latents one by one"),
    "mixed": ("latents = latents + 0.1 * latents.flip(-1)", "is not its latents one by one"),
    "squared": ("latents = latents + 0.1 * torch.arange(256).reshape(1, 4, 8, 8).cos() * latents**2", "one by one"),
    "cut": ("latents = latents[:, :, 2:]", r"gives its autoencoder 192 numbers for 256 latents"),
    "repeated": ("latents = torch.cat([latents[:, :, 4:]] * 2, 2)", "is not its latents one by one"),
}
# Entries of the zoo that can be trained, but not on pictures, and what is said
NOT_ENCODED = {
    **dict.fromkeys(
        ("QwenImageLayeredPipeline", "HunyuanImageRefinerPipeline", "JoyImageEditPlusPipeline"), "numbers for"
    ),
    **dict.fromkeys(("ltx_i2v", "ltx2", "ltx2_i2v", "kandinsky5_i2v"), "numbers for"),  # frames of the input; sound
    "QwenImage21Pipeline": "no picture",  # four channels
    "JoyImageEditPipeline": "encodes to",
    **dict.fromkeys(("stable_audio_3", "stable_audio_3_inpaint", "audio_ldm2"), "has no image processor"),
    **dict.fromkeys(("ace_step", "ace_step_reference"), "has no image processor"),
    **dict.fromkeys(("kandinsky22", "kandinsky22_inpaint", "kandinsky22_controlnet"), "has no image processor"),
    "kandinsky3": "has no image processor",
    **dict.fromkeys(("deepfloyd_if", "deepfloyd_if_img2img"), "without an autoencoder"),
    **dict.fromkeys(("deepfloyd_if_inpaint", "deepfloyd_if_super_resolution"), "without an autoencoder"),
}
# The pipeline scales and shifts, and so does the map, with scales and shifts that were measured: each rounds by half an eps.
ROUNDINGS = 4


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """Coloured noise, higher than wide."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    kept = io.BytesIO()
    Image.fromarray(pixels).save(kept, "PNG")
    return kept.getvalue()


def media(count: int = 1, *, seed: int = 0, size: tuple[int, int] = (24, 20)) -> Media:
    parts = tuple(picture(seed + place, size) for place in range(count))
    return Media("image" if count == 1 else "video", hashlib.sha256(b"".join(parts)).hexdigest()[:16], parts)


def prepared(name: str) -> tuple[FlowPipeline, Conditioning]:
    entry = entries()[name]
    pipeline, inputs, _ = lifted(entry)
    row = pipeline.prepare([entry.prompts[0]], inputs=inputs[:1] if inputs else None, **SETTINGS)
    return pipeline, row if isinstance(row, Conditioning) else row.parts[0]


def normalised(picture: Media, height: int, width: int) -> Tensor:
    """Independently of diffusers' processors: sized to cover, the middle, [T, 3, H, W] in [-1, 1]."""
    given = picture.load()
    frames = []
    for one in given if isinstance(given, list) else [given]:
        factor = max(height / one.height, width / one.width)
        sized = one.resize((round(one.width * factor), round(one.height * factor)), Image.Resampling.LANCZOS)
        left, top = (sized.width - width) // 2, (sized.height - height) // 2
        frames.append(np.asarray(sized.crop((left, top, left + width, top + height)), dtype=np.float32))
    return 2.0 * torch.from_numpy(np.stack(frames) / 255.0).permute(0, 3, 1, 2) - 1.0  # in this order, to the last bit


@pytest.mark.parametrize("name", NAMES)
def test_the_autoencoder_is_given_its_own_encoding_of_the_picture(name: str) -> None:
    pipeline, row = prepared(name)
    pipe: Any = pipeline.pipe
    decoded = decode_call(pipeline, torch.zeros(1, *row.latent_shape), row).decoded()
    count = decoded.shape[2] if decoded.dim() == 5 else len(decoded)
    height, width = decoded.shape[-2:]
    shown = media(count, size=(height + 8, width))
    encoded = Encoder(pipeline).encode(shown, row)

    pixels = normalised(shown, height, width)
    with torch.no_grad():
        own = mode_of(pipe.vae.encode(pixels.transpose(0, 1)[None] if decoded.dim() == 5 else pixels))
    given = decode_call(pipeline, encoded.latents, row).encoded
    assert given.shape == own.shape
    assert own.std() > 0.05, "the encoding says something"
    assert (given - own).abs().max() <= ROUNDINGS * torch.finfo(torch.float32).eps * own.abs().max()
    assert encoded.latents.shape == (1, *row.latent_shape)
    assert encoded.pixels.shape == pipeline.decode(encoded.latents, row).shape
    assert torch.allclose(encoded.pixels.reshape(pixels.shape), pixels / 2 + 0.5, atol=1e-6)


@pytest.mark.slow  # 80 s
def test_every_pipeline_of_the_zoo_encodes_or_says_why_not() -> None:
    encoded, refused = [], {}
    for name in entries():
        try:
            pipeline, row = prepared(name)
        except Exception:  # it cannot be trained at all: tests/rollout/test_zoo.py says why
            continue
        try:
            decoded = decode_call(pipeline, torch.zeros(1, *row.latent_shape), row).decoded()
            count = decoded.shape[2] if decoded.dim() == 5 else len(decoded)
            latents = Encoder(pipeline).encode(media(count), row).latents
        except ValueError as error:
            refused[name] = str(error)
            continue
        assert latents.shape == (1, *row.latent_shape)
        encoded.append(name)
    assert {name for name in NOT_ENCODED if NOT_ENCODED[name] not in refused.get(name, "")} == set()
    assert refused.keys() == NOT_ENCODED.keys()
    assert len(encoded) > 140


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen"])
def test_in_bfloat16_the_map_is_found_all_the_same(name: str) -> None:
    """A number above 256 is no whole number in bfloat16; the places of latents are."""
    exact = zoo.shared(name)
    coarse = zoo.lifted(name, zoo.build(name, torch.bfloat16))
    rows = [pipeline.prepare(["a cat"], **SETTINGS) for pipeline in (exact, coarse)]
    assert all(isinstance(row, Conditioning) for row in rows)
    maps = [find_map(own, row, torch.float32)[0] for own, row in zip((exact, coarse), rows)]  # type: ignore[arg-type]
    assert torch.equal(maps[0].source, maps[1].source)
    assert torch.allclose(maps[0].scale, maps[1].scale, rtol=4 * torch.finfo(torch.bfloat16).eps)
    encoded = Encoder(coarse, dtype=torch.bfloat16).encode(media(), rows[1])  # type: ignore[arg-type]
    assert encoded.latents.dtype == torch.bfloat16


def test_latents_do_not_depend_on_what_else_is_encoded() -> None:
    pipeline = zoo.shared("sd3")
    row = pipeline.prepare(["a cat"], **SETTINGS)
    assert isinstance(row, Conditioning)
    encoder, other = Encoder(pipeline), Encoder(pipeline)
    alone = encoder.encode(media(seed=1), row).latents
    for seed in (2, 3):
        other.encode(media(seed=seed), row)
    assert torch.equal(other.encode(media(seed=1), row).latents, alone)
    assert not torch.equal(other.encode(media(seed=2), row).latents, alone)


class TestKept:
    """What an autoencoder made is there again bit for bit, or is made again."""

    def encoder(self, folder: Path | None, **more: Any) -> tuple[Encoder, Conditioning, list[int]]:
        pipeline = zoo.lifted("flux")
        calls: list[int] = []
        encode = pipeline.pipe.vae.encode

        def counted(pixels: Tensor) -> Any:
            calls.append(len(pixels))
            return encode(pixels)

        pipeline.pipe.vae.encode = counted
        row = pipeline.prepare(["a cat"], **SETTINGS)
        assert isinstance(row, Conditioning)
        return Encoder(pipeline, kept=Kept(folder=folder, **more)), row, calls

    def test_from_memory_and_from_disk_it_is_bit_for_bit_a_fresh_encoding(self, tmp_path: Path) -> None:
        first, row, calls = self.encoder(tmp_path)
        fresh = first.encode(media(), row).latents
        again = first.encode(media(), row).latents
        assert calls == [1]
        second, row, calls = self.encoder(tmp_path)
        assert torch.equal(second.encode(media(), row).latents, fresh)
        assert calls == []
        assert torch.equal(again, fresh)
        without, row, calls = self.encoder(None)
        assert torch.equal(without.encode(media(), row).latents, fresh)
        assert calls == [1]

    def test_a_damaged_file_is_made_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        first, row, _ = self.encoder(tmp_path)
        fresh = first.encode(media(), row).latents
        (file,) = tmp_path.rglob("*.safetensors")
        whole = file.read_bytes()
        file.write_bytes(whole[:-7])
        second, row, calls = self.encoder(tmp_path)
        with caplog.at_level(logging.WARNING):
            assert torch.equal(second.encode(media(), row).latents, fresh)
        assert calls == [1]
        assert "cannot be read" in caplog.text
        assert file.read_bytes() == whole
        assert [path.name for path in file.parent.iterdir()] == [file.name], "no temporary file stays"

    def test_other_weights_make_other_encodings(self, tmp_path: Path) -> None:
        first, row, _ = self.encoder(tmp_path)
        fresh = first.encode(media(), row).latents
        second, row, calls = self.encoder(tmp_path)
        weight = next(second.pipeline.pipe.vae.encoder.parameters())
        with torch.no_grad():
            weight.flatten()[-1] += 1
        assert not torch.equal(second.encode(media(), row).latents, fresh)
        assert calls == [1]
        assert len([*tmp_path.rglob("*.safetensors")]) == 2

    def test_memory_is_bounded(self) -> None:
        encoder, row, calls = self.encoder(None, limit_bytes=2 * 4 * 8 * 8 * 4)  # two encodings of 4 x 8 x 8 float32
        for seed in (0, 1, 2, 2, 1, 0):
            encoder.encode(media(seed=seed), row)
        assert calls == [1] * 4, "the third took the place of the first"

    def test_a_hash_is_of_all_weights_and_settings(self) -> None:
        one, other = (torch.nn.Linear(3, 200) for _ in range(2))
        other.load_state_dict(one.state_dict())
        assert hash_of(one) == hash_of(other)
        with torch.no_grad():
            other.weight[-1, -1] += 1
        assert hash_of(one) != hash_of(other)


class TestRefused:
    def test_a_video_of_another_length(self) -> None:
        pipeline = zoo.shared("wan")
        row = pipeline.prepare(["a cat"], **SETTINGS)
        assert isinstance(row, Conditioning)
        with pytest.raises(ValueError, match=r"has 5 frames, and WanPipeline draws 9"):
            Encoder(pipeline).encode(media(5), row)

    @pytest.mark.parametrize("name", SPOILT)
    def test_an_epilogue_that_does_more_than_scale_and_move(self, name: str, tmp_path: Path) -> None:
        statement, message = SPOILT[name]
        pipe = zoo.build_variant(tmp_path, name, (UNSCALE, f"{UNSCALE}            {statement}\n"))
        pipeline = zoo.lifted("sd3", pipe)
        row = pipeline.prepare(["a cat"], **SETTINGS)
        assert isinstance(row, Conditioning)
        with pytest.raises(ValueError, match=message):
            Encoder(pipeline).encode(media(), row)

    def test_a_pipeline_without_an_image_processor(self) -> None:
        pipeline, _ = prepared("kandinsky22_inpaint")
        with pytest.raises(ValueError, match=r"KandinskyV22InpaintPipeline has no image processor of diffusers"):
            Encoder(pipeline)

    def test_the_pipeline_decodes_as_before(self) -> None:
        pipeline = zoo.lifted("sd3")
        row = pipeline.prepare(["a cat"], **SETTINGS)
        assert isinstance(row, Conditioning)
        latents = torch.randn(1, *row.latent_shape, generator=torch.Generator().manual_seed(0))
        before = pipeline.decode(latents, row)
        Encoder(pipeline).encode(media(), row)
        assert "decode" not in vars(pipeline.pipe.vae)
        assert torch.equal(pipeline.decode(latents, row), before)
