from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sam_distill.evaluate.agreement import Agreement
from sam_distill.evaluate.evaluator import Evaluator
from sam_distill.types import Batch


def test_embedding_errors_are_means_over_images_not_batches() -> None:
    """Two images with an error of 1 in the first batch, one with an error of 2 in the second."""
    evaluator = Evaluator(Agreement(points=1))
    for images, error in ((2, 1.0), (1, 2.0)):
        sizes = torch.tensor([[1024, 1024]] * images)
        student: Any = SimpleNamespace(
            batch=Batch(["image"] * images, sizes, sizes, sizes, [0] * images),
            embedding=torch.full((images, 256, 64, 64), error),
        )
        evaluator.update(student, torch.zeros(images, 256, 64, 64), [])
    assert evaluator.compute()["embedding_mse"] == pytest.approx((1 + 1 + 4) / 3)
