"""What the two ONNX files compute. The decoder's tensors are named as in segment-anything's own export."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_distill.models.sam import PIXEL_MEAN, PIXEL_STD, Sam
from sam_distill.types import ALL, FRAME, Prompts


class Encoder(nn.Module):
    """The image encoder with everything before it but the resize to the frame."""

    mean: Tensor
    std: Tensor

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.image_encoder = sam.image_encoder
        self.image_size = sam.image_size
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN))
        self.register_buffer("std", torch.tensor(PIXEL_STD))
        for layer in self.image_encoder.modules():
            if hasattr(layer, "fused_attn"):  # timm's switch: SAM's ViT calls the fused kernel in a way ONNX lacks
                layer.fused_attn = False  # type: ignore[assignment]

    def forward(self, image: Tensor) -> Tensor:
        """image [h, w, 3] uint8 RGB, resized to the frame (long side 1024) -> image_embeddings [1, 256, 64, 64]."""
        height, width = image.shape[:2]
        x = ((image.float() - self.mean) / self.std).permute(2, 0, 1).unsqueeze(0)
        x = F.pad(x, (0, FRAME - width, 0, FRAME - height)).reshape(1, 3, FRAME, FRAME)
        if self.image_size != FRAME:
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bilinear", antialias=True)
        return self.image_encoder(x)


class Decoder(nn.Module):
    """The prompt encoder, the mask decoder, and the way of its masks to the size of the original image."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """P prompts of N >= 1 points on one image; everything is float32.

        image_embeddings: [1, 256, 64, 64].
        point_coords: [P, N, 2], (x, y) in frame pixels; point_labels: [P, N], SAM's labels -1 to 3, see `types`.
        mask_input: [1, 1, 256, 256] logits of an earlier prediction, for all prompts; has_mask_input: [1], 1 or 0.
        orig_im_size: [2], (H, W).
        Returns masks [P, 4, H, W] (logits; a mask is where they are > 0), iou_predictions [P, 4] and
        low_res_masks [P, 4, 256, 256]. Mask 0 is for prompts without doubt, 1 to 3 for ambiguous ones.
        """
        tokens, no_mask = self.prompt_encoder(Prompts(point_coords.unsqueeze(0), point_labels.unsqueeze(0)))
        given = self.prompt_encoder.mask_downscaling(mask_input).unsqueeze(0)
        dense = has_mask_input * given + (1 - has_mask_input) * no_mask
        image_pe = self.prompt_encoder.dense_positions()
        masks = self.mask_decoder(image_embeddings, image_pe, tokens, dense, None, ALL)
        return _upscale(masks.low_res[0], orig_im_size), masks.iou[0], masks.low_res[0]


def _upscale(low_res: Tensor, original_size: Tensor) -> Tensor:
    """`images.upscale_masks` for sizes that are tensors: [P, 4, 256, 256], [2] (H, W) -> [P, 4, H, W]."""
    exact = original_size.double()  # in the arithmetic of `images.frame_size`
    framed = (FRAME / exact.max() * exact + 0.5).long().clamp(min=1)
    (h, w), (height, width) = framed.tolist(), original_size.long().tolist()
    for side in (h, w, height, width):  # for the exporter, which can't see values
        torch._check(side >= 1)
    for side in (h, w):
        torch._check(side <= FRAME)
    masks = F.interpolate(low_res, size=(FRAME, FRAME), mode="bilinear")
    return F.interpolate(masks[..., :h, :w], size=(height, width), mode="bilinear")
