"""Tests of the built-in data: reproducible images, and no validation photograph in any training image."""

import pytest
import torch

from sam_distill.data import photos
from sam_distill.data.photos import Photos
from sam_distill.types import FRAME


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return a set to which the name of every photograph opened from now on is added."""
    names: set[str] = set()
    original = photos.photo
    monkeypatch.setattr(photos, "photo", lambda name: (names.add(name), original(name))[1])
    return names


def test_counts() -> None:
    source = Photos(images=40, val_images=6)
    assert (source.num_train_images, source.val_images) == (40, 6)
    assert len({*source.train, *source.val}) == 46
    assert source.train[:10] == Photos(images=40, fraction=0.25).train
    assert Photos(images=1, fraction=0.1).num_train_images == 1


@pytest.mark.parametrize("index", range(8))
def test_samples_fit_the_frame(index: int) -> None:
    source = Photos()
    for item in (source.train[index], source.val[index]):
        sample = source.load(item)
        assert sample.key == item
        assert sample.image.dtype == torch.uint8
        assert sample.image.shape[0] == 3
        assert max(sample.image.shape[1:]) == FRAME
        h, w = sample.original_size
        assert abs(sample.image.shape[1] / sample.image.shape[2] - h / w) < 0.01
        assert sample.image.float().std() > 5, "a picture of something"


def test_same_key_and_seed_give_the_same_image() -> None:
    source, again, other = Photos(), Photos(images=500), Photos(seed=1)
    for item in source.train[:6]:
        image = source.load(item).image
        torch.testing.assert_close(image, again.load(item).image, rtol=0, atol=0)
        drawn_anew = other.load(item).image
        assert image.shape != drawn_anew.shape or not torch.equal(image, drawn_anew)
    for item in source.val[:6]:
        torch.testing.assert_close(source.load(item).image, other.load(item).image, rtol=0, atol=0)


def test_training_images_hold_nothing_of_the_validation_photographs(opened: set[str]) -> None:
    source = Photos()
    for item in source.train[:40]:
        source.load(item)
    assert opened == {*photos.TRAIN_PHOTOS, *photos.SURFACES}
    opened.clear()
    source.val_samples()
    assert opened == {*photos.VAL_PHOTOS}
    assert not {*photos.TRAIN_PHOTOS, *photos.SURFACES} & {*photos.VAL_PHOTOS}


def test_validation_begins_with_the_whole_photographs() -> None:
    source = Photos(val_images=5)
    sizes = [source.load(item).original_size for item in source.val]
    assert sizes[:4] == [(300, 451), (400, 600), (512, 512), (427, 640)]
    assert sizes[4] < (300, 451), "then close-ups"
