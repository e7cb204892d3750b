import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sam_distill.models.layers import LayerNorm2d
from sam_distill.models.sam import PIXEL_MEAN, PIXEL_STD, Sam, preprocess
from sam_distill.prompts.forms import point_prompts
from sam_distill.types import valid_area

SIZES = torch.tensor([[683, 1024], [1024, 700]])


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, 1024, 1024), generator=generator, dtype=torch.uint8)
    return noise * valid_area(SIZES, 1024)


@pytest.mark.parametrize("side", [1024, 512, 192])
def test_padding_is_zero_after_normalising(frames: torch.Tensor, side: int) -> None:
    """A smaller input is the normalised frame, padding included, reduced in size."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    expected = torch.zeros(2, 3, 1024, 1024)
    for image, frame, (height, width) in zip(expected, frames, SIZES.tolist(), strict=True):
        image[:, :height, :width] = (frame[:, :height, :width] - mean) / std
    expected = F.interpolate(expected, (side, side), mode="bilinear", antialias=True)
    torch.testing.assert_close(preprocess(frames, SIZES, side), expected, rtol=0, atol=1e-5)


def test_valid_area_counts_cells_by_their_centres() -> None:
    area = valid_area(torch.tensor([[683, 1024], [8, 9]]), 64)
    assert area[0].sum() == 43 * 64  # row 42 has its centre at 680
    assert area[1].sum() == 1  # the first row's centre, 8, lies outside, but no image has an empty area
    np.testing.assert_array_equal(
        valid_area(torch.tensor([[9, 25]]), 64)[0, 0, :2, :3], [[True, True, False], [False] * 3]
    )


def test_images_decoded_together_or_one_by_one_are_the_same(teacher: Sam) -> None:
    """Without gradients a CPU decodes one image at a time, with the same result."""
    embedding = torch.randn(2, 256, 64, 64, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[[[300.0, 200.0]], [[40.0, 640.0]]], [[[500.0, 100.0]], [[0.0, 0.0]]]])
    prompts = point_prompts(points, torch.tensor([[[1], [0]], [[1], [-2]]]))
    together = teacher.decode(embedding.requires_grad_(), prompts)
    with torch.no_grad():
        alone = teacher.decode(embedding, prompts)
    valid = prompts.valid
    torch.testing.assert_close(together.low_res[valid], alone.low_res[valid], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.iou[valid], alone.iou[valid], rtol=1e-4, atol=1e-4)


def test_logits_under_autocast(teacher: Sam) -> None:
    """The last matrix product runs in bf16, like all others: the logits are float32 tensors of bf16 values."""
    embedding = torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = point_prompts(torch.tensor([[[[300.0, 200.0]]]]), torch.tensor([[[1]]]))
    with torch.no_grad():
        precise = teacher.decode(embedding, prompts).low_res
        with torch.autocast("cpu", torch.bfloat16):
            rough = teacher.decode(embedding, prompts).low_res
    assert precise.dtype == rough.dtype == torch.float32
    assert torch.equal(rough, rough.bfloat16().float())
    assert not torch.equal(precise, precise.bfloat16().float())
    assert ((rough > 0) == (precise > 0)).float().mean() > 0.98


def test_layer_norm_is_computed_in_float32() -> None:
    """These values overflow in half precision."""
    x = torch.full((1, 4, 2, 2), 300.0)
    x[:, 1] = -300
    norm = LayerNorm2d(4)
    out = norm(x.half())
    assert out.dtype == torch.float32
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (4,), eps=1e-6).permute(0, 3, 1, 2)
    torch.testing.assert_close(out, expected)
