from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sam_distill.evaluate.agreement import Agreement
from sam_distill.evaluate.judge import Judge
from sam_distill.evaluate.protocol import Comparison
from sam_distill.metrics import iou_of, overlap
from sam_distill.types import Batch


def judge_of(*comparisons: Comparison) -> Judge:
    judge = Judge(Agreement(points=1))
    judge.comparisons = list(comparisons)
    return judge


def comparison(iou: float, teacher_area: int = 1, student_area: int = 1) -> Comparison:
    return Comparison("image", "point", (0.0, 0.0), (1,), iou, teacher_area, student_area)


def test_empty_masks_hide_nothing() -> None:
    """Design, numerics rule 7."""
    empty, full = torch.zeros(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)
    pixels = overlap(torch.stack([empty, full, empty]), torch.stack([full, full, empty]))
    compared = zip(iou_of(pixels).tolist(), pixels.tolist(), strict=True)
    scores = judge_of(*(comparison(iou, right, ours) for iou, (ours, right, _) in compared)).compute()
    # 0 for the empty prediction, 1, and the empty target left out
    assert (scores["miou/point"], scores["prompts/point"], scores["prompts_skipped"]) == (0.5, 2, 1)
    assert (scores["empty/point"], scores["prompts"]) == (0.5, 2)


def test_mean_is_over_prompts() -> None:
    """Half a million of them, whose sum in float32 would be off in the fourth digit."""
    values = torch.rand(500_000, generator=torch.Generator().manual_seed(0))
    scores = judge_of(*map(comparison, values.tolist())).compute()
    assert scores["miou/point"] == pytest.approx(values.double().mean().item(), abs=1e-7)


def test_embedding_errors_are_means_over_images_not_batches() -> None:
    """Two images with an error of 1 in the first batch, one with an error of 2 in the second."""
    judge = Judge(Agreement(points=1))
    for images, error in ((2, 1.0), (1, 2.0)):
        sizes = torch.tensor([[1024, 1024]] * images)
        student: Any = SimpleNamespace(
            batch=Batch(["image"] * images, sizes, sizes, sizes, [0] * images),
            embedding=torch.full((images, 256, 64, 64), error),
        )
        judge.update(student, torch.zeros(images, 256, 64, 64), [])
    assert judge.compute()["embedding_mse"] == pytest.approx((1 + 1 + 4) / 3)
