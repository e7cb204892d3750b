"""Points that need not be asked when everything is segmented, as one before them got their masks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_distill.predict.full_size import Patch
from sam_distill.types import FRAME, LOW_RES

SIMILAR = 0.92  # cosine of two points' image embeddings, chosen on eight photographs


class SimilarPoints:
    """embedding: of the image, [1, 256, 64, 64]; points: [n, 2] (x, y) in the frame."""

    def __init__(self, embedding: Tensor, points: np.ndarray) -> None:
        places = torch.from_numpy(points * (2 / FRAME) - 1).float().to(embedding.device)
        at_points = F.grid_sample(embedding.float(), places[None, None], align_corners=False)[0, :, 0]
        self._embeddings = F.normalize(at_points, dim=0).T.cpu().numpy()
        self._cells = (points * (LOW_RES / FRAME)).astype(int).clip(0, LOW_RES - 1)

    def answered_alike(self, point: int, masks: Sequence[Patch]) -> np.ndarray:
        """[n] bool: the points that look like this one and lie in the smallest of the masks that it got, if any."""
        similar = self._embeddings @ self._embeddings[point] > SIMILAR
        if masks:
            similar &= _contains(min(masks, key=_area), self._cells)
        return similar


def _area(mask: Patch) -> int:
    return int((mask.logits > 0).sum())


def _contains(mask: Patch, cells: np.ndarray) -> np.ndarray:
    """Which cells, [n, 2] (x, y) of the low-res mask, are in it: [n] bool."""
    (x, y), (height, width) = (cells - [mask.x_cell, mask.y_cell]).T, mask.logits.shape
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    inside[inside] = (mask.logits > 0).cpu().numpy()[y[inside], x[inside]]
    return inside
