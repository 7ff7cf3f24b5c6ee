"""The algorithms. Each file opens with its paper, what is left out, and where it differs from the published code."""

from typing import Annotated

from pydantic import Field

from flowsteer.rl.algorithms.awm import AWM
from flowsteer.rl.algorithms.dgpo import DGPO
from flowsteer.rl.algorithms.diffusion_dpo import DiffusionDPO
from flowsteer.rl.algorithms.diffusion_nft import DiffusionNFT
from flowsteer.rl.algorithms.flow_grpo import FlowGRPO
from flowsteer.rl.algorithms.grpo_guard import GRPOGuard
from flowsteer.rl.algorithms.pso import PSO
from flowsteer.rl.algorithms.step_dpo import StepDPO
from flowsteer.rl.algorithms.weighted_sft import WeightedSFT

ALGORITHMS = (FlowGRPO, GRPOGuard, StepDPO, PSO, DGPO, DiffusionNFT, AWM, DiffusionDPO, WeightedSFT)

AnyAlgorithm = Annotated[
    FlowGRPO | GRPOGuard | StepDPO | PSO | DGPO | DiffusionNFT | AWM | DiffusionDPO | WeightedSFT,
    Field(discriminator="name"),
]

__all__ = ["ALGORITHMS", "AnyAlgorithm"]
