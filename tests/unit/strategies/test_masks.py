"""The loss of mask strategies, checked with a student of known masks and predicted IoUs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sam_distill.strategies.semi_coupled import SemiCoupled
from sam_distill.types import Batch, Masks, Prompts, StepOutput

SIZES = torch.tensor([[512, 1024]])  # the upper half of the frame is image: 128 of 256 rows of a low-res mask
PROMPTS = Prompts(torch.tensor([[[[500.0, 100.0]]]]), torch.tensor([[[1]]]))


def masks(rows: int, iou: float, padding: bool = False) -> Masks:
    """Return the same mask for all four tokens: the first `rows` rows, with `padding` also all of the padding."""
    low_res = torch.full((1, 1, 4, 256, 256), -5.0)
    low_res[..., :rows, :] = 5.0
    if padding:
        low_res[..., 128:, :] = 5.0
    return Masks(low_res, torch.full((1, 1, 4), iou))


TARGET = masks(rows=128, iou=1.0)
HALF = masks(rows=64, iou=0.8, padding=True)  # half of the target, and the padding, which does not count
WHOLE = masks(rows=128, iou=0.6)


class ScriptedStudent:
    """Student that returns the given masks, one call after another."""

    def __init__(self, *answers: Masks) -> None:
        self.answers = list(answers)

    def encode(self, images: Tensor, sizes: Tensor) -> Tensor:
        return torch.zeros(1, 256, 64, 64)

    def decode(self, embedding: Tensor, prompts: Prompts, tokens: slice) -> Masks:
        return self.answers.pop(0)


def step(*answers: Masks, **options: Any) -> StepOutput:
    batch = Batch(["a"], torch.zeros(1, 3, 8, 8), SIZES, SIZES, [0], ask_teacher=lambda _: TARGET, prompts=PROMPTS)
    return SemiCoupled(rounds=len(answers), **options).step(ScriptedStudent(*answers), batch)  # type: ignore[arg-type]


def test_predicted_ious_learn_the_iou_inside_the_image() -> None:
    out = step(HALF)
    assert out.logs["miou"].item() == pytest.approx(0.5)
    assert out.logs["iou_error"].item() == pytest.approx((0.8 - 0.5) ** 2)
    assert out.loss.item() == pytest.approx((out.logs["mask_loss"] + out.logs["iou_error"]).item())


def test_the_loss_is_the_mean_of_all_rounds() -> None:
    first, second, both = step(HALF), step(WHOLE), step(HALF, WHOLE)
    assert second.loss < first.loss
    assert both.loss.item() == pytest.approx(((first.loss + second.loss) / 2).item())
    for name in ("mask_loss", "iou_error", "miou"):
        assert both.logs[name].item() == pytest.approx(((first.logs[name] + second.logs[name]) / 2).item()), name
