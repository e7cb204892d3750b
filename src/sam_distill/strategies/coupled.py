"""Coupled distillation: train the image encoder and the mask decoder together on masks."""

from typing import Any, Literal

from torch import nn

from sam_distill.models.mask_decoder import MaskDecoder
from sam_distill.models.sam import Sam
from sam_distill.strategies.masks import MaskStrategy


class Coupled(MaskStrategy):
    """Joint training of image encoder and mask decoder on masks, as SAM itself was trained (paper, Figure 2, left)."""

    def __init__(
        self,
        decoder: Literal["scratch", "teacher"] = "scratch",
        prompt_encoder: Literal["frozen", "trains"] = "frozen",
        **masks: Any,
    ) -> None:
        super().__init__(**masks)
        self.decoder = decoder
        self.prompt_encoder = prompt_encoder

    def prepare(self, sam: Sam) -> None:
        if self.decoder == "scratch":
            sam.mask_decoder = MaskDecoder()

    def trainable(self, sam: Sam) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"image_encoder": sam.image_encoder, "mask_decoder": sam.mask_decoder}
        if self.prompt_encoder == "trains":
            prompts = sam.prompt_encoder
            parts["prompt_encoder"] = nn.ModuleList(
                [prompts.point_embeddings, prompts.not_a_point_embed, prompts.no_mask_embed]
            )
        return parts
