import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sam_distill.metrics import MeanIoU, bootstrap, mask_iou

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


def test_empty_masks_hide_nothing() -> None:
    """Design, numerics rule 7."""
    empty, full = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    metric = MeanIoU()
    metric.update(mask_iou(torch.stack([empty, full, empty]), torch.stack([full, full, empty])))
    # 0 for the empty prediction, 1, and the empty target left out
    assert {name: value.item() for name, value in metric.compute().items()} == {"miou": 0.5, "prompts": 2, "skipped": 1}


def test_mean_is_over_prompts_however_they_are_batched() -> None:
    values = torch.rand(11, generator=torch.Generator().manual_seed(0))
    metric = MeanIoU()
    for part in values.split([1, 7, 3]):
        metric.update(part)
    torch.testing.assert_close(metric.compute()["miou"], values.mean())


def test_float64_is_not_needed() -> None:
    """Apple's GPUs have none. Half a million prompts, whose sum in float32 would be off in the fourth digit."""
    values = torch.rand(500_000, generator=torch.Generator().manual_seed(0))
    metric = MeanIoU()
    for part in values.split(100_000):
        metric.update(part)
    assert metric.compute()["miou"].item() == pytest.approx(values.double().mean().item(), abs=1e-7)
    assert metric.compute()["miou"].dtype == torch.float32
    tensors = [value for value in vars(metric).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 3
    assert not any(value.dtype == torch.float64 for value in tensors)


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
