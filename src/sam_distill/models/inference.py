"""The same model in fewer and faster layers, for when it no longer trains."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.tiny_vit import TinyVitBlock
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sam_distill.models.onednn import ACTIVATIONS, LAYERS, can_fuse, fuse
from sam_distill.models.openvino_encoder import OpenVinoEncoder
from sam_distill.models.sam import Sam
from sam_distill.types import GRID

Layers = tuple[type[nn.Module], ...]
Runtime = Literal["torch", "openvino"]  # what computes the image encoder


def optimize_for_inference(sam: Sam, runtime: Runtime = "torch") -> Sam:
    """A copy with the same embeddings, to 1e-4: BatchNorm is folded into convolutions, TinyViT attends without detours,
    and on x86 a layer and its activation are one.

    It can neither be trained nor saved. runtime: what computes the image encoder.
    """
    with_batch_norms = _has_batch_norms(sam.image_encoder)
    sam = simplified(sam)
    if runtime == "openvino":
        sam.image_encoder = OpenVinoEncoder(sam.image_encoder, sam.image_size)
    elif with_batch_norms:
        sam.image_encoder = _with_fused_layers(sam.image_encoder)
    return sam


def simplified(sam: Sam) -> Sam:
    """The copy, made of PyTorch's plain layers, which every exporter knows."""
    sam = copy.deepcopy(sam).requires_grad_(False).eval()
    encoder = sam.image_encoder
    if _has_batch_norms(encoder):
        _fold_batch_norms(encoder)
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, TinyVitBlock):
            _replace(encoder, name, WindowBlock(layer))
    return sam


def _has_batch_norms(encoder: nn.Module) -> bool:
    """SAM's ViTs have none: they are large, and need not run to be looked at."""
    return any(isinstance(layer, nn.BatchNorm2d) for layer in encoder.modules())


class WindowBlock(nn.Module):
    """timm's TinyVitBlock in four dimensions instead of six.

    Its attention bias has four as well: with timm's three, `scaled_dot_product_attention` takes a slow path on a CPU.
    fused_attn: whether to call that at all.
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
        """[B, h, w, C] -> the same."""
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
        """[windows, cells, C] -> the same."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.split(qkv.shape[-1] // 3, dim=-1)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


def fix_positions(sam: Sam) -> None:
    """Have SAM's ViT bring its positions in the size of its pictures, before an export."""
    for layer in sam.image_encoder.modules():
        if isinstance(layer, VisionTransformerSAM):
            vit: Any = layer
            grid = [sam.image_size // vit.patch_embed.patch_size[0]] * 2
            vit.pos_drop, vit.pos_embed = Positions(resample_abs_pos_embed_nhwc(vit.pos_embed, grid)), None


class Positions(nn.Module):
    """Adds what a ViT's patches get for their places, [1, h, w, C].

    timm's own code, once exported, resizes that in every run, which few runtimes can.
    """

    positions: Tensor

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.register_buffer("positions", positions)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


@torch.no_grad()
def _fold_batch_norms(encoder: nn.Module) -> None:
    """Each BatchNorm that takes exactly what a convolution gives becomes a part of that convolution."""
    for conv_name, name in _neighbours(encoder, (nn.Conv2d,), (nn.BatchNorm2d,)):
        conv: Any = encoder.get_submodule(conv_name)
        norm: Any = encoder.get_submodule(name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        _replace(encoder, name, getattr(norm, "act", nn.Identity()))  # timm's BatchNormAct2d has an activation, too


@torch.no_grad()
def _with_fused_layers(encoder: nn.Module) -> nn.Module:
    """Each activation that takes exactly what a linear layer or a convolution gives becomes a part of that layer."""
    fused, nothing = copy.deepcopy(encoder), nn.Identity()
    layers = dict(fused.named_modules())
    pairs = _neighbours(fused, tuple(LAYERS), tuple(ACTIVATIONS.keys() - {nn.Identity}))
    activations = {giver: name for giver, name in pairs if can_fuse(layers[giver], layers[name])}
    for name, layer in layers.items():
        if name in activations.values():
            _replace(fused, name, nothing)
        elif can_fuse(layer, nothing):
            fuse(layer, layers[activations[name]] if name in activations else nothing)
    picture = torch.rand(1, 3, 2 * GRID, 2 * GRID, generator=torch.Generator().manual_seed(0))
    picture = picture.to(next(encoder.parameters()).device)
    same = torch.allclose(fused(picture), encoder(picture), rtol=1e-3, atol=1e-3)
    return fused if same else encoder  # if someone else wants what the layer gave, too


@torch.inference_mode(False)  # there changes in place are not counted
@torch.no_grad()
def _neighbours(encoder: nn.Module, first: Layers, second: Layers) -> list[tuple[str, str]]:
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


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
