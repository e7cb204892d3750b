"""Search for pairs of layers where one takes the other's output, and the check that they could be merged."""

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sam_distill.types import GRID

Layers = tuple[type[nn.Module], ...]


@torch.inference_mode(False)  # inference mode does not count in-place changes
@torch.no_grad()
def layer_pairs(encoder: nn.Module, first: Layers, second: Layers) -> list[tuple[str, str]]:
    """Return (first, second) names of layers where in every call the second takes exactly the first one's output."""
    made: list[tuple[str, Tensor, int]] = []  # layer, its output, number of in-place changes
    calls: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()

    def after(_: nn.Module, inputs: Any, out: Tensor, name: str) -> None:
        calls[name] += 1
        made.append((name, out, out._version))

    def before(_: nn.Module, inputs: Any, name: str) -> None:
        calls[name] += 1
        pairs.update((source, name) for source, out, version in made if out is inputs[0] and out._version == version)

    hooks = []
    for name, layer in encoder.named_modules():
        if isinstance(layer, first):
            hooks.append(layer.register_forward_hook(partial(after, name=name)))
        elif isinstance(layer, second):
            hooks.append(layer.register_forward_pre_hook(partial(before, name=name)))
    encoder(next(encoder.parameters()).new_zeros(1, 3, 2 * GRID, 2 * GRID))
    for hook in hooks:
        hook.remove()
    paired = Counter(name for pair in pairs.elements() for name in pair)
    return [pair for pair in pairs if all(paired[name] == calls[name] for name in pair)]


@torch.no_grad()
def equal_outputs(changed: nn.Module, original: nn.Module) -> bool:
    """Whether both return the same for noise; not if merging a pair changed an output that others use, too."""
    image = torch.rand(1, 3, 2 * GRID, 2 * GRID, generator=torch.Generator().manual_seed(0))
    image = image.to(next(original.parameters()).device)
    return torch.allclose(changed(image), original(image), rtol=1e-3, atol=1e-3)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
