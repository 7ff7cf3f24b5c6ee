"""Options that several commands share, and what they stand for: a pipeline with the settings of a run or of the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:  # imported when a command needs them: `flowsteer --help` shall be quick
    from flowsteer.rewards.combine import RewardSet
    from flowsteer.rl.config import Config
    from flowsteer.rl.config.schema import EvaluationConfig
    from flowsteer.rollout.data.inputs import Input, Value
    from flowsteer.rollout.lifting.protocol import Pipeline

DEFAULT_REWARDS = ["composition"]  # where no reward is named
_PANEL = "Model"

RunOption = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Folder of a run: its model with what it exported, and its size, call arguments and rewards; denoising steps and "
        "guidance as in its evaluation.",
        rich_help_panel=_PANEL,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Folder or hub id in diffusers' layout, `embedded` or `embedded_edit`; default `embedded`.",
        rich_help_panel=_PANEL,
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="Pipeline written by hand in place of the lifted one: an entry point of the group `flowsteer.pipelines`, "
        "`package.module:Name` or `path/to/file.py:Name`.",
        rich_help_panel=_PANEL,
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
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="ARGUMENT=FILE",
        help="What the pipeline's argument gets with every prompt, such as `image=photo.png`; may be repeated.",
        rich_help_panel=_PANEL,
    ),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="ARGUMENT=COLUMN",
        help="The column of the prompt file that the pipeline's argument is taken from, such as `image=source`; may be "
        "repeated; default none, or as in the run.",
        rich_help_panel=_PANEL,
    ),
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
        "--reward",
        "-r",
        help="Name of a reward, `package.module:attribute` or `path/to/file.py:attribute`; may be repeated; default "
        "`composition`, or with `--run` those of the run.",
    ),
]
ScoredByOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reward",
        "-r",
        help="Name of a reward, `package.module:attribute` or `path/to/file.py:attribute`; may be repeated; default "
        "`composition`.",
    ),
]
RewardOptionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="[REWARD.]KEY=VALUE",
        help="An argument of the constructor of a reward that --reward names; repeatable.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the options ask for, before anything is loaded."""

    model: str
    adapter: str | None
    weights: Path | None  # folder of an exported LoRA, or of a run's exported networks
    dtype: str
    device: str
    size: dict[str, int]
    call: dict[str, Any]
    scheduler: dict[str, Any]  # of the run
    config: Config | None = field(default=None)  # of the run, or of one to come

    @property
    def evaluation(self) -> EvaluationConfig:
        """The run's settings of evaluation, the defaults without a run."""
        from flowsteer.rl.config.schema import EvaluationConfig

        return (self.config.evaluation if self.config else None) or EvaluationConfig()

    def inputs(self, columns: list[str] | None) -> dict[str, Input]:
        """What the pipeline takes from a prompt file: the columns of the options, or the run's."""
        from flowsteer.rl.config.data import inputs_of
        from flowsteer.rollout.data.inputs import Input, kind_of

        if columns or self.config is None:
            return {name: Input(column=column, kind=kind_of(name)) for name, column in pairs(columns or [])}
        return inputs_of(self.config.inputs)

    def load(self) -> Pipeline:
        """The pipeline with the weights."""
        from flowsteer.rl.adapters import load_pipeline
        from flowsteer.rl.build import DTYPES
        from flowsteer.rl.export import LORA_FILE, load_into, load_lora
        from flowsteer.rollout.lifting.pipeline import FlowPipeline

        given = {
            "quantize": self.config.model.quantize if self.config else None,
            "dtype": DTYPES[self.dtype],
            "device": self.device,
            "call": self.call,
            "scheduler": self.scheduler,
            **self.size,
        }
        pipeline = load_pipeline(self.model, adapter=self.adapter, **given)
        if self.weights is not None and isinstance(pipeline, FlowPipeline) and (self.weights / LORA_FILE).is_file():
            load_lora(pipeline.pipe, self.weights)
        elif self.weights is not None:
            load_into(pipeline.denoisers, self.weights)
        return pipeline

    def rewards_in_this_process(
        self, names: list[str] | None, options: list[str] | None = None
    ) -> Mapping[str, Mapping[str, Any]]:
        """The options of those of `rewards` that no other process hosts, by name."""
        from flowsteer.rl.command.score_files import options_by_reward

        if self.config is None or names:
            return options_by_reward(names or DEFAULT_REWARDS, options or [])
        return {name: section.options for name, section in self.config.rewards.items() if section.host is None}

    def names_of_columns(self, names: list[str] | None) -> Mapping[str, Mapping[str, str]]:
        """What the rewards of the run call columns, by reward; nothing for those that options name."""
        if self.config is None or names:
            return {}
        return {name: section.columns for name, section in self.config.rewards.items()}

    def rewards(self, names: list[str] | None, options: list[str] | None = None) -> RewardSet:
        """The rewards by name; without names the run's own, with its weights. Raises ValueError for options to those."""
        import torch

        from flowsteer.rl.build_rewards import build_rewards

        if self.config is None or names:
            return named_rewards(names, options)
        if options:
            raise ValueError("--option is for rewards that --reward names; those of --run have the run's own options")
        return build_rewards(self.config, torch.device(self.device))


def pairs(options: list[str]) -> list[tuple[str, str]]:
    """The two halves of each ``NAME=VALUE``. Raises ValueError for another text."""
    for option in options:
        if not all(option.partition("=")):
            raise ValueError(
                f"--input {option}: give an argument of the pipeline and what it gets, as in image=photo.png"
            )
    return [(option.partition("=")[0], option.partition("=")[2]) for option in options]


def files_as_inputs(options: list[str] | None) -> dict[str, Value]:
    """Inputs that are given by their files, one row's. Raises ValueError for a file that cannot be read."""
    from flowsteer.rollout.data.inputs import Input, kind_of, read_inputs

    given = dict(pairs(options or []))
    inputs = {name: Input(column=name, kind=kind_of(name)) for name in given}
    columns = {name: [_number(value) if inputs[name].kind == "number" else value] for name, value in given.items()}
    read = read_inputs(inputs, columns, where=["--input"], folder=Path.cwd())
    return {name: value for name, (value,) in read.items()}


def _number(text: str) -> int | float | str:
    """A number where the text is one; otherwise the text, which `read_inputs` refuses by name."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def named_rewards(names: list[str] | None, options: list[str] | None = None) -> RewardSet:
    """The rewards by name, with the weight 1 each; ``options`` are ``KEY=VALUE``, or ``REWARD.KEY=VALUE`` for several."""
    from flowsteer.rewards.combine import RewardSet
    from flowsteer.rewards.registry import label_of, load_reward
    from flowsteer.rl.command.score_files import options_by_reward

    names = names or DEFAULT_REWARDS
    given = options_by_reward(names, options or [])
    return RewardSet([(label_of(name), load_reward(name, **given[name]), 1.0) for name in names])


def choose(
    *,
    run: Path | None = None,
    config: Config | None = None,
    model: str | None = None,
    adapter: str | None = None,
    lora: Path | None = None,
    height: int | None = None,
    width: int | None = None,
    call: list[str] | None = None,
    dtype: str | None = None,
    device: str = "auto",
) -> Chosen:
    """Put the options together; they override the settings of the run, or of the configuration of a run to come.

    Raises:
        ValueError: the run or the LoRA is not there, or options contradict one another.
    """
    import torch

    from flowsteer.rl.config import parse_overrides
    from flowsteer.rl.config.schema import ModelConfig
    from flowsteer.rollout.lifting.loading import EMBEDDED

    if run is not None and (model is not None or lora is not None or adapter is not None):
        raise ValueError("--run brings its own model and weights; leave out --model, --adapter and --lora, or --run")
    config = read_run(run) if run is not None else config
    weights = _folder_of(lora) if run is None else run / "export"
    if weights is not None:
        _check_weights(weights, config)
    section = config.model if config is not None else ModelConfig(path=model or EMBEDDED, adapter=adapter)
    size = {"height": height or section.height, "width": width or section.width}
    if device == "auto":
        device = str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    return Chosen(
        model=section.path,
        adapter=section.adapter,
        weights=weights,
        dtype=dtype or section.dtype,
        device=device,
        size={name: value for name, value in size.items() if value is not None},
        call={**section.call, **parse_overrides(call or [])},
        scheduler=section.scheduler,
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
    try:
        return parse_config(data, source=str(file))
    except ValueError:
        if _is_built_in(data):
            raise
        # what a run learned by is not needed for its result, and may be in a file that is not here
        return parse_config({**data, "algorithm": {"name": "diffusion_nft"}}, source=str(file))


def _is_built_in(data: Any) -> bool:
    """Whether the algorithm of a configuration is one of flowsteer's own."""
    from flowsteer.rl.plugins import BUILT_IN

    section = data.get("algorithm") if isinstance(data, dict) else None
    return not isinstance(section, dict) or section.get("name") in BUILT_IN


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

    full = config is not None and (config.model.adapter is not None or config.model.lora is None)
    if not (folder / LORA_FILE).is_file() and not (full and folder.is_dir()):
        raise ValueError(f"{folder} holds no {'weights' if full else LORA_FILE}; a run writes it when it ends")
