"""Joint finetuning: the paper's other second stage of decoupled distillation."""

from torch import nn

from sam_distill.models.sam import Sam
from sam_distill.strategies.masks import MaskStrategy


class FinetuneJoint(MaskStrategy):
    """Strategy that trains a distilled image encoder and the mask decoder together on masks (paper, section 3.2)."""

    finetunes = True

    def trainable(self, sam: Sam) -> dict[str, nn.Module]:
        return {"image_encoder": sam.image_encoder, "mask_decoder": sam.mask_decoder}
