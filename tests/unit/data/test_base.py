"""Tests of data/base.py: skipped samples, and collating samples into a batch."""

import torch

from sam_distill.data.base import SkippedSamples, collate
from sam_distill.types import Sample


def test_skipped_samples_created_in_inference_mode_can_be_updated() -> None:
    """Lightning validates in inference mode; tensors created in it can't be modified outside."""
    with torch.inference_mode():
        skipped_samples = SkippedSamples(2)
    skipped_samples.report("broken", 0)
    assert len(skipped_samples) == 1
    assert skipped_samples.unreadable.is_shared()


def test_collate_pads_at_the_bottom_and_right() -> None:
    wide = Sample("wide", torch.full((3, 512, 1024), 7, dtype=torch.uint8), (300, 600))
    tall = Sample("tall", torch.full((3, 1024, 100), 9, dtype=torch.uint8), (4096, 400))
    batch = collate([wide, tall])
    assert batch.keys == ["wide", "tall"]
    assert (batch.images.shape, batch.images.dtype) == ((2, 3, 1024, 1024), torch.uint8)
    assert batch.sizes.tolist() == [[512, 1024], [1024, 100]]
    assert batch.original_sizes.tolist() == [[300, 600], [4096, 400]]
    assert batch.images[0, :, :512].eq(7).all()
    assert batch.images[0, :, 512:].eq(0).all()
    assert batch.images[1, :, :, :100].eq(9).all()
    assert batch.images[1, :, :, 100:].eq(0).all()
