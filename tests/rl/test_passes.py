"""Cheaper passes: adapters in the type of the base, checkpointed and compiled blocks, attention by name, merged adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

from flowsteer.rl.config import check_config, parse_config
from flowsteer.rl.lora import CURRENT
from flowsteer.rl.passes import repeated_blocks, set_passes
from flowsteer.rl.policy import Policy
from flowsteer.rl.run import Run
from flowsteer.rl.start import start
from flowsteer.rollout.lifting.pipeline import FlowPipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SETTINGS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 1.0}


def policy_of(family: str = "sd3", *, dtype: torch.dtype = torch.float32, **more: Any) -> Policy:
    """A policy with a LoRA that has moved away from zero, so that it counts."""
    pipeline = FlowPipeline(zoo.build(family).to(dtype), height=16, width=16, call_kwargs={"max_sequence_length": 16})
    policy = Policy(pipeline, lora=(4, 8, TARGETS), variants=frozenset({"reference", "old"}), seed=0, **more)
    policy.ready()
    return policy


def move(policy: Policy, name: str = CURRENT, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy._variants.parameters(name).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def state_of(policy: Policy) -> tuple[Tensor, Any]:
    """Latents [2, *X] and two rows."""
    pipeline: Any = policy.pipeline
    rows = pipeline.prepare(["a red circle", "the sea"], **SETTINGS)
    noise = torch.randn((2, *rows.latent_shape), generator=torch.Generator().manual_seed(0))
    return noise.to(rows.latent_dtype), rows


def gradients(policy: Policy) -> list[Tensor]:
    latents, rows = state_of(policy)
    policy.velocity(latents, 1, rows).float().square().mean().backward()
    found = [parameter.grad for parameter in policy.parameters().values()]
    for parameter in policy.parameters().values():
        parameter.grad = None
    return [value for value in found if value is not None]


# ---- adapters in the type of the base


def kept_bytes(policy: Policy) -> dict[torch.dtype, int]:
    """Bytes that a pass keeps for its backward pass, each storage once."""
    found: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        found[value.untyped_storage().data_ptr()] = value
        return value

    latents, rows = state_of(policy)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = policy.velocity(latents, 1, rows)
    sizes: dict[torch.dtype, int] = {}
    for value in found.values():
        sizes[value.dtype] = sizes.get(value.dtype, 0) + value.untyped_storage().nbytes()
    del output
    return sizes


def test_a_narrow_base_has_no_wide_copies_of_its_activations() -> None:
    policy = policy_of(dtype=torch.bfloat16)
    move(policy)
    narrow = kept_bytes(policy)
    layers: Any = policy._variants
    for layer in layers._layers:  # as PEFT computes it
        layer.cast_input_dtype_enabled = True
    wide = kept_bytes(policy)
    assert sum(narrow.values()) < sum(wide.values())
    assert narrow[torch.float32] < 0.75 * wide[torch.float32]  # its norms keep some, too


def test_its_gradients_are_float32_and_about_those_of_a_wide_base() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy = policy_of(dtype=dtype)
        move(policy)
        found[dtype] = gradients(policy)
    assert {value.dtype for value in found[torch.bfloat16]} == {torch.float32}
    wide, narrow = (torch.cat([value.flatten() for value in found[dtype]]) for dtype in found)
    assert torch.nn.functional.cosine_similarity(wide, narrow, dim=0) > 0.99


def test_a_float32_base_computes_the_same_bits_as_peft_alone() -> None:
    policy = policy_of()
    move(policy)
    latents, rows = state_of(policy)
    with torch.no_grad():
        ours = policy.velocity(latents, 1, rows)
        layers: Any = policy._variants
        for layer in layers._layers:
            layer.cast_input_dtype_enabled = True
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.__class__ = nn.Linear
        assert torch.equal(policy.velocity(latents, 1, rows), ours)


# ---- checkpointing


@contextmanager
def counting(policy: Policy) -> Iterator[list[nn.Module]]:
    """The repeated blocks' passes, in order."""
    made: list[nn.Module] = []
    blocks = [block for denoiser in policy.denoisers.values() for block in repeated_blocks(denoiser)]
    hooks = [block.register_forward_pre_hook(lambda block, _: made.append(block)) for block in blocks]
    yield made
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("every", "again"), [(None, 0), (1, 2), (2, 1)])
def test_so_many_blocks_are_computed_again_with_the_same_gradients(every: int | None, again: int) -> None:
    plain, policy = policy_of(), policy_of()
    set_passes(policy.denoisers, checkpoint_every=every)
    for own in (plain, policy):
        move(own)
    with counting(policy) as made:
        found = gradients(policy)
    blocks = [block for denoiser in policy.denoisers.values() for block in repeated_blocks(denoiser)]
    assert len(made) == len(blocks) + again
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(plain), strict=True))


def test_other_choices_of_blocks_are_refused(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give true, false, or \{every: NUMBER\}"):
        parse_config(make_config(tmp_path, **{"model.gradient_checkpointing": {"every": 0}}))


# ---- attention


def test_attention_goes_by_name() -> None:
    policy = policy_of("flux")
    latents, rows = state_of(policy)
    with torch.no_grad():
        before = policy.velocity(latents, 1, rows)
        set_passes(policy.denoisers, attention="_native_math")
        after = policy.velocity(latents, 1, rows)
    used = {layer.processor._attention_backend.value for layer in policy.denoisers["transformer"].modules()
            if hasattr(getattr(layer, "processor", None), "_attention_backend")}  # fmt: skip
    assert used == {"_native_math"}
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name", "said"),
    [
        ("flux", "flesh", "model.attention=flesh is not known to diffusers; it has flash, "),
        ("flux", "sage", "model.attention=sage is for inference: no gradient comes through it"),
        ("flux", "_flash_3", "model.attention=_flash_3 cannot be used here by transformer: Flash Attention 3 backend"),
        ("sd3", "native", "the attention of transformer, a SD3Transformer2DModel, takes no back-end of diffusers"),
    ],
)
def test_attention_that_cannot_be_used_is_refused(family: str, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        set_passes(policy_of(family).denoisers, attention=name)


@pytest.mark.parametrize("asked", [{"attention": "native"}, {"compiled": True}, {"checkpoint_every": 1}])
def test_a_network_that_is_not_diffusers_s_is_left_alone(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"is for diffusers' networks; mine of model.adapter is a Linear"):
        set_passes({"mine": nn.Linear(2, 2)}, **asked)


# ---- merged adapters


@pytest.mark.parametrize("name", [CURRENT, "old"])
def test_a_merged_adapter_predicts_the_same_and_leaves_no_trace(name: str) -> None:
    policy = policy_of()
    move(policy)
    move(policy, "old", seed=2)
    latents, rows = state_of(policy)
    bits = {key: value.clone() for key, value in policy.denoisers["transformer"].state_dict().items()}
    with torch.no_grad(), policy.using(name):
        apart = policy.velocity(latents, 1, rows)
        with policy.merged():
            layers: Any = policy._variants
            assert all(layer.disable_adapters for layer in layers._layers)
            within = policy.velocity(latents, 1, rows)
        assert torch.equal(policy.velocity(latents, 1, rows), apart)
    torch.testing.assert_close(within, apart, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), policy.using("reference"):
        assert (policy.velocity(latents, 1, rows) - apart).abs().max() > 100 * (within - apart).abs().max()
    assert all(torch.equal(bits[key], value) for key, value in policy.denoisers["transformer"].state_dict().items())


def test_a_convolution_is_merged_and_an_error_leaves_the_base_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1))
    policy = Policy(
        SimpleNamespace(denoisers={"net": network}),  # type: ignore[arg-type]
        lora=(2, 4, ("0", "1")), variants=frozenset(), seed=0,
    )  # fmt: skip
    policy.ready()
    move(policy)
    bits = {key: value.clone() for key, value in network.state_dict().items()}
    pixels = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = network(pixels)
        with policy.merged():
            torch.testing.assert_close(network(pixels), apart)
        with pytest.raises(RuntimeError, match="out of memory"), policy.merged():
            raise RuntimeError("out of memory")
        assert torch.equal(network(pixels), apart)
    assert all(torch.equal(bits[key], value) for key, value in network.state_dict().items())


def test_a_run_draws_with_merged_adapters_and_trains_without(make_config: Any, tmp_path: Path) -> None:
    more = {
        "algorithm": {"name": "diffusion_nft", "kl_coef": 0.1, "noise_levels_per_sample": 2},
        "rollout.plan": {"name": "none"},
    }
    run = start(parse_config(make_config(tmp_path / "run", **more, **{"rollout.merge_lora": True})), quiet=True)
    seen: list[bool] = []
    layers: Any = run.policy._variants
    layers._layers[0].register_forward_hook(lambda layer, *_: seen.append(layer.disable_adapters))
    first = one_step(run, 0)
    assert (first["kl"], first["old_distance"]) == (0, 0)
    drawn = len(run.worker.batches(0)) * 4
    assert all(seen[:drawn])
    assert not all(seen[drawn:])
    run.close()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "algorithm.name=flow_grpo compares the density of each step with the one that drew it"),
        ({"model.lora": None}, "rollout.merge_lora=true has no LoRA to merge"),
        ({"engine.strategy": "zero3"}, "rollout.merge_lora=true needs whole weights on every process"),
        ({"model.quantize": "nf4"}, "cannot add to weights of model.quantize=nf4"),
    ],
)
def test_what_cannot_be_merged_is_refused(make_config: Any, tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        check_config(parse_config(make_config(tmp_path, **{"rollout.merge_lora": True}, **given)), 1)


# ---- compiled blocks


def one_step(run: Run, step: int) -> dict[str, float]:
    """A training step and its metrics."""
    with run.policy.using(run.algorithm.acting):
        rollouts = run.worker.sample(step, policy_version=run.engine.num_updates, done=run.scorer.submit)
    comparisons, _ = run.compare(rollouts, run.scorer.collect(), run.engine.gather)
    for batch in run.algorithm.batches(rollouts, comparisons, step):
        loss, metrics = run.algorithm.loss(run.policy, batch)
        run.meter.add(metrics)
        run.meter.add_update(run.engine.backward(loss))
    run.policy.follow_old(run.algorithm.old_decay(run.engine.num_updates))
    return run.meter.finish(run.engine)


def test_compiled_policies_share_the_graph_of_training() -> None:
    """Whatever is active, the trained adapter's layers compute, with gradients; and what it held comes back."""
    policy = policy_of(compiled=True)
    plain = policy_of()
    for own in (policy, plain):
        move(own)
        move(own, "old", seed=2)
    latents, rows = state_of(policy)
    modes: list[tuple[bool, bool, list[str]]] = []
    layers: Any = policy._variants
    layers._layers[0].register_forward_hook(
        lambda layer, *_: modes.append((torch.is_grad_enabled(), layer.disable_adapters, list(layer.active_adapters)))
    )
    for name in (CURRENT, "old", "reference", CURRENT):
        with torch.no_grad(), policy.using(name), plain.using(name):
            velocity = policy.velocity(latents, 1, rows)
            assert torch.equal(velocity, plain.velocity(latents, 1, rows))
            assert not velocity.requires_grad
    assert modes == [(True, False, [CURRENT])] * 4


@pytest.fixture
def gradient_modes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether gradients were enabled in each pass of a block that is to be compiled, and is not."""
    modes: list[bool] = []

    def compiled(self: nn.Module, **_: Any) -> None:
        self.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))

    monkeypatch.setattr(nn.Module, "compile", compiled)
    return modes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [True, False])
def test_compiled_runs_begin_at_ratio_1(
    make_config: Any, tmp_path: Path, dtype: str, checkpointing: bool, lora: bool
) -> None:
    """With the compiler of this machine, whose graphs round differently with and without gradients."""
    more: dict[str, Any] = {"model.dtype": dtype, "model.gradient_checkpointing": checkpointing, "model.compile": True}
    if not lora:
        more |= {"model.lora": None, "engine.strategy": "plain" if dtype == "float32" else "zero1"}
    run = start(parse_config(make_config(tmp_path / "run", **more, **{"algorithm.updates_per_rollout": 1})), quiet=True)
    first, second = one_step(run, 0), one_step(run, 1)
    run.close()
    assert (first["ratio"], first["ratio_deviation"], first["kl"]) == (1, 0, 0)
    assert (second["ratio"], second["ratio_deviation"]) == (1, 0)
    assert second["kl"] > 0


def test_the_steps_of_a_ratio_are_drawn_by_the_graph_of_training(
    make_config: Any, tmp_path: Path, gradient_modes: list[bool]
) -> None:
    plan = {"name": "steps", "indices": [1]}
    config = make_config(
        tmp_path / "run", **{"model.compile": True, "rollout.plan": plan, "algorithm.updates_per_rollout": 1}
    )
    run = start(parse_config(config), quiet=True)
    gradient_modes.clear()
    with run.policy.using(run.algorithm.acting):
        (rollout, *_) = run.worker.rollouts(run.worker.batches(0)[0], 0, 0)
    blocks = sum(len(repeated_blocks(denoiser)) for denoiser in run.policy.denoisers.values())
    assert gradient_modes == [index == 1 for index in range(4) for _ in range(blocks)]
    assert rollout.trajectory is not None
    assert not rollout.latents.requires_grad
    assert not rollout.trajectory.log_prob.requires_grad
    run.close()


def test_compiled_weights_must_be_whole(make_config: Any, tmp_path: Path) -> None:
    given = {"model.compile": True, "engine.strategy": "zero3"}
    with pytest.raises(ValueError, match=r"model\.compile=true needs whole weights on every process"):
        check_config(parse_config(make_config(tmp_path, **given)), 1)
