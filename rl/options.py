"""Options that several commands share, and what they stand for: a pipeline with the settings of a run or of the user."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:  # imported when a command needs them: `flowsteer --help` shall be quick
    from flowsteer.rewards.combine import RewardSet
    from flowsteer.rl.config import Config, EvaluationConfig
    from flowsteer.rollout.pipeline import FlowPipeline

_PANEL = "Model"

RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Folder of a run: its model with its exported LoRA, size, call arguments, rewards, denoising steps and guidance.",
        rich_help_panel=_PANEL,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Folder or hub id in diffusers' layout; default `embedded`.", rich_help_panel=_PANEL
    ),
]
LoRAOption = Annotated[
    Path | None,
    typer.Option("--lora", help="Exported LoRA to load: its folder or its safetensors file.", rich_help_panel=_PANEL),
]
HeightOption = Annotated[int | None, typer.Option("--height", min=1, help="Pixels.", rich_help_panel=_PANEL)]
WidthOption = Annotated[int | None, typer.Option("--width", min=1, help="Pixels.", rich_help_panel=_PANEL)]
CallOption = Annotated[
    list[str] | None,
    typer.Option(
        "--call",
        metavar="KEY=VALUE",
        help="Argument of the pipeline's `__call__`, such as `max_sequence_length=128`; may be repeated.",
        rich_help_panel=_PANEL,
    ),
]
DTypeOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option("--dtype", help="Of the weights; default float32.", rich_help_panel=_PANEL),
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="`cpu`, `cuda`, or `auto`: an accelerator if there is one.", rich_help_panel=_PANEL),
]
StepsOption = Annotated[
    int | None, typer.Option("--num-inference-steps", min=1, help="Denoising steps; default 10, or as in the run.")
]
GuidanceOption = Annotated[
    float | None, typer.Option("--guidance-scale", help="1 is without guidance; default 1, or as in the run.")
]
NegativeOption = Annotated[
    str | None, typer.Option("--negative-prompt", help="What guidance leads away from; default none, or as in the run.")
]
RewardOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reward", "-r", help="Name of a reward, may be repeated; default `composition`, or those of `--run`."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the options ask for, before anything is loaded."""

    model: str
    weights: Path | None  # folder of an exported LoRA
    dtype: str
    device: str
    size: dict[str, int]
    call: dict[str, Any]
    config: Config | None = field(default=None)  # of the run

    @property
    def evaluation(self) -> EvaluationConfig:
        """The run's settings of evaluation, the defaults without a run."""
        from flowsteer.rl.config import EvaluationConfig

        return (self.config.evaluation if self.config else None) or EvaluationConfig()

    def load(self) -> FlowPipeline:
        """The pipeline with the weights."""
        from flowsteer.rl.build import DTYPES
        from flowsteer.rl.export import load_lora
        from flowsteer.rollout.pipeline import FlowPipeline

        pipeline = FlowPipeline.load(
            self.model, dtype=DTYPES[self.dtype], device=self.device, call_kwargs=self.call, **self.size
        )
        if self.weights is not None:
            load_lora(pipeline.pipe, self.weights)
        return pipeline

    def rewards(self, names: list[str] | None) -> RewardSet:
        """The rewards by name; without names the run's own, with its weights."""
        import torch

        from flowsteer.rl.build import build_rewards

        if self.config is None or names:
            return named_rewards(names)
        return build_rewards(self.config, torch.device(self.device))


def named_rewards(names: list[str] | None) -> RewardSet:
    """The rewards by name, with the weight 1 each."""
    from flowsteer.rewards.combine import RewardSet
    from flowsteer.rewards.registry import load_reward

    return RewardSet([(name, load_reward(name), 1.0) for name in names or ["composition"]])


def choose(
    *,
    run: Path | None = None,
    model: str | None = None,
    lora: Path | None = None,
    height: int | None = None,
    width: int | None = None,
    call: list[str] | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> Chosen:
    """Put the options together; what is given by hand goes before what the run says.

    Raises:
        ValueError: the run or the LoRA is not there, or options contradict one another.
    """
    import torch

    from flowsteer.rl.config import ModelConfig, parse_overrides
    from flowsteer.rollout.pipeline import EMBEDDED

    if run is not None and (model is not None or lora is not None):
        raise ValueError("--run brings its own model and weights; leave out --model and --lora, or --run")
    config = read_run(run) if run is not None else None
    weights = _folder_of(lora) if run is None else run / "export"
    if weights is not None:
        _check_weights(weights, config)
    section = config.model if config is not None else ModelConfig(path=model or EMBEDDED)
    size = {"height": height or section.height, "width": width or section.width}
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    return Chosen(
        model=section.path,
        weights=weights,
        dtype=dtype or section.dtype,
        device=device,
        size={name: value for name, value in size.items() if value is not None},
        call={**section.call, **parse_overrides(call or [])},
        config=config,
    )


def read_run(folder: Path) -> Config:
    """The configuration of a run's folder. Raises ValueError where there is none."""
    from flowsteer.rl.config import parse_config

    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no config.json")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    return parse_config(data, source=str(file))


def refuse_existing(*paths: Path) -> None:
    """Raises ValueError for a file that is there already, or whose folder is not."""
    for path in paths:
        if path.exists():
            raise ValueError(f"{path} exists already; choose another file")
        if not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} does not exist; make it first, or choose another")


def _folder_of(lora: Path | None) -> Path | None:
    """The folder of a LoRA that is given by its folder or by its file. Raises ValueError for another file."""
    from flowsteer.rl.export import LORA_FILE, SECOND

    if lora is None:
        return None
    if lora.is_file() or lora.suffix == ".safetensors":
        if not lora.is_file():
            raise ValueError(f"there is no file {lora}")
        if lora.name != LORA_FILE:
            raise ValueError(f"{lora} is not called {LORA_FILE}, as diffusers loads it; rename it, or give its folder")
        lora = lora.parent
    if lora.name == SECOND:
        raise ValueError(f"{lora} is the second half of a LoRA for two transformers; give the folder above it")
    return lora


def _check_weights(folder: Path, config: Config | None) -> None:
    from flowsteer.rl.export import LORA_FILE

    if (folder / LORA_FILE).is_file():
        return
    if config is not None and config.model.lora is None:
        raise ValueError(
            f"the run of {folder} trained all weights: write its pipeline with `flowsteer export {folder.parent} FOLDER`, "
            "then use --model FOLDER"
        )
    raise ValueError(f"{folder} holds no {LORA_FILE}; a run writes it when it ends")
