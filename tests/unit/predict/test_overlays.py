import numpy as np
from PIL import Image

from sam_distill.predict.overlays import STUDENT, column, masks_overlay, overlay, prompt_overlay, side_by_side

GREY = Image.new("RGB", (60, 40), (100, 100, 100))
MASK = np.zeros((40, 60), bool)
MASK[10:30, 20:50] = True


def test_only_the_mask_is_tinted_and_its_outline_is_white() -> None:
    pixels = np.asarray(overlay(GREY, MASK, STUDENT))
    assert (pixels[~MASK] == 100).all()
    assert (pixels[10, 20:50] == 255).all()
    assert (pixels[29, 20:50] == 255).all()
    inside = pixels[15:25, 25:45].reshape(-1, 3)
    assert (inside == inside[0]).all()
    assert inside[0, 0] > 150 > 70 > inside[0, 1]  # pink


def test_very_thin_image_is_drawn() -> None:
    mask = np.ones((5000, 1), bool)
    row = side_by_side([prompt_overlay(Image.new("RGB", (1, 5000)), [0.0, 9.0], [1], mask)] * 3, ["", "", ""])
    assert row.height > 384


def test_prompts_are_drawn_where_they_are() -> None:
    pixels = np.asarray(overlay(GREY, points=[(30, 20), (5, 5)], labels=[1, 0], box=(10, 5, 55, 35))).astype(int)
    assert pixels[20, 30, 1] > 200 > pixels[20, 30, 0]  # foreground: green
    assert pixels[5, 5, 0] > 200 > pixels[5, 5, 1]  # background: red
    assert (pixels[35, 30] != 100).any()
    assert (pixels[38, 58] == 100).all()


def test_many_masks_have_many_colours_and_the_smallest_lies_above() -> None:
    whole = np.ones_like(MASK)
    small = {"segmentation": MASK, "area": int(MASK.sum()), "bbox": (20, 10, 29, 19)}
    pixels = np.asarray(
        masks_overlay(GREY, [small, {"segmentation": whole, "area": whole.size, "bbox": (0, 0, 59, 39)}])
    )
    first, second = pixels[5, 5], pixels[20, 30]
    assert (first != second).any()
    assert (pixels[11:29, 21:49] == second).all()
    assert (pixels[1:9, 1:59] == first).all()


def test_a_tiny_box_can_be_seen() -> None:
    large = Image.new("RGB", (1300, 1000), (100, 100, 100))
    changed = np.asarray(overlay(large, box=(600, 500, 602, 501))) != 100
    assert np.ptp(np.nonzero(changed.any((0, 2)))[0]) >= 40
    assert np.ptp(np.nonzero(changed.any((1, 2)))[0]) >= 40


def test_captions_have_room_beside_narrow_images() -> None:
    tall = Image.new("RGB", (40, 400))
    panels = [prompt_overlay(tall, (5.0, 5.0), (1,), np.zeros((400, 40), bool))] * 3
    row = side_by_side(panels, ("image and point", "teacher", "student   IoU 0.5"))
    assert row.width > 250


def test_rows_and_columns() -> None:
    panels = [prompt_overlay(GREY, (30.0, 20.0), (1,), mask) for mask in (None, MASK, ~MASK)]
    row = side_by_side(panels, ("a", "b", "c"))
    assert row.width > 3 * 380
    assert column([row, row]).size == (row.width, 2 * row.height)
