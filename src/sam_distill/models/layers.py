"""Layers that several parts of SAM use."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_distill.types import EMBED_DIM


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W], always in float32: half precision overflows here in some students.

    Parameter names and epsilon are SAM's (`modeling/common.py`).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.over_last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def over_last(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension: [..., C] -> [..., C] float32."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution that trains in float32 on a CPU, even under autocast.

    oneDNN's backward pass in bf16 takes up to seven times as long (5 x 5 or stride 2), for lack of a fast kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)

    @staticmethod
    def replace_in(network: nn.Module) -> None:
        """Change all depthwise convolutions of a network to this class; their tensors stay the same."""
        for module in network.modules():
            if type(module) is nn.Conv2d and 1 < module.groups == module.in_channels:
                module.__class__ = DepthwiseConv2d


class MLP(nn.Module):
    """Three linear layers with ReLU between them, 256 wide: the mask decoder's hypernetworks and IoU head."""

    def __init__(self, width_out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(EMBED_DIM, width) for width in (EMBED_DIM, EMBED_DIM, width_out))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
