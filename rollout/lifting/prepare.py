"""Rows of prompts and inputs, prepared by a pipeline's own prologue, and what is found out about its batches on the way.

Letters: B samples, X latent shape of one sample.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowsteer.rollout.data.inputs import kind_of, load
from flowsteer.rollout.data.prompts import Row
from flowsteer.rollout.lifting.arguments import CallArguments, Settings
from flowsteer.rollout.lifting.beginning import Beginning, Draws, Prologue, beginning_of, find_beginning
from flowsteer.rollout.lifting.company import Company, find_company
from flowsteer.rollout.lifting.conditioning import (
    Attribute,
    Conditioning,
    Key,
    Layout,
    Rows,
    find_layouts,
)
from flowsteer.rollout.lifting.lift import ADAPTER_ADVICE, LiftError
from flowsteer.rollout.lifting.loop import Loop, fixed_randomness
from flowsteer.rollout.lifting.schedules import read_schedule
from flowsteer.rollout.lifting.step import finish, join_states, samples

logger = logging.getLogger(__name__)


class _SilentBar:
    """A progress bar that shows nothing."""

    def update(self, count: int = 1) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a run of the prologue left."""

    conditioning: Conditioning
    state: Tensor  # [B, *X]
    drawn: tuple[Tensor, ...]  # its normal draws, in order

    def prologue(self) -> Prologue:
        return Prologue(
            state=self.state, values=self.conditioning.values, schedule=self.conditioning.schedule, drawn=self.drawn
        )


@dataclass(frozen=True, kw_only=True)
class _Probed:
    """What is known of a pipeline under one setting."""

    layout: dict[Key, Layout]  # which values carry rows
    alone: bool  # it takes one row at a time
    from_loop: dict[str, Any]  # what the epilogue wants from the loop besides latents
    beginning: Beginning  # how the start follows from noise
    stepped: Tensor | None  # see Conditioning
    sample_shape: tuple[int, ...] | None  # of what a step takes, where that is a part of the state

    def complete(self, one: _Run, beginning: Beginning) -> Conditioning:
        """The conditioning of a row, from a run whose noise was replaced by zeros, or of any with its own start as base."""
        state, gain = one.state, beginning.gain
        more: dict[str, Any] = {}
        if self.stepped is not None and self.sample_shape is not None:
            more = {"stepped": self.stepped, "rest": state, "latent_shape": self.sample_shape}
            state = state.flatten(1)[:, self.stepped].reshape(1, *self.sample_shape)
            gain = gain.flatten()[self.stepped].reshape(self.sample_shape) if isinstance(gain, Tensor) else gain
        return replace(
            one.conditioning,
            layout=self.layout,
            alone=self.alone,
            values={**self.from_loop, **one.conditioning.values},
            base=state,
            gain=gain,
            noise_names=beginning.noise_names,
            start_names=beginning.start_names,
            **more,
        )


class Preparer:
    """Prepares rows, and remembers them.

    The last bits of an encoding may depend on how many prompts a network pass has, so a row must always be prepared the same
    way. With ``together`` above 1 the prologue always runs for that many rows, some of them repeated, where the pipeline gives
    a row the same bits in any company; else it runs for one row at a time.

    Args:
        loop: the pipeline's lifted parts.
        arguments: what its ``__call__`` is called with.
        cache_size: how many prepared rows are kept, or as many as were asked for at once.
        together: rows of a run of the prologue.
    """

    def __init__(self, loop: Loop, arguments: CallArguments, cache_size: int, together: int = 1) -> None:
        self.loop, self.arguments, self.cache_size, self.together = loop, arguments, cache_size, together
        self.name = type(loop.pipe).__name__
        arguments.place = self._placed
        self.prepared: OrderedDict[tuple[Row, Settings], Conditioning] = OrderedDict()
        self._probed: dict[Any, _Probed] = {}
        self._companies: dict[Any, Company] = {}

    def _placed(self, tensor: Tensor) -> Tensor:
        """A tensor of a file as the pipeline's own: numpy has no bfloat16, and its own floats have 64 bits."""
        return tensor.to(self.loop.device, self.loop.pipe.dtype if tensor.is_floating_point() else tensor.dtype)

    def rows(self, rows: Sequence[Row], settings: Settings) -> list[Conditioning]:
        """A conditioning of one row for each.

        Raises:
            ValueError: the pipeline refuses a prompt or its inputs, or lacks one that it needs.
        """
        missing = [row for row in dict.fromkeys(rows) if (row, settings) not in self.prepared]
        for row in missing:
            self.arguments.check_inputs(name for name, _ in row.inputs)
        kinds: dict[Company, list[Row]] = {}
        for row in missing if self.together > 1 else ():
            kinds.setdefault(self.company(row, settings, self.together), []).append(row)
        for company, own in kinds.items():
            for filled, places in company.batches(own, self.together) if not company.reason else ():
                made = self.batched(filled, settings)
                for place, row in places.items():
                    self.prepared[row, settings] = self.loop.kept(made[place])
        for row in missing:
            if (row, settings) not in self.prepared:
                self.prepared[row, settings] = self.loop.kept(self.alone(row, settings))
        for row in rows:
            self.prepared.move_to_end((row, settings))
        self.cache_size = max(self.cache_size, len({*rows}))
        while len(self.prepared) > self.cache_size:
            self.prepared.popitem(last=False)
        return [self.prepared[row, settings] for row in rows]

    def alone(self, row: Row, settings: Settings) -> Conditioning:
        """The row by a run of its own."""
        probed = self.probe(row, settings)
        if probed.beginning.plain:
            return replace(probed.complete(self.run([row], settings), probed.beginning), base=None)
        # the gain may follow a mask of the row's own
        draws = probed.beginning.draws
        zeros, ones = (self.run([row], settings, draws=draws, value=value) for value in (0.0, 1.0))
        own = beginning_of(draws, zeros.prologue(), ones.prologue(), self.name)
        return probed.complete(zeros, own)

    def batched(self, rows: Sequence[Row], settings: Settings) -> list[Conditioning]:
        """The rows by one run for all of them."""
        probed = self.probe(rows[0], settings)
        whole = replace(probed.complete(self.run([*rows], settings), probed.beginning), base=None)
        return [whole.take([place]) for place in range(len(rows))]

    def company(self, row: Row, settings: Settings, size: int) -> Company:
        """Whether rows of this signature are prepared ``size`` at a time, see `find_company`."""
        if row.inputs:
            return Company(reason="rows have inputs of their own")
        key = (settings, row.signature, size)
        if key not in self._companies:
            probed = self.probe(row, settings)
            if probed.alone or probed.stepped is not None or not probed.beginning.plain:
                how = "takes one row at a time" if probed.alone else "starts from more than noise"
                self._companies[key] = Company(reason=f"the pipeline {how}")
            else:
                self._companies[key] = find_company(
                    lambda rows: self.batched(rows, settings),
                    lambda row: self.alone(row, settings),
                    row,
                    size,
                    ours=probed.beginning.noise_names | probed.beginning.start_names,
                    encoders=self.loop.encoders.values(),
                )
        return self._companies[key]

    def own_start(self, row: Row, settings: Settings) -> tuple[Tensor, Conditioning]:
        """The latents [1, *X] with which the pipeline itself would start from its argument ``generator``, and that row."""
        probed = self.probe(row, settings)
        own = probed.complete(self.run([row], settings), probed.beginning)
        assert own.base is not None
        return own.base, own

    def call_arguments(self, rows: list[Row], settings: Settings, *, once: bool = False) -> dict[str, Any]:
        """The arguments of the pipeline's ``__call__`` for some rows."""
        inputs = [{name: load(value) for name, value in row.inputs} for row in rows]
        return self.arguments.build([row.text for row in rows], settings, inputs, once=once)

    def _bare(self, rows: list[Row], settings: Settings, draws: frozenset[int], value: float) -> _Run | None:
        """The run with a bare text in place of a list of prompts, for pipelines that want one; None where it fails, too."""
        self.arguments.bare = True
        try:
            return self.run(rows, settings, draws=draws, value=value)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the first error is the one to show
            self.arguments.bare = False
            return None

    def probe(self, row: Row, settings: Settings) -> _Probed:
        """What is known of the pipeline for rows of this signature."""
        key = (settings, row.signature)
        if key not in self._probed:
            one = self.run([row], settings)  # its errors are the user's, those of a batch are not
            layout, two = self._batch(row, settings, one)
            carried = one if two is None else two
            missing = (self.loop.lifted.epilogue_reads & self.loop.lifted.writes) - {*self.loop.lifted.states}
            missing -= carried.conditioning.values.keys()

            def run(draws: frozenset[int], value: float) -> Prologue:
                return self.run([row], settings, draws=draws, value=value).prologue()

            beginning = find_beginning(run, self.name)
            stepped, sample_shape = (None, None) if self.loop.lifted.whole else self._stepped(one, beginning)
            self._probed[key] = _Probed(
                layout=layout or {},
                alone=layout is None,
                from_loop=self._left_by_the_loop(carried.conditioning, missing) if missing else {},
                beginning=beginning,
                stepped=stepped,
                sample_shape=sample_shape,
            )
        return self._probed[key]

    def _batch(self, row: Row, settings: Settings, one: _Run) -> tuple[dict[Key, Layout] | None, _Run | None]:
        """How values carry rows, from batches of two and three; None where the pipeline takes one row at a time."""
        reasons = []
        for once in (False, True) if row.inputs else (False,):
            try:
                two, three = (self.run([row] * size, settings, once=once) for size in (2, 3))
                layout = find_layouts(two.conditioning, three.conditioning)
                replace(one.conditioning, layout=layout)  # it checks that the row fits
            except (LiftError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever a pipeline says of batches
                reasons.append(f"{type(error).__name__}: {error}")
                continue
            if not layout:
                reasons.append("no value has a row for each of them")
                continue
            layout = self._ordered(layout, row, settings, one, once=once)
            if row.inputs and (reason := self._stumbles(replace(one.conditioning, layout=layout))):
                reasons.append(reason)
                continue
            return layout, two
        logger.warning(
            "%s prepares one row, but not two or three at once (%s): each sample takes a network pass of its own",
            self.name,
            reasons[0],
        )
        return None, None

    def _stepped(self, one: _Run, beginning: Beginning) -> tuple[Tensor, tuple[int, ...]]:
        """Where in a sample's state its steps take their sample from, and the sample's shape.

        The state is filled with the numbers of its places, and the loop is asked what it hands to its steps.
        """
        states = len(self.loop.lifted.states)
        numbers = torch.arange(one.state.numel(), dtype=torch.float32, device=one.state.device)
        with torch.no_grad():
            body = self.loop.enter(
                numbers.reshape(one.state.shape), 0, replace(one.conditioning, latent_dtype=torch.float32)
            )
            taken = join_states(samples(body, self.name, states))
        places = taken.flatten().long()
        if not torch.equal(places.to(taken.dtype), taken.flatten()) or len(places.unique()) < len(places):
            raise LiftError(
                f"what {self.name} steps is no part of its {', '.join(self.loop.lifted.states)}; {ADAPTER_ADVICE}"
            )
        noisy = torch.as_tensor(beginning.gain, device=one.state.device).expand(one.state.shape[1:]).flatten() != 0
        noisy[places] = False
        if bool(noisy.any()) or beginning.noise_names or beginning.start_names:
            raise LiftError(f"{self.name} steps a part of what it starts from noise; {ADAPTER_ADVICE}")
        return places, tuple(taken.shape[1:])

    def _stumbles(self, row: Conditioning) -> str:
        """Why a denoising step of the row twice is not possible; empty where it is. Costs a network pass."""
        latents = torch.zeros((2, *row.latent_shape), dtype=row.latent_dtype, device=self.loop.device)
        try:
            with torch.no_grad():
                samples(self.loop.enter(latents, 0, row.take([0, 0])), self.name, len(self.loop.lifted.states))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a network says of rows that do not go together
            return f"{type(error).__name__}: {error}"
        return ""

    def _ordered(
        self, layout: dict[Key, Layout], row: Row, settings: Settings, one: _Run, *, once: bool
    ) -> dict[Key, Layout]:
        """The layout with the order of the rows of values that have several for each sample.

        A batch of the row and another prompt of the same length tells; where there can be none, it is block after block.
        """
        if not any(isinstance(own, Rows) and own.blocks > 1 for own in layout.values()):
            return layout
        other = row._replace(text=row.text[::-1])
        try:
            both = self.run([row, other], settings, once=once).conditioning.values
            alone = [own.conditioning.values for own in (one, self.run([other], settings))]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a pipeline that does not pad
            return layout
        return {
            key: own.ordered([values.get(key) for values in alone], both.get(key)) if isinstance(own, Rows) else own
            for key, own in layout.items()
        }

    def _left_by_the_loop(self, conditioning: Conditioning, names: frozenset[str]) -> dict[str, Any]:
        """Plain values, such as a dtype, that an iteration leaves for the epilogue."""
        shape = (conditioning.size, *conditioning.latent_shape)
        latents = torch.zeros(shape, dtype=conditioning.latent_dtype, device=self.loop.device)
        with torch.no_grad():
            generator = self.loop.enter(latents, 0, conditioning)
            left = finish(generator, samples(generator, self.name, len(self.loop.lifted.states))[-1])
        plain = (torch.dtype, torch.device, int, float, str)
        return {name: value for name, value in left.items() if name in names and isinstance(value, plain)}

    def run(
        self,
        rows: list[Row],
        settings: Settings,
        *,
        draws: frozenset[int] = frozenset(),
        value: float = 0.0,
        once: bool = False,
    ) -> _Run:
        """The prologue for some rows, on a private view of the pipeline; which values carry rows is not known yet.

        Its normal draws numbered in ``draws`` are replaced by ``value``. ``once``: see `CallArguments.build`.
        """
        lifted, pipe = self.loop.lifted, self.loop.pipe
        own: dict[str, Any] = {"scheduler": copy.deepcopy(pipe.scheduler)}
        if getattr(pipe, "guider", None) is not None:  # may keep momentum
            own["guider"] = copy.deepcopy(pipe.guider)
            own["guider"].guidance_scale = settings.guidance_scale
        view = self.loop.view({**own, "_progress_bar_config": {"disable": True}})
        before = dict(vars(view))
        recorded = Draws(draws, value)
        try:
            arguments = self.call_arguments(rows, settings, once=once)
            with torch.no_grad(), fixed_randomness(self.loop.device), recorded:
                local, iterable, around = lifted.prologue(view, **arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a pipeline says of what it was given
            if "set_timesteps()" in str(error):
                stands_in = f"{type(pipe.scheduler).__name__}, which stands in for the pipeline's own"
                raise LiftError(
                    f"{self.name} asks its scheduler for what {stands_in}, cannot do ({error}); {ADAPTER_ADVICE}"
                ) from error
            single = len(rows) == 1 and not self.arguments.bare and isinstance(error, (ValueError, TypeError))
            if single and (run := self._bare(rows, settings, draws, value)):
                return run
            given = {name for row in rows for name, _ in row.inputs} | self.arguments.fixed.keys()
            media = [name for name in self.arguments.media if not name.startswith(("ip_adapter", "negative"))]
            if not (idle := [name for name in media if name not in given]):
                raise
            raise ValueError(
                f"{self.name} cannot prepare {rows[0].text!r} ({type(error).__name__}: {error}). It was not given "
                f"{', '.join(idle)}: if it needs one of them, map a column of the prompt file to it, as in "
                f"inputs={{{idle[0]}: {{column: {idle[0]}, kind: {kind_of(idle[0])}}}}}"
            ) from error
        for line, outer in zip(lifted.outer, around):
            if (passes := len(list(outer))) != 1:
                raise LiftError(
                    f"{self.name} denoises {passes} times in a loop around its denoising loop ({line}), one "
                    f"after the other; call it so that one pass is enough, or {ADAPTER_ADVICE}"
                )
        states = [local[name] for name in lifted.states if isinstance(local.get(name), Tensor)]
        if len(states) < len(lifted.states):
            raise LiftError(
                f"{self.name} gives {', '.join(map(repr, lifted.states))} to scheduler.step, not all of "
                f"which are tensors before the loop: the loop's state is more than the step's latents; {ADAPTER_ADVICE}"
            )
        items = tuple(iterable)
        read = ((lifted.body_reads | lifted.epilogue_reads) & local.keys()) - {*lifted.states}
        values: dict[str, Any] = {name: local[name] for name in sorted(read)}
        values |= dict.fromkeys(lifted.bars & values.keys(), _SilentBar())
        set_by_prologue = {name: value for name, value in vars(view).items() if before.get(name, view) is not value}
        attributes = {Attribute(name): value for name, value in {**own, **set_by_prologue}.items()}
        state = join_states(states)
        conditioning = Conditioning(
            schedule=read_schedule(view.scheduler, len(items)),
            latent_shape=tuple(state.shape[1:]),
            latent_dtype=state.dtype,
            size=len(rows),
            values={**values, **attributes},
            layout={},
            items=items,
            shapes=tuple(tuple(own.shape[1:]) for own in states) if len(states) > 1 else (),
        )
        return _Run(conditioning=conditioning, state=state, drawn=tuple(recorded.drawn))
