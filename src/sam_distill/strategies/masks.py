"""Base class of the strategies with a loss on masks, against the teacher's masks or annotations."""

from abc import ABC
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from sam_distill.errors import UserError
from sam_distill.losses import bce_dice, focal_dice, mean_per_prompt
from sam_distill.metrics import mask_iou
from sam_distill.models.sam import Sam
from sam_distill.prompts.forms import add_points
from sam_distill.prompts.sampling import PromptRng, corrections
from sam_distill.strategies.base import Strategy
from sam_distill.types import ABSENT, ALL, LOW_RES, Batch, Masks, Prompts, StepOutput, valid_area

_LOSSES = {"bce_dice": bce_dice, "focal_dice": focal_dice}


class MaskStrategy(Strategy, ABC):
    """Strategy with a loss between the student's low-res masks and target masks for the same prompts.

    targets: the teacher's masks for the same prompts, or the annotation that each prompt was made from.
    tokens: which of the decoder's four mask tokens are trained, and with which target.
        all: each token, with the teacher's mask of the same token.
        chosen: likewise, but only token 0 and the one of tokens 1-3 with the teacher's highest predicted IoU.
        minimum: SAM's rule. There is one target (the annotation, or the one of the teacher's masks 1-3 with the highest
            predicted IoU), for token 0 and for the one of tokens 1-3 with the lowest mask loss.
    rounds: 1 for the prompts alone; each further round adds a click in the error region to them, for student and
        teacher alike (EdgeSAM's prompt-in-the-loop), and the losses of all rounds are averaged.
    mask_loss: bce_dice (EdgeSAM's, 5 : 5) or focal_dice (SAM's, 20 : 1).
    iou: weight of the squared error of the predicted IoUs; SAM uses 1.
    mask_padding: leave the padding of the frame out of the loss.
    seed: of the clicks.
    """

    def __init__(
        self,
        targets: Literal["teacher", "annotations"] = "teacher",
        tokens: Literal["all", "chosen", "minimum"] = "all",
        rounds: Annotated[int, Field(gt=0)] = 1,
        mask_loss: Literal["bce_dice", "focal_dice"] = "bce_dice",
        iou: Annotated[float, Field(ge=0)] = 1.0,
        mask_padding: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if targets == "annotations" and tokens != "minimum":
            raise UserError(f"strategy.tokens={tokens} needs a teacher; for targets=annotations take minimum")
        self.targets = targets
        self.tokens = tokens
        self.rounds = rounds
        self.mask_loss = _LOSSES[mask_loss]
        self.iou = iou
        self.mask_padding = mask_padding
        self.seed = seed
        self.requires = frozenset({"prompts", "ask_teacher" if targets == "teacher" else "annotations"})

    def embed(self, sam: Sam, batch: Batch) -> Tensor:
        """Return the student's embeddings: [B, 256, 64, 64]."""
        return sam.encode(batch.images, batch.sizes)

    def step(self, sam: Sam, batch: Batch) -> StepOutput:
        assert batch.prompts is not None
        embedding, prompts, losses = self.embed(sam, batch), batch.prompts, []
        for number in range(self.rounds):
            answer, target = sam.decode(embedding, prompts, ALL), self._target(batch, prompts)
            losses.append(self._compare(answer, target, prompts.valid, batch))
            if number + 1 < self.rounds:
                prompts = self._corrected(prompts, answer, target, batch, number)
        mask_loss, iou_error, miou = torch.stack(losses).mean(0)
        logs = {"mask_loss": mask_loss, "iou_error": iou_error, "miou": miou}
        return StepOutput(mask_loss + self.iou * iou_error, {name: value.detach() for name, value in logs.items()})

    @torch.no_grad()
    def _target(self, batch: Batch, prompts: Prompts) -> Masks:
        """Return the target masks: M = 4, one per token, or M = 1, one for all. iou: the teacher's predicted IoU."""
        if self.targets == "annotations":
            assert batch.annotations is not None
            masks = batch.annotations[:, : prompts.points.shape[1]].unsqueeze(2)
            return Masks(masks.float() - 0.5, masks.new_ones(masks.shape[:3], dtype=torch.float32))
        assert batch.ask_teacher is not None
        teacher_masks = batch.ask_teacher(prompts)
        if self.tokens != "minimum":
            return teacher_masks
        token = _best_token(teacher_masks)
        return Masks(_take_token(teacher_masks.low_res, token), _take_token(teacher_masks.iou, token))

    def _compare(self, answer: Masks, target: Masks, valid: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the masks, the loss of the predicted IoUs and the IoU, each a mean over prompts: [3].

        The IoU is that of token 0; prompts with an empty target are left out of it, as in validation.
        """
        inside, truth = valid_area(batch.sizes, LOW_RES), target.low_res > 0
        area = inside if self.mask_padding else None
        with torch.no_grad():
            iou = mask_iou((answer.low_res > 0) & inside.unsqueeze(1), truth & inside.unsqueeze(1))
        mask_loss = self.mask_loss(answer.low_res, truth, area)
        each = torch.stack([mask_loss, (answer.iou - iou.nan_to_num(0)).square()])  # [2, B, P, 4 tokens]
        if self.tokens == "all":
            per_prompt = each.mean(-1)
        else:
            best = _best_token(target) if self.tokens == "chosen" else mask_loss[..., 1:].argmin(-1, keepdim=True) + 1
            per_prompt = (each[..., 0] + _take_token(each, best[None]).squeeze(-1)) / 2
        means, iou = [mean_per_prompt(values, valid) for values in per_prompt], iou[..., 0]
        return torch.stack([*means, mean_per_prompt(iou.nan_to_num(0), valid & ~iou.isnan())])

    @torch.no_grad()
    def _corrected(self, prompts: Prompts, answer: Masks, target: Masks, batch: Batch, number: int) -> Prompts:
        """Return the prompts with one more click each, where the student's mask of token 0 is wrong."""
        draw = PromptRng(batch.keys, batch.epochs, self.seed, f"click{number}")
        area, wanted = valid_area(batch.sizes, LOW_RES), target.low_res[:, :, 0] > 0
        points, labels = corrections(draw, answer.low_res[:, :, 0] > 0, wanted, area, batch.sizes)
        return add_points(prompts, points, labels.masked_fill(~prompts.valid, ABSENT))


def _best_token(masks: Masks) -> Tensor:
    """Return the one of tokens 1-3 with the highest predicted IoU: [B, P, 1]."""
    return masks.iou[..., 1:].argmax(-1, keepdim=True) + 1


def _take_token(values: Tensor, token: Tensor) -> Tensor:
    """Return the token's values: values [..., 4] or [..., 4, h, w], token [..., 1] -> [..., 1] or [..., 1, h, w]."""
    index = token.view(*token.shape, *[1] * (values.ndim - token.ndim))
    return values.take_along_dim(index, token.ndim - 1)
