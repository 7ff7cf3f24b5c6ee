"""Randomness as a value: every draw comes from (seed, stream), never from a generator's state.

A sample therefore does not depend on its batch, on the number of processes, or on whether the run was interrupted.
Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_MASK = (1 << 63) - 1


def mix(*values: int) -> int:
    """A well-mixed 63-bit number from some whole numbers; their order matters (SplitMix64's finaliser)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state & _MASK


def initial_noise(seeds: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal [B, *shape]; row b is what ``torch.Generator().manual_seed(seeds[b])`` gives diffusers.

    Drawn on the CPU, where the same seed gives the same bits on every machine. torch's CPU generator uses 32 bits of a seed, so
    there are 2^32 different rows.
    """
    rows = [
        torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds.tolist()
    ]
    return torch.cat(rows)


def stream_noise(seeds: Tensor, stream: int, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 [B, *shape], independent between seeds and streams, and of `initial_noise`.

    ``seeds`` [B] int64 and ``stream``, 64 bits each, are the two halves of the key of a counter-based generator (Philox 4x64,
    Salmon et al. 2011): two pairs that differ in any bit have different noise.
    """
    rows = [_philox(seed, stream).standard_normal(tuple(shape), dtype=np.float32) for seed in seeds.tolist()]
    return torch.from_numpy(np.stack(rows))


def _philox(seed: int, stream: int) -> np.random.Generator:
    key = np.array([seed & _WORD, stream & _WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
