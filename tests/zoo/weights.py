"""Weights with which an untrained network lets its inputs through."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def enlarged(network: Network, factor: float) -> Network:
    """Larger matrices than the initialisation's, with which too little of the input arrives at the output."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter *= factor
    return network


def opened(network: Network) -> Network:
    """Random matrices where the initialisation has zeros until training begins, as at the ends of a ControlNet."""
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return network
