"""Fusion of a layer, its bias and its activation into one pass over memory, on x86.

PyTorch has oneDNN's operators for this, but only its compiler calls them, and compiling takes minutes.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sam_distill.inference.layer_pairs import equal_outputs, layer_pairs, replace_layer
from sam_distill.models.layers import DepthwiseConv2d

ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float], str]] = {  # oneDNN's name, scalar arguments, algorithm
    nn.Identity: ("none", [], ""),
    nn.GELU: ("gelu", [], "none"),
    nn.ReLU: ("relu", [], ""),
    nn.ReLU6: ("hardtanh", [0.0, 6.0], ""),
    nn.SiLU: ("swish", [], ""),
    nn.Hardswish: ("hardswish", [], ""),
}


class FusedLinear(nn.Linear):
    """Linear layer and activation, in one pass if oneDNN can: on a CPU, without gradients, also in autocast's bf16."""

    activation: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not _can_compute(x):
            return self.activation(super().forward(x))
        return torch.ops.mkldnn._linear_pointwise(*_in_autocast_dtype(self, x), *ACTIVATIONS[type(self.activation)])


class FusedConv2d(nn.Conv2d):
    """Convolution and activation, in one pass if oneDNN can, as in `FusedLinear`."""

    activation: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not _can_compute(x):
            return self.activation(super().forward(x))
        geometry = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._convolution_pointwise(
            *_in_autocast_dtype(self, x), *geometry, *ACTIVATIONS[type(self.activation)]
        )


LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FusedLinear, nn.Conv2d: FusedConv2d, DepthwiseConv2d: FusedConv2d,
}  # fmt: skip


@torch.no_grad()
def with_fused_layers(encoder: nn.Module) -> nn.Module:
    """Return a copy in which each linear layer and convolution applies the activation that takes exactly its output."""
    fused, identity = copy.deepcopy(encoder), nn.Identity()
    layers = dict(fused.named_modules())
    pairs = layer_pairs(fused, tuple(LAYERS), tuple(ACTIVATIONS.keys() - {nn.Identity}))
    activations = {layer_name: name for layer_name, name in pairs if _can_fuse(layers[layer_name], layers[name])}
    for name, layer in layers.items():
        if name in activations.values():
            replace_layer(fused, name, identity)
        elif _can_fuse(layer, identity):
            layer.__class__ = LAYERS[type(layer)]  # its tensors and their names stay the same
            layer.activation = layers[activations[name]] if name in activations else identity
    return fused if equal_outputs(fused, encoder) else encoder


def _can_fuse(layer: nn.Module, activation: nn.Module) -> bool:
    plain = type(layer) in LAYERS and getattr(layer, "padding_mode", "zeros") == "zeros"
    exact = getattr(activation, "approximate", "none") == "none"  # an option of GELU
    return plain and exact and type(activation) in ACTIVATIONS and "AVX" in torch.backends.cpu.get_cpu_capability()


def _can_compute(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _in_autocast_dtype(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return input, weight and bias, in the dtype of autocast if it is enabled."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return x.to(dtype), layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
