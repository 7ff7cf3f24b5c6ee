"""Context parallelism: the processes of a team share every sample, and each pass of a network splits its sequence among them.

diffusers says for each network where its sequence is cut and joined again (``_cp_plan``), and its attention exchanges heads for
tokens (Ulysses). So a network gives every process of a team the same whole prediction. In the backward pass each process gets
the part of the gradient that its own tokens give: the gradient is their sum over the team.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import ModelMixin
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import (
    ContextParallelGatherHook,
    ContextParallelSplitHook,
    _get_submodule_by_name,
)
from diffusers.models._modeling_parallel import ContextParallelConfig, ContextParallelInput, ParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from flowsteer.rl.engine.processes import Processes

SPLIT = ("Flux2Transformer2DModel", "FluxTransformer2DModel", "WanTransformer3DModel")
"""Networks whose split gradient is known to be that of one process (tests/rl/test_context.py). Of the others that have a plan,
LTX's attention mask is not split with its heads, Helios joins its sequence in the middle, where the backward pass would need an
exchange that it has not, and Qwen-Image splits prompts whose length is that of their text."""


def check_split(denoisers: Mapping[str, nn.Module], size: int) -> None:
    """Raises ValueError for a network whose sequence cannot be split among ``size`` processes."""
    for name, denoiser in denoisers.items():
        kind = type(denoiser).__name__
        if kind not in SPLIT or not isinstance(denoiser, ModelMixin):
            raise ValueError(
                f"engine.context_parallel={size} cannot split {name}, a {kind}; it is for {', '.join(SPLIT)}: leave it out"
            )
        heads = denoiser.config["num_attention_heads"]
        if heads % size:
            raise ValueError(
                f"engine.context_parallel={size} does not divide the {heads} attention heads of {name}; set it to a number "
                "that does"
            )


def split_sequences(denoisers: Mapping[str, nn.Module], processes: Processes) -> None:
    """Split the sequence in all passes of the networks from here on; nothing changes where a team is one process.

    `ModelMixin.enable_parallelism` is not asked, because it wants an accelerator. A LoRA must be there already: a layer that
    is joined must be the whole of it.

    Raises:
        ValueError: here, for a network that cannot be split; in a pass, for a sequence that cannot be split evenly.
    """
    size = processes.team_size
    if size == 1:
        return
    check_split(denoisers, size)
    shape, names = (processes.num_teams, 1, size), ("team", "ring", "ulysses")
    mesh = init_device_mesh(processes.device.type, shape, mesh_dim_names=names)["ring", "ulysses"]
    context = ContextParallelConfig(ulysses_degree=size, mesh=mesh)
    parallel = ParallelConfig(context_parallel_config=context)
    parallel.setup(processes.process_index, processes.num_processes, processes.device, mesh=mesh)
    for denoiser in denoisers.values():
        for module in denoiser.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = parallel
        plan: Any = denoiser._cp_plan
        for place, cut in plan.items():
            found = _get_submodule_by_name(denoiser, place)
            for module in found if isinstance(found, list) else [found]:
                joins: Any = [cut]
                hook = _Split(cut, context) if isinstance(cut, dict) else ContextParallelGatherHook(joins, context)
                HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, f"context_parallel {place}")


class _Split(ContextParallelSplitHook):
    """diffusers' own, which says what to do where it would only assert."""

    def _prepare_cp_input(self, x: Tensor, cp_input: ContextParallelInput) -> Tensor:
        if cp_input.expected_dims not in (None, x.dim()):
            return x  # Wan's timestep has a dimension for the sequence in some models only
        size, length = self.parallel_config.ulysses_degree or 1, x.shape[cp_input.split_dim]
        if length % size:
            raise ValueError(
                f"engine.context_parallel={size} does not divide a sequence of {length} tokens; change model.height, "
                "model.width or the number of frames, so that it does, or engine.context_parallel"
            )
        return super()._prepare_cp_input(x, cp_input)
