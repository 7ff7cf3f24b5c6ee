"""One set of base weights, several policies: current, old, reference and ema.

With a LoRA they are named adapters (the reference is the base without any); with all weights in training they are copies
that change places with the live weights. Either way `Policy.using` makes one of them active and always restores the current
one. The optimiser only ever sees the current one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flowsteer.rl.engine.zero import kept
from flowsteer.rl.targets import endings, linear_layers
from flowsteer.rollout.lifting.protocol import Pipeline
from flowsteer.rollout.lifting.several import Prepared
from flowsteer.rollout.types import ConditioningRows

CURRENT = "current"


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
    ) -> None:
        self.pipeline = pipeline
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
            self._variants = _Adapters(self.denoisers, variants, rank=rank, alpha=alpha, targets=targets, seed=seed)

    @property
    def names(self) -> frozenset[str]:
        """Every policy that `using` accepts."""
        return frozenset({CURRENT, *self._variants.names})

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in a fixed order."""
        return self._variants.parameters(CURRENT)

    def exported(self) -> list[nn.Parameter]:
        """The parameters that hold the best policy while it is active."""
        return list(self._variants.parameters(self.best).values())

    def velocity(self, latents: Tensor, index: int, conditioning: ConditioningRows) -> Tensor:
        """The active policy's prediction at a denoising index, [B, *X] -> [B, *X]."""
        prepared = cast(Prepared, conditioning)  # the rows of a rollout are those that its pipeline prepared
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

    def ready(self) -> None:
        """Take the copies of the starting weights, once the engine has laid the parameters out.

        Averages are kept in float32, even where the engine made the policies themselves bfloat16: in bfloat16 a step of
        1 % towards the current policy is rounded away, and the average would stand still.
        """
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
        """Every policy that moves, as far as this process keeps it, for a checkpoint."""
        moving = {CURRENT: self._variants.parts(CURRENT), **self._averages}
        return {
            f"{name}/{key}": value for name in sorted(moving) for key, value in zip(self.parameters(), moving[name])
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave. Raises ValueError where names or shapes differ."""
        mine = self.state()
        if mine.keys() != state.keys() or any(mine[key].shape != state[key].shape for key in mine):
            raise ValueError("the checkpoint's weights belong to another model or other LoRA settings than this run's")
        for key, value in mine.items():
            value.copy_(state[key])
        for name, averages in self._averages.items():
            for policy, average in zip(self._variants.parts(name), averages):
                policy.copy_(average)


class _Variants(Protocol):
    names: frozenset[str]

    def parameters(self, name: str) -> dict[str, nn.Parameter]: ...

    def parts(self, name: str) -> list[Tensor]: ...

    def switch(self, before: str, after: str) -> None: ...

    def ready(self) -> None: ...


class _Adapters:
    """Policies as LoRA adapters of the same base weights; the reference is the base alone."""

    def __init__(
        self,
        denoisers: dict[str, nn.Module],
        variants: frozenset[str],
        *,
        rank: int,
        alpha: int,
        targets: Sequence[str],
        seed: int,
    ) -> None:
        self.names = variants
        self._denoisers = denoisers
        _check_targets(denoisers, targets)
        with torch.random.fork_rng(devices=[]):
            for name in sorted({CURRENT, *variants} - {"reference"}):
                torch.manual_seed(seed)  # every adapter starts as the same policy
                for denoiser in denoisers.values():
                    config = LoraConfig(
                        r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian"
                    )
                    with warnings.catch_warnings():  # several adapters are what we want
                        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                        inject_adapter_in_model(config, denoiser, adapter_name=name)
        self._layers = [m for d in denoisers.values() for m in d.modules() if isinstance(m, LoraLayer)]
        for name in {CURRENT, *variants} - {"reference"}:
            for parameter in self.parameters(name).values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(name == CURRENT)
        self.switch(CURRENT, CURRENT)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        return {
            key.replace(f".{name}.", "."): value
            for component, denoiser in self._denoisers.items()
            for key, value in denoiser.named_parameters(prefix=component)
            if ".lora_" in key and f".{name}." in key
        }

    def parts(self, name: str) -> list[Tensor]:
        return [kept(parameter) for parameter in self.parameters(name).values()]

    def switch(self, before: str, after: str) -> None:
        # PEFT's own set_adapter also changes requires_grad, which the optimiser and ZeRO rely on; its fields do not.
        for layer in self._layers:
            layer._disable_adapters = after == "reference"
            layer._active_adapter = [CURRENT if after == "reference" else after]

    def ready(self) -> None:
        pass


class _Copies:
    """Policies as copies of all weights, which change places with the live ones."""

    def __init__(self, denoisers: dict[str, nn.Module], variants: frozenset[str]) -> None:
        self.names = variants
        self._denoisers = denoisers
        self._copies: dict[str, list[Tensor]] = {}
        for denoiser in denoisers.values():
            denoiser.requires_grad_(True)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        return {
            key: value
            for component, denoiser in self._denoisers.items()
            for key, value in denoiser.named_parameters(prefix=component)
        }

    def ready(self) -> None:
        self._copies = {name: [value.clone() for value in self._live()] for name in self.names}

    def parts(self, name: str) -> list[Tensor]:
        return self._live() if name == CURRENT else self._copies[name]

    @torch.no_grad()
    def switch(self, before: str, after: str) -> None:
        for name in (before, after):  # put what is live back in its place, then bring the other one in
            if name != CURRENT and before != after:
                for live, copy in zip(self._live(), self._copies[name]):
                    held = live.clone()
                    live.copy_(copy)
                    copy.copy_(held)

    def _live(self) -> list[Tensor]:
        return [kept(parameter) for parameter in self.parameters(CURRENT).values()]


def _check_targets(denoisers: dict[str, nn.Module], targets: Sequence[str]) -> None:
    """PEFT trains nothing, silently, for a name that matches nothing; here it is an error."""
    layers = {f".{key}" for denoiser in denoisers.values() for key in linear_layers(denoiser)}
    idle = [target for target in targets if not any(key.endswith(f".{target}") for key in layers)]
    if idle:
        found = sorted({ending for denoiser in denoisers.values() for ending in endings(denoiser)})
        raise ValueError(
            f"model.lora.targets: {', '.join(map(repr, idle))} match no linear layer of {', '.join(denoisers)}; "
            f"its layers end in {', '.join(found)}"
        )
