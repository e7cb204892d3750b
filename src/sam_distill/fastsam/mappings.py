"""From FastSAM's masks of everything in an image to one mask for a prompt.

A SAM decodes a prompt. FastSAM segments everything first, then a rule of plain geometry answers. Which one is an
option, for its releases differ in what they make of foreground and background points together.

All take masks [N, H, W] bool (N may be 0), points [K, 2] int64 (x, y) within them and labels [K] int64, FOREGROUND or
BACKGROUND, in the order given; the answer is [H, W] bool.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from sam_distill.types import BACKGROUND, FOREGROUND

MappingName = Literal["official", "ultralytics_old", "ultralytics_new"]


def official(masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """FastSAM's own (`point_prompt`): masks are painted from large to small, each once for every point that it holds.

    A foreground point paints it in, a background point out, so the last point that a mask holds decides on it: a mask
    with both is painted out if the background point comes second. What is painted out takes larger masks with it.
    """
    held = _held(masks, points)
    masks, held = masks[held.any(1)], held[held.any(1)]
    answer = masks.new_zeros(masks.shape[1:])
    for n in masks.flatten(1).sum(1).argsort(descending=True, stable=True).tolist():
        answer[masks[n]] = bool(labels[held[n]][-1] == FOREGROUND)
    return answer


def ultralytics_old(masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """ultralytics 8.2, 8.3 and early 8.4: of the masks that hold points, those whose last one is foreground, together.

    Nothing is taken out of them. With background points alone: all masks that hold none.
    """
    chosen = labels.new_full((len(masks),), not (labels == FOREGROUND).any()).bool()
    for held, label in zip(_held(masks, points).T, labels, strict=True):
        chosen[held] = bool(label == FOREGROUND)
    return masks[chosen].any(0)


def ultralytics_new(masks: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """ultralytics 8.4.190: masks that hold a foreground point and no background point, together, in whatever order.

    With background points alone: all masks that hold none.
    """
    held = _held(masks, points)
    wanted = held[:, labels == FOREGROUND].any(1) | (not (labels == FOREGROUND).any())
    return masks[wanted & ~held[:, labels == BACKGROUND].any(1)].any(0)


def best_for_box(masks: Tensor, box: Tensor) -> Tensor:
    """FastSAM's `box_prompt`: the mask with the highest IoU with the area of the box, [4] (x0, y0, x1, y1)."""
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
    """[N, K] bool: which mask holds which point."""
    return masks[:, points[:, 1], points[:, 0]]
