"""Would a LoRA on this pipeline learn? The part of `flowsteer check-model` that trains: targets, parameters, gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from flowsteer.rl.config.data import inputs_of, sources_of
from flowsteer.rl.config.schema import Config
from flowsteer.rl.policy import Policy
from flowsteer.rl.targets import automatic_targets, summary
from flowsteer.rollout.data.inputs import Value
from flowsteer.rollout.data.prompts import Row, read_prompts
from flowsteer.rollout.lifting.company import TOGETHER
from flowsteer.rollout.lifting.pipeline import FlowPipeline, Pipeline
from flowsteer.rollout.lifting.selfcheck import PROMPTS, Finding
from flowsteer.rollout.sample import prepare_rows

RANK = 32  # of the LoRA that is tried
_NAMED = 6  # layers that a finding lists before it only counts


def first_inputs(config: Config) -> dict[str, Value]:
    """The inputs of the first row of a configuration's prompts. Raises ValueError as `read_prompts`."""
    prompts = read_prompts(sources_of(config.prompts.train), inputs=inputs_of(config.inputs), warn=False)
    return dict(prompts.row(0).inputs)


def input_findings(config: Config, pipeline: Pipeline) -> list[Finding]:
    """Which column each input of the pipeline is taken from, and which inputs it could take besides.

    Example: ``image from the column 'source'; not mapped: mask_image``.
    """
    media = pipeline.preparer.arguments.media if isinstance(pipeline, FlowPipeline) else ()
    mapped = [f"{name} from the column {own.column!r}" for name, own in config.inputs.items()]
    left = [name for name in media if name not in config.inputs]
    if not (mapped or left):
        return []
    detail = ", ".join(mapped) or "the configuration maps none"
    return [Finding(name="inputs", ok=True, detail=detail + (f"; not mapped: {', '.join(left)}" if left else ""))]


def encoding_findings(
    pipeline: Pipeline, *, inputs: Mapping[str, Value] | None = None, **settings: Any
) -> list[Finding]:
    """Whether a run encodes several prompts in one pass; none for an adapter, which encodes as it likes.

    Either way is fine. ``settings`` are those of `FlowPipeline.prepare`.
    """
    if not isinstance(pipeline, FlowPipeline):
        return []
    reason = pipeline.one_by_one(PROMPTS[0], inputs=inputs, **settings)
    detail = f"one by one: {reason}" if reason else f"{TOGETHER} prompts at once, with the same bits in any company"
    return [Finding(name="encoding", ok=True, detail=detail)]


def trainable_findings(
    pipeline: Pipeline,
    targets: str = "auto",
    guidance_scale: float = 1.0,
    *,
    rank: int = RANK,
    num_inference_steps: int = 3,
    prompt: str = PROMPTS[0],
    negative_prompt: str | None = None,
    inputs: Mapping[str, Value] | None = None,
) -> list[Finding]:
    """What a LoRA with these targets finds in the pipeline, and which of its tensors a gradient reaches.

    ``targets`` are names separated by commas, or ``auto``.

    Costs a forward and a backward pass at batch 1 for each of the ``num_inference_steps``, which together visit every
    denoiser of a pipeline that has several. The adapters stay on the pipeline, with small random values.

    The gradient is in order when it is finite and reaches every target in every denoiser. Single tensors may stay
    without one: in the last block of Stable Diffusion 3 the text queries lead nowhere.
    """
    row = Row.of(prompt, inputs or {})
    settings: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }
    try:
        named = automatic_targets(pipeline, row, **settings) if targets == "auto" else tuple(targets.split(","))
        policy = Policy(pipeline, lora=(rank, rank, named), variants=frozenset(), seed=0)
    except ValueError as error:
        return [Finding(name="LoRA targets", ok=False, detail=str(error))]
    parameters = policy.parameters()
    layers = {name: name.rsplit(".lora_", 1)[0] for name in parameters}  # of each tensor
    found = {
        (component, target): {layer for layer in layers.values() if _is(layer, component, target)}
        for component in policy.denoisers
        for target in named
    }
    counted = (
        summary(set(layers.values()))
        if targets == "auto"
        else ", ".join(
            f"{target} {sum(len(found[component, target]) for component in policy.denoisers)}" for target in named
        )
    )
    trained = sum(parameter.numel() for parameter in parameters.values())

    gradients = _gradients(pipeline, policy, row, settings)
    idle = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    broken = [name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()]
    reached = {layers[name] for name in parameters.keys() - idle}
    dead = [f"{target} of {component}" for (component, target), own in found.items() if own and not own & reached]
    detail = f"reached {len(parameters) - len(idle)} of {len(parameters)} LoRA tensors"
    if idle:
        detail += f", none those of {_list({layers[name] for name in idle})}"
    if dead:
        detail += f"; no {', no '.join(dead)} would learn: leave it out of the targets"
    if broken:
        detail += f"; not finite in {_list({layers[name] for name in broken})}"
    return [
        Finding(
            name="LoRA targets",
            ok=True,
            detail=f"{'found by auto' if targets == 'auto' else 'layers found'}: {counted}",
        ),
        Finding(name="parameters", ok=True, detail=f"{trained:,} are trained at rank {rank}"),
        Finding(name="gradient", ok=not (dead or broken), detail=detail),
    ]


def _gradients(pipeline: Pipeline, policy: Policy, row: Row, settings: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """The gradient of a random projection of the velocities, summed over the steps, by the names of the parameters."""
    generator = torch.Generator().manual_seed(0)
    parameters = policy.parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            if ".lora_B" in name:  # at its initial 0 no gradient would reach the other factor
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)
    conditioning = prepare_rows(pipeline, [row], **settings)
    device = next(iter(parameters.values())).device
    for index in range(conditioning.schedule.num_steps):
        noise = torch.randn((1, *conditioning.latent_shape), generator=generator)
        probe = torch.randn(noise.shape, generator=generator).to(device)
        latents, started = conditioning.start(noise.to(device, conditioning.latent_dtype))
        velocity = policy.velocity(latents, index, started)
        (velocity.float() * probe).mean().backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


def _is(layer: str, component: str, target: str) -> bool:
    return layer.startswith(f"{component}.") and layer.endswith(f".{target}")


def _list(names: Collection[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(sorted(names)[:_NAMED]) + more
