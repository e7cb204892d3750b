"""Tests of the demo: the actions of a visitor, without a browser."""

import numpy as np
import pytest
from PIL import Image

from sam_distill.demo import page as demo
from sam_distill.demo.page import BACKGROUND, BOX, FOREGROUND, Visit
from sam_distill.models.sam import Sam


@pytest.fixture(scope="module")
def tiles() -> Image.Image:
    """Return an image of two plain halves, 300 x 200 pixels."""
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[:, :150], pixels[:, 150:] = (200, 40, 30), (20, 60, 190)
    return Image.fromarray(pixels)


def begin(teacher: Sam, tiles: Image.Image) -> Visit:
    visit, *views, message = demo._begin(tiles, {"student": teacher, "teacher": teacher})
    assert [view.size for view in views] == [(300, 200)] * 2
    assert "student in" in message
    return visit


def test_foreground_and_background_clicks(teacher: Sam, tiles: Image.Image) -> None:
    visit = begin(teacher, tiles)
    visit.take(60, 100, FOREGROUND)
    _, ours, theirs, message = demo._answer(visit)
    assert message.startswith("**IoU 1.00**"), "a model beside itself"
    tinted = np.asarray(ours).astype(int) - np.asarray(tiles)
    assert abs(tinted[100, 20]).sum() > 30 > abs(tinted[100, 280]).sum()
    assert np.asarray(theirs)[100, 20].tolist() != np.asarray(ours)[100, 20].tolist(), "each in its colour"
    visit.take(250, 100, BACKGROUND)
    assert (visit.points, visit.labels) == ([(60, 100), (250, 100)], [1, 0])
    assert demo._answer(visit)[-1].startswith("**IoU 1.00**")


def test_a_box_takes_two_corners(teacher: Sam, tiles: Image.Image) -> None:
    visit = begin(teacher, tiles)
    visit.take(145, 195, BOX)
    assert demo._answer(visit)[-1] == "Now the opposite corner."
    visit.take(5, 5, BOX)
    assert visit.box == [5, 5, 145, 195]
    assert demo._answer(visit)[-1].startswith("**IoU 1.00**")
    visit.take(200, 20, BOX)
    assert visit.box is None, "a third corner begins another box"


def test_segment_everything(teacher: Sam, tiles: Image.Image) -> None:
    visit = begin(teacher, tiles)
    *_, message = demo._everything(visit, 2)
    assert message.startswith("Everything: student, ")


def test_16_bit_image_is_scaled_not_clipped(teacher: Sam) -> None:
    """16-bit values are scaled, not clipped to white; Gradio must not convert the image before that."""
    visit = demo._begin(Image.fromarray(np.full((20, 30), 128 * 256, np.uint16)), {"student": teacher})[0]
    assert visit.image.getpixel((0, 0)) == (128, 128, 128)
    page = demo.build({"student": teacher}, [], 4)
    (source,) = (block for block in page.blocks.values() if getattr(block, "label", None) == "image")
    assert source.image_mode is None


def test_the_page_is_built(teacher: Sam, tiles: Image.Image) -> None:
    page = demo.build({"student": teacher}, [tiles], 4)
    assert {block.label for block in page.blocks.values() if getattr(block, "label", None)} >= {"image", "student"}
