"""What every embedded configuration computes, as hashes: a refactoring is right when they are the same before and after.

    python scripts/record_bits.py before.json          # on the old commit
    python scripts/record_bits.py after.json --against before.json

Each configuration is trained for two small steps on one process without DeepSpeed, and on two processes under ZeRO-2 and
ZeRO-3. Recorded are `metrics.jsonl` without its times and a hash of the exported weights. Compare on one machine only:
another processor rounds differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file

SMALL = ["num_steps=2", "rollout.prompts_per_step=8", "rollout.group_size=4", "rollout.batch_size=4"]
SMALL += ["trackers=[]", "evaluation=null", "optimizer.warmup_updates=0", "engine.device=cpu"]
SMALL += ["rewards={composition: {options: {score: strict}}, jpeg_compressibility: {weight: 0.1}}"]
ENGINES = {"plain": 1, "zero2": 2, "zero3": 2, "fsdp2": 2}  # engine.strategy: processes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the record is written")
    parser.add_argument("--against", type=Path, help="an earlier record; the exit code is 1 where a value differs")
    parser.add_argument("--only", default="embedded_", help="configurations whose name contains this")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    arguments = parser.parse_args()

    from flowsteer.rl.config import shipped_configs

    names = [name.removesuffix(".yaml") for name in shipped_configs()]
    names = [name for name in names if name.startswith("embedded_") and arguments.only in name]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowsteer.rl.start", "flowsteer.rl.train", "deepspeed"])
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = [(name, engine) for name in names for engine in arguments.engines]
        for name, engine in track(runs, description="training", disable=not sys.stderr.isatty()):
            record[f"{name} {engine}"] = trained(context, name, engine, Path(folder) / f"{name}_{engine}")
    arguments.file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    if arguments.against is None:
        print(f"{len(record)} runs recorded")
        return 0
    before = json.loads(arguments.against.read_text(encoding="utf-8"))
    unlike = [run for run in record if record[run] != before.get(run)]
    print(f"{len(record) - len(unlike)} of {len(record)} runs are equal bit for bit")
    for run in unlike:
        print(f"  differs: {run}")
    return 1 if unlike or not record else 0


def trained(context: Any, name: str, engine: str, output: Path) -> dict[str, Any]:
    """The record of one configuration under one engine."""
    processes = ENGINES[engine]
    overrides = [*SMALL, f"output={output}", f"engine.strategy={engine}"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(processes):
        environment = {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = output.with_suffix(f".{rank}.log")
        started.append(context.Process(target=train_once, args=(name, overrides, environment, log)))
        started[-1].start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        texts = [file.read_text()[-2000:] for file in sorted(output.parent.glob(f"{output.name}.*.log"))]
        raise SystemExit("\n".join([*texts, f"{name} under {engine} failed"]))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: line[key] for key in sorted(line) if not key.startswith("seconds/")} for line in lines]
    digest = hashlib.sha256()
    for file in sorted((output / "export").rglob("*.safetensors")):
        for key, value in sorted(load_file(file).items()):  # a LoRA's header lists its targets in no fixed order
            digest.update(f"{file.name} {key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return {"metrics": numbers, "weights": digest.hexdigest()}


def train_once(name: str, overrides: list[str], environment: dict[str, str], log: Path) -> None:
    """A whole run in this process, whose output goes to a log."""
    os.environ.update(environment)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from flowsteer.rl.config import load_config
    from flowsteer.rl.start import start
    from flowsteer.rl.train import train

    run = start(load_config(name, overrides), quiet=True)
    try:
        train(run)
        run.export()
    finally:
        run.close()


if __name__ == "__main__":
    raise SystemExit(main())
