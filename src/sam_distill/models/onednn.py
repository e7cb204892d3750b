"""A layer, its bias and its activation in one pass over memory, on x86.

PyTorch has oneDNN's operators for that, but calls them from its compiler only, which takes minutes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sam_distill.models.layers import DepthwiseConv2d

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


def can_fuse(layer: nn.Module, activation: nn.Module) -> bool:
    plain = type(layer) in LAYERS and getattr(layer, "padding_mode", "zeros") == "zeros"
    exact = getattr(activation, "approximate", "none") == "none"  # of GELU
    return plain and exact and type(activation) in ACTIVATIONS and "AVX" in torch.backends.cpu.get_cpu_capability()


def fuse(layer: Any, activation: nn.Module) -> None:
    """Have a layer apply the activation, too. Its tensors and their names stay as they are."""
    layer.__class__ = LAYERS[type(layer)]
    layer.activation = activation


def _can_compute(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _as_autocast_has_it(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return x.to(dtype), layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype)
