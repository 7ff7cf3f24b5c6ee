"""How much of a gradient is signal? The cosine between the gradients of two halves of an update's samples.

An update whose halves agree (0.1 or more) goes where the whole data would send it. One whose halves are nearly orthogonal
(0.003) is mostly noise: it needs many updates, larger groups, a denser reward or other denoising steps. Such runs may learn
all the same (the embedded policy gradients do, at 0.003 to 0.03). The expected cosine of two halves with n samples each is
n s / (1 + n s), where s is the signal of a single sample: it grows with the batch, so compare runs of equal size. The halves
are of whole rollout batches, and each process compares its own. A pull that does not depend on the scores, such as a KL or
DiffusionNFT's towards its old policy once they are apart, is common to both halves and counts as agreement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flowsteer.rl.engine.shares import whole_size

MAX_ELEMENTS = 1 << 24  # of the gradient that are compared: enough for a cosine, and no burden beside a large model


class GradientAgreement:
    """Watches the gradients of each pass through tensor hooks, which fire alike under every engine.

    Args:
        parameters: the trained parameters, every one of which is watched.
        batches: rollout batches of one update on this process; the first half of them makes one gradient, the rest the other.
        passes_per_batch: consecutive backward passes that share a rollout batch.
        most: elements that are compared; of a larger model every k-th element of every parameter.
        total: from this process's part of a gradient to the gradient, where processes share samples.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        batches: int,
        passes_per_batch: int,
        most: int = MAX_ELEMENTS,
        total: Callable[[Tensor], Tensor] = lambda part: part,
    ) -> None:
        self._total = total
        self._half = batches // 2 * passes_per_batch
        self._sums: list[dict[int, Tensor]] = [{}, {}]
        self._pass = 0
        self._stride = max(math.ceil(sum(map(whole_size, parameters)) / most), 1)
        if self._half == 0:  # a single batch has no halves
            return
        for number, parameter in enumerate(parameters):
            parameter.register_hook(lambda gradient, number=number: self._add(number, gradient))

    def next_pass(self) -> None:
        """A backward pass is about to run."""
        self._pass += 1

    def finish(self) -> Tensor:
        """The cosine of this update, a scalar float32 on the parameters' device; NaN where an update is a single batch."""
        first, second = ({key: self._total(half[key]) for key in sorted(half)} for half in self._sums)
        self._sums, self._pass = [{}, {}], 0
        common = sorted(first.keys() & second.keys())
        if not common:
            return torch.tensor(float("nan"))
        dot = sum((first[k] * second[k]).sum() for k in common)
        norms = [torch.sqrt(sum((value**2).sum() for value in half.values())) for half in (first, second)]  # type: ignore[arg-type]
        return (dot / (norms[0] * norms[1]).clamp(min=1e-30)).float()  # type: ignore[operator]

    def _add(self, number: int, gradient: Tensor) -> None:
        half = self._sums[0 if self._pass <= self._half else 1]
        gradient = gradient.detach().flatten()[:: self._stride]  # the hook sees all of it, also under ZeRO-3
        if number in half:
            half[number] += gradient
        else:
            half[number] = gradient.to(torch.float32, copy=True)
