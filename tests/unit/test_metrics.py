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
    for iou, a, b in zip(mask_iou(p, t), p, t, strict=True):
        predicted, truth = ({(i, j) for i, j in torch.nonzero(m).tolist()} for m in (a, b))
        if not truth:
            assert iou.isnan()
        else:
            assert iou.item() == torch.tensor(len(predicted & truth) / len(predicted | truth)).item()


def test_empty_prediction_counts_as_0_and_empty_target_is_skipped() -> None:
    """An empty prediction counts as 0, an empty target is left out."""
    empty, full = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    metric = MeanIoU()
    metric.update(mask_iou(torch.stack([empty, full, empty]), torch.stack([full, full, empty])))
    # IoU 0 for the empty prediction, 1 for the full one, none for the empty target
    assert {name: value.item() for name, value in metric.compute().items()} == {"miou": 0.5, "prompts": 2, "skipped": 1}


def test_mean_is_over_prompts_however_they_are_batched() -> None:
    values = torch.rand(11, generator=torch.Generator().manual_seed(0))
    metric = MeanIoU()
    for part in values.split([1, 7, 3]):
        metric.update(part)
    torch.testing.assert_close(metric.compute()["miou"], values.mean())


def test_mean_iou_needs_no_float64() -> None:
    """Apple's GPUs have no float64. A float32 sum over half a million prompts would be wrong in the fourth digit."""
    values = torch.rand(500_000, generator=torch.Generator().manual_seed(0))
    metric = MeanIoU()
    for part in values.split(100_000):
        metric.update(part)
    assert metric.compute()["miou"].item() == pytest.approx(values.double().mean().item(), abs=1e-7)
    assert metric.compute()["miou"].dtype == torch.float32
    tensors = [value for value in vars(metric).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 3
    assert not any(value.dtype == torch.float64 for value in tensors)


def test_95_percent_interval_contains_the_true_mean() -> None:
    """About 95% of the intervals of many data sets contain the known mean. Prompts of the same image are correlated."""
    random, covered, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        level = random.beta(2, 2, size=60)  # mean IoU of each image; its expected value is 0.5
        prompts = np.clip(np.repeat(level, 4) + random.normal(0, 0.02, 240), 0, 1)
        low, high = bootstrap([str(i) for i in np.repeat(np.arange(60), 4)], prompts.tolist(), 400) or (1, 0)
        covered += low <= 0.5 <= high
    assert 0.90 < covered / trials < 0.98


def test_bootstrap_leaves_out_empty_targets() -> None:
    assert bootstrap(["a", "b"], [0.5, float("nan")]) == (0.5, 0.5)
    assert bootstrap(["a"], [float("nan")]) is None
