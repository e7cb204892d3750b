"""Masks as runs of pixels in column-major order, and their two COCO run-length encodings (RLE)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from sam_distill.images import Size


@dataclass(frozen=True)
class Runs:
    """Mask as runs. edges: [2n] int64, strictly ascending: start and end (exclusive) of each run. size: (H, W)."""

    edges: np.ndarray
    size: Size

    @property
    def area(self) -> int:
        return int((self.edges[1::2] - self.edges[::2]).sum())

    def uncompressed(self) -> dict[str, Any]:
        """Return COCO's RLE: {"size": [H, W], "counts": [...]}, the lengths of runs outside and inside in turn."""
        counts = np.diff(self.edges, prepend=0, append=self.size[0] * self.size[1]).tolist()
        return {"size": list(self.size), "counts": counts if counts[-1] or len(counts) == 1 else counts[:-1]}

    def compressed(self) -> dict[str, Any]:
        """Return the RLE with counts as COCO's compressed string, as in SA-1B's JSON."""
        rle = coco.frPyObjects(self.uncompressed(), *self.size)
        return {"size": list(self.size), "counts": rle["counts"].decode()}

    def mask(self) -> np.ndarray:
        """Return the mask: [H, W] bool."""
        return coco.decode(coco.frPyObjects(self.uncompressed(), *self.size)).view(bool)


def runs_of(strips: Iterable[tuple[int, np.ndarray]], y: int, size: Size) -> Runs:
    """Return the runs of a mask from its strips, left to right: x of the first column and [columns, rows] bool.

    y: first row of the strips. size: (H, W) of the whole mask.
    """
    edges = [np.zeros(0, np.int64)]
    for x, strip in strips:
        columns, rows = strip.shape
        padded = np.zeros((columns, rows + 1), np.int8)  # a row of background ends each column's last run
        padded[:, :rows] = strip
        changes = np.flatnonzero(np.diff(padded.ravel(), prepend=np.int8(0)))
        column, row = np.divmod(changes, rows + 1)
        # A run to the end of a column ends where the next column begins: its `row` is then `rows`, not 0.
        edges.append((x + column) * size[0] + y + row)
    joined = np.concatenate(edges)
    # Join runs where one ends at the bottom of a column and another begins at the top of the next column.
    joints = np.flatnonzero(joined[1:-1:2] == joined[2::2])
    return Runs(np.delete(joined, np.concatenate([2 * joints + 1, 2 * joints + 2])), size)
