"""Make prompts: from points and boxes as SAM takes them, or drawn at random, the same for every strategy and run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_distill.types import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FRAME, LOW_RES, NOT_A_POINT, Prompts


def point_prompts(points: Tensor, labels: Tensor, masks: Tensor | None = None) -> Prompts:
    """points [B, P, N, 2] in frame pixels, labels [B, P, N] (1, 0, or ABSENT where there are fewer than N).

    SAM's rule: points without a box are followed by one NOT_A_POINT token.
    """
    present = (labels != ABSENT).any(-1, keepdim=True)
    padding = torch.where(present, NOT_A_POINT, ABSENT).to(labels)
    return Prompts(F.pad(points.float(), (0, 0, 0, 1)), torch.cat([labels, padding], dim=-1), masks)


def box_prompts(
    boxes: Tensor, points: Tensor | None = None, labels: Tensor | None = None, masks: Tensor | None = None
) -> Prompts:
    """boxes [B, P, 4] (x0, y0, x1, y1) in frame pixels, NaN where there is none; points may stand beside them."""
    corners = boxes.float().unflatten(-1, (2, 2))
    corner_labels = torch.tensor([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], device=boxes.device).expand(corners.shape[:-1])
    corner_labels = corner_labels.masked_fill(corners.isnan().any(-1), ABSENT)
    corners = corners.nan_to_num()
    if points is not None and labels is not None:  # SAM's order: points first
        corners = torch.cat([points.float(), corners], dim=2)
        corner_labels = torch.cat([labels, corner_labels], dim=2)
    return Prompts(corners, corner_labels, masks)


def uniform_points(keys: Sequence[str], sizes: Tensor, count: int, seed: int, step: int = 0) -> Tensor:
    """`count` pixels per image, uniform over its valid area: [B, count, 2] float32 (x, y), on the device of `sizes`.

    They depend on (seed, key, step) alone, so strategies and sweeps see the same prompts, and a resumed run goes on.
    """
    uniform = np.stack([_generator(seed, key, step).random((count, 2), dtype=np.float32) for key in keys])
    extent = sizes.flip(-1).unsqueeze(1)  # (w, h)
    return (torch.from_numpy(uniform).to(sizes.device) * extent).floor()


def boxes_of(low_res: Tensor, area: Tensor) -> Tensor:
    """Tight boxes of masks: logits [B, P, 256, 256] > 0 within area [B, 1, 256, 256] -> [B, P, 4] frame pixels.

    An empty mask has no box: NaN.
    """
    inside = (low_res > 0) & area
    cell = FRAME // LOW_RES
    sides = []
    for occupied in (inside.any(-2), inside.any(-1)):  # columns, rows: [B, P, 256]
        first = occupied.int().argmax(-1) * cell
        last = (LOW_RES - occupied.flip(-1).int().argmax(-1)) * cell - 1
        sides.append(torch.stack([first, last], dim=-1))
    boxes = torch.stack(sides, dim=-1).flatten(-2).float()  # x0, y0, x1, y1
    return boxes.masked_fill(~inside.any((-1, -2)).unsqueeze(-1), torch.nan)


def _generator(seed: int, key: str, step: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}/{step}/{key}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
