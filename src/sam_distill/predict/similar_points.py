"""Find points that "segment everything" can skip, as an earlier point already has their masks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_distill.predict.full_size import Patch
from sam_distill.types import FRAME, LOW_RES

SIMILAR = 0.92  # above this cosine of their image embeddings two points are similar; chosen on eight photographs


class SimilarPoints:
    """Similarity of points in an image. embedding: the image's [1, 256, 64, 64]; points: [n, 2] (x, y) in the frame."""

    def __init__(self, embedding: Tensor, points: np.ndarray) -> None:
        places = torch.from_numpy(points * (2 / FRAME) - 1).float().to(embedding.device)
        at_points = F.grid_sample(embedding.float(), places[None, None], align_corners=False)[0, :, 0]
        self._embeddings = F.normalize(at_points, dim=0).T.cpu().numpy()
        self._cells = (points * (LOW_RES / FRAME)).astype(int).clip(0, LOW_RES - 1)

    def redundant_points(self, point: int, masks: Sequence[Patch]) -> np.ndarray:
        """Return the points similar to `point` that lie in the smallest of its masks (if it has any): [n] bool."""
        similar = self._embeddings @ self._embeddings[point] > SIMILAR
        if masks:
            similar &= _contains(min(masks, key=lambda mask: int((mask.logits > 0).sum())), self._cells)
        return similar


def _contains(mask: Patch, cells: np.ndarray) -> np.ndarray:
    """Return which cells, [n, 2] (x, y) of the low-res mask, are in the mask: [n] bool."""
    (x, y), (height, width) = (cells - [mask.x_cell, mask.y_cell]).T, mask.logits.shape
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    inside[inside] = (mask.logits > 0).cpu().numpy()[y[inside], x[inside]]
    return inside
