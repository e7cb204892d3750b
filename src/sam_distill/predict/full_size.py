"""Masks at the size of the original, but only where they are: any rectangle is a product of three small matrices."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sam_distill.images import Size, upscale_weights
from sam_distill.predict.crops import Box
from sam_distill.predict.run_lengths import Runs, runs_of

STRIP = 128  # columns at a time on a CPU, whose cache their logits fit in

Span = tuple[int, int]  # from, to (not included)


@dataclass(frozen=True)
class Patch:
    """The part of a low-res mask that makes some rectangle of the full-size one.

    logits: [h, w] float32, the cells from row `y_cell` and column `x_cell` on. y, x: the rectangle's rows and columns.
    """

    logits: Tensor
    y_cell: int
    x_cell: int
    y: Span
    x: Span


class FullSize:
    """Up-samples low-res logits as `upscale_masks` does.

    size: (h, w) that the picture takes up in the frame. crop: the picture's place in a larger one of `image_size`
    (H, W), x0, y0, x1, y1; patches and boxes count from its corner.
    """

    def __init__(self, size: Size, crop: Box, image_size: Size, device: torch.device) -> None:
        self.crop, self.image_size = crop, image_size
        x0, y0, x1, y1 = crop
        rows, columns = upscale_weights(size, (y1 - y0, x1 - x0))
        self._row_cells, self._column_cells = _cells(rows), _cells(columns)
        self._rows, self._columns = rows.to(device), columns.to(device)

    def patches(self, low_res: Tensor, level: float) -> list[Patch]:
        """Where masks [n, 256, 256] can be above a level: no pixel is higher than all the cells it depends on."""
        above = low_res > level
        occupied = torch.stack([above.any(-1), above.any(-2)]).cpu().numpy()
        found = []
        for logits, rows, columns in zip(low_res, *occupied, strict=True):
            (y, (top, bottom)), (x, (left, right)) = _reach(rows, self._row_cells), _reach(columns, self._column_cells)
            found.append(Patch(logits[top:bottom, left:right].clone(), top, left, y, x))
        return found

    def measure(self, patch: Patch, offset: float) -> tuple[float, Box]:
        """A mask's stability score, which is the IoU of its logits above +offset and above -offset, and its box."""
        high: int | Tensor = 0
        low: int | Tensor = 0
        in_rows, in_columns = [], []
        for _, logits in self._strips(patch):
            high, low = high + _count(logits, offset), low + _count(logits, -offset)
            in_rows.append(logits.amax(0) > 0)
            in_columns.append(logits.amax(1) > 0)
        stability = int(high) / int(low) if low else float("nan")
        if not in_rows:
            return stability, (0, 0, 0, 0)
        rows, columns = torch.stack(in_rows).any(0).cpu().numpy(), torch.cat(in_columns).cpu().numpy()
        return stability, box_of(columns, rows, patch.x[0], patch.y[0])

    def runs(self, patch: Patch) -> Runs:
        """The mask itself, in the larger picture."""
        x0, y0, *_ = self.crop
        strips = ((x0 + x, (logits > 0).cpu().numpy()) for x, logits in self._strips(patch))
        return runs_of(strips, y0 + patch.y[0], self.image_size)

    def _strips(self, patch: Patch) -> Iterator[tuple[int, Tensor]]:
        """The pixels of a patch from left to right: x of the first column, and logits [columns, rows]."""
        (y0, y1), (x0, x1) = patch.y, patch.x
        if y0 == y1 or x0 == x1:
            return
        first, last = self._column_cells
        tall = self._rows[y0:y1, patch.y_cell : patch.y_cell + len(patch.logits)] @ patch.logits
        step = STRIP if tall.device.type == "cpu" else x1 - x0
        for x in range(x0, x1, step):
            end = min(x + step, x1)
            left, right = int(first[x]), int(last[end - 1])
            yield x, self._columns[x:end, left:right] @ tall[:, left - patch.x_cell : right - patch.x_cell].T


def box_of(columns: np.ndarray, rows: np.ndarray, x: int = 0, y: int = 0) -> Box:
    """The box of a mask that has pixels in these columns and rows ([n] bool), the first of which are x and y."""
    if not rows.any():
        return 0, 0, 0, 0
    (left, right), (top, bottom) = _extent(columns), _extent(rows)
    return x + left, y + top, x + right - 1, y + bottom - 1


def _count(logits: Tensor, level: float) -> int | Tensor:
    """Pixels above a level. On a CPU numpy compares and counts several times faster than torch."""
    if logits.device.type == "cpu":
        return int(np.count_nonzero(logits.numpy() > level))
    return torch.count_nonzero(logits > level)


def _cells(weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """weights [pixels, cells] -> the first cell that each pixel depends on, and the one after the last; both ascend."""
    used = (weights > 0).numpy()
    return used.argmax(1), used.shape[1] - used[:, ::-1].argmax(1)


def _reach(occupied: np.ndarray, cells: tuple[np.ndarray, np.ndarray]) -> tuple[Span, Span]:
    """The pixels that depend on any of the occupied cells ([256] bool), and all the cells that these depend on."""
    (start, end), (first, last) = _extent(occupied), cells
    pixels = int(np.searchsorted(last, start, "right")), int(np.searchsorted(first, end, "left"))
    if end == start or pixels[0] >= pixels[1]:
        return (0, 0), (0, 0)
    return pixels, (int(first[pixels[0]]), int(last[pixels[1] - 1]))


def _extent(occupied: np.ndarray) -> Span:
    """[n] bool -> the span from the first True to the last; (0, 0) if there is none."""
    found = np.flatnonzero(occupied)
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)
