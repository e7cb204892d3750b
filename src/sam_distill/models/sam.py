"""Segment Anything: an image encoder, a prompt encoder and a mask decoder, under their official names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_distill.models.mask_decoder import MaskDecoder
from sam_distill.models.prompt_encoder import PromptEncoder
from sam_distill.types import FRAME, Masks, Prompts

PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class Sam(nn.Module):
    """image_size: side S of the square the image encoder sees. Prompts and masks stay in the 1024 frame."""

    def __init__(
        self,
        image_encoder: nn.Module,
        prompt_encoder: PromptEncoder | None = None,
        mask_decoder: MaskDecoder | None = None,
        image_size: int = FRAME,
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder or PromptEncoder()
        self.mask_decoder = mask_decoder or MaskDecoder()
        self.image_size = image_size

    @property
    def device(self) -> torch.device:
        return self.prompt_encoder.no_mask_embed.weight.device

    def encode(self, images: Tensor, sizes: Tensor) -> Tensor:
        """images [B, 3, 1024, 1024] uint8 in the frame, sizes [B, 2] (h, w) -> embeddings [B, 256, 64, 64] float32."""
        return self.image_encoder(preprocess(images, sizes, self.image_size)).float()

    def decode(self, embedding: Tensor, prompts: Prompts, multimask: bool = False) -> Masks:
        """embedding [B, 256, 64, 64], prompts for the same B images -> masks: 3 per prompt if multimask, else 1."""
        tokens, dense = self.prompt_encoder(prompts)
        image_pe = self.prompt_encoder.dense_positions()
        return self.mask_decoder(embedding, image_pe, tokens, dense, prompts.labels, multimask)

    def forward(self, images: Tensor, sizes: Tensor, prompts: Prompts, multimask: bool = False) -> Masks:
        return self.decode(self.encode(images, sizes), prompts, multimask)


def preprocess(images: Tensor, sizes: Tensor, image_size: int) -> Tensor:
    """Frames as an image encoder wants them: [B, 3, S, S] float32, normalised, channels last.

    Padding is zero AFTER normalising, as in SAM. A smaller S is an area-averaged reduction of the whole padded frame,
    so that every S has the same geometry and prompts need no rescaling.
    """
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    x = ((images - mean) / std).mul_(valid_area(sizes, FRAME)).contiguous(memory_format=torch.channels_last)
    if image_size != FRAME:
        x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", antialias=True)
    return x


def valid_area(sizes: Tensor, side: int) -> Tensor:
    """[B, 1, side, side] bool: True for cells whose centre lies in the valid area of a frame (sizes: [B, 2] (h, w))."""
    centres = (torch.arange(side, device=sizes.device) + 0.5) * (FRAME / side)
    rows = centres < sizes[:, 0, None]
    columns = centres < sizes[:, 1, None]
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)
