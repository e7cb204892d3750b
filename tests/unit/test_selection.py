"""Tests of selection.py: choosing images by hash, file names of images, and keys."""

import pytest

from sam_distill.errors import UserError
from sam_distill.selection import choose, is_image, limit_val_images, unique_keys

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


def test_too_many_images_warn_and_both_options_fail(caplog: pytest.LogCaptureFixture) -> None:
    assert choose(KEYS, 5000, None) == list(range(1000))
    assert "only 1000 to train on" in caplog.text
    with pytest.raises(UserError, match="exclude each other"):
        choose(KEYS, 5, 0.5)


def test_validation_takes_a_fifth_at_most() -> None:
    assert limit_val_images(80, 16, "x") == (16, "")
    assert [limit_val_images(images, 16, "x")[0] for images in (79, 19, 10, 2, 1)] == [15, 3, 2, 1, 0]
    assert limit_val_images(19, 16, "x")[1] == (
        "x has only 19 images: 3, not 16, are held out for validation (a fifth)"
    )


def test_names_of_images() -> None:
    assert all(map(is_image, ["a.jpg", "a.b.JPEG", "a.PnG", "a.webp", "a.tif", "a.tiff", "a.bmp"]))
    assert not any(map(is_image, [".jpg", "._a.jpg", ".hidden.png", "jpg", "a.json", "a.jpg.txt"]))


def test_key_differs_from_the_names_of_other_images() -> None:
    names = ["a.jpg", "a.png", "a.jpg.png", "b.jpg"]
    assert unique_keys(names) == ["a.jpg", "a.png", "a.jpg.png", "b"]


def test_keys_stay_unique() -> None:
    assert unique_keys(["a.jpg", "b.jpg", "b.png"]) == ["a", "b.jpg", "b.png"]
