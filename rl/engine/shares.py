"""What a process keeps of the weights, whichever strategy spreads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def kept(parameter: Tensor) -> Tensor:
    """The values of a parameter that this process keeps: all of them, or its share under ZeRO-3 and FSDP2."""
    if isinstance(parameter, DTensor):
        with torch.no_grad():  # then it is the share itself, not a copy that gradients pass through
            return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter.data)


def whole_size(parameter: Tensor) -> int:
    """The number of elements of a parameter, also where this process keeps a share of it."""
    return getattr(parameter, "ds_numel", parameter.numel())


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The float32 share of all trained weights on this process, and how weights of the passes are made from such shares.

    Example: two processes under ZeRO-2 with 7 trained weights: ``values=[[4]]``, the flat first or second half, one of them
    padded; ``dtypes=[torch.bfloat16]``; ``publish([average])`` makes all 7 weights of both those of the average.
    """

    values: Sequence[Tensor]  # float32, the masters that the optimiser updates; any shapes
    dtypes: Sequence[torch.dtype]  # of the weights in the passes, for each of the values
    publish: Callable[[Sequence[Tensor]], None]  # all processes call it at the same time
