"""Joint finetuning: the other second stage that the paper names."""

from torch import nn

from sam_distill.models.sam import Sam
from sam_distill.strategies.masks import MaskStrategy


class FinetuneJoint(MaskStrategy):
    """A distilled image encoder and the mask decoder learn from masks together (paper, section 3.2)."""

    finetunes = True

    def trainable(self, sam: Sam) -> dict[str, nn.Module]:
        return {"image_encoder": sam.image_encoder, "mask_decoder": sam.mask_decoder}
