"""Up-sample masks to original size, but only where they are: a rectangle is a product of three small matrices."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sam_distill.images import Size, upscale_weights
from sam_distill.predict.crops import Box
from sam_distill.predict.run_lengths import Runs, runs_of

STRIP = 128  # columns at a time on a CPU, so that their logits fit in its cache

Span = tuple[int, int]  # start, end (exclusive)


@dataclass(frozen=True)
class Patch:
    """Part of a low-res mask from which a rectangle of the full-size mask is computed.

    logits: [h, w] float32, the cells from row `y_cell` and column `x_cell` on. y, x: the rectangle's rows and columns.
    """

    logits: Tensor
    y_cell: int
    x_cell: int
    y: Span
    x: Span


class PatchUpsampler:
    """Up-sampler of low-res logits with the results of `upscale_masks`, for parts of a mask.

    size: (h, w) of the picture in the frame. crop: (x0, y0, x1, y1) of the picture in the whole image of `image_size`
    (H, W); patches and boxes are relative to the crop's top left corner.
    """

    def __init__(self, size: Size, crop: Box, image_size: Size, device: torch.device) -> None:
        self.crop, self.image_size = crop, image_size
        x0, y0, x1, y1 = crop
        rows, columns = upscale_weights(size, (y1 - y0, x1 - x0))
        self._row_cells, self._column_cells = _cell_ranges(rows), _cell_ranges(columns)
        self._rows, self._columns = rows.to(device), columns.to(device)

    def patches(self, low_res: Tensor, level: float) -> list[Patch]:
        """Return where masks [n, 256, 256] can be above a level: no pixel is above all the cells that it depends on."""
        above = low_res > level
        occupied = torch.stack([above.any(-1), above.any(-2)]).cpu().numpy()
        found = []
        for logits, rows, columns in zip(low_res, *occupied, strict=True):
            (y, (top, bottom)), (x, (left, right)) = _reach(rows, self._row_cells), _reach(columns, self._column_cells)
            found.append(Patch(logits[top:bottom, left:right].clone(), top, left, y, x))
        return found

    def measure(self, patch: Patch, offset: float) -> tuple[float, Box]:
        """Return a mask's stability score, the IoU of its logits above +offset and above -offset, and its box."""
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
        """Return the mask as runs in the whole image."""
        x0, y0, *_ = self.crop
        strips = ((x0 + x, (logits > 0).cpu().numpy()) for x, logits in self._strips(patch))
        return runs_of(strips, y0 + patch.y[0], self.image_size)

    def _strips(self, patch: Patch) -> Iterator[tuple[int, Tensor]]:
        """Yield strips of a patch's pixels from left to right: x of the first column, and logits [columns, rows]."""
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
    """Return the box of a mask with pixels in these columns and rows ([n] bool), which are numbered from x and y on."""
    if not rows.any():
        return 0, 0, 0, 0
    (left, right), (top, bottom) = _extent(columns), _extent(rows)
    return x + left, y + top, x + right - 1, y + bottom - 1


def _count(logits: Tensor, level: float) -> int | Tensor:
    """Return the number of pixels above a level. On a CPU numpy is several times faster than torch at this."""
    if logits.device.type == "cpu":
        return int(np.count_nonzero(logits.numpy() > level))
    return torch.count_nonzero(logits > level)


def _cell_ranges(weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the start and end (exclusive) of the cells each pixel depends on, ascending: weights [pixels, cells]."""
    used = (weights > 0).numpy()
    return used.argmax(1), used.shape[1] - used[:, ::-1].argmax(1)


def _reach(occupied: np.ndarray, cells: tuple[np.ndarray, np.ndarray]) -> tuple[Span, Span]:
    """Return the pixels that depend on any of the occupied cells ([256] bool), and all cells these pixels depend on."""
    (start, end), (first, last) = _extent(occupied), cells
    pixels = int(np.searchsorted(last, start, "right")), int(np.searchsorted(first, end, "left"))
    if end == start or pixels[0] >= pixels[1]:
        return (0, 0), (0, 0)
    return pixels, (int(first[pixels[0]]), int(last[pixels[1] - 1]))


def _extent(occupied: np.ndarray) -> Span:
    """Return the span from the first True to the last in [n] bool; (0, 0) if there is none."""
    found = np.flatnonzero(occupied)
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)
