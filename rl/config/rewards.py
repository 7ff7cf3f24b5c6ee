"""The sections of rewards: what each counts, how many workers it has, and where they run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from flowsteer.rl.config.section import Section


class HostConfig(Section):
    """Where a reward runs, if not in this process; exactly one of ``environment``, ``python`` and ``url`` says where."""

    environment: str | None = None
    """A managed environment (`flowsteer rewards env list`)."""
    python: str | None = None
    """The interpreter of an environment of your own."""
    url: str | None = None
    """A reward on another machine, where `flowsteer rewards serve` runs."""
    target: str | None = None
    """What runs there: a scorer of the managed environment; of an interpreter, ``module:attribute`` or
    ``path/to/file.py:attribute``. By default the reward's name. A server has one already."""
    token_file: str | None = None
    """The server's token; null takes it from the environment variable FLOWSTEER_REWARD_TOKEN."""
    start_timeout_s: PositiveFloat = 600.0
    """How long to wait until the reward is ready: it may load a model."""
    deadline_s: PositiveFloat = 30.0
    """See ``deadline_per_image_s``."""
    deadline_per_image_s: NonNegativeFloat = 2.0
    """A batch of B images is waited for ``deadline_s + deadline_per_image_s * B`` seconds; then its scores are missing."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often a process that died or got stuck is restarted within an hour."""
    max_body_bytes: PositiveInt = 2**30
    """Limit for the pixels of a batch, in bytes; a server has its own."""

    @model_validator(mode="after")
    def _one_place(self) -> HostConfig:
        given = [name for name in ("environment", "python", "url") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a host is one of environment, python and url; {' and '.join(given) or 'none'} is given")
        idle = {"url": ("target", "max_restarts", "max_body_bytes")}.get(given[0], ("token_file",))
        for name in idle:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} does nothing for a host that is given by {given[0]}; leave it out")
        return self


def as_frames(given: Any) -> Any:
    """Which frames of a video count, if it says so. Raises ValueError otherwise, in one sentence for all of its forms."""
    every = given.get("every") if isinstance(given, dict) and len(given) == 1 else None
    if given not in (None, "mean", "first") and not (type(every) is int and every > 0):
        raise ValueError("give mean, first, or {every: NUMBER} with a number from 1 on")
    return given


class RewardConfig(Section):
    """One reward: ``weight * scale * (score - offset)``."""

    weight: float = 1.0
    """In the sum of the rewards; may be negative, and 0 only reports."""
    scale: float = 1.0
    """Multiplies the score, after the offset."""
    offset: float = 0.0
    """Subtracted from the score."""
    options: dict[str, Any] = {}
    """Arguments of the reward's constructor."""
    columns: dict[str, str] = {}
    """What the reward calls a column, and what the prompt file calls it, where the two differ: ``{source: photo}``."""
    frames: Annotated[Literal["mean", "first"] | dict[Literal["every"], int] | None, BeforeValidator(as_frames)] = None
    """Which frames of a video a reward of images scores: ``mean`` (of all, as null is), ``first``, or ``{every: 4}`` for the
    mean of every fourth. Not for rewards that take videos."""
    host: HostConfig | None = None
    """Where it runs; null is this process."""
    workers: PositiveInt = 1
    """How many of it score at the same time, on each process of the run; the images of a batch are dealt among them (whole
    groups, of a reward that compares). With ``host.python`` or ``host.environment`` each is a process, otherwise a thread,
    which helps a reward that computes outside Python, as ``ocr`` does. Each has its own copy of its model, and its part of
    the CPU's cores. Lossless for a reward whose score does not depend on the batch."""

    @model_validator(mode="after")
    def _options_are_elsewhere(self) -> RewardConfig:
        if self.workers > 1 and self.host is not None and self.host.url is not None:
            raise ValueError(
                f"workers={self.workers} are connections to one server, which scores one batch after another; leave workers "
                "out, or give host.python or host.environment in the place of host.url"
            )
        if self.host is not None and self.host.url is not None and self.options:
            raise ValueError("the options of a served reward are given where it is served; leave options out")
        return self
