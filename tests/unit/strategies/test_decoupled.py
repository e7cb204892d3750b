import pytest
import torch

from sam_distill.losses import embedding_mse, embedding_norm, embedding_smooth_l1
from sam_distill.strategies.decoupled import Decoupled
from sam_distill.types import Batch, valid_area

SIZES = torch.tensor([[640, 1024]])
STUDENT, TEACHER = torch.randn(2, 1, 256, 64, 64, generator=torch.Generator().manual_seed(0))


class FixedStudent:
    """Student with a known embedding."""

    def encode(self, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return STUDENT


BATCH = Batch(["a"], torch.zeros(1, 3, 8, 8, dtype=torch.uint8), SIZES, SIZES, [0], teacher_embedding=TEACHER)
LOSSES = {"mse": embedding_mse, "smooth_l1": embedding_smooth_l1, "norm": embedding_norm}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("padding", [0, 1])
def test_loss(loss: str, padding: float) -> None:
    area = None if padding else valid_area(SIZES, 64)
    out = Decoupled(loss=loss, padding=padding).step(FixedStudent(), BATCH)  # type: ignore[arg-type]
    torch.testing.assert_close(out.loss, LOSSES[loss](STUDENT, TEACHER, area))


def test_padding_has_its_weight_in_the_loss() -> None:
    """40 of the 64 rows are image, the others padding."""
    error = (STUDENT - TEACHER).square().mean(1)[0]
    expected = (error[:40].sum() + 0.1 * error[40:].sum()) / (64 * (40 + 0.1 * 24))
    torch.testing.assert_close(Decoupled(padding=0.1).step(FixedStudent(), BATCH).loss, expected)  # type: ignore[arg-type]


def test_cosine_is_added() -> None:
    plain, with_cosine = (Decoupled(cosine=weight).step(FixedStudent(), BATCH) for weight in (0.0, 2.0))  # type: ignore[arg-type]
    torch.testing.assert_close(with_cosine.loss, plain.loss + 2 * (1 - with_cosine.logs["cosine"]))
