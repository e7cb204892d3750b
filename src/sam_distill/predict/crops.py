"""Grids of points and layers of image crops for the mask generator."""

from collections.abc import Sequence
from itertools import product
from math import ceil

import numpy as np

from sam_distill.images import Size

Box = tuple[int, int, int, int]  # x0, y0, x1, y1; for a mask x1, y1 are its last pixel, and all are 0 if it is empty


def point_grid(points_per_side: int) -> np.ndarray:
    """Return the centres of n x n equal cells, row by row: [n * n, 2] (x, y) in 0..1."""
    half = 1 / (2 * points_per_side)
    centres = np.linspace(half, 1 - half, points_per_side)
    x, y = np.meshgrid(centres, centres)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def coarse_to_fine(grid: np.ndarray) -> np.ndarray:
    """Return an order [n] of grid points [n, 2]: every fourth row and column, then every second, then all others."""
    column, row = (np.unique(side, return_inverse=True)[1] for side in grid.T)
    level = 2 - sum(((column % step == 1) & (row % step == 1)).astype(int) for step in (2, 4))
    return np.argsort(level, kind="stable")


def checked_grids(grids: Sequence[np.ndarray], layers: int) -> list[np.ndarray]:
    """Return a user's own points for each layer of crops, [n, 2] float64; raise ValueError if they are invalid."""
    points = [np.asarray(grid, np.float64) for grid in grids]
    if any(grid.ndim != 2 or grid.shape[1] != 2 for grid in points):
        shapes = ", ".join(str(list(grid.shape)) for grid in points)
        raise ValueError(f"point_grids is a list of [n, 2], one for each layer of crops, not of {shapes}")
    if len(points) <= layers:
        raise ValueError(f"{len(points)} point_grids for {layers + 1} layers: the image itself, and crop_n_layers")
    if not all(((grid >= 0) & (grid <= 1)).all() for grid in points):
        raise ValueError("point_grids are (x, y) in 0..1, shares of the image's width and height, not pixels")
    return points


def crop_boxes(size: Size, layers: int, overlap_ratio: float) -> list[tuple[int, Box]]:
    """Return (layer, box) of the whole image (layer 0) and of the 2^i x 2^i overlapping crops of layers i = 1, 2, ...

    overlap_ratio: overlap of the crops of layer 1 as a share of the image's short side; halves with each further layer.
    """
    height, width = size
    boxes: list[tuple[int, Box]] = [(0, (0, 0, width, height))]
    for layer in range(1, layers + 1):
        crops = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / crops))
        wide, tall = (ceil((overlap * (crops - 1) + side) / crops) for side in (width, height))
        for column, row in product(range(crops), range(crops)):
            x, y = column * (wide - overlap), row * (tall - overlap)
            if x < width and y < height:  # an image of a pixel or two has fewer crops
                boxes.append((layer, (x, y, min(x + wide, width), min(y + tall, height))))
    return boxes


def is_cut_off(box: Box, crop: Box, size: Size, tolerance: int = 20) -> bool:
    """Whether a mask's box (pixels of the image) ends within `tolerance` of its crop's edge, but not of the image's."""
    edges = zip(box, crop, (0, 0, size[1], size[0]), strict=True)
    return any(abs(side - end) <= tolerance < abs(side - border) for side, end, border in edges)
