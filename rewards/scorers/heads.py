"""Linear layers without activations between them: what aesthetic predictors and ImageReward put on an embedding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn

from flowsteer.rewards.scorers.weights import load_strictly


def linear_layers(state: Mapping[str, Tensor], prefix: str, *, width: int, name: str) -> nn.Sequential:
    """The layers of a state dictionary, from an embedding to one number.

    Args:
        state: ``{prefix}{number}.weight`` and ``.bias`` and nothing else. The numbers have gaps, where the published code
            has dropout.
        prefix: of all keys.
        width: of the embedding that the layers will be given.
        name: of the weights, for messages.

    Raises:
        ValueError: another key, layers that do not follow one another, or that want another embedding.
    """
    weights = {key.removeprefix(prefix): value for key, value in state.items()}
    numbers = sorted(
        int(key.split(".")[0]) for key in weights if key.split(".")[0].isdigit() and key.endswith(".weight")
    )
    shapes = [tuple(weights[f"{number}.weight"].shape) for number in numbers]  # (out, in)
    widths = [width, *(shape[0] for shape in shapes)]
    if not shapes or shapes != list(zip(widths[1:], widths[:-1])) or widths[-1] != 1:
        raise ValueError(
            f"{name} must hold linear layers {prefix}N.weight from {width} numbers, which is what the model's embedding has, "
            f"to one; it has {', '.join(f'{shape[1]} to {shape[0]}' for shape in shapes) or 'none'}"
        )
    layers = nn.Sequential(
        OrderedDict((str(number), nn.Linear(shape[1], shape[0])) for number, shape in zip(numbers, shapes))
    )
    load_strictly(layers, weights, name)
    return layers.eval().requires_grad_(False)


__all__ = ["linear_layers"]
