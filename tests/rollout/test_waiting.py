"""Components that wait on the CPU: they come when they are needed, go back, and change no bit."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Make
from torch import nn

from flowsteer.rl.adapters import load_pipeline
from flowsteer.rl.config import Config
from flowsteer.rl.start import start
from flowsteer.rollout.lifting.conditioning import Conditioning
from flowsteer.rollout.lifting.loading import EMBEDDED, in_turn
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.selfcheck import check
from flowsteer.rollout.sample import sample

SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
PROMPTS = ["a red circle", "two blue squares", "a green triangle"]


def drawn(pipeline: FlowPipeline) -> torch.Tensor:
    conditioning = pipeline.prepare(PROMPTS, **SETTINGS)
    latents, _ = sample(pipeline, conditioning, seeds=torch.tensor([1, 2, 3]), noise_levels=[0.0, 0.0])
    return pipeline.decode(latents, conditioning)


def test_what_waits_comes_for_its_work_only_and_draws_the_same_bits():
    plain, offloaded = FlowPipeline.load(EMBEDDED), FlowPipeline.load(EMBEDDED, offload=("text_encoders", "vae"))
    places = offloaded.loop.places
    assert places.waiting == {"text_encoder", "text_encoder_2", "vae"}
    present: list[bool] = []

    def note(name: str) -> Any:
        return lambda *_: present.append(name in places._here)

    for name in ("text_encoder", "text_encoder_2"):
        getattr(offloaded.pipe, name).register_forward_pre_hook(note(name))
    offloaded.pipe.vae.decoder.register_forward_pre_hook(note("vae"))
    assert torch.equal(drawn(plain), drawn(offloaded))
    assert len(present) > 2
    assert all(present), "a network worked where it waits"
    assert not places._here, "and something has not gone back"
    before = len(places.moves)
    drawn(offloaded)
    assert [name for name, _ in places.moves[before:]] == ["vae", "vae"], "the prompts are encoded already"


def test_a_step_moves_the_encoders_once_and_the_autoencoder_for_each_batch(make_config: Make, tmp_path: Path):
    sizes = {"rollout.prompts_per_step": 4, "rollout.batch_size": 4, "rollout.group_size": 4}
    offload = {"text_encoders": True, "vae": True}
    given = make_config(tmp_path / "run", **{"model.path": EMBEDDED, "model.offload": offload}, **sizes)
    run = start(Config.model_validate(given), quiet=True)
    pipeline = run.policy.pipeline
    assert isinstance(pipeline, FlowPipeline)
    pipeline.forget()
    before = len(pipeline.loop.places.moves)
    run.worker.sample(0)
    run.close()
    moved = [name for name, _ in pipeline.loop.places.moves[before:]]
    assert {name: moved.count(name) for name in moved} == {"text_encoder": 2, "text_encoder_2": 2, "vae": 2 * 4}


def test_rows_wait_too():
    pipeline = FlowPipeline.load(EMBEDDED, offload=("text_encoders",))
    pipeline.loop.places.device = torch.device("meta")  # stands for an accelerator: rows must be told to go there
    pipeline.loop.places._move = lambda name, device: None  # type: ignore[method-assign]
    row = pipeline.loop.kept(FlowPipeline.load(EMBEDDED).prepare(PROMPTS[:1], **SETTINGS))  # type: ignore[arg-type]
    assert isinstance(row, Conditioning)
    assert {value.device.type for value in row.values.values() if isinstance(value, torch.Tensor)} == {"cpu"}
    pipeline.preparer.rows = lambda rows, settings: [row]  # type: ignore[method-assign]
    brought = pipeline.prepare(PROMPTS[:1], **SETTINGS)
    assert isinstance(brought, Conditioning)
    assert {value.device.type for value in brought.values.values() if isinstance(value, torch.Tensor)} == {"meta"}


def test_the_check_holds_for_a_pipeline_whose_parts_wait():
    report = check(FlowPipeline.load(EMBEDDED, offload=("text_encoders", "vae")), guidance_scale=3.0)
    assert report.ok, report.text()


def test_what_cannot_wait_is_refused(tmp_path: Path):
    class Bare(nn.Module):
        pass

    pipeline = FlowPipeline.load(EMBEDDED)
    pipeline.pipe.vae = Bare()
    with pytest.raises(ValueError, match=r"model\.offload\.vae: StableDiffusion3Pipeline has none; leave it out"):
        FlowPipeline(pipeline.pipe, offload=("vae",))
    with pytest.raises(ValueError, match=r"model\.offload and model\.vae are for pipelines that are lifted"):
        load_pipeline("x", adapter="y:Z", dtype=torch.float32, device="cpu", offload=("vae",))


@pytest.mark.parametrize("offload", [(), ("vae",)])
def test_an_autoencoder_of_its_own_type_is_given_what_it_takes(offload: tuple[str, ...]):
    coarse = FlowPipeline.load(EMBEDDED, dtype=torch.bfloat16, offload=offload)
    mixed = FlowPipeline.load(EMBEDDED, dtype=torch.bfloat16, vae_dtype=torch.float32, offload=offload)
    fine = FlowPipeline.load(EMBEDDED)
    assert torch.equal(mixed.pipe.vae.decoder.conv_in.weight, fine.pipe.vae.decoder.conv_in.weight), "read in its type"
    assert mixed.pipe.transformer.dtype == torch.bfloat16
    conditioning = mixed.prepare(PROMPTS, **SETTINGS)
    latents = torch.randn((3, *conditioning.latent_shape), generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = fine.decode(latents.float(), fine.prepare(PROMPTS, **SETTINGS))
    # the pipeline itself rounds the scaled latents to bfloat16; the autoencoder adds nothing to that
    rough = (coarse.decode(latents, coarse.prepare(PROMPTS, **SETTINGS)) - exact).abs().mean()
    assert (mixed.decode(latents, conditioning) - exact).abs().mean() < rough / 2
    assert check(mixed).ok


def test_an_encoding_comes_back_in_the_type_of_the_picture():
    mixed = FlowPipeline.load(EMBEDDED, vae_dtype=torch.bfloat16)
    encoded = mixed.loop.view({}).vae.encode(torch.zeros(1, 3, 32, 32))
    assert encoded.latent_dist.mean.dtype == encoded.latent_dist.mode().dtype == torch.float32
    assert mixed.loop.view({}).vae.dtype == torch.bfloat16, "which pipelines ask for"


def test_slices_draw_the_same_up_to_rounding():
    plain, sliced = FlowPipeline.load(EMBEDDED), FlowPipeline.load(EMBEDDED, vae_modes=("slicing", "tiling"))
    assert sliced.pipe.vae.use_slicing
    assert sliced.pipe.vae.use_tiling
    torch.testing.assert_close(drawn(plain), drawn(sliced), rtol=0, atol=1e-4)


def test_processes_of_a_machine_load_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def most_at_once(local_processes: int, device: str) -> int:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_processes))
        inside, most = [], [0]

        def load(number: int) -> None:
            with in_turn(torch.device(device)):
                inside.append(number)
                most[0] = max(most[0], len(inside))
                time.sleep(0.05)
                inside.remove(number)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(load, range(3)))
        return most[0]

    assert most_at_once(3, "cuda") == 1
    assert most_at_once(3, "cpu") > 1, "nothing moves there, so nothing is freed either"
