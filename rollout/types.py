"""What the rollout side hands to the others.

Letters: B samples, K stored transitions, S states that samples left, T denoising steps, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

RANGE_TOLERANCE = 1e-2  # rounding of a half-precision decoder beyond [0, 1], as rewards allow it


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The noise levels of one sampling run: ``x = alpha * data + sigma * noise`` at every index.

    Rectified flow has ``alpha = 1 - sigma`` and ``sigma`` from 1 down to 0; a variance-preserving model
    (Stable Diffusion 1.5, SDXL) has ``alpha = sqrt(alphas_cumprod)``. All on the CPU in float32.

    Example: two steps of a rectified flow are ``sigma = [1, .5, 0]``, ``alpha = [0, .5, 1]``, ``timesteps = [1000, 500]``.
    """

    sigma: Tensor  # [T+1]
    alpha: Tensor  # [T+1]
    timesteps: Tensor  # [T], what the network wants to be told
    prediction: Literal["velocity", "epsilon", "v_prediction"] = "velocity"
    rising: bool = False  # the pipeline itself counts 1 - sigma, from 0 to 1, and predicts data minus noise (Mochi)

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if self.sigma.shape != (steps + 1,) or self.alpha.shape != (steps + 1,):
            raise ValueError(
                f"a schedule of {steps} timesteps needs {steps + 1} sigmas and alphas, "
                f"got {tuple(self.sigma.shape)} and {tuple(self.alpha.shape)}"
            )

    @property
    def num_steps(self) -> int:
        """T, how many denoising steps there are."""
        return len(self.timesteps)

    def equals(self, other: Schedule) -> bool:
        """Whether the levels and timesteps are the same, bit for bit."""
        return self is other or (torch.equal(self.sigma, other.sigma) and torch.equal(self.timesteps, other.timesteps))

    def along(self, path: Sequence[int]) -> Schedule:
        """The schedule that visits only the denoising indices ``path``, increasing, and then ends where this one ends."""
        visited = [*path]
        ends = [*visited, self.num_steps]
        return replace(self, sigma=self.sigma[ends], alpha=self.alpha[ends], timesteps=self.timesteps[visited])


class ConditioningRows(Protocol):
    """What a pipeline prepared for B prompts, a row for each; `flowsteer.rollout.lifting.conditioning.Conditioning` is one.

    Who stores it or trains on it needs no more than this. What else is in a row is for the pipeline that prepared it.
    """

    @property
    def schedule(self) -> Schedule:
        """The noise levels, the same for all rows."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """X."""
        ...

    def take(self, index: Sequence[int] | Tensor, /) -> Self:
        """The rows ``index``, in that order; rows may repeat."""
        ...


@dataclass(frozen=True, kw_only=True)
class SharedStates:
    """States that several samples leave: a pool of candidates, or a group that parts from its anchor.

    One network pass over the S states serves all B samples, in sampling and in training.

    Example: two prompts with a group of three samples each have ``conditioning`` of S = 2 rows and
    ``state = tensor([0, 0, 0, 1, 1, 1])``.
    """

    conditioning: ConditioningRows  # S rows
    state: Tensor  # [B] int64, the state that each sample left


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The stochastic transitions of a rollout batch, each self-contained.

    All samples of a batch share their denoising indices, so one network call serves one transition of the whole batch.

    Example: six samples of shape [4, 8, 8] whose denoising steps 1 and 2 were stochastic with eta = 0.7 have
    ``indices = (1, 2)``, ``noise_levels = (0.7, 0.7)``, ``latents`` and ``next_latents`` of [6, 2, 4, 8, 8] and ``log_prob``
    of [6, 2]. ``next_latents[:, 0]`` is what step 1 drew from ``latents[:, 0]``. If the six left two shared states at a
    single step, ``latents`` are [2, 1, 4, 8, 8] and ``next_latents`` [6, 1, 4, 8, 8].
    """

    indices: tuple[int, ...]  # K denoising indices, increasing
    noise_levels: tuple[float, ...]  # K, the kernel's eta at each index
    latents: Tensor  # [S, K, *X], storage dtype; S = B unless states are shared
    next_latents: Tensor  # [B, K, *X], storage dtype: rounded first, scored second
    log_prob: Tensor  # [B, K] float32, mean over the latent's dimensions, under the policy that drew it
    mean: Tensor | None = None  # [B, K, *X] float32, the kernel's mean under that policy, where a loss needs it
    shared: SharedStates | None = None

    def __post_init__(self) -> None:
        count = len(self.indices)
        if (
            self.latents.shape[1:] != self.next_latents.shape[1:]
            or (self.shared is None and len(self.latents) != len(self.next_latents))
            or self.next_latents.shape[:2] != self.log_prob.shape
            or self.log_prob.shape[1] != count
            or len(self.noise_levels) != count
            or (self.mean is not None and self.mean.shape != self.next_latents.shape)
        ):
            raise ValueError(
                f"a trajectory of {count} transitions needs latents [B, {count}, ...] and log_prob [B, {count}], got "
                f"{tuple(self.latents.shape)}, {tuple(self.next_latents.shape)} and {tuple(self.log_prob.shape)}"
            )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The finished samples of one sampling batch; a training step has several.

    A batch is the unit of everything that follows: the improving passes use the same samples in the same order, so that
    every network call has the shape it had when the samples were drawn.

    Example: the first batch of a step, two samples each of two prompts, has
    ``prompts = ("a cat", "a cat", "two dogs", "two dogs")``, ``group = tensor([0, 0, 1, 1])``,
    ``sample = tensor([0, 1, 2, 3])``, four different ``seeds``, and for a picture of 64 x 64 pixels ``latents`` of
    [4, 16, 8, 8] and ``images`` of [4, 3, 64, 64]. With ``columns = {"count": (1, 1, 2, 2)}`` a reward gets ``count``, too.
    """

    prompts: tuple[str, ...]  # B
    columns: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # other columns of the prompt file, B each
    pictures: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # columns that rewards want as pictures, B each
    group: Tensor  # [B] int64, the same number for samples of one prompt in one training step
    sample: Tensor  # [B] int64, the sample's place in the whole training step, on whichever process it was drawn
    seeds: Tensor  # [B] int64, the seed of each sample's own generator
    conditioning: ConditioningRows  # B rows
    latents: Tensor  # [B, *X], final
    images: (
        Tensor  # uint8 [B, 3, H, W] or [B, T, 3, H, W], or float32 sound [B, C, N] in [-1, 1]; on the CPU; see `kept`
    )
    trajectory: Trajectory | None
    policy_version: int  # how many optimiser updates the policy that drew it had seen
    stored_scores: Tensor | None = None  # [B] float32, what the file says that pictures are worth; NaN: it says nothing

    def __post_init__(self) -> None:
        size = len(self.prompts)
        for name in ("group", "sample", "seeds", "latents", "images"):
            if len(getattr(self, name)) != size:
                raise ValueError(
                    f"a rollout of {size} prompts needs {size} rows of {name}, got {len(getattr(self, name))}"
                )

    def __len__(self) -> int:
        return len(self.prompts)


def kept(images: Tensor) -> Tensor:
    """What a rollout keeps of pictures [B, 3, H, W] or [B, T, 3, H, W] in [0, 1]: uint8 on the CPU, a quarter of float32.

    Rewards are shown 8 bits anyway, rounded in the same way (`flowsteer.rewards.pixels.to_uint8`), so scores do not change.
    Sound stays float32. So does a batch with NaN, inf or values outside the range: what to say of it is for the rewards.
    """
    images = images.float()
    if images.dim() == 3 or images.shape[-3] != 3 or not images.numel():
        return images.cpu()
    low, high = torch.aminmax(images)  # NaN where there is one
    if not bool((low >= -RANGE_TOLERANCE) & (high <= 1 + RANGE_TOLERANCE)):
        return images.cpu()
    return (images * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def flat_mean(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [B, *X] -> [B]. Latents have 3 to 5 dimensions; no fixed set of axes will do."""
    return x.flatten(1).mean(1)


def expand_to(value: Tensor, like: Tensor) -> Tensor:
    """Give ``value`` [B] the trailing axes of ``like`` [B, *X], so that they broadcast."""
    return value.view(-1, *([1] * (like.dim() - 1)))


__all__ = ["ConditioningRows", "Rollout", "Schedule", "SharedStates", "Trajectory", "expand_to", "flat_mean", "kept"]
