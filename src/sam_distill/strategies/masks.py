"""The loss that all strategies on masks share, against the teacher's masks or annotations."""

from abc import ABC
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from sam_distill.losses import bce_dice, focal_dice, mean_per_prompt
from sam_distill.metrics import mask_iou
from sam_distill.models.sam import Sam
from sam_distill.prompts.forms import add_points
from sam_distill.prompts.sampling import PromptRng, corrections
from sam_distill.strategies.base import Strategy
from sam_distill.types import ABSENT, ALL, LOW_RES, Batch, Masks, Prompts, StepOutput, UserError, valid_area

_LOSSES = {"bce_dice": bce_dice, "focal_dice": focal_dice}


class MaskStrategy(Strategy, ABC):
    """The student's masks learn to be the target's for the same prompts, at low resolution.

    targets: the teacher's masks for the same prompts, or the annotation that each prompt was made from.
    tokens: which of the decoder's four mask tokens learn what.
        all: each learns the teacher's mask of the same token.
        chosen: token 0, and of tokens 1-3 the one that the teacher trusts most, likewise.
        minimum: SAM's rule. There is one target (the annotation, or the teacher's most trusted of three): token 0
            learns it, and of tokens 1-3 the one that is closest already.
    rounds: 1 for the prompts alone; with each further round a click in the error region joins them, for student and
        teacher alike (EdgeSAM's prompt-in-the-loop), and the losses of all rounds are averaged.
    mask_loss: bce_dice, EdgeSAM's 5 : 5; focal_dice, SAM's 20 : 1.
    iou: weight of the squared error of the predicted IoUs; SAM's is 1.
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
        """The student's embeddings, [B, 256, 64, 64]."""
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
        """What to learn. M = 4, one target per token; or M = 1, the same for all. iou: the teacher's trust in it."""
        if self.targets == "annotations":
            assert batch.annotations is not None
            masks = batch.annotations[:, : prompts.points.shape[1]].unsqueeze(2)
            return Masks(masks.float() - 0.5, masks.new_ones(masks.shape[:3], dtype=torch.float32))
        assert batch.ask_teacher is not None
        theirs = batch.ask_teacher(prompts)
        if self.tokens != "minimum":
            return theirs
        trusted = _trusted(theirs)
        return Masks(_take(theirs.low_res, trusted), _take(theirs.iou, trusted))

    def _compare(self, answer: Masks, target: Masks, valid: Tensor, batch: Batch) -> Tensor:
        """[3]: losses of masks and of predicted IoUs, and the IoU itself, means over prompts.

        The IoU is token 0's, and an empty target has none, as in validation.
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
            best = _trusted(target) if self.tokens == "chosen" else mask_loss[..., 1:].argmin(-1, keepdim=True) + 1
            per_prompt = (each[..., 0] + _take(each, best[None]).squeeze(-1)) / 2
        means, iou = [mean_per_prompt(values, valid) for values in per_prompt], iou[..., 0]
        return torch.stack([*means, mean_per_prompt(iou.nan_to_num(0), valid & ~iou.isnan())])

    @torch.no_grad()
    def _corrected(self, prompts: Prompts, answer: Masks, target: Masks, batch: Batch, number: int) -> Prompts:
        """The prompts with one more click each, where the student's token 0 is wrong."""
        draw = PromptRng(batch.keys, batch.epochs, self.seed, f"click{number}")
        area, wanted = valid_area(batch.sizes, LOW_RES), target.low_res[:, :, 0] > 0
        points, labels = corrections(draw, answer.low_res[:, :, 0] > 0, wanted, area, batch.sizes)
        return add_points(prompts, points, labels.masked_fill(~prompts.valid, ABSENT))


def _trusted(masks: Masks) -> Tensor:
    """[B, P, 1]: of tokens 1-3 the one with the highest predicted IoU."""
    return masks.iou[..., 1:].argmax(-1, keepdim=True) + 1


def _take(values: Tensor, token: Tensor) -> Tensor:
    """values [..., 4] or [..., 4, h, w], token [..., 1] -> the token's values, its dimension kept."""
    index = token.view(*token.shape, *[1] * (values.ndim - token.ndim))
    return values.take_along_dim(index, token.ndim - 1)
