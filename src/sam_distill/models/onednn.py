"""A layer, its bias and its activation in one pass over memory, on x86.

PyTorch has oneDNN's operators for that, but calls them from its compiler only, which takes minutes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sam_distill.models.layers import DepthwiseConv2d

LAYERS = (nn.Linear, nn.Conv2d, DepthwiseConv2d)
ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float], str]] = {  # oneDNN's name, numbers, and algorithm
    nn.Identity: ("none", [], ""),
    nn.GELU: ("gelu", [], "none"),
    nn.ReLU: ("relu", [], ""),
    nn.ReLU6: ("hardtanh", [0.0, 6.0], ""),
    nn.SiLU: ("swish", [], ""),
    nn.Hardswish: ("hardswish", [], ""),
}


def can_fuse(layer: nn.Module, activation: nn.Module) -> bool:
    plain = type(layer) in LAYERS and getattr(layer, "padding_mode", "zeros") == "zeros"
    exact = getattr(activation, "approximate", "none") == "none"  # of GELU
    return plain and exact and type(activation) in ACTIVATIONS and "AVX" in torch.backends.cpu.get_cpu_capability()


class FusedLayer(nn.Module):
    """`activation(layer(x))`, in one pass where oneDNN can: on a CPU, without gradients, also in autocast's bf16."""

    def __init__(self, layer: Any, activation: nn.Module) -> None:
        super().__init__()
        self.layer, self.activation = layer, activation

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.activation(self.layer(x))
        layer, dtype = self.layer, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        given, how = (x.to(dtype), layer.weight.to(dtype), bias), ACTIVATIONS[type(self.activation)]
        if isinstance(layer, nn.Linear):
            return torch.ops.mkldnn._linear_pointwise(*given, *how)
        place = layer.padding, layer.stride, layer.dilation, layer.groups
        return torch.ops.mkldnn._convolution_pointwise(*given, *place, *how)
