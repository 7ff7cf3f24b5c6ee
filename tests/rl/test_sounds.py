"""Sound: what rewards are given, what people see of it, and the files that are written."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from zoo.entries import entries, lifted
from zoo.training import brightness, loudness

from flowsteer.rewards.combine import RewardSet
from flowsteer.rewards.functions import FunctionReward
from flowsteer.rewards.pixels import to_uint8
from flowsteer.rl.evaluate import save_grid
from flowsteer.rl.sounds import RATE, envelopes, sampling_rate_of, save_sounds


def tones() -> torch.Tensor:
    """Silence, and a tone that grows from nothing to its full strength; two channels."""
    time = torch.linspace(0, 1, 4800)
    tone = time * torch.sin(2 * torch.pi * 100 * time)
    return torch.stack([torch.zeros(2, 4800), torch.stack([tone, tone])])


def test_a_reward_of_sound_gets_the_samples_as_they_are() -> None:
    scores = RewardSet([("loudness", loudness, 1.0)]).score(tones(), ["a", "b"], {})
    assert scores.total.tolist() == pytest.approx([0, float(tones()[1].abs().mean())], rel=1e-6)


def test_a_reward_of_pictures_is_refused_for_sound_and_the_other_way_round() -> None:
    with pytest.raises(ValueError, match=r"draws sound, and reward 'brightness' is for pictures; .* `sound = True`"):
        RewardSet([("brightness", brightness, 1.0)]).score(tones(), ["a", "b"], {})
    with pytest.raises(ValueError, match=r"draws pictures, and reward 'loudness' is for sound"):
        RewardSet([("loudness", loudness, 1.0)]).score(torch.zeros(1, 3, 4, 4), ["a"], {})
    grouped = FunctionReward(brightness)
    grouped.groupwise = True
    with pytest.raises(ValueError, match="draws sound, and reward 'grouped' is for pictures"):
        RewardSet([("grouped", grouped, 1.0)]).score(tones(), ["a", "a"], {})
    with pytest.raises(ValueError, match="sound has no pixels"):
        to_uint8(tones())


def test_a_reward_hears_what_is_written() -> None:
    loud = RewardSet([("loudness", loudness, 1.0)]).score(7 * torch.ones(1, 1, 4), ["a"], {})
    assert loud.total.tolist() == [1.0]


def test_sound_that_is_no_number_is_shown_to_no_reward() -> None:
    broken = tones()
    broken[0, 1, 7] = float("nan")
    scores = RewardSet([("loudness", loudness, 1.0)]).score(broken, ["a", "b"], {})
    assert scores.missing.tolist() == [True, False]


def test_a_louder_sound_has_a_taller_envelope(tmp_path: Path) -> None:
    silent, growing = envelopes(tones())
    assert silent.shape == (3, 64, 192)
    heights = (growing[0] == 0).sum(0)  # black where the bar is
    assert (silent == 1).sum() >= silent.numel() - 2 * silent.shape[-1] * 3
    assert heights[-1] > 55
    assert bool((heights.diff() >= -2).all())
    save_grid(tones(), tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0


def test_sounds_are_written_as_wav_files(tmp_path: Path) -> None:
    save_sounds(tones(), ["quiet", "loud"], tmp_path / "sounds", rate=16000)
    with wave.open(str(tmp_path / "sounds" / "0001.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16000, 4800)
        samples = np.frombuffer(file.readframes(4800), dtype=np.int16).reshape(-1, 2)
    assert np.abs(samples[:, 0] / 32767 - tones()[1, 0].numpy()).max() <= 0.5 / 32767 + 1e-6
    lines = (tmp_path / "sounds" / "metadata.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"file_name": "0001.wav", "prompt": "loud"}


def test_the_rate_is_the_pipelines_own() -> None:
    pipeline, _, _ = lifted(entries()["audio_ldm2"])
    assert sampling_rate_of(pipeline) == pipeline.pipe.vocoder.config.sampling_rate
    assert sampling_rate_of(lifted(entries()["FluxPipeline"])[0]) == RATE
