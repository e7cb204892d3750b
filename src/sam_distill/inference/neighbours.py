"""Which layer of a network takes what another one gives, found by running it once."""

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sam_distill.types import GRID

Layers = tuple[type[nn.Module], ...]


@torch.inference_mode(False)  # there changes in place are not counted
@torch.no_grad()
def neighbours(encoder: nn.Module, first: Layers, second: Layers) -> list[tuple[str, str]]:
    """Names of a `first` and a `second` layer that takes exactly what the first one gives, whenever they run."""
    made: list[tuple[str, Tensor, int]] = []  # by whom, and how often changed in place
    calls: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()

    def after(_: nn.Module, given: Any, out: Tensor, name: str) -> None:
        calls[name] += 1
        made.append((name, out, out._version))

    def before(_: nn.Module, given: Any, name: str) -> None:
        calls[name] += 1
        pairs.update((giver, name) for giver, out, version in made if out is given[0] and out._version == version)

    hooks = []
    for name, layer in encoder.named_modules():
        if isinstance(layer, first):
            hooks.append(layer.register_forward_hook(partial(after, name=name)))
        elif isinstance(layer, second):
            hooks.append(layer.register_forward_pre_hook(partial(before, name=name)))
    encoder(next(encoder.parameters()).new_zeros(1, 3, 2 * GRID, 2 * GRID))
    for hook in hooks:
        hook.remove()
    taken = Counter(name for pair in pairs.elements() for name in pair)
    return [pair for pair in pairs if all(taken[name] == calls[name] for name in pair)]


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
