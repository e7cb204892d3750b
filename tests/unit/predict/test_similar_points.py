import numpy as np
import torch

from sam_distill.predict.full_size import Patch
from sam_distill.predict.similar_points import SimilarPoints

POINTS = np.array([[100.0, 100.0], [300.0, 100.0], [100.0, 300.0], [900.0, 900.0]])  # (x, y) in the frame


def patch(side: int) -> Patch:
    """Return a mask of the first `side` x `side` cells of the frame."""
    return Patch(torch.ones(side, side), 0, 0, (0, side), (0, side))


def test_redundant_points_look_alike_and_lie_in_the_smallest_mask() -> None:
    embedding = torch.zeros(1, 256, 64, 64)
    embedding[:, 0] = 1
    embedding[:, 1, 16:32, :16] = 1  # the third point looks different
    similar = SimilarPoints(embedding, POINTS)
    assert similar.redundant_points(0, []).tolist() == [True, True, False, True], "no mask: anywhere"
    assert similar.redundant_points(0, [patch(256), patch(80)]).tolist() == [True, True, False, False]
    assert similar.redundant_points(0, [patch(256), patch(30)]).tolist() == [True, False, False, False]
    assert similar.redundant_points(2, [patch(256)]).tolist() == [False, False, True, False]


def test_offset_of_a_patch_is_taken_into_account() -> None:
    similar = SimilarPoints(torch.ones(1, 256, 64, 64), POINTS)
    logits = torch.full((20, 20), -1.0)
    logits[:5, 10:] = 1  # cells 70..79 in x, 20..24 in y: the second point's cell, (75, 25), is just below
    mask = Patch(logits, 20, 60, (0, 1), (0, 1))
    assert not similar.redundant_points(0, [mask]).any()
    logits[5] = 1
    assert similar.redundant_points(0, [mask]).tolist() == [False, True, False, False]
