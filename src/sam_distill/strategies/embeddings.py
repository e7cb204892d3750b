"""Strategies whose loss compares image embeddings."""

from __future__ import annotations

from torch import nn

from sam_distill.losses import embedding_cosine, embedding_mse
from sam_distill.models.sam import Sam, valid_area
from sam_distill.strategies.base import Strategy
from sam_distill.types import GRID, Batch, StepOutput


class Decoupled(Strategy):
    """Decoupled distillation (paper, section 3.2 and Figure 3): no prompt and no mask decoder at training time.

    The student's image encoder learns the teacher's embedding; the teacher's decoder then works on it as it is.

    mask_padding: leave the padding of the frame out of the loss.
    """

    requires = frozenset({"teacher_embedding"})

    def __init__(self, mask_padding: bool = True) -> None:
        super().__init__()
        self.mask_padding = mask_padding

    def trainable(self, sam: Sam) -> dict[str, nn.Module]:
        return {"image_encoder": sam.image_encoder}

    def step(self, sam: Sam, batch: Batch) -> StepOutput:
        assert batch.teacher_embedding is not None
        embedding = sam.encode(batch.images, batch.sizes)
        area = valid_area(batch.sizes, GRID)
        loss = embedding_mse(embedding, batch.teacher_embedding, area if self.mask_padding else None)
        cosine = embedding_cosine(embedding.detach(), batch.teacher_embedding, area)
        return StepOutput(loss, {"cosine": cosine})
