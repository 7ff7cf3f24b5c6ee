"""How much time goes into anything but the networks.

For the rollout and for each algorithm's update: images per second, and **overhead** = wall time / (time of exactly the network
passes that it needs, at the same batch size and type, measured in the same run). The passes are recorded while the real
code runs (`FlowPipeline.route`) and replayed alone; real run and replay alternate, so that other load on the machine hits both.
The rollout is timed cold: every prompt is prepared anew, text encoders included, and that counts as overhead.

    python scripts/benchmark.py
    python scripts/benchmark.py embedded_flow_grpo_cps_composition --repeats 5
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowsteer.rl.config import load_config
from flowsteer.rl.run import Run
from flowsteer.rl.start import start
from flowsteer.rollout.types import Rollout

console = Console()
CONFIGS = ["embedded_nft_composition", "embedded_flow_grpo_cps_composition", "embedded_flow_grpo_sde_composition"]
Call = tuple[Any, tuple[Any, ...], dict[str, Any], bool, str]  # network, arguments, with gradient, policy


class Recorder:
    """Notes every denoiser call of a stretch of the real code, to make the same calls again without the rest."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.calls: list[Call] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside the context; outside calls go straight to the network."""
        pipeline, denoisers = self.run.policy.pipeline, self.run.policy.denoisers

        def note(name: str, *args: Any, **kwargs: Any) -> Any:
            self.calls.append((denoisers[name], args, kwargs, torch.is_grad_enabled(), self.run.policy.active))
            return denoisers[name](*args, **kwargs)

        pipeline.route(note)
        try:
            yield
        finally:
            pipeline.route(lambda name, *args, **kwargs: denoisers[name](*args, **kwargs))

    def replay(self) -> None:
        """The same network passes with nothing in between; those that had a gradient run backward too."""
        parameters = self.run.policy.parameters().values()
        hooks = [parameter._backward_hooks for parameter in parameters]
        for parameter in parameters:  # what watches the gradients is not the network's own time
            parameter._backward_hooks = None
        for network, args, kwargs, with_gradient, policy in self.calls:
            with self.run.policy.using(policy), torch.set_grad_enabled(with_gradient):
                output = network(*args, **kwargs)
                output = output[0] if isinstance(output, tuple) else output.sample
            if with_gradient:
                output.float().square().mean().backward()
        for parameter, hook in zip(parameters, hooks):
            parameter._backward_hooks = hook


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rollout_once(run: Run, step: int) -> list[Rollout]:
    """The first two acts of training, with prompts that are not prepared yet: training draws new ones at every step."""
    run.policy.pipeline.forget()  # type: ignore[attr-defined]
    with run.policy.using(run.algorithm.acting):
        rollouts = run.worker.sample(step, done=run.scorer.submit)
    run.scores = run.scorer.collect()  # type: ignore[attr-defined]
    return rollouts


def decode_alone(run: Run, rollouts: list[Rollout]) -> Callable[[], None]:
    """The autoencoder's passes: one per rollout batch."""
    vae = run.policy.pipeline.pipe.vae  # type: ignore[attr-defined]

    @torch.no_grad()
    def work() -> None:
        for rollout in rollouts:
            latents: Tensor = rollout.latents / vae.config.scaling_factor + vae.config.shift_factor
            vae.decode(latents, return_dict=False)

    return work


def improve_once(run: Run, rollouts: list[Rollout], step: int) -> None:
    """The last two acts of training."""
    comparisons, _ = run.compare(rollouts, run.scores, run.engine.gather)  # type: ignore[attr-defined]
    for batch in run.algorithm.batches(rollouts, comparisons, step):
        loss, metrics = run.algorithm.loss(run.policy, batch)
        run.meter.add(metrics)
        run.meter.add_update(run.engine.backward(loss))
    run.policy.follow_old(run.algorithm.old_decay(run.engine.num_updates))


def measure(name: str, repeats: int, overrides: list[str]) -> list[tuple[str, str, float, float, float]]:
    """(configuration, act, images per second, seconds of the act, seconds of its networks alone), medians."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(name, [f"output={folder}/run", "evaluation=null", "trackers=[]", *overrides])
        run = start(config, quiet=True)
        images = config.rollout.prompts_per_step * config.rollout.group_size
        times: dict[str, list[tuple[float, float]]] = {"rollout": [], "update": []}
        for step in range(repeats + 1):  # the first round warms up
            recorder = Recorder(run)
            with recorder.recording():
                rollouts = rollout_once(run, step)
            decode = decode_alone(run, rollouts)
            real = seconds(lambda step=step: rollout_once(run, step))
            alone = seconds(recorder.replay) + seconds(decode)
            times["rollout"].append((real, alone))

            recorder = Recorder(run)
            with recorder.recording():
                improve_once(run, rollouts, step)
            real = seconds(lambda rollouts=rollouts, step=step: improve_once(run, rollouts, step))
            alone = seconds(recorder.replay)
            for parameter in run.policy.parameters().values():
                parameter.grad = None
            times["update"].append((real, alone))
        run.close()
    rows = []
    for act, pairs in times.items():
        _, real, alone = min((abs(r / a - _middle(pairs)), r, a) for r, a in pairs[1:])
        rows.append((name, act, images / real, real, alone))
    return rows


def _middle(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(real / alone for real, alone in pairs[1:])


def main(
    configs: Annotated[list[str] | None, typer.Argument(help="Configurations; the embedded ones unless given.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; the one with the median overhead is shown.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    override: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of the configuration; may be repeated.")] = None,
) -> None:
    """Print images per second and overhead of sampling and of updates."""
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} thread(s)"
    table = Table("configuration", "act", "images/s", "wall s", "networks alone s", "overhead", title=hardware)
    for name in configs or CONFIGS:
        for config, act, rate, real, alone in measure(name, repeats, override or []):
            table.add_row(config, act, f"{rate:.1f}", f"{real:.3f}", f"{alone:.3f}", f"{real / alone:.3f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
