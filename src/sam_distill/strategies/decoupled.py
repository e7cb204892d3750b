"""Decoupled distillation: train the image encoder on the teacher's embedding."""

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from sam_distill.losses import embedding_cosine, embedding_mse, embedding_norm, embedding_smooth_l1
from sam_distill.models.sam import Sam
from sam_distill.strategies.base import Strategy
from sam_distill.types import GRID, Batch, StepOutput, valid_area

_LOSSES = {"mse": embedding_mse, "smooth_l1": embedding_smooth_l1, "norm": embedding_norm}


class Decoupled(Strategy):
    """Strategy that trains without prompts and without a mask decoder (paper, section 3.2 and Figure 3).

    The student's image encoder learns the teacher's embedding; the teacher's mask decoder then works on it unchanged.

    loss: mse (the paper's), smooth_l1 (NanoSAM's) or norm (root of the sum of squares).
    cosine: weight of an added (1 - cosine similarity); EfficientSAM3 uses 1.
    padding: weight of the frame's padding in the loss, relative to the image's 1; 0 leaves it out. The mask decoder
        also attends to the student's embedding in the padding (experiments/padding_mask).
    """

    requires = frozenset({"teacher_embedding"})

    def __init__(
        self,
        loss: Literal["mse", "smooth_l1", "norm"] = "mse",
        cosine: Annotated[float, Field(ge=0)] = 0.0,
        padding: Annotated[float, Field(ge=0, le=1)] = 0.1,
    ) -> None:
        super().__init__()
        self.distance = _LOSSES[loss]
        self.cosine = cosine
        self.padding = padding

    def trainable(self, sam: Sam) -> dict[str, nn.Module]:
        return {"image_encoder": sam.image_encoder}

    def step(self, sam: Sam, batch: Batch) -> StepOutput:
        assert batch.teacher_embedding is not None
        embedding = sam.encode(batch.images, batch.sizes)
        area = valid_area(batch.sizes, GRID).float().clamp_min(self.padding)
        loss = self.distance(embedding, batch.teacher_embedding, area)
        if not self.cosine:
            return StepOutput(loss)
        cosine = embedding_cosine(embedding, batch.teacher_embedding, area)
        return StepOutput(loss + self.cosine * (1 - cosine), {"cosine": cosine.detach()})
