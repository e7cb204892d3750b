import json

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco
from segment_anything.utils.amg import mask_to_rle_pytorch

from sam_distill.predict.run_lengths import runs_of

MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=12))


@given(MASKS, st.integers(1, 5))
def test_runs_match_segment_anything(mask: np.ndarray, step: int) -> None:
    """For whole masks that are given in strips of any width."""
    strips = [(x, mask[:, x : x + step].T) for x in range(0, mask.shape[1], step)]
    runs = runs_of(strips, 0, mask.shape)
    (expected,) = mask_to_rle_pytorch(torch.from_numpy(mask)[None])
    assert runs.uncompressed() == expected
    assert runs.area == mask.sum()
    np.testing.assert_array_equal(runs.mask(), mask)
    compressed = json.loads(json.dumps(runs.compressed()))
    np.testing.assert_array_equal(coco.decode(compressed), mask)


@given(MASKS, st.tuples(*[st.integers(0, 3)] * 4))
def test_a_mask_may_lie_within_a_larger_one(mask: np.ndarray, margins: tuple[int, int, int, int]) -> None:
    left, right, top, bottom = margins
    whole = np.pad(mask, ((top, bottom), (left, right)))
    np.testing.assert_array_equal(runs_of([(left, mask.T)], top, whole.shape).mask(), whole)


def test_an_empty_mask_has_no_runs() -> None:
    assert runs_of([], 0, (3, 4)).uncompressed() == {"size": [3, 4], "counts": [12]}
