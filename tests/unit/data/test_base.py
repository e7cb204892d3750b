"""Choosing by hash, and laying samples into a batch."""

import pytest
import torch

from sam_distill.data.base import Damage, affordable_val, choose, collate, is_image, unique_keys
from sam_distill.types import Sample, UserError

KEYS = [f"key{number}" for number in range(1000)]


def test_a_smaller_choice_is_part_of_a_larger_one() -> None:
    ten, hundred = choose(KEYS, 10, None), choose(KEYS, 100, None)
    assert (len(ten), len(hundred)) == (10, 100)
    assert set(ten) < set(hundred)
    assert hundred == sorted(hundred) == choose(KEYS, None, 0.1)
    assert choose(KEYS, None, None) == list(range(1000))
    assert choose(KEYS[:3], None, 0.01) != []


def test_a_choice_depends_on_keys_not_on_their_order() -> None:
    backwards = KEYS[::-1]
    assert {backwards[index] for index in choose(backwards, 10, None)} == {
        KEYS[index] for index in choose(KEYS, 10, None)
    }


def test_too_many_are_wanted(caplog: pytest.LogCaptureFixture) -> None:
    assert choose(KEYS, 5000, None) == list(range(1000))
    assert "only 1000 to train on" in caplog.text
    with pytest.raises(UserError, match="exclude each other"):
        choose(KEYS, 5, 0.5)


def test_validation_takes_a_fifth_at_most() -> None:
    assert affordable_val(80, 16, "x") == (16, "")
    assert [affordable_val(images, 16, "x")[0] for images in (79, 19, 10, 2, 1)] == [15, 3, 2, 1, 0]
    assert affordable_val(19, 16, "x")[1] == ("x has only 19 images: 3, not 16, are held out for validation (a fifth)")


def test_damage_found_during_validation_can_be_added_to() -> None:
    """Lightning validates in inference mode; the tensors made there can't be changed outside."""
    with torch.inference_mode():
        damage = Damage(2)
    damage.report(0, "broken")
    assert len(damage) == 1
    assert damage.unreadable.is_shared()


def test_names_of_images() -> None:
    assert all(map(is_image, ["a.jpg", "a.b.JPEG", "a.PnG", "a.webp", "a.tif", "a.tiff", "a.bmp"]))
    assert not any(map(is_image, [".jpg", "._a.jpg", ".hidden.png", "jpg", "a.json", "a.jpg.txt"]))


def test_keys_stay_unique() -> None:
    assert unique_keys(["a", "b", "b"], ["a.jpg", "b.jpg", "b.png"]) == ["a", "b.jpg", "b.png"]


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
