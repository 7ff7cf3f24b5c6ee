"""Sound where people look: its envelope as a picture, and WAV files.

Letters: P sounds of C channels, N samples in time.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.protocol import Pipeline

HEIGHT, WIDTH = 64, 192  # pixels of an envelope
RATE = 44100  # samples a second, where a pipeline does not say


def envelopes(sounds: Tensor) -> Tensor:
    """Sound [P, C, N] in [-1, 1] to pictures [P, 3, 64, 192] in [0, 1]: time to the right, loudness as the height of a bar."""
    loudness = F.adaptive_max_pool1d(sounds.abs().mean(1, keepdim=True), WIDTH).clamp(0, 1)  # [P, 1, WIDTH]
    height = torch.linspace(1, -1, HEIGHT).abs()[None, :, None]  # from the middle
    return (height > loudness).float()[:, None].expand(-1, 3, -1, -1)


def sampling_rate_of(pipeline: Pipeline) -> int:
    """Samples a second of a pipeline's sound: what its vocoder or autoencoder says, else 44,100."""
    parts = pipeline.pipe.components if isinstance(pipeline, FlowPipeline) else {}
    for name in ("vocoder", "vae", "audio_vae"):
        config = getattr(parts.get(name), "config", None)
        for key in ("sampling_rate", "sample_rate"):
            if isinstance(rate := getattr(config, key, None), int):
                return rate
    return RATE


def save_sounds(sounds: Tensor, prompts: Sequence[str], folder: Path, *, rate: int) -> None:
    """Write each sound [P, C, N] as a WAV file of 16 bits, and a ``metadata.jsonl`` with their prompts, into a new folder."""
    folder.mkdir()
    lines = []
    for number, (sound, prompt) in enumerate(zip(sounds, prompts)):
        name = f"{number:04d}.wav"
        with wave.open(str(folder / name), "wb") as file:
            file.setnchannels(len(sound))
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes((sound.clamp(-1, 1) * 32767).round().short().T.contiguous().numpy().tobytes())
        lines.append(json.dumps({"file_name": name, "prompt": prompt}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
