"""A layer, its bias and its activation in one pass over memory, on x86.

PyTorch has oneDNN's operators for that, but calls them from its compiler only, which takes minutes.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sam_distill.inference.neighbours import neighbours, replace_layer
from sam_distill.models.layers import DepthwiseConv2d
from sam_distill.types import GRID

ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float], str]] = {  # oneDNN's name, numbers, and algorithm
    nn.Identity: ("none", [], ""),
    nn.GELU: ("gelu", [], "none"),
    nn.ReLU: ("relu", [], ""),
    nn.ReLU6: ("hardtanh", [0.0, 6.0], ""),
    nn.SiLU: ("swish", [], ""),
    nn.Hardswish: ("hardswish", [], ""),
}


class FusedLinear(nn.Linear):
    """`activation(layer(x))`, in one pass where oneDNN can: on a CPU, without gradients, also in autocast's bf16."""

    activation: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not _can_compute(x):
            return self.activation(super().forward(x))
        return torch.ops.mkldnn._linear_pointwise(*_as_autocast_has_it(self, x), *ACTIVATIONS[type(self.activation)])


class FusedConv2d(nn.Conv2d):
    """The same of a convolution."""

    activation: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not _can_compute(x):
            return self.activation(super().forward(x))
        place = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._convolution_pointwise(
            *_as_autocast_has_it(self, x), *place, *ACTIVATIONS[type(self.activation)]
        )


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FusedLinear, nn.Conv2d: FusedConv2d, DepthwiseConv2d: FusedConv2d,
}  # fmt: skip


@torch.no_grad()
def with_fused_layers(encoder: nn.Module) -> nn.Module:
    """Each activation that takes exactly what a linear layer or a convolution gives becomes a part of that layer."""
    fused, nothing = copy.deepcopy(encoder), nn.Identity()
    layers = dict(fused.named_modules())
    pairs = neighbours(fused, tuple(LAYERS), tuple(ACTIVATIONS.keys() - {nn.Identity}))
    activations = {giver: name for giver, name in pairs if _can_fuse(layers[giver], layers[name])}
    for name, layer in layers.items():
        if name in activations.values():
            replace_layer(fused, name, nothing)
        elif _can_fuse(layer, nothing):
            _fuse(layer, layers[activations[name]] if name in activations else nothing)
    picture = torch.rand(1, 3, 2 * GRID, 2 * GRID, generator=torch.Generator().manual_seed(0))
    picture = picture.to(next(encoder.parameters()).device)
    same = torch.allclose(fused(picture), encoder(picture), rtol=1e-3, atol=1e-3)
    return fused if same else encoder  # if someone else wants what the layer gave, too


def _can_fuse(layer: nn.Module, activation: nn.Module) -> bool:
    plain = type(layer) in LAYERS and getattr(layer, "padding_mode", "zeros") == "zeros"
    exact = getattr(activation, "approximate", "none") == "none"  # of GELU
    return plain and exact and type(activation) in ACTIVATIONS and "AVX" in torch.backends.cpu.get_cpu_capability()


def _fuse(layer: Any, activation: nn.Module) -> None:
    """Have a layer apply the activation, too. Its tensors and their names stay as they are."""
    layer.__class__ = LAYERS[type(layer)]
    layer.activation = activation


def _can_compute(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _as_autocast_has_it(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return x.to(dtype), layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
