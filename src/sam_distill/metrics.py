"""Mean IoU between masks of student and teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def mask_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """IoU of boolean masks [..., H, W] -> [...] float32. NaN where the target is empty: there is nothing to find."""
    intersection = (prediction & target).sum((-1, -2))
    union = (prediction | target).sum((-1, -2))
    iou = intersection / union.clamp_min(1)
    return iou.masked_fill(~target.any((-1, -2)), torch.nan)


class MeanIoU(Metric):
    """Mean over prompts (not over images, not pooled over pixels), exact under data-parallel training.

    An empty prediction against a non-empty target is 0. An empty target is left out and counted in `skipped`.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    prompts: Tensor
    skipped: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("skipped", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, iou: Tensor) -> None:
        """iou: any shape and device, as `mask_iou` gives it."""
        iou = iou.to(self.total.device)
        known = ~iou.isnan()
        self.total += iou[known].double().sum()
        self.prompts += known.sum()
        self.skipped += (~known).sum()

    def compute(self) -> dict[str, Tensor]:
        """`miou` (NaN if there was no prompt at all), `prompts` and `skipped`, over all ranks."""
        return {"miou": (self.total / self.prompts).float(), "prompts": self.prompts, "skipped": self.skipped}
