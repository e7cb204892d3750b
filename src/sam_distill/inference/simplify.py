"""Copies of a model with fewer layers, all of them plain PyTorch layers, which every exporter supports."""

import copy
from typing import Any

import torch
from timm.models.tiny_vit import TinyVitBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sam_distill.inference.layer_pairs import equal_outputs, layer_pairs, replace_layer
from sam_distill.models.sam import Sam


def simplified(sam: Sam) -> Sam:
    """Return a frozen copy in eval mode, made of plain PyTorch layers, which every exporter supports."""
    sam = copy.deepcopy(sam).requires_grad_(False).eval()
    if has_batch_norms(sam.image_encoder):
        sam.image_encoder = _with_folded_batch_norms(sam.image_encoder)
    encoder = sam.image_encoder
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, TinyVitBlock):
            replace_layer(encoder, name, WindowBlock(layer))
    return sam


def has_batch_norms(encoder: nn.Module) -> bool:
    """Whether there are any. SAM's ViTs have none, so that `layer_pairs` need not run these large networks."""
    return any(isinstance(layer, nn.BatchNorm2d) for layer in encoder.modules())


@torch.no_grad()
def _with_folded_batch_norms(encoder: nn.Module) -> nn.Module:
    """Return a copy with each BatchNorm folded into the convolution whose output it takes, if outputs stay the same."""
    folded = copy.deepcopy(encoder)
    for conv_name, name in layer_pairs(folded, (nn.Conv2d,), (nn.BatchNorm2d,)):
        conv: Any = folded.get_submodule(conv_name)
        norm: Any = folded.get_submodule(name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        activation = getattr(norm, "act", nn.Identity())  # timm's BatchNormAct2d includes one
        replace_layer(folded, name, activation)
    return folded if equal_outputs(folded, encoder) else encoder


class WindowBlock(nn.Module):
    """timm's TinyVitBlock with tensors of at most four dimensions instead of six.

    Its attention bias has four as well: with timm's three, `scaled_dot_product_attention` takes a slow path on a CPU.
    fused_attn: whether to call `scaled_dot_product_attention` at all.
    """

    bias: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = block.attn.norm, block.attn.qkv, block.attn.proj
        self.local_conv, self.mlp = block.local_conv, block.mlp
        self.side, self.heads = block.window_size, block.attn.num_heads
        self.fused_attn = True
        self.register_buffer("bias", block.attn.attention_biases[:, block.attn.attention_bias_idxs].unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block: [B, h, w, C] -> [B, h, w, C]."""
        batch, height, width, channels = x.shape
        side, down, right = self.side, -height % self.side, -width % self.side
        rows, columns = (height + down) // side, (width + right) // side
        windows = F.pad(x, (0, 0, 0, right, 0, down)).view(batch * rows, side, columns, side * channels).transpose(1, 2)
        windows = self._attend(windows.reshape(batch * rows * columns, side * side, channels))
        windows = windows.view(batch * rows, columns, side, side * channels).transpose(1, 2)
        x = x + windows.reshape(batch, rows * side, columns * side, channels)[:, :height, :width]
        x = self.local_conv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return (x + self.mlp(x)).view(batch, height, width, channels)

    def _attend(self, x: Tensor) -> Tensor:
        """Return the attended values: [windows, cells, C] -> [windows, cells, C]."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.split(qkv.shape[-1] // 3, dim=-1)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))
