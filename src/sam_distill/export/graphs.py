"""The two static graphs that every runtime can run: an image encoder, and a prompt encoder with a mask decoder.

Tensors of a TinyViT or a convolutional encoder have four dimensions at most; the decoder ends with a view of five.
BatchNorm is folded into the convolutions; attention biases and a ViT's position embedding are computed once, at export.
"""

from typing import Any

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn import functional as F

from sam_distill.export import contract
from sam_distill.export.contract import DECODER_OUTPUTS, EMBEDDING, HAS_MASK_INPUT, MASK_INPUT, Normalize
from sam_distill.inference.simplify import simplified
from sam_distill.models.prompt_encoder import PromptEncoder
from sam_distill.models.sam import PIXEL_MEAN, PIXEL_STD, Sam
from sam_distill.types import ABSENT, ALL, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NOT_A_POINT, Prompts

UNKNOWN_LABEL_PENALTY = 1000.0  # more than any logit: subtracted for an unknown label


class Encoder(nn.Module):
    """Image encoder, with or without the normalisation of the image."""

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
    """Prompt encoder and mask decoder, for one prompt of up to `points` points."""

    def __init__(self, sam: Sam, points: int) -> None:
        super().__init__()
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
        self.inputs = [EMBEDDING, *contract.prompt(points), MASK_INPUT, HAS_MASK_INPUT]
        self.outputs = DECODER_OUTPUTS

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return low_res_masks [1, 4, 256, 256] and iou_predictions [1, 4]; all float32, inputs as in `contract`.

        SAM appends one NOT_A_POINT to points without a box. The graph does so itself, and keeps the app's padding
        points out of attention, so that the result equals SAM's for any number of points. A graph can't raise an error
        for a label that SAM does not know, so it returns empty masks and predicted IoUs far below 0.
        """
        present = point_labels - (point_labels == NOT_A_POINT).float() * (NOT_A_POINT - ABSENT)
        highest = point_labels.amax(dim=1, keepdim=True)
        only_points = (highest >= 0).float() * (highest < BOX_TOP_LEFT).float()  # not `&`, which Core ML lacks
        labels = torch.cat([present, ABSENT + only_points * (NOT_A_POINT - ABSENT)], dim=1)
        labels = labels.unsqueeze(0)
        tokens, _ = self.prompt_encoder(Prompts(F.pad(point_coords, (0, 0, 0, 1)).unsqueeze(0), labels))
        dense = dense_prompt(self.prompt_encoder, mask_input, has_mask_input)
        image_pe = self.prompt_encoder.dense_positions()
        masks = self.mask_decoder(image_embeddings, image_pe, tokens, dense, labels, ALL)
        unknown = (point_labels - point_labels.clamp(NOT_A_POINT, BOX_BOTTOM_RIGHT)).abs().amax(dim=1, keepdim=True)
        penalty = UNKNOWN_LABEL_PENALTY * unknown
        return masks.low_res[0] - penalty.view(1, 1, 1, 1), masks.iou[0] - penalty


def dense_prompt(prompt_encoder: PromptEncoder, mask: Tensor, has_mask: Tensor) -> Tensor:
    """Return [1, 1, 4096, 256]: the embedding of `mask` [1, 1, 256, 256] if `has_mask` [1] is 1, of no mask if 0."""
    given = prompt_encoder.embed_masks(mask).unsqueeze(0)
    return has_mask * given + (1 - has_mask) * prompt_encoder.no_mask_embed.weight


def prepared(sam: Sam) -> Sam:
    """Return a float32 copy on the CPU that computes the same with layers that exporters and runtimes support."""
    sam = simplified(sam).cpu().float()
    layer: Any
    for layer in list(sam.image_encoder.modules()):
        if isinstance(layer, VisionTransformerSAM):  # resize its position embedding to its image size
            vit: Any = layer
            grid = [sam.image_size // vit.patch_embed.patch_size[0]] * 2
            vit.pos_drop, vit.pos_embed = Positions(resample_abs_pos_embed_nhwc(vit.pos_embed, grid)), None
        if hasattr(layer, "fused_attn"):  # ONNX has no such kernel for SAM's ViT, and XNNPACK has none at all
            layer.fused_attn = False
    return sam


class Positions(nn.Module):
    """Layer that adds a ViT's position embedding: [1, h, w, C], already resized.

    timm's own code, once exported, would resize it in every run, which few runtimes support.
    """

    positions: Tensor

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.register_buffer("positions", positions)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions
