"""Convert points and boxes to SAM's form of prompts, and masks to boxes."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_distill.types import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, CELL, FOREGROUND, NOT_A_POINT, Prompts, upload


def point_prompts(points: Tensor, labels: Tensor | None = None, masks: Tensor | None = None) -> Prompts:
    """Return prompts of points [B, P, N, 2] in frame pixels; labels [B, P, N] are by default all foreground.

    labels: 1, 0, or ABSENT where a prompt has fewer than N points.
    SAM's rule: points without a box are followed by one NOT_A_POINT token.
    """
    if labels is None:
        labels = torch.full(points.shape[:3], FOREGROUND, device=points.device)
    present = (labels != ABSENT).any(-1, keepdim=True)
    padding = torch.where(present, NOT_A_POINT, ABSENT).to(labels)
    return Prompts(F.pad(points.float(), (0, 0, 0, 1)), torch.cat([labels, padding], dim=-1), masks)


def box_prompts(
    boxes: Tensor, points: Tensor | None = None, labels: Tensor | None = None, masks: Tensor | None = None
) -> Prompts:
    """Return prompts of boxes [B, P, 4] (x0, y0, x1, y1) in frame pixels, NaN where absent, optionally with points."""
    corners = boxes.float().unflatten(-1, (2, 2))
    corner_labels = upload([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], boxes.device).expand(corners.shape[:-1])
    corner_labels = corner_labels.masked_fill(corners.isnan().any(-1), ABSENT)
    corners = corners.nan_to_num()
    if points is not None and labels is not None:  # SAM's order: points first
        corners = torch.cat([points.float(), corners], dim=2)
        corner_labels = torch.cat([labels, corner_labels], dim=2)
    return Prompts(corners, corner_labels, masks)


def join(parts: Sequence[Prompts]) -> Prompts:
    """Concatenate prompts for the same images along P. Prompts with fewer points are filled up with ABSENT."""
    longest = max(part.labels.shape[-1] for part in parts)
    missing = [longest - part.labels.shape[-1] for part in parts]
    points = [F.pad(part.points, (0, 0, 0, n)) for part, n in zip(parts, missing, strict=True)]
    labels = [F.pad(part.labels, (0, n), value=ABSENT) for part, n in zip(parts, missing, strict=True)]
    return Prompts(torch.cat(points, dim=1), torch.cat(labels, dim=1))


def add_points(prompts: Prompts, points: Tensor, labels: Tensor) -> Prompts:
    """Put one more point first in each prompt: points [B, P, 2], labels [B, P], ABSENT where a prompt gets none."""
    return Prompts(
        torch.cat([points.unsqueeze(2), prompts.points], dim=2), torch.cat([labels.unsqueeze(2), prompts.labels], dim=2)
    )


def boxes_of(masks: Tensor, area: Tensor) -> Tensor:
    """Return tight boxes: masks [B, P, 256, 256] bool within area [B, 1, 256, 256] -> [B, P, 4] in frame pixels.

    The box of an empty mask is NaN.
    """
    inside = masks & area
    sides = []
    for occupied in (inside.any(-2), inside.any(-1)):  # columns, rows: [B, P, 256]
        first = occupied.int().argmax(-1) * CELL
        last = (occupied.shape[-1] - occupied.flip(-1).int().argmax(-1)) * CELL - 1
        sides.append(torch.stack([first, last], dim=-1))
    boxes = torch.stack(sides, dim=-1).flatten(-2).float()  # x0, y0, x1, y1
    return boxes.masked_fill(~inside.any((-1, -2)).unsqueeze(-1), torch.nan)
