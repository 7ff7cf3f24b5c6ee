"""The algorithms. Each file opens with its paper, what is left out, and where it differs from the published code."""

from typing import Annotated

from pydantic import Field

from flowsteer.rl.algorithms.diffusion_nft import DiffusionNFT, DiffusionNFTConfig
from flowsteer.rl.algorithms.flow_grpo import FlowGRPO, FlowGRPOConfig

AlgorithmConfig = Annotated[FlowGRPOConfig | DiffusionNFTConfig, Field(discriminator="name")]

__all__ = ["AlgorithmConfig", "DiffusionNFT", "DiffusionNFTConfig", "FlowGRPO", "FlowGRPOConfig"]
