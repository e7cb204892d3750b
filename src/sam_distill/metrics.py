"""IoU between masks, its mean and the confidence interval of the mean."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from sam_distill.types import upload

_IOU_SCALE = 2**30  # sums of IoUs are integers, in units of 1 / _IOU_SCALE


def mask_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the IoU of boolean masks: [..., H, W] -> [...] float32; NaN where the target is empty."""
    return iou_of(overlap(prediction, target))


def overlap(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the numbers of pixels of prediction, target and both: boolean masks [..., H, W] -> [..., 3] int64."""
    counts = [mask.sum((-1, -2)) for mask in (prediction, target, prediction & target)]
    return torch.stack(torch.broadcast_tensors(*counts), dim=-1)


def iou_of(pixels: Tensor) -> Tensor:
    """Return the IoUs, as `mask_iou` does, from the counts that `overlap` returns: [..., 3] -> [...] float32."""
    prediction, target, both = pixels.unbind(-1)
    return (both / (prediction + target - both).clamp_min(1)).masked_fill(target == 0, torch.nan)


def bootstrap(images: Sequence[str], ious: Sequence[float], resamplings: int = 1000) -> tuple[float, float] | None:
    """Return the bootstrap 95% interval of the mean IoU, over images drawn with replacement; None if there is no IoU.

    Images are resampled, not prompts: IoUs of prompts on the same image are correlated. NaN (empty target) is left out.
    """
    totals: dict[str, tuple[float, int]] = {}  # image -> sum and number of its IoUs
    for image, iou in zip(images, ious, strict=True):
        if iou == iou:
            total, count = totals.get(image, (0.0, 0))
            totals[image] = total + iou, count + 1
    if not totals:
        return None
    table = np.array(list(totals.values()))
    drawn = table[np.random.default_rng(0).integers(len(table), size=(resamplings, len(table)))].sum(1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])
    return float(low), float(high)


class MeanIoU(Metric):
    """Mean over prompts (not over images, not pooled over pixels), exact under data-parallel training.

    An empty prediction against a non-empty target counts as 0. An empty target is left out and counted in `skipped`.
    The sum is kept as an integer: exact in any order, and on Apple's GPUs, which have no float64.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    prompts: Tensor
    skipped: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "prompts", "skipped"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, iou: Tensor) -> None:
        """Add IoUs of any shape and device, as `mask_iou` returns them."""
        iou = upload(iou, self.total.device)
        known = ~iou.isnan()
        self.total += (iou.nan_to_num(0) * _IOU_SCALE).long().sum()
        self.prompts += known.sum()
        self.skipped += (~known).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `miou` (NaN if there was no prompt at all), `prompts` and `skipped`, over all ranks."""
        return {"miou": self.total / _IOU_SCALE / self.prompts, "prompts": self.prompts, "skipped": self.skipped}
