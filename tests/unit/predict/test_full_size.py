"""Full-size masks computed as patches around each object, compared with masks of the whole image."""

import numpy as np
import pytest
import torch
from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score
from torch import Tensor
from torch.nn import functional as F

from sam_distill.images import frame_size, upscale_masks
from sam_distill.predict.full_size import PatchUpsampler

SIZES = [(333, 500), (1500, 700), (64, 64), (9, 300)]


def blobs(size: tuple[int, int]) -> Tensor:
    """Return [6, 256, 256] float32 logits: four smooth masks, some reaching into the padding, one empty, one full."""
    generator = torch.Generator().manual_seed(sum(size))
    coarse = torch.randn(4, 1, 9, 9, generator=generator) * 4 - torch.tensor([0.0, 2, 4, 6]).view(4, 1, 1, 1)
    smooth = F.interpolate(coarse, (256, 256), mode="bicubic")[:, 0]
    return torch.cat([smooth, torch.full((1, 256, 256), -9.0), torch.full((1, 256, 256), 9.0)])


@pytest.mark.parametrize("size", SIZES)
def test_masks_scores_and_boxes_match_whole_masks(size: tuple[int, int]) -> None:
    low_res, (height, width) = blobs(size), size
    whole = upscale_masks(low_res, frame_size(size), size)
    upsampler = PatchUpsampler(frame_size(size), (0, 0, width, height), size, torch.device("cpu"))
    patches = upsampler.patches(low_res, -1.0)
    measured = [upsampler.measure(patch, 1.0) for patch in patches]
    np.testing.assert_allclose([score for score, _ in measured], calculate_stability_score(whole, 0, 1), atol=1e-4)
    assert [box for _, box in measured] == [tuple(box) for box in batched_mask_to_box(whole > 0).tolist()]
    for patch, expected in zip(patches, (whole > 0).numpy(), strict=True):
        assert (upsampler.runs(patch).mask() != expected).mean() < 1e-4


def test_masks_of_a_crop_lie_in_their_place_in_the_image() -> None:
    crop, size = (100, 50, 400, 250), (300, 450)
    low_res = blobs((200, 300))
    upsampler = PatchUpsampler(frame_size((200, 300)), crop, size, torch.device("cpu"))
    whole = F.pad(upscale_masks(low_res, frame_size((200, 300)), (200, 300)) > 0, (100, 50, 50, 50)).numpy()
    for patch, expected in zip(upsampler.patches(low_res, 0.0), whole, strict=True):
        assert (upsampler.runs(patch).mask() != expected).mean() < 1e-4


def test_a_small_mask_is_a_small_patch() -> None:
    low_res = torch.full((1, 256, 256), -9.0)
    low_res[0, 40:50, 30:60] = 9
    (patch,) = PatchUpsampler((1024, 1024), (0, 0, 4000, 4000), (4000, 4000), torch.device("cpu")).patches(low_res, 0.0)
    assert patch.logits.shape <= (14, 34)
