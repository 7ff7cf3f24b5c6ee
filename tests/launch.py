"""Training runs in processes of their own: forked from a server that has imported everything, or by a real launcher.

Importing torch, diffusers and DeepSpeed takes seconds; a process that is forked from the server starts in a few
milliseconds and still has its own memory, environment, signals and death.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Work = Callable[..., None]  # of a configuration and ``resume``
TIMEOUT_S = 300.0  # a run takes 1 to 30 s; what takes longer hangs

_context = multiprocessing.get_context("forkserver")
# What runs import on their way, too: DeepSpeed alone loads 700 modules when an engine is made. One that is missing in another
# version is passed over, and then imported by each process.
_context.set_forkserver_preload(
    [
        "flowsteer.rl.start",
        "flowsteer.rl.train",
        "flowsteer.rewards.scorers.jpeg",
        "cv2",
        "deepspeed",
        "deepspeed.comm.mori",
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.ops.triton_ops",
        "deepspeed.runtime.superoffload.superoffload_stage3",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.zero.stage_1_and_2",
        "diffusers.guiders",
        "diffusers.pipelines.onnx_utils",
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
        "functorch.compile",
        "numpy.ctypeslib",
        "torch._dynamo.repro.after_aot",
        "torch._dynamo.testing",
        "torch._inductor.compile_fx",
        "torch.utils.cpp_extension",
        "torch.utils.mkldnn",
        "transformers.models.clip.modeling_clip",
        "transformers.models.t5.modeling_t5",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
        "typer.rich_utils",
        "jinja2",
        *(f"PIL.{name}ImagePlugin" for name in ("Bmp", "Gif", "Jpeg", "Png", "Ppm")),
    ]
)


def process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process of the server's, not yet started; the function is imported there by its name."""
    return _context.Process(target=target, args=arguments)


def nft(**more: Any) -> dict[str, Any]:
    """Overrides that turn a Flow-GRPO run into one of DiffusionNFT."""
    algorithm = {"name": "diffusion_nft", "noise_levels_per_sample": 2, "kl_coef": 1e-3, **more}
    return {"algorithm": algorithm, "rollout.plan": {"name": "none"}}


def train_and_export(config: dict[str, Any], *, resume: bool = False) -> None:
    """A whole run in this process: what `flowsteer train` does, without the report."""
    from flowsteer.rl.config import parse_config
    from flowsteer.rl.start import start
    from flowsteer.rl.train import train

    run = start(parse_config(config), resume=resume, quiet=True)
    try:
        train(run)
        run.export()
    finally:
        run.close()


@dataclass(frozen=True, kw_only=True)
class Strike:
    """A signal that meets a process of a run 50 ms after it wrote (or would have written) a training step's line."""

    step: int
    signal: signal.Signals
    rank: int = 0

    def arm(self) -> None:
        """In the process that is to be hit: from inside, so that no load of the machine can delay it."""
        from flowsteer.rl.metrics import Log

        write = Log.write

        def write_and_fall(log: Log, step: int, values: dict[str, float]) -> None:
            write(log, step, values)
            if step == self.step:
                threading.Timer(0.05, os.kill, (os.getpid(), self.signal)).start()

        Log.write = write_and_fall


def begin(
    config: dict[str, Any],
    *,
    processes: int = 1,
    resume: bool = False,
    strike: Strike | None = None,
    work: Work = train_and_export,
) -> list[BaseProcess]:
    """Start a run on so many processes, with the environment that torchrun gives them; returns at once."""
    environment = {"OMP_NUM_THREADS": "1"}
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        hit = strike if strike and strike.rank == rank else None
        started.append(process(_child, config, resume, environment | own, _log(config, rank), hit, work))
        started[-1].start()
    return started


def wait(started: Sequence[BaseProcess], timeout: float = TIMEOUT_S) -> list[int | None]:
    """The exit codes of a run that `begin` started; None for a process that hangs."""
    for each in started:
        each.join(timeout)
    codes = [each.exitcode for each in started]
    for each in started:
        if each.is_alive():
            each.kill()
    return codes


def run(
    config: dict[str, Any],
    *,
    processes: int = 1,
    resume: bool = False,
    strike: Strike | None = None,
    work: Work = train_and_export,
) -> Path:
    """A whole run in processes of its own; returns its folder. Fails with their output when one failed or hangs.

    ``work`` is what each process does, a function of a module that the server can import.
    """
    codes = wait(begin(config, processes=processes, resume=resume, strike=strike, work=work))
    if any(code != 0 for code in codes):
        texts = [_log(config, rank).read_text()[-4000:] for rank in range(processes)]
        raise AssertionError(f"the run ended with {codes} (None: it hung)\n" + "\n".join(texts))
    return Path(config["output"])


def run_under(launcher: Sequence[str], config: dict[str, Any]) -> Path:
    """A whole run under ``torchrun`` or ``accelerate launch``, as a user would start it; returns its folder."""
    file = Path(config["output"]).with_suffix(".json")
    file.write_text(json.dumps(config))
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return Path(config["output"])


def torchrun(processes: int) -> list[str]:
    """The arguments of a `run_under` torchrun."""
    return ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={_free_port()}"]


def accelerate_launch(processes: int) -> list[str]:
    """The arguments of a `run_under` accelerate."""
    options = ["--multi_gpu", f"--num_processes={processes}", "--num_machines=1", "--mixed_precision=no"]
    return ["-m", "accelerate.commands.launch", *options, "--dynamo_backend=no", f"--main_process_port={_free_port()}"]


def python(
    *arguments: str | Path, cwd: Path, environment: Mapping[str, str] | None = None, timeout: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """``python *arguments`` (a script, ``-m`` or ``-c``) as `subprocess.run` does it, in a process forked from the server.

    It has its own folder, environment, arguments, `sys.path` (with the environment's PYTHONPATH) and output. Unlike in a new
    interpreter, what the server has imported is there already: what a start imports, and what is read from the environment
    by those packages as they are imported, has to be tested with a real one.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if environment is None else dict(environment)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        started = process(_as_python, [*map(str, arguments)], str(cwd), environment, out, err)
        started.start()
        (code,) = wait([started], timeout)
        said = out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
    if code is None:
        raise subprocess.TimeoutExpired(["python", *map(str, arguments)], timeout, *said)
    return subprocess.CompletedProcess(["python", *map(str, arguments)], code, *said)


def _as_python(arguments: list[str], cwd: str, environment: dict[str, str], out: Path, err: Path) -> None:
    for stream, file in ((1, out), (2, err)):
        with file.open("w") as opened:
            os.dup2(opened.fileno(), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    kind, *rest = arguments
    first = os.path.dirname(os.path.abspath(kind)) if kind[:1] != "-" else cwd if kind == "-m" else ""
    given = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    own = [path for path in sys.path if path and Path(path).is_relative_to(sys.base_prefix)]
    own += [path for path in sys.path if Path(path).is_relative_to(sys.prefix) and path not in own]
    sys.path[:] = [first, *given, *own]
    importlib.invalidate_caches()
    if kind == "-c":
        code, *sys.argv[1:] = rest
        sys.argv[0] = kind
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        module, *sys.argv[1:] = rest
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        runpy.run_path(os.path.abspath(kind), run_name="__main__")


def _child(
    config: dict[str, Any], resume: bool, environment: dict[str, str], log: Path, strike: Strike | None, work: Work
) -> None:
    os.environ.update(environment)
    if strike:
        strike.arm()
    with log.open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    work(config, resume=resume)


def _log(config: dict[str, Any], rank: int) -> Path:
    return Path(config["output"]).with_suffix(f".{rank}.log")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    train_and_export(json.loads(Path(sys.argv[1]).read_text()))
