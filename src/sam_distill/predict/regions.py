"""Removal of small islands and holes from masks."""

import numpy as np
from skimage.measure import label


def remove_small_regions(mask: np.ndarray, least: int) -> np.ndarray:
    """Fill holes of fewer than `least` pixels in a mask [H, W] bool, then remove such islands, except the largest.

    Regions are 8-connected, as in segment-anything.
    """
    regions = label(~mask, connectivity=2)
    mask = mask | (np.bincount(regions.ravel()) < least)[regions] & ~mask
    regions = label(mask, connectivity=2)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    kept = sizes >= least
    kept[sizes.argmax()] |= not kept.any()
    return kept[regions] & mask
