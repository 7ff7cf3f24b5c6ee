"""The algorithms. Each file opens with its paper, what is left out, and where it differs from the published code."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field

from flowsteer.rl.algorithms.awm import AWM, AWMConfig
from flowsteer.rl.algorithms.dgpo import DGPO, DGPOConfig
from flowsteer.rl.algorithms.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from flowsteer.rl.algorithms.diffusion_nft import DiffusionNFT, DiffusionNFTConfig
from flowsteer.rl.algorithms.flow_grpo import FlowGRPO, FlowGRPOConfig
from flowsteer.rl.algorithms.grpo_guard import GRPOGuard, GRPOGuardConfig
from flowsteer.rl.algorithms.pso import PSO, PSOConfig
from flowsteer.rl.algorithms.step_dpo import StepDPO, StepDPOConfig
from flowsteer.rl.algorithms.weighted_sft import WeightedSFT, WeightedSFTConfig

AlgorithmConfig = Annotated[
    FlowGRPOConfig
    | GRPOGuardConfig
    | StepDPOConfig
    | PSOConfig
    | DGPOConfig
    | DiffusionNFTConfig
    | AWMConfig
    | DiffusionDPOConfig
    | WeightedSFTConfig,
    Field(discriminator="name"),
]

ALGORITHMS: Mapping[type, type[Any]] = MappingProxyType(
    {
        FlowGRPOConfig: FlowGRPO,
        GRPOGuardConfig: GRPOGuard,
        StepDPOConfig: StepDPO,
        PSOConfig: PSO,
        DGPOConfig: DGPO,
        DiffusionNFTConfig: DiffusionNFT,
        AWMConfig: AWM,
        DiffusionDPOConfig: DiffusionDPO,
        WeightedSFTConfig: WeightedSFT,
    }
)
"""A configuration's class -> what it configures."""

__all__ = ["ALGORITHMS", "AlgorithmConfig"]
