"""One set of base weights, several policies: current, old, reference and ema.

With a LoRA they are named adapters (the reference is the base without any); with all weights in training they are copies
that change places with the live weights. Either way `Policy.using` makes one of them active and always restores the current
one. The optimiser only ever sees the current one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from flowsteer.rl.engine.shares import Shares, kept
from flowsteer.rl.lora import CURRENT, Adapters
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.several import Prepared
from flowsteer.rollout.types import ConditioningRows


class Policy:
    """The denoisers of a pipeline under several names.

    Args:
        pipeline: what predicts the velocity.
        lora: rank, alpha and targets (the ends of layers' paths), or None to train all weights.
        variants: which of ``old``, ``reference`` and ``ema`` are needed besides the current one.
        seed: of the adapters' initial values.
        ema_decay: how much of the ema policy stays each time that it follows.
        ema_ramp: after n updates no more of it stays than (1 + n) / (10 + n).
        ema_every: it follows after each so many updates.
        compiled: the networks are compiled, and what one graph computes another one rounds differently: all policies are then
            evaluated by the graph of the one that is trained.

    Raises:
        ValueError: a target matches no linear layer.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        lora: tuple[int, int, Sequence[str]] | None,
        variants: frozenset[str],
        seed: int,
        ema_decay: float = 0.0,
        ema_ramp: bool = False,
        ema_every: int = 1,
        compiled: bool = False,
    ) -> None:
        self.pipeline = pipeline
        self.compiled = compiled
        self.ema_decay, self.ema_ramp, self.ema_every = ema_decay, ema_ramp, ema_every
        self.denoisers: dict[str, nn.Module] = dict(pipeline.denoisers)
        self.active = CURRENT
        self._averages: dict[str, list[Tensor]] = {}  # float32, where the policies themselves are narrower
        for denoiser in self.denoisers.values():
            denoiser.requires_grad_(False)
        self._variants: _Variants
        if lora is None:
            self._variants = _Copies(self.denoisers, variants)
        else:
            rank, alpha, targets = lora
            self._variants = Adapters(
                self.denoisers, variants, rank=rank, alpha=alpha, targets=targets, seed=seed, lend=compiled
            )

    @property
    def names(self) -> frozenset[str]:
        """Every policy that `using` accepts."""
        return frozenset({CURRENT, *self._variants.names})

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in a fixed order."""
        return self._variants.parameters(CURRENT)

    def velocity(self, latents: Tensor, index: int, conditioning: ConditioningRows) -> Tensor:
        """The active policy's prediction at a denoising index, [B, *X] -> [B, *X]."""
        prepared = cast(Prepared, conditioning)  # the rows of a rollout are those that its pipeline prepared
        if self.compiled and not torch.is_grad_enabled():
            with torch.enable_grad():  # the graph of training, see `compiled`
                return self.pipeline.begin(latents, index, prepared).velocity.detach()
        return self.pipeline.begin(latents, index, prepared).velocity

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Make a policy active inside the context. Raises ValueError for a name that was not asked for at the start."""
        if name not in self.names:
            raise ValueError(f"there is no policy {name!r} in this run, only {', '.join(sorted(self.names))}")
        before, self.active = self.active, name
        self._variants.switch(before, name)
        try:
            yield
        finally:
            self._variants.switch(name, before)
            self.active = before

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, the active LoRA is added to the base's weights, which saves the adapters' share of every pass.

        Rounded to the base's type: in bfloat16 small updates are lost. Afterwards the base has its own bits again. Nothing
        changes where all weights are trained, or the reference is active.
        """
        with self._variants.merged(self.active):
            yield

    def ready(self, shares: Shares | None = None) -> None:
        """Take the copies of the starting weights, once the engine has laid the parameters out.

        With ``shares`` and all weights in training, policies are kept by float32 share, and a policy's weights are made from
        the shares of all processes each time that it becomes active.

        Averages are kept in float32, even where the engine made the policies themselves bfloat16: in bfloat16 a step of
        1 % towards the current policy is rounded away, and the average would stand still.
        """
        if isinstance(self._variants, _Copies):
            self._variants.shares = shares
        self._variants.ready()
        moving = self._variants.names - {"reference"}
        # .float() of a float32 tensor is the tensor itself: then the policy is its own average
        self._averages = {name: [value.float() for value in self._variants.parts(name)] for name in moving}

    @torch.no_grad()
    def follow(self, name: str, decay: float) -> None:
        """Move a policy towards the current one: ``name = decay * name + (1 - decay) * current``; 0 makes them equal."""
        parts, currents = self._variants.parts(name), self._variants.parts(CURRENT)
        for mine, average, current in zip(parts, self._averages[name], currents):
            average.copy_(current) if decay == 0 else average.lerp_(current.float(), 1 - decay)
            mine.copy_(average)

    def updated(self, num_updates: int) -> None:
        """The optimiser update of this number, from 1, has changed the current policy: the averaged one follows when due."""
        if "ema" in self.names and num_updates % self.ema_every == 0:
            most = (1 + num_updates) / (10 + num_updates) if self.ema_ramp else 1.0
            self.follow("ema", min(most, self.ema_decay))

    def follow_old(self, decay: float) -> None:
        """A training step is over: the old policy, where there is one, follows the current one."""
        if "old" in self.names:
            self.follow("old", decay)

    @property
    def best(self) -> str:
        """The policy to evaluate and export: the averaged one where there is one."""
        return "ema" if "ema" in self.names else CURRENT

    def state(self) -> dict[str, Tensor]:
        """Every policy that moves, as far as this process keeps it, for a checkpoint.

        Where policies are kept by share, the current one is left out: the optimiser's masters are its shares.
        """
        if self._by_share:
            return {
                f"{name}/share_{number}": value
                for name in sorted(self._averages)
                for number, value in enumerate(self._averages[name])
            }
        moving = {CURRENT: self._variants.parts(CURRENT), **self._averages}
        return {
            f"{name}/{key}": value for name in sorted(moving) for key, value in zip(self.parameters(), moving[name])
        }

    @property
    def _by_share(self) -> bool:
        return isinstance(self._variants, _Copies) and self._variants.shares is not None

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave, after the optimiser's masters. Raises ValueError where names or shapes differ."""
        mine = self.state()
        if mine.keys() != state.keys() or any(mine[key].shape != state[key].shape for key in mine):
            raise ValueError("the checkpoint's weights belong to another model or other LoRA settings than this run's")
        for key, value in mine.items():
            value.copy_(state[key])
        for name, averages in self._averages.items():
            for policy, average in zip(self._variants.parts(name), averages):
                policy.copy_(average)
        if isinstance(self._variants, _Copies) and self._variants.shares is not None:
            self._variants.publish(self.active)


class _Variants(Protocol):
    names: frozenset[str]

    def parameters(self, name: str) -> dict[str, nn.Parameter]: ...

    def parts(self, name: str) -> list[Tensor]: ...

    def switch(self, before: str, after: str) -> None: ...

    def merged(self, name: str) -> AbstractContextManager[None]: ...

    def ready(self) -> None: ...


class _Copies:
    """Policies as copies of all weights, which change places with the live ones; or as shares, which the live ones are made of.

    Attributes:
        shares: of the current policy on this process, where the live weights can be made from such; else None.
    """

    def __init__(self, denoisers: dict[str, nn.Module], variants: frozenset[str]) -> None:
        self.names = variants
        self._denoisers = denoisers
        self._copies: dict[str, list[Tensor]] = {}
        self.shares: Shares | None = None
        for denoiser in denoisers.values():
            denoiser.requires_grad_(True)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        return {
            key: value
            for component, denoiser in self._denoisers.items()
            for key, value in denoiser.named_parameters(prefix=component)
        }

    def merged(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def ready(self) -> None:
        if self.shares is None:
            self._copies = {name: [value.clone() for value in self._live()] for name in self.names}
            return
        for name in self.names:  # the reference is as the model was loaded, so that its type holds it exactly
            dtypes = self.shares.dtypes if name == "reference" else [torch.float32] * len(self.shares.dtypes)
            self._copies[name] = [
                value.detach().to(dtype, copy=True) for value, dtype in zip(self.shares.values, dtypes)
            ]

    def parts(self, name: str) -> list[Tensor]:
        if name != CURRENT:
            return self._copies[name]
        return self._live() if self.shares is None else list(self.shares.values)

    def publish(self, name: str) -> None:
        """Make the live weights those of a policy that is kept by share."""
        assert self.shares is not None
        self.shares.publish(self.parts(name))

    @torch.no_grad()
    def switch(self, before: str, after: str) -> None:
        if self.shares is not None:
            if before != after:
                self.publish(after)
            return
        for name in (before, after):  # put what is live back in its place, then bring the other one in
            if name != CURRENT and before != after:
                for live, copy in zip(self._live(), self._copies[name]):
                    held = live.clone()
                    live.copy_(copy)
                    copy.copy_(held)

    def _live(self) -> list[Tensor]:
        return [kept(parameter) for parameter in self.parameters(CURRENT).values()]
