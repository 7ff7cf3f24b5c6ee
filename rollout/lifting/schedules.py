"""The noise levels that a pipeline's scheduler would have used, read from it once and never asked again.

Schedulers are stateful, which is poison where one transition is evaluated many times: only their tables are read.
Left out: schedulers with several network calls per step (Heun), and levels beyond 1 (the EDM parametrisation).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler

from flowsteer.rollout.types import Schedule

logger = logging.getLogger(__name__)

VARIANCE_PRESERVING = ("epsilon", "v_prediction")
_DDIM = (DDIMScheduler, CogVideoXDDIMScheduler)
_OWN_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def is_variance_preserving(scheduler: Any) -> bool:
    """True for noise or v prediction on a table of ``alphas_cumprod``, false for a flow with ``sigmas`` in [0, 1]."""
    config = scheduler.config
    return config.get("prediction_type") in VARIANCE_PRESERVING and not config.get("use_flow_sigmas", False)


def with_settings(scheduler: Any, settings: Mapping[str, Any]) -> Any:
    """The scheduler with some of its settings changed. Raises ValueError for one that it does not have."""
    if not settings:
        return scheduler
    for name in settings.keys() - scheduler.config.keys():
        near = difflib.get_close_matches(name, scheduler.config, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(scheduler.config))}"
        raise ValueError(f"{type(scheduler).__name__} has no setting {name!r} (model.scheduler); {hint}")
    return type(scheduler).from_config(scheduler.config, **settings)


def steppable(scheduler: Any) -> Any:
    """The scheduler, or for a variance-preserving model the DDIM scheduler over the same noise levels, as DDPO used.

    Source: Black et al. 2023, "Training Diffusion Models with Reinforcement Learning" (arXiv:2305.13301), section 4.
    Raises ValueError where DDIM would not have the same noise levels.
    """
    if not is_variance_preserving(scheduler):
        return scheduler
    if isinstance(scheduler, _DDIM):
        _check_steps(scheduler)
        return scheduler
    own = [name for name in _OWN_LEVELS if scheduler.config.get(name)]
    if own:
        raise ValueError(
            f"{type(scheduler).__name__} with {own[0]}=True has noise levels of its own; train with "
            f"model.scheduler={{{own[0]}: false}}, and draw with the same"
        )
    if "alphas_cumprod" not in vars(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__} predicts {scheduler.config.prediction_type} on noise levels of its own; a flow, or "
            "a table of alphas_cumprod, is needed"
        )
    made: Any = CogVideoXDDIMScheduler if isinstance(scheduler, CogVideoXDPMScheduler) else DDIMScheduler
    ddim: Any = made.from_config(scheduler.config, clip_sample=False, thresholding=False)
    # DeepFloyd IF predicts its variance besides; its pipeline drops that part where the scheduler does not want it
    ddim.register_to_config(variance_type="fixed_small")
    if not torch.equal(ddim.alphas_cumprod, scheduler.alphas_cumprod):
        raise ValueError(
            f"{type(scheduler).__name__} has noise levels that {made.__name__}.from_config does not reproduce; give the "
            "pipeline a DDIM scheduler of its own (pipe.scheduler = ...) before handing it over"
        )
    _check_steps(ddim)
    logger.warning("%s is replaced by %s with the same noise levels", type(scheduler).__name__, made.__name__)
    return ddim


def _check_steps(scheduler: Any) -> None:
    """Raise ValueError for settings under which diffusers' DDIM takes other steps than those that are taken here."""
    config = scheduler.config
    wrong: dict[str, Any] = {}
    if isinstance(scheduler, DDIMScheduler):
        wrong |= {name: False for name in ("clip_sample", "thresholding") if config.get(name)}
    if config.get("timestep_spacing") == "linspace":
        wrong["timestep_spacing"] = "leading"
    for name, instead in wrong.items():
        reason = "steps to other levels than it visits" if instead else "clips what it predicts"
        raise ValueError(
            f"{type(scheduler).__name__} with {name}={config[name]} {reason}; train with "
            f"model.scheduler={{{name}: {str(instead).lower()}}}, and draw with the same"
        )


def read_schedule(scheduler: Any, num_steps: int) -> Schedule:
    """The ``num_steps`` noise levels that ``set_timesteps`` has left in a scheduler.

    Raises ValueError where the levels are not one more than the steps, or do not fall within [0, 1].
    """
    if not hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        raise ValueError(
            f"{type(scheduler).__name__} has a noise schedule of another kind than flows and variance-preserving models have; "
            "give the pipeline a scheduler with sigmas (model.scheduler), or leave it"
        )
    # image-to-image takes the last of the steps
    start = getattr(scheduler, "begin_index", None) or max(len(scheduler.timesteps) - num_steps, 0)
    timesteps = scheduler.timesteps[start : start + num_steps].detach().float().cpu()
    if is_variance_preserving(scheduler):
        return _ddim_schedule(scheduler, timesteps)
    sigma = scheduler.sigmas[start : start + num_steps + 1].detach().float().cpu()
    if rising := bool(scheduler.config.get("invert_sigmas")):
        sigma = 1 - sigma
    name = type(scheduler).__name__
    if len(sigma) != num_steps + 1:
        raise ValueError(f"{name} has {len(sigma)} noise levels for {num_steps} steps; a one-call scheduler is needed")
    if sigma.min() < 0 or sigma.max() > 1 or (sigma.diff() >= 0).any():
        raise ValueError(f"{name} has noise levels {sigma.tolist()}; they must fall, from at most 1 to at least 0")
    return Schedule(sigma=sigma, alpha=1 - sigma, timesteps=timesteps, rising=rising)


def _ddim_schedule(scheduler: Any, timesteps: torch.Tensor) -> Schedule:
    """Alpha = sqrt(abar), sigma = sqrt(1 - abar) (Song et al. 2021, DDIM, arXiv:2010.02502, eq. 4), in float32."""
    abar = scheduler.alphas_cumprod.float().cpu()[timesteps.long()]
    abar = torch.cat([abar, scheduler.final_alpha_cumprod.float().cpu().reshape(1)])  # [T+1]
    return Schedule(
        sigma=(1 - abar) ** 0.5,
        alpha=abar**0.5,
        timesteps=timesteps,
        prediction=scheduler.config.prediction_type,
    )
