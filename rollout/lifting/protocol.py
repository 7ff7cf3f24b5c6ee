"""What sampling and learning ask of a model: the seam at which a hand-written adapter may stand in.

Letters: B samples, T frames, X latent shape of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from flowsteer.rollout.lifting.several import Prepared
from flowsteer.rollout.lifting.step import LiftedStep

ARGUMENTS = ("path", "dtype", "device", "height", "width", "call")
"""What an adapter is called with, see `Pipeline`."""
METHODS = ("route", "prepare", "begin", "decode")
"""What an adapter has besides ``denoisers``."""


class Pipeline(Protocol):
    """What sampling and learning ask of a model. ``FlowPipeline`` is one; a hand-written adapter may stand in.

    A configuration names an adapter by ``model.adapter``. It is a class, or a function that makes the object, and is called
    with keyword arguments, all of which come from the section ``model``:

    - ``path``, a text: where the weights are; what it means is the adapter's own affair.
    - ``dtype``, a ``torch.dtype``: of the frozen weights.
    - ``device``, a ``torch.device`` or a text.
    - ``height`` and ``width``, in pixels, or None for its own.
    - ``call``, a dict: further arguments. It raises ValueError for those that it does not know.

    The conditioning is a `Conditioning`: ``schedule`` has the noise levels, ``values`` the tensors that `begin` and
    `decode` need, and ``layout`` says which of them have rows, as ``{"embeds": Rows(dim=0, blocks=1)}``; ``items`` may stay
    empty. `prepare` gives one row per prompt in the order of the prompts, and the same for a prompt in any company.

    Networks are called through `route`'s ``call`` once that was given, and directly before. `begin` must depend on its
    arguments alone: steps are evaluated again, by themselves and in any order. `flowsteer check-model --adapter` finds out.
    """

    @property
    def denoisers(self) -> dict[str, nn.Module]:
        """The networks that the denoising loop calls, by component name."""
        ...

    def route(self, call: Callable[..., Any]) -> None:
        """Send the calls of denoisers to ``call(name, *args, **kwargs)``: a trainer's wrapped network, under DeepSpeed."""
        ...

    def prepare(
        self,
        prompts: Sequence[str],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        negative_prompt: str | None = None,
    ) -> Prepared:
        """One row per prompt.

        An adapter that takes pictures has a further argument ``inputs``: for each prompt a mapping of the names in the
        configuration's ``inputs`` to the row's values: a `Media`, whose ``load()`` gives the picture, a number or a text.
        """
        ...

    def begin(self, latents: Tensor, index: int, conditioning: Prepared) -> LiftedStep:
        """A denoising step from latents [B, *X], for any index in any order, its velocity differentiable:
        ``LiftedStep(velocity)``, or ``LiftedStep(velocity, finish)`` where the loop does something to the next latents.
        """
        ...

    def decode(self, latents: Tensor, conditioning: Prepared) -> Tensor:
        """[B, *X] -> images float32 [B, 3, H, W] in [0, 1], video [B, T, 3, H, W]."""
        ...
