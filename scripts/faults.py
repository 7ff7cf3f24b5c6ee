"""Known faults of this field, for `scripts/mutate.py`: a replacement of source text each, and the tests that should fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, where it is planted, and the tests that are asked."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str


FAULTS = (
    Fault(
        name="schedule shifted by one step",
        file="rollout/steps/kernels.py",
        right="    return values[index].item(), values[index + 1].item()",
        wrong="    return values[max(index - 1, 0)].item(), values[index].item()",
        tests="tests/rollout/test_kernels.py",
    ),
    Fault(
        name="dropped noise term",
        file="rollout/steps/kernels.py",
        right="    return (gaussian.mean + gaussian.std * noise.to(gaussian.mean.dtype)).to(dtype)",
        wrong="    return gaussian.mean.to(dtype)",
        tests="tests/rollout/test_kernels.py tests/rollout/test_sample.py",
    ),
    Fault(
        name="scored before it is rounded",
        file="rollout/sample.py",
        right="            log_prob = kernels.log_prob(gaussian, next_latents, weight=log_prob_weight)",
        wrong="            log_prob = kernels.log_prob(\n"
        "                gaussian,\n"
        "                kernels.draw(gaussian, stream_noise(seeds, index, shape).to(device), torch.float32),\n"
        "                weight=log_prob_weight,\n"
        "            )",
        tests="tests/whole/test_proofs.py -k ratio_is_one_and",
    ),
    Fault(
        name="deviation without the step's length",
        file="rollout/steps/kernels.py",
        right="        std=diffusion * math.sqrt(dt),",
        wrong="        std=diffusion,",
        tests="tests/rollout/test_kernels.py",
    ),
    Fault(
        name="swapped sign of the advantage",
        file="rl/algorithms/losses.py",
        right="    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio",
        wrong="    return torch.maximum(advantage * ratio, advantage * clipped), ratio",
        tests="tests/rl/test_algorithms.py tests/rl/test_every_algorithm.py",
    ),
    Fault(
        name="optimistic clipping",
        file="rl/algorithms/losses.py",
        right="    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio",
        wrong="    return torch.minimum(-advantage * ratio, -advantage * clipped), ratio",
        tests="tests/rl/test_algorithms.py",
    ),
    Fault(
        name="swapped sign of a preference",
        file="rl/algorithms/step_dpo.py",
        right="(win - lose).float()",
        wrong="(lose - win).float()",
        tests="tests/rl/test_losses.py tests/rl/test_every_algorithm.py -k step_dpo",
    ),
    Fault(
        name="KL under no_grad",
        file="rl/algorithms/transitions.py",
        right="kernels.kl(terms.current, terms.reference)",
        wrong="kernels.kl(terms.current, terms.reference).detach()",
        tests="tests/rl/test_algorithms.py",
    ),
    Fault(
        name="anchor of AWM under no_grad",
        file="rl/algorithms/forward.py",
        right="name: matching_loss(terms.prediction, terms.others[name])",
        wrong="name: matching_loss(terms.prediction.detach(), terms.others[name])",
        tests="tests/rl/test_losses.py tests/rl/test_every_algorithm.py -k awm",
    ),
    Fault(
        name="deviation over the wrong axis: all groups together",
        file="rl/advantage.py",
        right="        scale = stats.deviation(ddof)[stats.row_group] + epsilon  # [N]",
        wrong="        scale = stats.global_deviation(ddof) + epsilon",
        tests="tests/rl/test_advantage.py",
    ),
    Fault(
        name="window drawn per process",
        file="rollout/steps/plan.py",
        right="            return self.choices[mix(self.seed, step) % len(self.choices)]",
        wrong="            return self.choices[mix(self.seed, step, id(self)) % len(self.choices)]",
        tests="tests/rollout/test_plan.py tests/rollout/test_sample.py",
    ),
    Fault(
        name="tied group turned into a pair",
        file="rl/algorithms/pairs.py",
        right=" and gap > threshold and float(score[best]) > float(score[worst])",
        wrong="",
        tests="tests/rl/test_losses.py tests/rl/test_every_algorithm.py",
    ),
    Fault(
        name="adapter not restored",
        file="rl/policy.py",
        right="            self._variants.switch(name, before)\n            self.active = before",
        wrong="            self.active = before",
        tests="tests/rl/test_policy.py",
    ),
    Fault(
        name="noise of DGPO not shared in the group",
        file="rl/algorithms/dgpo.py",
        right="torch.tensor([mix(self.facts.seed, step, group) for group in rollout.group.tolist()])",
        wrong="rollout.seeds",
        tests="tests/rl/test_losses.py",
    ),
    Fault(
        name="group of DGPO summed on one process only",
        file="rl/algorithms/dgpo.py",
        right="    return (same * facts.gather(values)[None]).sum(1)",
        wrong="    return (same[:, : len(values)] * values[None]).sum(1)",
        tests="tests/rl/test_losses.py",
    ),
    Fault(
        name="pair noised with two noises",
        file="rl/algorithms/forward.py",
        right="noise_from=pairs.win.repeat(2)",
        wrong="noise_from=pairs.sides()",
        tests="tests/rl/test_losses.py",
    ),
    Fault(
        name="negative policy of NFT is the positive one",
        file="rl/algorithms/diffusion_nft.py",
        right="denoise((1 + beta) * old - beta * velocity)",
        wrong="denoise(beta * velocity + (1 - beta) * old)",
        tests="tests/rl/test_algorithms.py tests/rl/test_every_algorithm.py -k nft",
    ),
    Fault(
        name="winner becomes the trunk's next state",
        file="rollout/branches.py",
        right="own[mix(seed, _CHOICE_STREAM, index) % len(own)]",
        wrong="own[0]",
        tests="tests/rollout/test_branches.py",
    ),
    Fault(
        name="bias of the ratio left in GRPO-Guard",
        file="rl/algorithms/grpo_guard.py",
        right="(step.log_prob - step.old_log_prob + step.kl_to_old)",
        wrong="(step.log_prob - step.old_log_prob)",
        tests="tests/rl/test_losses.py",
    ),
    Fault(
        name="compressed tail ends before the data",
        file="rollout/types.py",
        right="        ends = [*visited, self.num_steps]",
        wrong="        ends = [*visited, self.num_steps - 1]",
        tests="tests/rollout/test_branches.py",
    ),
    Fault(
        name="compressed tail steps along the whole schedule",
        file="rollout/sample.py",
        right="SOLVERS[solver](velocity, latents, walk, place, history)",
        wrong="SOLVERS[solver](velocity, latents, schedule, index, history)",
        tests="tests/rollout/test_sample.py",
    ),
    Fault(
        name="GDPO without its second normalisation",
        file="rl/compare.py",
        right='over_step=combine == "gdpo"',
        wrong="over_step=False",
        tests="tests/rl/test_algorithms.py",
    ),
    Fault(
        name="KL of DGPO under no_grad",
        file="rl/algorithms/forward.py",
        right="name: matching_loss(terms.prediction, terms.others[name])",
        wrong="name: matching_loss(terms.prediction.detach(), terms.others[name])",
        tests="tests/rl/test_every_algorithm.py -k dgpo",
    ),
    Fault(
        name="a missing score counts as zero",
        file="rl/advantage.py",
        right="        self.scored = torch.isfinite(scores)  # [N]",
        wrong="        scores = scores.nan_to_num(0.0)\n        self.scored = torch.isfinite(scores)",
        tests="tests/rl/test_advantage.py",
    ),
    Fault(
        name="old policy follows by the wrong part",
        file="rl/policy.py",
        right="average.lerp_(current.float(), 1 - decay)",
        wrong="average.lerp_(current.float(), decay)",
        tests="tests/rl/test_policy.py",
    ),
    Fault(
        name="granularities summed without their weights",
        file="rl/algorithms/transitions.py",
        right="(weights * advantages).sum(0) / weight.clamp(min=1e-12)",
        wrong="advantages.sum(0)",
        tests="tests/rl/test_losses.py",
    ),
    Fault(
        name="Diffusion-DPO without its reference",
        file="rl/algorithms/diffusion_dpo.py",
        right='        win, lose = (terms.error() - terms.error("old")).chunk(2)',
        wrong="        win, lose = terms.error().chunk(2)",
        tests="tests/rl/test_losses.py tests/rl/test_every_algorithm.py -k dpo",
    ),
    Fault(
        name="winner and loser of PSO swapped",
        file="rl/algorithms/pso.py",
        right="self.beta * (win - lose)",
        wrong="self.beta * (lose - win)",
        tests="tests/rl/test_losses.py tests/rl/test_every_algorithm.py -k pso",
    ),
    Fault(
        name="GRPO-Guard without the step's length",
        file="rl/algorithms/grpo_guard.py",
        right="loss=loss / step.length",
        wrong="loss=loss",
        tests="tests/rl/test_losses.py",
    ),
    Fault(
        name="the current policy draws what the old one should",
        file="rl/train.py",
        right="policy.using(algorithm.acting)",
        wrong='policy.using("current")',
        tests="tests/rl/test_train.py",
    ),
    Fault(
        name="the old policy stays behind",
        file="rl/train.py",
        right="            policy.follow_old(algorithm.old_decay(engine.num_updates))",
        wrong="            pass",
        tests="tests/rl/test_train.py",
    ),
    Fault(
        name="old policy of AWM as far behind as can be",
        file="rl/algorithms/forward.py",
        right="min(slope * max(num_updates, 0), most)",
        wrong="max(slope * max(num_updates, 0), most)",
        tests="tests/rl/test_losses.py",
    ),
    Fault(
        name="noise levels of AWM without strata",
        file="rl/algorithms/awm.py",
        right="levels.stratified(",
        wrong="levels.spread(",
        tests="tests/rl/test_losses.py",
    ),
    Fault(
        name="contrast of NFT not scaled by the clip",
        file="rl/algorithms/diffusion_nft.py",
        right="loss=clip * contrast",
        wrong="loss=contrast",
        tests="tests/rl/test_algorithms.py",
    ),
    Fault(
        name="KL of GRPO-Guard a hundred times too strong",
        file="rl/algorithms/grpo_guard.py",
        right='{"reference": self.kl_coef}',
        wrong='{"reference": 100 * self.kl_coef}',
        tests="tests/rl/test_every_algorithm.py -k pulls_back",
    ),
    Fault(
        name="a flagged picture is black, and scored",
        file="rollout/lifting/loop.py",
        right="**proxies, **self.unchecked, ",
        wrong="**proxies, ",
        tests="tests/rollout/test_pipeline.py -k flagged",
    ),
    Fault(
        name="an update that is not finite is made",
        file="rl/engine/zero.py",
        right="        check(before)\n",
        wrong="",
        tests="tests/whole/test_processes.py -k not_finite",
    ),
    Fault(
        name="processes ask different denoisers at the same time",
        file="rl/start.py",
        right="common_indices=len(pipeline.denoisers) > 1",
        wrong="common_indices=False",
        tests="tests/whole/test_processes.py -k asked_alike",
    ),
    Fault(
        name="old gradients of what no pass reached under ZeRO-3",
        file="rl/engine/zero.py",
        right="            self._uncleared.zero_()",
        wrong="            pass",
        tests="tests/whole/test_processes.py -k asked_alike",
    ),
    Fault(
        name="unreached: the run's seed, windows of the plan",
        file="rl/build.py",
        right="window(count, levels, seed=config.seed,",
        wrong="window(count, levels, seed=0,",
        tests="tests/rl/test_settings_reach.py -k places and seed",
    ),
    Fault(
        name="unreached: the kernel's decay, windows of the plan",
        file="rl/build.py",
        right="window(count, levels, seed",
        wrong="window(count, level, seed",
        tests="tests/rl/test_settings_reach.py -k kernel and decay",
    ),
    Fault(
        name="unreached: the negative prompt, rollouts",
        file="rl/build.py",
        right="        negative_prompt=rollout.negative_prompt,",
        wrong="        negative_prompt=None,",
        tests="tests/rl/test_settings_reach.py -k rollout and negative_prompt",
    ),
    Fault(
        name="unreached: the largest norm of a gradient",
        file="rl/build.py",
        right="max_grad_norm=section.max_grad_norm",
        wrong="max_grad_norm=1.0",
        tests="tests/rl/test_settings_reach.py -k max_grad_norm",
    ),
    Fault(
        name="unreached: a run evaluates its current policy, not the averaged one",
        file="rl/evaluations.py",
        right="self._policy.using(self._policy.best)",
        wrong='self._policy.using("current")',
        tests="tests/rl/test_settings_reach.py -k ema_decay",
    ),
    Fault(
        name="betas reversed",
        file="rl/build.py",
        right="betas=section.betas,",
        wrong="betas=section.betas[::-1],",
        tests="tests/rl/test_engine.py",
    ),
    Fault(
        name="learning rate one update late",
        file="rl/engine/base.py",
        right="rate = self._settings.rate(self.num_updates)",
        wrong="rate = self._settings.rate(max(self.num_updates - 1, 0))",
        tests="tests/rl/test_engine.py",
    ),
    Fault(
        name="averaged policy keeps what it should take",
        file="rl/policy.py",
        right='self.follow("ema", self.ema_decay)',
        wrong='self.follow("ema", 1 - self.ema_decay)',
        tests="tests/rl/test_policy.py",
    ),
    Fault(
        name="restored policies in bfloat16 stay at their start",
        file="rl/policy.py",
        right="                policy.copy_(average)\n",
        wrong="                pass\n",
        tests="tests/rl/test_policy.py",
    ),
    Fault(
        name="KL of NFT to the old policy",
        file="rl/algorithms/diffusion_nft.py",
        right='{"reference": self.kl_coef}',
        wrong='{"old": self.kl_coef}',
        tests="tests/rl/test_losses.py -k kl_is_to_the_reference",
    ),
    Fault(
        name="KL of DGPO to the old policy",
        file="rl/algorithms/dgpo.py",
        right='{"reference": self.kl_coef}',
        wrong='{"old": self.kl_coef}',
        tests="tests/rl/test_losses.py -k kl_is_to_the_reference",
    ),
)
