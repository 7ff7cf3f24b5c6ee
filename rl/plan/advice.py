"""What would fit: the largest batch, and options in the order of the time that they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from flowsteer.rl.plan.parts import Estimate, estimate
from flowsteer.rl.plan.settings import Settings

LEAST = 5e7  # bytes; an option that saves less is not worth a line


@dataclass(frozen=True, kw_only=True)
class Option:
    """A setting that saves memory.

    Example: ``Option(setting="model.offload.text_encoders=true", costs="...", apply=...)``.
    """

    setting: str
    costs: str
    apply: Callable[[Settings], Settings | None]  # None where it changes nothing


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """An option on top of those before it."""

    setting: str
    costs: str
    saves: float  # bytes of the peak
    peak: float  # bytes, with this option and those before it
    settings: Settings


def fits(settings: Settings, memory: float) -> bool:
    """Whether a run fits into so many bytes."""
    return estimate(settings).peak <= memory


def largest_batch(settings: Settings, memory: float, sizes: Sequence[int]) -> int | None:
    """The largest of the ascending ``sizes`` with which the run fits into so many bytes; None if none does."""
    best = None
    for size in sizes:
        if not fits(replace(settings, batch_size=size), memory):
            break
        best = size
    return best


def proposals(
    settings: Settings,
    memory: float,
    sizes: Sequence[int],
    *,
    accepts: Callable[[Sequence[str]], bool] = lambda chosen: True,
) -> Iterator[Proposal]:
    """Options one after another, each on top of the others, until the run fits.

    Args:
        settings: of the run.
        memory: bytes of the device.
        sizes: batch sizes that a run is not refused with, ascending.
        accepts: whether a configuration takes settings together, such as ``["model.quantize=nf4"]``.
    """
    now = settings
    peak, chosen = estimate(now).peak, list[str]()
    for option in _options(settings):
        if peak <= memory:
            return
        if option.setting != SMALLER and not accepts([*chosen, option.setting]):
            continue
        if option.setting == SMALLER:
            found = largest_batch(now, memory, [size for size in sizes if size < now.batch_size])
            if found is None:
                continue
            after, setting = replace(now, batch_size=found), f"rollout.batch_size={found}"
        else:
            changed = option.apply(now)
            if changed is None:
                continue
            after, setting = changed, option.setting
        new = estimate(after).peak
        if peak - new < LEAST:
            continue
        yield Proposal(setting=setting, costs=option.costs, saves=peak - new, peak=new, settings=after)
        now, peak = after, new
        chosen.append(setting)
    if peak > memory and (left := [size for size in sizes if size < now.batch_size]):
        after = replace(now, batch_size=left[0])
        new = estimate(after).peak
        if peak - new >= LEAST:
            yield Proposal(
                setting=f"rollout.batch_size={left[0]}", costs=_SMALL, saves=peak - new, peak=new, settings=after
            )


SMALLER = "rollout.batch_size=smaller"
_SMALL = "5 to 15 %: small batches use the device less well"


def _options(settings: Settings) -> Iterator[Option]:
    """In the order of the time that they cost."""
    yield Option(
        setting="model.offload.text_encoders=true",
        costs="about 1 %: encoders are moved once in a training step",
        apply=lambda s: None if s.offload_text_encoders else replace(s, offload_text_encoders=True),
    )
    yield Option(
        setting="model.vae.slicing=true",
        costs="about 1 %: pictures are decoded one by one",
        apply=lambda s: None if s.vae_slicing else replace(s, vae_slicing=True),
    )
    if settings.rank is None and settings.strategy == "zero1":
        yield Option(
            setting="engine.strategy=zero2",
            costs="0 to 10 %: gradients are reduced at every pass",
            apply=lambda s: replace(s, strategy="zero2"),
        )
    yield Option(setting=SMALLER, costs=_SMALL, apply=lambda s: None)
    if (
        settings.num_processes > 1
        and settings.strategy != "fsdp2"
        and (settings.rank is None or settings.quantize is None)
    ):
        yield Option(
            setting="engine.strategy=fsdp2",
            costs="10 to 20 %: weights are gathered in every pass",
            apply=lambda s: replace(s, strategy="fsdp2") if s.sharded == 1 else None,
        )
        yield Option(setting=SMALLER, costs=_SMALL, apply=lambda s: None)
    # after the strategies: FSDP2, which saves more, does not take it
    yield Option(
        setting="optimizer.name=adamw8bit",
        costs="about 1 %; lossy: the optimiser's state has 8 bits",
        apply=lambda s: replace(s, optimizer="adamw8bit") if s.optimizer == "adamw" else None,
    )
    yield Option(
        setting="model.gradient_checkpointing={every: 2}",
        costs="about 15 %: every other block is computed twice",
        apply=lambda s: None if s.checkpointing else replace(s, checkpointing=2),
    )
    yield Option(
        setting="model.gradient_checkpointing=true",
        costs="about 30 %: every block is computed twice",
        apply=lambda s: None if s.checkpointing == 1 else replace(s, checkpointing=1),
    )
    yield Option(setting=SMALLER, costs=_SMALL, apply=lambda s: None)
    if settings.rank is not None:
        for name, costs in (("int8", "10 to 30 %"), ("nf4", "20 to 50 %")):
            yield Option(
                setting=f"model.quantize={name}",
                costs=f"{costs}; lossy: the frozen base has fewer bits",
                apply=lambda s, name=name: replace(s, quantize=name) if s.sharded == 1 else None,
            )
        yield Option(setting=SMALLER, costs=_SMALL, apply=lambda s: None)
    yield Option(
        setting="model.vae.tiling=true",
        costs="pictures are decoded in tiles, which may show",
        apply=lambda s: None if s.vae_tiling or not _decoding_decides(s) else replace(s, vae_tiling=True),
    )
    yield Option(
        setting="model.offload.vae=true",
        costs="a few per cent: the VAE is moved for every batch",
        apply=lambda s: None if s.offload_vae else replace(s, offload_vae=True),
    )


def _decoding_decides(settings: Settings) -> bool:
    """Whether the peak is that of decoding pictures: to count tiles takes long, and they help nowhere else."""
    found = estimate(settings)
    return "decoding" in found.rollout and sum(found.rollout.values()) == found.peak


__all__ = ["Estimate", "Option", "Proposal", "fits", "largest_batch", "proposals"]
