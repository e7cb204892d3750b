"""The two static graphs that every runtime can take: an image encoder, and a prompt encoder with a mask decoder.

No encoder has more than four dimensions that is a TinyViT or a convolutional one; the decoder ends with a view of five.
BatchNorm is folded into the convolutions, and attention biases are gathered once.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models.tiny_vit import TinyVitBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sam_distill.export import contract
from sam_distill.export.contract import ANSWER, EMBEDDING, HAS_MASK_INPUT, MASK_INPUT, Normalize
from sam_distill.models.prompt_encoder import PromptEncoder
from sam_distill.models.sam import PIXEL_MEAN, PIXEL_STD, Sam
from sam_distill.types import ABSENT, ALL, BOX_TOP_LEFT, GRID, NOT_A_POINT, Prompts


class Encoder(nn.Module):
    """The image encoder, normalising included or not."""

    mean: Tensor
    std: Tensor

    def __init__(self, sam: Sam, normalize: Normalize) -> None:
        super().__init__()
        self.image_encoder = sam.image_encoder
        self.inputs, self.outputs = [contract.image(sam.image_size, normalize)], [EMBEDDING]
        self.normalize = normalize
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(PIXEL_STD).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """image [1, 3, S, S] float32 -> image_embeddings [1, 256, 64, 64]."""
        return self.image_encoder((image - self.mean) / self.std if self.normalize == "inside" else image)


class Decoder(nn.Module):
    """The prompt encoder and the mask decoder, for one prompt of up to `points` points."""

    def __init__(self, sam: Sam, points: int) -> None:
        super().__init__()
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
        self.inputs = [EMBEDDING, *contract.prompt(points), MASK_INPUT, HAS_MASK_INPUT]
        self.outputs = ANSWER

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """low_res_masks [1, 4, 256, 256] and iou_predictions [1, 4]; all float32, the inputs as `contract` has them.

        SAM ends points without a box with one NOT_A_POINT. That is done here, and the app's filling is left out of
        attention, so that the answer is exactly SAM's for any number of points.
        """
        present = point_labels - (point_labels == NOT_A_POINT).float() * (NOT_A_POINT - ABSENT)
        highest = point_labels.amax(dim=1, keepdim=True)
        only_points = ((highest >= 0) & (highest < BOX_TOP_LEFT)).float()
        labels = torch.cat([present, ABSENT + only_points * (NOT_A_POINT - ABSENT)], dim=1)
        labels = labels.unsqueeze(0)
        tokens, _ = self.prompt_encoder(Prompts(F.pad(point_coords, (0, 0, 0, 1)).unsqueeze(0), labels))
        dense = dense_prompt(self.prompt_encoder, mask_input, has_mask_input)
        image_pe = self.prompt_encoder.dense_positions()
        masks = self.mask_decoder(image_embeddings, image_pe, tokens, dense, labels, ALL)
        return masks.low_res[0], masks.iou[0]


def dense_prompt(prompt_encoder: PromptEncoder, mask: Tensor, has_mask: Tensor) -> Tensor:
    """[1, 1, 4096, 256]: of `mask`, [1, 1, 256, 256] logits, if `has_mask`, [1], is 1; of no mask if it is 0."""
    given = prompt_encoder.embed_masks(mask).unsqueeze(0)
    return has_mask * given + (1 - has_mask) * prompt_encoder.no_mask_embed.weight


def prepared(sam: Sam) -> Sam:
    """A copy of `sam` that computes the same in layers that exporters and runtimes like."""
    sam = copy.deepcopy(sam).cpu().float().requires_grad_(False).eval()
    encoder = sam.image_encoder
    _fold_batch_norms(encoder)
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, TinyVitBlock):
            _replace(encoder, name, WindowBlock(layer))
        elif hasattr(layer, "fused_attn"):  # timm's switch: SAM's ViT calls the fused kernel in a way ONNX lacks
            layer.fused_attn = False
    return sam


class WindowBlock(nn.Module):
    """timm's TinyVitBlock for one image, in four dimensions instead of six."""

    bias: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = block.attn.norm, block.attn.qkv, block.attn.proj
        self.local_conv, self.mlp = block.local_conv, block.mlp
        self.side, self.heads = block.window_size, block.attn.num_heads
        self.register_buffer("bias", block.attn.attention_biases[:, block.attn.attention_bias_idxs].unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        """[1, h, w, C] -> the same."""
        _, height, width, channels = x.shape
        side, down, right = self.side, -height % self.side, -width % self.side
        rows, columns = (height + down) // side, (width + right) // side
        windows = F.pad(x, (0, 0, 0, right, 0, down)).view(rows, side, columns, side * channels).transpose(1, 2)
        windows = self._attend(windows.reshape(rows * columns, side * side, channels))
        windows = windows.view(rows, columns, side, side * channels).transpose(1, 2)
        x = x + windows.reshape(1, rows * side, columns * side, channels)[:, :height, :width]
        x = self.local_conv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return (x + self.mlp(x)).view(1, height, width, channels)

    def _attend(self, x: Tensor) -> Tensor:
        """[windows, cells, C] -> the same."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.split(qkv.shape[-1] // 3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return self.proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def _fold_batch_norms(encoder: nn.Module) -> None:
    """Each BatchNorm that takes exactly what a convolution gives becomes a part of that convolution."""
    made: list[tuple[Tensor, nn.Conv2d]] = []
    pairs: list[tuple[nn.Conv2d, str]] = []
    hooks = []
    for name, layer in encoder.named_modules():
        if isinstance(layer, nn.Conv2d):
            hooks.append(layer.register_forward_hook(lambda conv, _, out: made.append((out, conv))))
        elif isinstance(layer, nn.BatchNorm2d):

            def before(_: nn.Module, given: Any, name: str = name) -> None:
                pairs.extend((conv, name) for out, conv in made if out is given[0])

            hooks.append(layer.register_forward_pre_hook(before))
    encoder(torch.zeros(1, 3, 2 * GRID, 2 * GRID))
    for hook in hooks:
        hook.remove()
    for conv, name in pairs:
        norm: Any = encoder.get_submodule(name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        _replace(encoder, name, getattr(norm, "act", nn.Identity()))  # timm's BatchNormAct2d has an activation, too


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
