"""Random draws for prompts, for all images and prompts of a batch at once.

A draw depends on (seed, image key, epoch) alone, not on the batch, the rank or earlier draws: strategies and sweeps
see the same prompts, and a resumed run draws the same prompts as a run without interruption.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sam_distill.types import ABSENT, BACKGROUND, CELL, FOREGROUND, FRAME, LOW_RES, upload

_MIN_ERROR_CELLS = 10  # cells; a click into a smaller error would be noise (EdgeSAM's number)


def generator(seed: int, key: str, epoch: int, purpose: str = "") -> np.random.Generator:
    """Return a random generator for an image. purpose: makes draws for the same image and epoch differ."""
    what = f"{seed}/{epoch}{purpose}/{key}".encode(errors="surrogateescape")
    digest = hashlib.blake2b(what, digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


class PromptRng:
    """Random numbers for the images of a batch, drawn on the CPU so that they are the same for every device."""

    def __init__(self, keys: Sequence[str], epochs: Sequence[int], seed: int, purpose: str = "") -> None:
        self.generators = [generator(seed, key, epoch, purpose) for key, epoch in zip(keys, epochs, strict=True)]

    def uniform(self, *shape: int) -> Tensor:
        """Return [B, *shape] float32, uniform in [0, 1)."""
        return torch.from_numpy(np.stack([g.random(shape, dtype=np.float32) for g in self.generators]))

    def normal(self, *shape: int) -> Tensor:
        """Return [B, *shape] float32, normal with mean 0 and standard deviation 1."""
        return torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in self.generators]))


def uniform_points(draw: PromptRng, sizes: Tensor, count: int) -> Tensor:
    """Return `count` pixels per image, uniform in its valid area: [B, count, 2] float32 (x, y), on `sizes`' device."""
    extent = sizes.flip(-1).unsqueeze(1)  # (w, h)
    return (upload(draw.uniform(count, 2), sizes.device) * extent).floor()


def points_in(draw: PromptRng, masks: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return a pixel for each mask, uniform over its cells within the valid area.

    masks: [B, P, 256, 256] bool, False in the padding -> points [B, P, 2] float32 and found [B, P] bool, False where
    the mask is empty.
    """
    cells = masks.flatten(2)
    count = cells.sum(-1)
    random = upload(draw.uniform(masks.shape[1], 3), masks.device)
    rank = (random[..., 0] * count).floor().clamp_max((count - 1).clamp_min(0))
    index = (cells.cumsum(-1) > rank.unsqueeze(-1)).int().argmax(-1)  # the mask's cell number `rank`
    corner = torch.stack([index % LOW_RES, index // LOW_RES], dim=-1) * CELL
    last = (sizes.flip(-1) - 1).unsqueeze(1)  # a cell at the border may reach into the padding
    return torch.minimum(corner + (random[..., 1:] * CELL).floor(), last), count > 0


def jitter(draw: PromptRng, boxes: Tensor, sizes: Tensor, share: float, most: float) -> Tensor:
    """Add SAM's noise to boxes [B, P, 4]: standard deviation `share` of each side, clipped to +-`most` frame pixels."""
    sides = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
    noise = (upload(draw.normal(boxes.shape[1], 4), boxes.device) * share * sides).clamp(-most, most)
    last = (sizes.flip(-1) - 1).repeat(1, 2).unsqueeze(1)  # (w, h, w, h)
    return torch.minimum((boxes + noise).round().clamp_min(0), last)


def distant_points(
    draw: PromptRng, points: Tensor, sizes: Tensor, nearest: float | Tensor, farthest: float | Tensor
) -> Tensor:
    """Return for each point [B, P, 2] another one in a random direction and distance, within the valid area.

    nearest, farthest: limits of the distance in frame pixels, for all or [B, 1, 1]. In an image too small for the
    distance, return the farthest of several points on the border.
    """
    directions = 16
    random = upload(draw.uniform(points.shape[1], 2 + directions), points.device)
    distance = nearest + (farthest - nearest) * random[..., :1]
    angles = 2 * torch.pi * (random[..., 1:2] + torch.arange(directions, device=points.device) / directions)
    steps = distance.unsqueeze(-1) * torch.stack([angles.cos(), angles.sin()], dim=-1)
    candidates = (points.unsqueeze(2) + steps).round()  # [B, P, directions, 2]
    last = (sizes.flip(-1) - 1)[:, None, None]
    clipped = torch.minimum(candidates.clamp_min(0), last)
    is_inside = (candidates == clipped).all(-1)
    length = (clipped - points.unsqueeze(2)).norm(dim=-1) / FRAME  # below 2, the score of points inside
    score = torch.where(is_inside, 2 + random[..., 2:], length)
    return clipped.take_along_dim(score.argmax(-1)[..., None, None], 2).squeeze(2)


def values_at(masks: Tensor, points: Tensor) -> Tensor:
    """Return each mask's value at its point: masks [B, P, 256, 256], points [B, P, 2] in frame pixels -> [B, P]."""
    cell = (points // CELL).long()
    index = (cell[..., 1] * LOW_RES + cell[..., 0]).unsqueeze(-1)
    return masks.flatten(2).gather(2, index).squeeze(-1)


def corrections(draw: PromptRng, answer: Tensor, target: Tensor, area: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return a correcting click for each prompt: a random point in the error region, with its label in the target.

    answer, target: [B, P, 256, 256] bool; area: [B, 1, 256, 256] bool -> points [B, P, 2], labels [B, P], which are
    ABSENT where fewer than _MIN_ERROR_CELLS are wrong. (EdgeSAM, prompt-in-the-loop; SAM, "Training algorithm".)
    """
    wrong = (answer ^ target) & area
    points, _ = points_in(draw, wrong, sizes)
    labels = torch.where(values_at(target, points), FOREGROUND, BACKGROUND)
    return points, labels.masked_fill(wrong.sum((-1, -2)) < _MIN_ERROR_CELLS, ABSENT)
