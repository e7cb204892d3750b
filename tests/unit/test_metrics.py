from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sam_distill.metrics import bootstrap, mask_iou

MASKS = arrays(bool, (3, 5, 7), elements=st.booleans())


@given(MASKS, MASKS)
def test_iou_is_intersection_over_union(prediction: object, target: object) -> None:
    p, t = torch.as_tensor(prediction), torch.as_tensor(target)
    for got, a, b in zip(mask_iou(p, t), p, t, strict=True):
        ours, theirs = ({(i, j) for i, j in torch.nonzero(m).tolist()} for m in (a, b))
        if not theirs:
            assert got.isnan()
        else:
            assert got.item() == torch.tensor(len(ours & theirs) / len(ours | theirs)).item()


def test_the_interval_covers() -> None:
    """Of many data sets whose mean is known, nineteen in twenty intervals hold it; prompts of an image are alike."""
    random, held, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        level = random.beta(2, 2, size=60)  # of each image; the mean is 0.5
        prompts = np.clip(np.repeat(level, 4) + random.normal(0, 0.02, 240), 0, 1)
        low, high = bootstrap([str(i) for i in np.repeat(np.arange(60), 4)], prompts.tolist(), 400) or (1, 0)
        held += low <= 0.5 <= high
    assert 0.90 < held / trials < 0.98


def test_an_empty_target_is_not_drawn() -> None:
    assert bootstrap(["a", "b"], [0.5, float("nan")]) == (0.5, 0.5)
    assert bootstrap(["a"], [float("nan")]) is None
