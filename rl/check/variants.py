"""Every algorithm, and the ways of drawing that change what it does, as overrides of a configuration.

Proofs that must hold for all of them are generated from here; `test_every_algorithm.py` refuses an algorithm that is not here.
Values fit both the toy and the tiny models: four or more denoising steps, groups of four or more.
"""

from __future__ import annotations

from typing import Any

NONE = {"rollout.plan": {"name": "none"}}
POOLS = {"rollout.branching": {}, "rollout.plan": {"name": "steps", "indices": [1, 2]}}

VARIANTS: dict[str, dict[str, Any]] = {
    "flow_grpo": {"algorithm": {"name": "flow_grpo", "kl_coef": 0.1, "clip_range": 0.05}},
    "flow_grpo cps": {
        "algorithm": {"name": "flow_grpo", "kl_coef": 0.1, "clip_range": 0.05},
        "rollout.kernel": {"name": "cps", "noise_level": 0.7, "log_prob_weight": "variance"},
    },
    "dance_grpo": {
        "algorithm": {"name": "flow_grpo", "clip_range": 0.05, "transitions_per_sample": 2},
        "rollout.kernel": {"name": "dance_sde", "noise_level": 0.7, "decay": "linear", "keep_budget": False},
        "rollout.shared_noise": True,
        "advantage.best_and_worst": 2,
    },
    "mix_grpo flash": {
        "algorithm": {"name": "flow_grpo", "clip_range": 0.05},
        "rollout.plan": {"name": "window", "strategy": "progressive", "size": 2, "high": 3, "iterations": 1},
        "rollout.solver": "dpmpp_2m",
        "rollout.tail_fraction": 0.5,
    },
    "g2rpo": {
        "algorithm": {"name": "flow_grpo", "clip_range": 0.05, "kl_coef": 0.1},
        **POOLS,
        "rollout.branching": {"granularities": [1, 2]},
    },
    "grpo_guard": {"algorithm": {"name": "grpo_guard", "kl_coef": 0.1, "clip_range": 0.02}},
    "step_dpo": {"algorithm": {"name": "step_dpo", "threshold": 0.0}, **POOLS},
    "step_dpo resampled": {
        "algorithm": {"name": "step_dpo", "threshold": 0.0},
        **POOLS,
        "rollout.branching": {"trunk": "resampled", "finish": "denoised"},
    },
    "pso": {"algorithm": {"name": "pso", "beta": 5.0}},
    "dgpo": {"algorithm": {"name": "dgpo", "noise_levels_per_sample": 2, "beta": 5.0}, **NONE},
    "dgpo old": {
        "algorithm": {
            "name": "dgpo",
            "noise_levels_per_sample": 2,
            "beta": 5.0,
            "reference": "old",
            "old_decay_slope": 0.1,
        },
        **NONE,
    },
    "diffusion_nft": {
        "algorithm": {"name": "diffusion_nft", "noise_levels_per_sample": 2, "kl_coef": 1e-3, "old_decay_slope": 0.1},
        **NONE,
    },
    "awm": {"algorithm": {"name": "awm", "noise_levels_per_sample": 2}, **NONE},
    "awm off-policy": {
        "algorithm": {"name": "awm", "noise_levels_per_sample": 2, "clip_range": 0.1, "weighting": "sigma"},
        **NONE,
    },
    "diffusion_dpo": {"algorithm": {"name": "diffusion_dpo", "noise_levels_per_sample": 2, "beta": 20.0}, **NONE},
    "diffusion_dpo online": {
        "algorithm": {"name": "diffusion_dpo", "noise_levels_per_sample": 2, "beta": 20.0, "refresh_every": 2},
        **NONE,
    },
    "weighted_sft": {"algorithm": {"name": "weighted_sft", "noise_levels_per_sample": 2, "kl_coef": 0.1}, **NONE},
    "weighted_sft exponential": {
        "algorithm": {
            "name": "weighted_sft",
            "noise_levels_per_sample": 2,
            "weights": "exponential",
            "refresh_every": 2,
        },
        **NONE,
    },
}
