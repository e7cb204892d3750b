"""Rules that turn FastSAM's masks of everything in an image into one mask for a prompt.

SAM decodes a prompt. FastSAM segments everything first, then a geometric rule combines these masks. The rule is an
option, because FastSAM's releases treat foreground and background points together differently.

All rules for points take masks [N, H, W] bool (N may be 0), points [K, 2] int64 (x, y) within them and labels [K]
int64, FOREGROUND or BACKGROUND, in the order given; they return a mask [H, W] bool.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from sam_distill.types import BACKGROUND, FOREGROUND

MappingName = Literal["official", "ultralytics_old", "ultralytics_new"]


def official(masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """Apply FastSAM's own rule (`point_prompt`): paint the masks from large to small, once for every point they hold.

    A foreground point paints the mask in, a background point erases it, so the last point that it holds decides: a mask
    with both is erased if the background point comes second. Erasing also removes these pixels from larger masks.
    """
    held = _held(masks, points)
    masks, held = masks[held.any(1)], held[held.any(1)]
    answer = masks.new_zeros(masks.shape[1:])
    for n in masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist():
        answer[masks[n]] = bool(labels[held[n]][-1] == FOREGROUND)
    return answer


def ultralytics_old(masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """Apply the rule of ultralytics 8.2, 8.3 and early 8.4: the union of the masks whose last point is foreground.

    Nothing is erased from it. With background points alone: the union of all masks that hold none.
    """
    chosen = labels.new_full((len(masks),), not (labels == FOREGROUND).any()).bool()
    for held, label in zip(_held(masks, points).T, labels, strict=True):
        chosen[held] = bool(label == FOREGROUND)
    return masks[chosen].any(0)


def ultralytics_new(masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """Apply the rule of ultralytics 8.4.190: the union of masks that hold a foreground point and no background point.

    The order of points does not matter. With background points alone: the union of all masks that hold none.
    """
    held = _held(masks, points)
    wanted = held[:, labels == FOREGROUND].any(1) | (not (labels == FOREGROUND).any())
    return masks[wanted & ~held[:, labels == BACKGROUND].any(1)].any(0)


def best_for_box(masks: Tensor, box: Tensor) -> Tensor:
    """Apply FastSAM's `box_prompt`: return the mask with the highest IoU with the box, [4] (x0, y0, x1, y1)."""
    if not len(masks):
        return masks.new_zeros(masks.shape[1:])
    x0, y0, x1, y1 = box.long().tolist()
    inside = masks[:, y0:y1, x0:x1].flatten(1).sum(1)
    union = masks.flatten(1).sum(1) + (y1 - y0) * (x1 - x0) - inside
    return masks[(inside / union).argmax()]


RULES: dict[MappingName, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "official": official,
    "ultralytics_old": ultralytics_old,
    "ultralytics_new": ultralytics_new,
}


def _held(masks: Tensor, points: Tensor) -> Tensor:
    """Return which mask holds which point: [N, K] bool."""
    return masks[:, points[:, 1], points[:, 0]]
