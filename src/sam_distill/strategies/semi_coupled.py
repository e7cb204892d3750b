"""Semi-coupled distillation: train the image encoder on masks, through a frozen mask decoder."""

from torch import nn

from sam_distill.models.sam import Sam
from sam_distill.strategies.masks import MaskStrategy


class SemiCoupled(MaskStrategy):
    """Training of the image encoder on masks with a frozen copy of the teacher's decoder (paper, Figure 2, right)."""

    def trainable(self, sam: Sam) -> dict[str, nn.Module]:
        return {"image_encoder": sam.image_encoder}
