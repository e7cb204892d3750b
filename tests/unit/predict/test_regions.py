import numpy as np
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from skimage.measure import label

from sam_distill.predict.regions import remove_small_regions


def test_small_holes_are_filled_and_small_islands_removed() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:12, 2:12] = True
    mask[4:6, 4:6] = False  # 4 pixels
    mask[8:11, 8:11] = False  # 9 pixels
    mask[15:17, 15:18] = True  # 6 pixels
    expected = np.zeros((20, 20), bool)
    expected[2:12, 2:12] = True
    expected[8:11, 8:11] = False
    np.testing.assert_array_equal(remove_small_regions(mask, 8), expected)


def test_pixels_that_touch_at_corners_are_one_region() -> None:
    mask = np.eye(10, dtype=bool)
    np.testing.assert_array_equal(remove_small_regions(mask, 10), mask)


def test_where_all_are_small_the_largest_stays() -> None:
    mask = np.zeros((20, 20), bool)
    mask[1:3, 1:3] = True
    mask[10:13, 10:13] = True
    assert remove_small_regions(mask, 50).sum() == 9
    assert not remove_small_regions(np.zeros((20, 20), bool), 5).any()


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=3, max_side=10)))
def test_at_most_one_small_region_is_left(mask: np.ndarray) -> None:
    sizes = np.bincount(label(remove_small_regions(mask, 4), connectivity=2).ravel())[1:]
    assert len(sizes) == 1 or (sizes >= 4).all()
