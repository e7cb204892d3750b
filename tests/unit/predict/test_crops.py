import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_anything.utils.amg import build_point_grid, generate_crop_boxes, is_box_near_crop_edge

from sam_distill.predict.crops import crop_boxes, is_cut_off, point_grid


@pytest.mark.parametrize("side", [1, 3, 32])
def test_point_grid_matches_segment_anything(side: int) -> None:
    np.testing.assert_array_equal(point_grid(side), build_point_grid(side))


@given(st.tuples(st.integers(8, 3000), st.integers(8, 3000)), st.integers(0, 3), st.floats(0, 0.5))
def test_crop_boxes_match_segment_anything(size: tuple[int, int], layers: int, overlap: float) -> None:
    boxes, numbers = generate_crop_boxes(size, layers, overlap)
    theirs = [
        (layer, (x0, y0, x1, y1)) for layer, (x0, y0, x1, y1) in zip(numbers, boxes, strict=True) if x0 < x1 and y0 < y1
    ]
    assert crop_boxes(size, layers, overlap) == theirs, "but for crops without a pixel"


@given(st.tuples(*[st.integers(0, 199)] * 2), st.tuples(*[st.integers(200, 400)] * 2))
def test_cut_off_masks_match_segment_anything(first: tuple[int, int], last: tuple[int, int]) -> None:
    crop, size = (90, 100, 300, 310), (310, 400)
    box = torch.tensor([[*first, *last]])
    corner = torch.tensor([[90, 100, 90, 100]])
    expected = bool(is_box_near_crop_edge(box - corner, list(crop), [0, 0, 400, 310]))
    assert is_cut_off((*first, *last), crop, size) == expected
