"""One set of base weights, several policies: which one answers, what each of them is, and what is trained."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor, nn

from flowsteer.rl.engine.base import prepare
from flowsteer.rl.engine.optimizer import OptimizerSettings
from flowsteer.rl.engine.processes import Processes
from flowsteer.rl.lora import CURRENT
from flowsteer.rl.policy import Policy
from flowsteer.rollout.lifting.pipeline import Conditioning, FlowPipeline

RANK, ALPHA, TARGETS = 4, 12, ("to_q", "to_k", "to_v", "to_out.0")
ALL = frozenset({"old", "reference", "ema"})
KINDS = {"lora": (RANK, ALPHA, TARGETS), "full": None}
INDEX = 1


class Subject:
    """A policy on a pipeline of its own, and one question to ask it."""

    def __init__(self, kind: str, *, variants: frozenset[str] = ALL, ema_decay: float = 0.75) -> None:
        self.kind = kind
        self.pipeline: FlowPipeline = zoo.lifted("sd3")
        self.rows: Conditioning = self.pipeline.prepare(
            ["a red circle", "a cat"], num_inference_steps=3, guidance_scale=4.0
        )
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn((2, *self.rows.latent_shape), generator=generator)
        # asked of the base as of the policies: where a weight wants a gradient, torch multiplies what is not contiguous in
        # one product instead of one per row, which on some processors rounds otherwise (MKL_CBWR=COMPATIBLE shows it)
        for denoiser in self.pipeline.denoisers.values():
            denoiser.requires_grad_(KINDS[kind] is None)
        self.untouched = self.ask()
        self.policy = Policy(self.pipeline, lora=KINDS[kind], variants=variants, seed=0, ema_decay=ema_decay)
        self.policy.ready()

    @torch.no_grad()
    def ask(self, name: str | None = None) -> Tensor:
        """The velocity of a policy; None asks whichever is active."""
        if name is None:
            return self.pipeline.velocity(self.latents, INDEX, self.rows)
        with self.policy.using(name):
            return self.policy.velocity(self.latents, INDEX, self.rows)

    @torch.no_grad()
    def move(self, seed: int) -> None:
        """Change the current policy, as an update would."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.policy.parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)

    def weights(self, name: str) -> dict[str, Tensor]:
        """The weights of a policy that moves, by the names of the current one's."""
        prefix = f"{name}/"
        state = self.policy.state().items()
        return {key[len(prefix) :]: value.clone() for key, value in state if key.startswith(prefix)}


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@pytest.fixture(scope="module")
def lora() -> Subject:
    """For tests that change nothing about it."""
    return Subject("lora")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# --- which policy answers -----------------------------------------------------------------------------------------------


def test_every_policy_starts_as_the_base(subject: Subject) -> None:
    assert subject.policy.names == {"current", "old", "reference", "ema"}
    for name in subject.policy.names:
        assert torch.equal(subject.ask(name), subject.untouched)


def test_the_reference_stays_the_base_bit_for_bit(subject: Subject) -> None:
    subject.move(1)
    current = subject.ask()
    assert (current - subject.untouched).abs().max() > 1e-2
    for _ in range(3):  # copies are exchanged back and forth
        assert torch.equal(subject.ask("reference"), subject.untouched)
        assert torch.equal(subject.ask("old"), subject.untouched)
        assert torch.equal(subject.ask(), current)


def test_using_restores_after_nesting_and_after_errors(subject: Subject) -> None:
    policy = subject.policy
    subject.move(1)
    policy.follow("old", 0.0)
    subject.move(2)
    answers = {name: subject.ask(name) for name in ("current", "old", "reference", "ema")}
    assert not torch.equal(answers["current"], answers["old"])
    assert not torch.equal(answers["old"], answers["reference"])

    before = subject.weights("current")
    with policy.using("old"):
        assert policy.active == "old"
        assert torch.equal(subject.ask(), answers["old"])
        with policy.using("reference"):
            assert torch.equal(subject.ask(), answers["reference"])
            with policy.using("current"):
                assert torch.equal(subject.ask(), answers["current"])
            with policy.using("reference"):
                assert torch.equal(subject.ask(), answers["reference"])
            assert torch.equal(subject.ask(), answers["reference"])
        assert torch.equal(subject.ask(), answers["old"])
        with pytest.raises(RuntimeError, match="out of memory"), policy.using("ema"):
            raise RuntimeError("out of memory")
        assert torch.equal(subject.ask(), answers["old"])
    assert policy.active == "current"
    assert same(subject.weights("current"), before)
    for name, answer in answers.items():
        assert torch.equal(subject.ask(name), answer)


def test_a_policy_that_nobody_asked_for_is_refused(lora: Subject) -> None:
    few = Subject("lora", variants=frozenset({"reference"}))
    with pytest.raises(ValueError, match="there is no policy 'old' in this run, only current, reference"):
        few.ask("old")
    assert few.policy.active == "current"
    assert few.policy.best == "current"
    assert lora.policy.best == "ema"


def test_gradients_reach_the_current_policy_only(subject: Subject) -> None:
    """Also where a pass under the reference stands between forward and backward, as in every loss with a KL."""
    subject.move(1)

    def gradient(*, reference_between: bool) -> list[Tensor]:
        velocity = subject.policy.velocity(subject.latents, INDEX, subject.rows)
        if reference_between:
            subject.ask("reference")
        parameters = [p for p in subject.policy.parameters().values() if p.requires_grad]
        grads = torch.autograd.grad((velocity**2).mean(), parameters, allow_unused=True)
        return [torch.zeros(1) if grad is None else grad for grad in grads]

    plain, between = gradient(reference_between=False), gradient(reference_between=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, between))
    velocity = subject.policy.velocity(subject.latents, INDEX, subject.rows)
    (velocity**2).mean().backward()
    trained = {id(parameter) for parameter in subject.policy.parameters().values()}
    for parameter in every_parameter(subject.policy):
        assert id(parameter) in trained or parameter.grad is None


# --- following ----------------------------------------------------------------------------------------------------------


def test_follow_copies_at_decay_0_and_mixes_otherwise(subject: Subject) -> None:
    start = subject.weights("current")
    subject.move(1)
    moved = subject.weights("current")
    subject.policy.follow("old", 0.0)
    assert same(subject.weights("old"), moved)
    assert torch.equal(subject.ask("old"), subject.ask("current"))

    subject.policy.follow("ema", 0.75)
    for key, value in subject.weights("ema").items():
        expected = 0.75 * start[key].double() + 0.25 * moved[key].double()
        torch.testing.assert_close(value.double(), expected, rtol=2e-7, atol=2e-7)  # float32's two roundings
    assert same(subject.weights("current"), moved)


def test_old_and_ema_follow_when_they_are_told(subject: Subject) -> None:
    policy, start = subject.policy, subject.weights("current")
    subject.move(1)
    policy.updated(1)  # after an optimiser update
    assert same(subject.weights("old"), start)
    assert not same(subject.weights("ema"), start)
    policy.follow_old(0.0)  # after a training step
    assert same(subject.weights("old"), subject.weights("current"))


def test_the_average_is_faster_at_first_and_moves_when_due() -> None:
    """After n updates min((1 + n) / (10 + n), decay), and only at every second update: 3/12 at 2, 5/14 at 4, then 0.4."""
    subject = Subject("lora", ema_decay=0.4)
    subject.policy.ema_ramp, subject.policy.ema_every = True, 2
    expected = {key: value.double() for key, value in subject.weights("ema").items()}
    for number in range(1, 9):
        subject.move(number)
        subject.policy.updated(number)
        decay = {2: 3 / 12, 4: 5 / 14, 6: 0.4, 8: 0.4}.get(number, 1.0)
        now = subject.weights("current")
        expected = {key: decay * value + (1 - decay) * now[key].double() for key, value in expected.items()}
    for key, value in subject.weights("ema").items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-6, atol=1e-6)


def test_the_averaged_policy_keeps_so_much_of_itself_at_each_update() -> None:
    """Unlike 0.5, a decay of 0.9 tells what stays from what is added."""
    subject = Subject("lora", ema_decay=0.9)
    expected = {key: value.double() for key, value in subject.weights("ema").items()}
    for seed in (1, 2):
        subject.move(seed)
        subject.policy.updated(seed)
        now = subject.weights("current")
        expected = {key: 0.9 * value + 0.1 * now[key].double() for key, value in expected.items()}
    for key, value in subject.weights("ema").items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-6, atol=1e-6)


def test_policies_that_are_not_there_need_not_follow() -> None:
    few = Subject("lora", variants=frozenset())
    few.policy.updated(1)
    few.policy.follow_old(0.0)
    assert few.policy.names == {"current"}


# --- the state of a restart ---------------------------------------------------------------------------------------------


def test_state_is_everything_that_moves(subject: Subject) -> None:
    subject.move(1)
    subject.policy.follow("ema", 0.75)
    kept = {key: value.clone() for key, value in subject.policy.state().items()}
    assert {key.split("/")[0] for key in kept} == {"current", "old", "ema"}
    other = Subject(subject.kind)
    other.policy.load_state(kept)
    for name in subject.policy.names:
        assert torch.equal(other.ask(name), subject.ask(name))
    del kept[next(iter(kept))]
    with pytest.raises(ValueError, match="belong to another model or other LoRA settings"):
        other.policy.load_state(kept)


# --- what is trained ----------------------------------------------------------------------------------------------------

# Stable Diffusion 3's last block throws its context stream away: what only feeds that stream gets no gradient.
DEAD = {"transformer.transformer_blocks.1.attn.add_q_proj"}
EVERY_ATTENTION = (*TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def test_every_lora_tensor_gets_a_gradient_except_the_dead_ones() -> None:
    pipeline = zoo.lifted("sd3")
    policy = Policy(pipeline, lora=(RANK, ALPHA, EVERY_ATTENTION), variants=frozenset({"old"}), seed=0)
    with torch.no_grad():  # B starts at 0, and with it the gradient of A
        for parameter in policy.parameters().values():
            parameter += 0.05
    rows = pipeline.prepare(["a red circle"], num_inference_steps=3, guidance_scale=4.0)
    latents = torch.randn((1, *rows.latent_shape), generator=torch.Generator().manual_seed(0))
    policy.velocity(latents, INDEX, rows).square().mean().backward()
    without = {
        name.split(".lora_")[0]
        for name, parameter in policy.parameters().items()
        if parameter.grad is None or not parameter.grad.any()
    }
    assert without == DEAD
    assert len(policy.parameters()) == 2 * (8 + 7)  # A and B; the last block has no to_add_out at all


def every_parameter(policy: Policy) -> list[nn.Parameter]:
    return [parameter for denoiser in policy.denoisers.values() for parameter in denoiser.parameters()]


def test_averages_do_not_stand_still_where_the_engine_made_the_adapters_bfloat16() -> None:
    """0.9 * 0.02 + 0.1 * 0.0206 rounds to 0.02 in bfloat16: an average kept there would never move."""
    pipeline = zoo.lifted("sd3", zoo.build("sd3", torch.bfloat16))
    policy = Policy(pipeline, lora=(2, 2, ("to_q",)), variants=frozenset({"old"}), seed=0, ema_decay=0.9)
    for parameter in every_parameter(policy):
        parameter.data = parameter.data.bfloat16()  # what deepspeed.initialize does
    with torch.no_grad():
        for name in ("current", "old"):
            for parameter in policy._variants.parts(name):
                parameter.fill_(0.02)
        policy.ready()
        for parameter in policy.parameters().values():
            parameter.fill_(0.0206)
    for _ in range(100):
        policy.follow("old", 0.9)
    for mine, current in zip(policy._variants.parts("old"), policy._variants.parts("current")):
        assert torch.equal(mine, current)
    kept = {key: value.clone() for key, value in policy.state().items()}
    assert {value.dtype for key, value in kept.items() if key.startswith("old/")} == {torch.float32}
    policy.follow("old", 0.0)
    policy.load_state(kept)
    assert all(torch.equal(value, kept[key]) for key, value in policy.state().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_restart_brings_back_the_live_policies_where_averages_are_tensors_of_their_own(kind: str) -> None:
    """In bfloat16 the float32 averages are restored, and the policies that draw and are evaluated must be, too."""

    def fresh() -> Policy:
        pipeline = zoo.lifted("sd3", zoo.build("sd3", torch.bfloat16))
        policy = Policy(pipeline, lora=KINDS[kind], variants=frozenset({"old", "ema"}), seed=0, ema_decay=0.5)
        for parameter in every_parameter(policy):
            parameter.data = parameter.data.bfloat16()  # what deepspeed.initialize does
        policy.ready()
        return policy

    def live(policy: Policy) -> dict[str, list[Tensor]]:
        found = {}
        for name in ("current", "old", "ema"):
            with policy.using(name):
                found[name] = [value.clone() for value in policy._variants.parts(CURRENT if kind == "full" else name)]
        return found

    unbroken, start = fresh(), live(fresh())
    with torch.no_grad():
        for parameter in unbroken.parameters().values():
            parameter += 0.05
    unbroken.updated(1)
    unbroken.follow_old(0.25)
    resumed = fresh()
    resumed.load_state({key: value.clone() for key, value in unbroken.state().items()})
    for name, values in live(unbroken).items():
        assert not all(torch.equal(value, first) for value, first in zip(values, start[name]))
        assert all(torch.equal(mine, value) for mine, value in zip(live(resumed)[name], values))


def test_the_optimiser_sees_exactly_the_current_policy(subject: Subject) -> None:
    settings = OptimizerSettings(
        learning_rate=1e-2,
        schedule="constant",
        warmup_updates=0,
        total_updates=1,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        epsilon=1e-8,
        max_grad_norm=1.0,
    )
    engine = prepare(
        Processes(cpu=True, timeout_s=60),
        subject.policy,
        settings,
        strategy="plain",
        dtype=torch.float32,
        batch_size=2,
        batches=1,
        passes_per_batch=1,
    )
    wanted = {id(parameter) for parameter in subject.policy.parameters().values()}
    given = [id(parameter) for group in engine.backend.param_groups for parameter in group["params"]]
    assert len(given) == len(set(given))
    assert set(given) == wanted
    assert wanted == {id(parameter) for parameter in every_parameter(subject.policy) if parameter.requires_grad}

    before = {name: subject.weights(name) for name in ("current", "old")}
    engine.backward(subject.policy.velocity(subject.latents, INDEX, subject.rows).square().mean())
    assert not same(subject.weights("current"), before["current"])
    assert same(subject.weights("old"), before["old"])
    assert torch.equal(subject.ask("reference"), subject.untouched)
    engine.close()


def test_a_lora_is_named_and_shaped_as_asked(lora: Subject) -> None:
    parameters = lora.policy.parameters()
    assert len(parameters) == 2 * 2 * len(TARGETS)  # two blocks, A and B
    assert all(parameter.dtype == torch.float32 for parameter in parameters.values())
    assert parameters["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (RANK, 32)
    assert parameters["transformer.transformer_blocks.1.attn.to_out.0.lora_B.weight"].shape == (32, RANK)


def test_adapters_stay_in_float32_on_a_half_precision_model() -> None:
    """An update of 1e-4 on a weight of 1 would be lost in bfloat16, which has 8 bits."""
    pipeline = zoo.lifted("sd3", zoo.build("sd3", torch.bfloat16))
    policy = Policy(pipeline, lora=KINDS["lora"], variants=ALL, seed=0)
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters().values())
    assert all(value.dtype == torch.float32 for value in policy.state().values())


def test_the_seed_decides_the_initial_adapter() -> None:
    def first(seed: int) -> Tensor:
        policy = Policy(zoo.lifted("sd3"), lora=KINDS["lora"], variants=frozenset({"old"}), seed=seed)
        return policy.parameters()["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].detach()

    state = torch.get_rng_state()
    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator was left alone


def test_targets_that_match_nothing_are_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"model\.lora\.targets: 'to_x', 'q' match no linear layer") as error:
        Policy(zoo.lifted("sd3"), lora=(RANK, ALPHA, ("to_q", "to_x", "q")), variants=frozenset(), seed=0)
    for ending in ("to_q", "to_out.0", "add_k_proj", "net.2", "proj_out"):
        assert ending in str(error.value)
