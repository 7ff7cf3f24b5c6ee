"""Before the first update nothing has changed; after the last one, the export draws what training saw.

Before the first update every ratio is exactly 1 and every distance exactly 0. These are equalities of bits, not tolerances:
rollout and training run the same function on the same shapes. What breaks them (a step computed in two ways, latents scored
before they are rounded or in another memory layout, a policy that is not put back, a kernel that depends on whether
gradients are wanted) would bias every update and show in no curve.

The cases come from `kernels.KERNELS` and `variants.VARIANTS`, so that a new kernel or algorithm is proved as soon as it exists.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from conftest import Make
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from toy import toy_config
from variants import VARIANTS

from flowsteer.rl.algorithms.flow_grpo import FlowGRPO
from flowsteer.rl.build import build_algorithm, build_plan, build_worker
from flowsteer.rl.check.checks import START
from flowsteer.rl.config import parse_config
from flowsteer.rl.evaluate import evaluate
from flowsteer.rl.export import LORA_FILE, export_lora, load_lora, merge
from flowsteer.rl.policy import Policy
from flowsteer.rl.start import start
from flowsteer.rl.thumbnails import thumbnails
from flowsteer.rl.train import train
from flowsteer.rl.types import Comparison, Facts
from flowsteer.rollout.data.prompts import Prompts
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.steps import kernels
from flowsteer.rollout.steps.plan import all_steps, fixed_steps, no_steps, window
from flowsteer.rollout.types import Rollout
from flowsteer.rollout.worker import RolloutWorker

STEPS, LEVEL = 3, 0.6
MODELS = ("sd3", "sdxl")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
PROMPTS = Prompts(texts=("a red circle", "a blue field", "a dark cloud"))  # of one length: some models do not pad
PLANS = {
    "all": all_steps(STEPS, LEVEL),
    "window": window(STEPS, LEVEL, size=1, strategy="random", seed=3),
    "steps": fixed_steps(STEPS, LEVEL, [1]),
    "none": no_steps(STEPS),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = {"lora": (4, 12, TARGETS), "full": None}
# the export multiplies lora_B by alpha / rank, which is exact for a power of two
DOUBLED = {"doubled": (4, 8, TARGETS)}


def model_for(kernel: str) -> str:
    """The first model of the zoo whose noise schedule the kernel fits."""
    for name in MODELS:
        conditioning = zoo.shared(name).prepare(["a"], num_inference_steps=STEPS, guidance_scale=1.0)
        try:
            kernels.check_kernel(kernel, conditioning.schedule)
        except ValueError:
            continue
        return name
    raise AssertionError(f"no model of this file fits the kernel {kernel!r}; add one to MODELS")


class Case:
    """A model with its policies, and the sampling of it."""

    def __init__(self, model: str, dtype: str, kind: str) -> None:
        self.model, self.dtype = model, DTYPES[dtype]
        self.pipeline: FlowPipeline = zoo.lifted(model, zoo.build(model, self.dtype))
        variants = frozenset({"old", "reference"})
        self.policy = Policy(self.pipeline, lora=(KINDS | DOUBLED)[kind], variants=variants, seed=0)
        self.policy.ready()

    def rollout(self, *, kernel: str, weight: str, plan: str, guided: bool, shared_noise: bool) -> Rollout:
        """One batch: two prompts with groups of two, drawn by the current policy."""
        worker = RolloutWorker(
            self.pipeline,
            PROMPTS,
            plan=PLANS[plan],
            kernel=kernel,
            log_prob_weight=weight,  # type: ignore[arg-type]
            solver="euler",
            num_inference_steps=STEPS,
            guidance_scale=zoo.ZOO[self.model].guided if guided else 1.0,
            prompts_per_step=2,
            group_size=2,
            batch_size=4,
            shared_noise=shared_noise,
            updates_per_rollout=1,
            seed=5,
            num_processes=1,
            process_index=0,
            dtype=self.dtype,
            device="cpu",
        )
        (rollout,) = worker.sample(0)
        return rollout

    @torch.no_grad()
    def disturb(self) -> None:
        """Move the current policy away from the others, as an update would."""
        generator = torch.Generator().manual_seed(1)
        for parameter in self.policy.parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    """Tests are ordered by this fixture, so each model is built once."""
    return Case(*request.param)


def comparison(size: int) -> Comparison:
    advantage = torch.linspace(-1, 1, size)
    return Comparison(score=advantage, advantage=advantage, weight=torch.ones(size))


def flow_grpo(kernel: str, weight: str, rollout: Rollout) -> FlowGRPO:
    assert rollout.trajectory is not None
    facts = Facts(
        kernel=kernel,
        log_prob_weight=weight,  # type: ignore[arg-type]
        num_inference_steps=4,
        num_transitions=len(rollout.trajectory.indices),
        group_size=len(rollout),
        advantage_clip=None,
        seed=0,
        common_indices=False,
        gather=lambda values: values,
    )
    return FlowGRPO(clip_range=1e-4, kl_coef=1.0).bind(facts)


def losses(case: Case, algorithm: Any, *rollouts: Rollout) -> list[tuple[Tensor, dict[str, float]]]:
    """Every loss of some rollouts, and its metrics as means over samples."""
    found = []
    for batch in algorithm.batches(rollouts, [comparison(len(rollout)) for rollout in rollouts], step=0):
        loss, metrics = algorithm.loss(case.policy, batch)
        assert loss.requires_grad
        found.append((loss, {name: float(total) / count for name, (total, count) in metrics.items()}))
    return found


def proof_cases() -> list:
    """(model, dtype, kind), kernel, weight: every kernel in both conventions of its log-density."""
    return [
        pytest.param((model_for(kernel), dtype, kind), kernel, weight, id=f"{kernel}-{weight}-{kind}-{dtype}")
        for kernel in kernels.KERNELS
        for weight in ("gaussian", "variance")
        for dtype in DTYPES
        for kind in KINDS
    ]


@pytest.mark.parametrize(("case", "kernel", "weight"), proof_cases(), indirect=["case"])
def test_ratio_is_one_and_kl_is_zero_before_the_first_update(case: Case, kernel: str, weight: str) -> None:
    stochastic = [name for name, plan in PLANS.items() if plan.num_transitions]
    if weight != "gaussian":  # the convention plays no part in what is drawn when
        stochastic = ["all"]
    for plan, guided, shared_noise in itertools.product(stochastic, (False, True), (False, True)):
        rollout = case.rollout(kernel=kernel, weight=weight, plan=plan, guided=guided, shared_noise=shared_noise)
        found = losses(case, flow_grpo(kernel, weight, rollout), rollout)
        assert len(found) == PLANS[plan].num_transitions
        for _, metrics in found:
            where = f"{plan}, guided={guided}, shared_noise={shared_noise}"
            assert_unmoved(metrics, where)
            assert metrics["kl"] == 0, where


def assert_unmoved(metrics: dict[str, float], where: str) -> None:
    """The policy that is asked is the one that drew."""
    assert metrics["ratio_deviation"] == 0, where  # the mean of |log_prob - old log_prob|: every one of them is equal
    assert metrics["ratio"] == 1, where
    assert metrics["clip_fraction"] == 0, where


@pytest.mark.parametrize("family", [name for name in zoo.ZOO if name not in MODELS])
def test_ratio_is_one_for_every_family(family: str) -> None:
    """Packed latents, guidance in three fashions, two transformers that share the steps, latents of a video."""
    kernel, case = "flow_sde", Case(family, "bfloat16", "lora")
    rollout = case.rollout(kernel=kernel, weight="gaussian", plan="all", guided=True, shared_noise=False)
    for _, metrics in losses(case, flow_grpo(kernel, "gaussian", rollout), rollout):
        assert_unmoved(metrics, family)
        assert metrics["kl"] == 0


@pytest.mark.parametrize(("model", "dtype", "kind"), itertools.product(MODELS, DTYPES, KINDS))
def test_a_moved_policy_is_seen_and_its_own_rollouts_have_ratio_one(model: str, dtype: str, kind: str) -> None:
    """The proof above would also hold for a policy that cannot change, or if the reference were the policy itself."""
    kernel = next(name for name in kernels.KERNELS if model_for(name) == model)
    case = Case(model, dtype, kind)
    settings = {"kernel": kernel, "weight": "gaussian", "plan": "all", "guided": True, "shared_noise": False}
    before = case.rollout(**settings)  # type: ignore[arg-type]
    case.disturb()
    for _, metrics in losses(case, flow_grpo(kernel, "gaussian", before), before):
        assert metrics["ratio_deviation"] > 0
        assert metrics["kl"] > 0
    for denoiser in case.pipeline.denoisers.values():
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    after = case.rollout(**settings)  # type: ignore[arg-type]
    for loss, metrics in losses(case, flow_grpo(kernel, "gaussian", after), after):
        assert_unmoved(metrics, "its own rollout, with gradient checkpointing")
        assert metrics["kl"] > 0
        loss.backward()  # the passes under the reference left the graph whole
    assert any(parameter.grad is not None for parameter in case.policy.parameters().values())


def drawn_and_learned(case: Case, name: str, *, guided: bool) -> tuple[list[Rollout], Any]:
    """A variant's rollouts of one batch, and its algorithm, by the builders of real runs."""
    settings = {
        "num_inference_steps": 4,
        "prompts_per_step": 2,
        "group_size": 2,
        "batch_size": 4,
        "guidance_scale": zoo.ZOO[case.model].guided if guided else 1.0,
    }
    config = toy_config({f"rollout.{key}": value for key, value in settings.items()} | VARIANTS[name])
    data = config.model_dump()
    data["model"]["dtype"] = str(case.dtype).split(".")[1]
    if case.model == "sdxl" and config.algorithm.learns_from == "transitions":
        data["rollout"]["kernel"] = {"name": "ddim", "noise_level": 0.6}
    config = parse_config(data)
    here: Any = SimpleNamespace(gather=lambda x: x, num_teams=1, team_index=0, device=torch.device("cpu"))
    plan = build_plan(config.rollout.plan, config)
    rollouts = build_worker(config, case.pipeline, PROMPTS, plan, here).sample(0)
    return rollouts, build_algorithm(config, plan, here)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param((model, dtype, kind), name, id=f"{name}-{model}-{kind}-{dtype}")
        for model, dtype, kind in itertools.product(MODELS, DTYPES, KINDS)
        for name in VARIANTS
    ],
    indirect=["case"],
)
def test_every_algorithm_starts_where_nothing_has_changed(case: Case, name: str) -> None:
    """Bit for bit; and after a change of the policy no metric stays there."""
    for guided in (False, True):
        rollouts, algorithm = drawn_and_learned(case, name, guided=guided)
        found = losses(case, algorithm, *rollouts)
        assert len(found) == algorithm.passes_per_batch
        for _, metrics in found:
            start_of = {key: value for key, value in metrics.items() if key in START}
            assert start_of == {key: START[key] for key in start_of}, f"guided={guided}"
    kept = [value.detach().clone() for value in case.policy.parameters().values()]
    case.disturb()
    changed = losses(case, algorithm, *rollouts)
    with torch.no_grad():
        for value, before in zip(case.policy.parameters().values(), kept):
            value.copy_(before)
    for (_, after), (_, metrics) in zip(changed, found):
        differ = {key for key in after.keys() & START.keys() - {"clip_fraction"} if after[key] == metrics[key]}
        assert not differ


def test_every_algorithm_has_such_a_metric() -> None:
    """Plain fine-tuning on better samples has none of its own; its variant with a KL has that."""
    proved = {
        overrides["algorithm"]["name"] for name, overrides in VARIANTS.items() if START.keys() & losses_of(name).keys()
    }
    assert proved == {overrides["algorithm"]["name"] for overrides in VARIANTS.values()}


def losses_of(name: str) -> dict[str, float]:
    case = Case("sd3", "float32", "lora")
    rollouts, algorithm = drawn_and_learned(case, name, guided=False)
    return losses(case, algorithm, *rollouts)[0][1]


# --- the export ---------------------------------------------------------------------------------------------------------

SAMPLING = {"num_inference_steps": 4, "guidance_scale": 4.0}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run: what it exported, and the pictures of training's own evaluation, before and after."""

    export: Path
    prompts: tuple[str, ...]  # P
    before: Tensor  # [P, 3, H, W], of the reference policy
    after: Tensor  # [P, 3, H, W], of the trained policy
    exact: bool  # does the export hold the weights without another rounding?


@pytest.fixture(scope="module", params=["lora", "lora, alpha 3 x rank", "full"])
def trained(request: pytest.FixtureRequest, make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two steps, with averaged weights: those are what is evaluated and exported."""
    overrides = {"lora": {"model.lora.alpha": 8}, "full": {"model.lora": None}}.get(request.param, {})  # see DOUBLED
    config = make_config(tmp_path_factory.mktemp("export") / "run", num_steps=2, ema_decay=0.5, **overrides)
    run = start(parse_config(config), quiet=True)
    try:
        train(run)
        pictures, drawn = {}, dict[str, list[Tensor]]()
        for name in ("reference", run.policy.best):
            drawn[name] = []  # as they were drawn: an evaluation keeps 8 bits

            def seen(images: Tensor, name: str = name) -> tuple[Tensor, int]:
                drawn[name].append(images)
                return thumbnails(images)

            with run.policy.using(name), pytest.MonkeyPatch.context() as patch:
                patch.setattr("flowsteer.rl.evaluate.thumbnails", seen)
                pictures[name] = evaluate(
                    run.policy.pipeline,
                    run.worker.prompts,
                    run.scorer.rewards,
                    num_prompts=3,
                    num_seeds=1,
                    batch_size=1,
                    dtype=torch.float32,
                    device="cpu",
                    **SAMPLING,  # type: ignore[arg-type]
                )
        return Trained(
            export=run.export() if request.param == "full" else run.export().parent,
            exact=request.param in ("lora", "full"),
            prompts=pictures["ema"].prompts,
            before=torch.cat(drawn["reference"]),
            after=torch.cat(drawn["ema"]),
        )
    finally:
        run.close()


def draw(pipe: StableDiffusion3Pipeline, prompts: tuple[str, ...]) -> Tensor:
    """The evaluation's pictures, by plain diffusers: seed p for prompt p, one by one as in the evaluation."""
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "max_sequence_length": 32}
    pictures = [
        pipe(prompt, generator=torch.Generator().manual_seed(place), output_type="pt", **SAMPLING, **size).images
        for place, prompt in enumerate(prompts)
    ]
    return torch.cat(pictures)


def test_the_export_draws_in_plain_diffusers_what_training_saw(trained: Trained, tiny_sd3: Path) -> None:
    """Bit for bit: diffusers puts the LoRA on through PEFT, with the forward pass that training used.

    Where alpha / rank is no power of two, lora_B is rounded once more when it is written.

    Training with a LoRA freezes the other weights; a pipeline as loaded does not. Torch multiplies some layers in another
    way if their weight wants a gradient, and a few processors round the two ways differently. So the pipeline is frozen as
    training froze it. Where this processor rounds alike, it also draws the same as loaded.
    """
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    as_loaded, frozen = draw(pipe, trained.prompts), (trained.export / LORA_FILE).exists()
    pipe.transformer.requires_grad_(not frozen)
    assert torch.equal(draw(pipe, trained.prompts), trained.before)
    if frozen:
        pipe.load_lora_weights(trained.export)
        (config,) = pipe.transformer.peft_config.values()
        assert (config.r, config.lora_alpha) == (4, 4)  # alpha is in the weights
    else:
        pipe.transformer = type(pipe.transformer).from_pretrained(trained.export / "transformer")
    pipe.transformer.requires_grad_(not frozen)
    drawn = draw(pipe, trained.prompts)
    assert torch.equal(drawn, trained.after) if trained.exact else (drawn - trained.after).abs().max() < 1e-4
    if torch.equal(as_loaded, trained.before):
        pipe.transformer.requires_grad_(True)
        assert torch.equal(draw(pipe, trained.prompts), drawn)
    assert (trained.after - trained.before).abs().max() > 1e-2  # the comparisons would notice a LoRA that is not there


def test_the_merged_pipeline_draws_what_training_saw(trained: Trained, tiny_sd3: Path, tmp_path: Path) -> None:
    pipe = StableDiffusion3Pipeline.from_pretrained(merge(str(tiny_sd3), trained.export, tmp_path / "merged"))
    # (W + s B A) x instead of W x + s B (A x): other roundings of 6e-8 per operation, some hundred operations deep
    assert (draw(pipe, trained.prompts) - trained.after).abs().max() < 1e-4
    with pytest.raises(ValueError, match="is not empty"):
        merge(str(tiny_sd3), trained.export, tmp_path / "merged")


def test_what_is_no_export_is_refused(tiny_sd3: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds neither pytorch_lora_weights.safetensors nor the folder of a denoiser"
    ):
        merge(str(tiny_sd3), tmp_path, tmp_path / "merged")


def test_both_transformers_of_wan_are_exported_and_loaded(tmp_path: Path) -> None:
    """Diffusers loads a LoRA for the second one from a file of its own."""
    case, latents = Case("wan", "float32", "doubled"), {}
    case.disturb()
    engine = SimpleNamespace(full=torch.Tensor.detach, is_main=True, wait=lambda: None)
    export_lora(case.policy, engine, tmp_path)  # type: ignore[arg-type]
    pipe = zoo.build("wan")
    load_lora(pipe, tmp_path)
    loaded = zoo.lifted("wan", pipe)
    for name, pipeline in (("trained", case.pipeline), ("loaded", loaded)):
        rows = pipeline.prepare(["a cat"], num_inference_steps=4, guidance_scale=1.0)
        noise = torch.randn((1, *rows.latent_shape), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            latents[name] = [pipeline.velocity(noise, index, rows) for index in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(latents["trained"], latents["loaded"]))
    for denoiser in case.pipeline.denoisers:
        (config,) = getattr(pipe, denoiser).peft_config.values()
        assert (config.r, config.lora_alpha) == (4, 4)
