"""Decoder finetuning: the optional second stage of decoupled distillation."""

import torch
from torch import Tensor, nn

from sam_distill.models.sam import Sam
from sam_distill.strategies.masks import MaskStrategy
from sam_distill.types import Batch


class FinetuneDecoder(MaskStrategy):
    """Strategy that trains the mask decoder on a distilled, frozen image encoder (paper, section 3.2, Figure 3)."""

    finetunes = True

    def trainable(self, sam: Sam) -> dict[str, nn.Module]:
        return {"mask_decoder": sam.mask_decoder}

    @torch.no_grad()
    def embed(self, sam: Sam, batch: Batch) -> Tensor:
        return super().embed(sam, batch)
