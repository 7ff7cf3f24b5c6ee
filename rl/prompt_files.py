"""The prompt files of a run: what its rewards want of them, and what its pipeline cannot see of them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence

from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from flowsteer.rewards.columns import check_columns
from flowsteer.rewards.combine import RewardSet
from flowsteer.rl.config import Config
from flowsteer.rl.config.data import inputs_of, name_of, sources_of
from flowsteer.rollout.data.prompts import Prompts, with_pictures
from flowsteer.rollout.lifting.arguments import CallArguments
from flowsteer.rollout.lifting.pipeline import FlowPipeline
from flowsteer.rollout.lifting.protocol import Pipeline

logger = logging.getLogger(__name__)

RATES = ("frame_rate", "fps")  # what pipelines of diffusers call it
LONGEST_WINDOW = 10**6  # transformers writes 10^30 where a tokenizer does not say how many tokens its model takes
SPECIAL_TOKENS = 8  # at most so many more than characters and bytes
_EXCERPT = 80  # characters of a prompt in a message


def check_columns_of_prompts(config: Config, train: Prompts, evaluation: Prompts | None) -> None:
    """Raise ValueError where a reward in this process requires a column that a prompt file lacks."""
    scored = {} if config.training_asks_no_reward else {f"prompts.train={name_of(config.prompts.train)}": train}
    read = dict(scored)
    if config.evaluation is not None and evaluation is not None:
        read[f"evaluation.prompts={name_of(config.evaluation.prompts)}"] = evaluation
    files = {file: list(prompts.columns) for file, prompts in read.items()}
    for file in scored:
        files[file] += ["sigma"] if config.rollout.branching else []
    media = {file: prompts.media for file, prompts in read.items()}
    for name, section in config.rewards.items():
        for argument, column in section.columns.items():
            if lacking := [file for file in files if column not in (*files[file], *media[file])]:
                raise ValueError(
                    f"rewards.{name}.columns.{argument}={column}: {lacking[0]} has no such column; it has "
                    f"{', '.join((*files[lacking[0]], *media[lacking[0]])) or 'none besides the prompt'}"
                )
    own = {name: section.options for name, section in config.rewards.items() if section.host is None}
    check_columns(own, files, {name: section.columns for name, section in config.rewards.items()}, media)


def add_pictures(
    config: Config, rewards: RewardSet, train: Prompts, evaluation: Prompts | None
) -> tuple[Prompts, Prompts | None]:
    """The prompts of training and evaluation with the pictures that the rewards want. Raises as `with_pictures`."""
    inputs = inputs_of(config.inputs)
    if train.groups and rewards.pictures and not config.training_asks_no_reward:
        raise ValueError(
            f"a reward wants the pictures of the column {next(iter(rewards.pictures))!r}, which are not kept for rewards where "
            "prompts.pictures is given; leave the reward out"
        )
    if not train.groups:
        train = with_pictures(train, sources_of(config.prompts.train), rewards.pictures, inputs=inputs)
    if config.evaluation is not None and evaluation is not None:
        sources = sources_of(config.evaluation.prompts)
        evaluation = with_pictures(evaluation, sources, rewards.pictures, inputs=inputs)
    return train, evaluation


def frame_rate_of(pipeline: Pipeline) -> float | None:
    """Frames a second of a pipeline's videos: what ``model.call`` says, or the default of its ``__call__``; None without."""
    return rate_of(pipeline.preparer.arguments) if isinstance(pipeline, FlowPipeline) else None


def rate_of(arguments: CallArguments) -> float | None:
    """As `frame_rate_of`, of what a pipeline is called with."""
    for name in RATES:
        if name in arguments.parameters:
            default = arguments.parameters[name].default
            given = arguments.fixed.get(name, None if default is inspect.Parameter.empty else default)
            return None if given is None else float(given)
    return None


def warn_of_long_prompts(config: Config, pipeline: Pipeline, train: Prompts, evaluation: Prompts | None) -> None:
    """Warn of prompts that are longer than what an encoder sees: a line for each tokenizer of the pipeline.

    Tokens are counted of the prompt alone, without a template that a pipeline may put around it.
    """
    if not isinstance(pipeline, FlowPipeline):
        return
    files = {f"prompts.train={name_of(config.prompts.train)}": train.texts}
    if config.evaluation is not None and evaluation is not None:
        files[f"evaluation.prompts={name_of(config.evaluation.prompts)}"] = evaluation.texts
    for name, tokenizer, window in windows(pipeline):
        said = [text for file, texts in files.items() if (text := _too_long(tokenizer, window, file, texts))]
        if said:
            logger.warning(
                "%s: its encoder sees %d tokens, and the pipeline most likely cuts off what is beyond. %s",
                name,
                window,
                "; ".join(said),
            )


def windows(pipeline: FlowPipeline) -> list[tuple[str, PreTrainedTokenizerBase, int]]:
    """The tokenizers of a pipeline whose encoders are there, and how many tokens of a prompt those see.

    CLIP's say so themselves. Of others the pipeline decides, by its argument ``max_sequence_length`` where it has one. One that
    is no plain tokenizer of transformers, or of which nobody knows the number, is left out.
    """
    found = []
    arguments = pipeline.preparer.arguments
    asked = arguments.parameters.get("max_sequence_length")
    longest = arguments.fixed.get("max_sequence_length", None if asked is None else asked.default)
    for name, tokenizer in pipeline.pipe.components.items():
        encoder = name.replace("tokenizer", "text_encoder")
        unused = encoder in pipeline.pipe.components and pipeline.pipe.components[encoder] is None
        if not name.startswith("tokenizer") or not isinstance(tokenizer, PreTrainedTokenizerBase) or unused:
            continue
        own = longest if isinstance(longest, int) and not isinstance(tokenizer, CLIPTokenizer) else None
        window = own or tokenizer.model_max_length
        if window < LONGEST_WINDOW:
            found.append((name, tokenizer, int(window)))
    return found


def _most_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """More tokens than that a text cannot have: each is at least a byte. To CLIP's tokenizer spaces only part words."""
    spaces = text.count(" ") if isinstance(tokenizer, CLIPTokenizer) else 0
    return len(text.encode()) - spaces + SPECIAL_TOKENS


def _too_long(tokenizer: PreTrainedTokenizerBase, window: int, file: str, texts: Sequence[str]) -> str:
    """How many of a file's prompts are longer than the window, with the longest; empty where none is."""
    long = [text for text in dict.fromkeys(texts) if _most_tokens(tokenizer, text) > window]
    if not long:
        return ""
    counted: Mapping[str, int] = dict(zip(long, map(len, tokenizer(long, verbose=False).input_ids)))
    count = sum(counted.get(text, 0) > window for text in texts)
    worst = max(counted, key=lambda text: counted[text])
    if not count:
        return ""
    shown = worst if len(worst) <= _EXCERPT else f"{worst[:_EXCERPT]}..."
    return f"{file}: {count} of {len(texts)} prompts are longer; the longest has {counted[worst]} tokens: {shown!r}"
