"""Masks as runs of pixels, counted down the columns, and COCO's two notations for that."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from sam_distill.images import Size


@dataclass(frozen=True)
class Runs:
    """edges: [2n] int64, strictly ascending: where each run begins and where it has ended. size: (H, W)."""

    edges: np.ndarray
    size: Size

    @property
    def area(self) -> int:
        return int((self.edges[1::2] - self.edges[::2]).sum())

    def uncompressed(self) -> dict[str, Any]:
        """COCO's lengths of runs outside and inside in turn: {"size": [H, W], "counts": [...]}."""
        counts = np.diff(self.edges, prepend=0, append=self.size[0] * self.size[1]).tolist()
        return {"size": list(self.size), "counts": counts if counts[-1] or len(counts) == 1 else counts[:-1]}

    def compressed(self) -> dict[str, Any]:
        """The same with COCO's string for counts, as SA-1B's JSON has it."""
        rle = coco.frPyObjects(self.uncompressed(), *self.size)
        return {"size": list(self.size), "counts": rle["counts"].decode()}

    def mask(self) -> np.ndarray:
        """[H, W] bool."""
        change = np.zeros(self.size[0] * self.size[1] + 1, np.int8)
        change[self.edges[::2]], change[self.edges[1::2]] = 1, -1
        return change[:-1].cumsum(dtype=np.int8).view(bool).reshape(self.size[::-1]).T


def runs_of(strips: Iterable[tuple[int, np.ndarray]], y: int, size: Size) -> Runs:
    """A mask from strips of it, left to right: x of the first column and [columns, rows] bool, the rows from y on.

    size: (H, W) of the whole mask.
    """
    edges = [np.zeros(0, np.int64)]
    for x, strip in strips:
        columns, rows = strip.shape
        fenced = np.zeros((columns, rows + 1), np.int8)  # a row of background ends each column's last run
        fenced[:, :rows] = strip
        changes = np.flatnonzero(np.diff(fenced.ravel(), prepend=np.int8(0)))
        column, row = np.divmod(changes, rows + 1)
        # A run that ends with its column ends where the next column begins: `row` is then `rows`, not 0.
        edges.append((x + column) * size[0] + y + row)
    joined = np.concatenate(edges)
    # Where a run ends at the foot of a column and another begins at the top of the next, they are one.
    meet = np.flatnonzero(joined[1:-1:2] == joined[2::2])
    return Runs(np.delete(joined, np.concatenate([2 * meet + 1, 2 * meet + 2])), size)
