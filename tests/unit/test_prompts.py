from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import masks_to_boxes

from sam_distill.models.sam import valid_area
from sam_distill.prompts import box_prompts, boxes_of, point_prompts, uniform_points


@given(st.lists(st.tuples(st.integers(1, 1024), st.integers(1, 1024)), min_size=1, max_size=4), st.integers(0, 9))
def test_points_lie_in_the_image_and_never_in_the_padding(sizes: list[tuple[int, int]], step: int) -> None:
    keys = [f"image{i}" for i in range(len(sizes))]
    points = uniform_points(keys, torch.tensor(sizes), 5, seed=0, step=step)
    for (height, width), (x, y) in zip(sizes, points.transpose(1, 2), strict=True):
        assert ((x >= 0) & (x < width) & (x == x.floor())).all()
        assert ((y >= 0) & (y < height) & (y == y.floor())).all()


def test_points_depend_on_seed_key_and_step_alone() -> None:
    """Design, numerics rule 13."""
    sizes = torch.tensor([[600, 1024], [1024, 700]])
    points = uniform_points(["a", "b"], sizes, 4, seed=0)
    assert torch.equal(points.flip(0), uniform_points(["b", "a"], sizes.flip(0), 4, seed=0))
    assert torch.equal(points[:1], uniform_points(["a"], sizes[:1], 4, seed=0))
    for other in ({"seed": 1}, {"seed": 0, "step": 1}):
        assert not torch.equal(points, uniform_points(["a", "b"], sizes, 4, **other))
    assert not torch.equal(points[0], points[1])


def test_points_cover_the_image() -> None:
    points = uniform_points(["a"], torch.tensor([[512, 1024]]), 20000, seed=0)[0]
    torch.testing.assert_close(points.mean(0), torch.tensor([511.5, 255.5]), rtol=0.03, atol=0)


def test_boxes_are_tight_and_ignore_the_padding() -> None:
    logits = torch.full((1, 3, 256, 256), -1.0)
    logits[0, 0, 10:20, 30:50] = 1
    logits[0, 1, 100:250, 5:9] = 1  # reaches into the padding below row 128
    area = valid_area(torch.tensor([[512, 1024]]), 256)
    boxes = boxes_of(logits, area)[0]
    assert boxes[0].tolist() == [120, 40, 199, 79]
    assert boxes[1].tolist() == [20, 400, 35, 511]
    assert boxes[2].isnan().all()
    cells = masks_to_boxes(logits[0, :1] > 0)[0]
    assert boxes[0].tolist() == [4 * cells[0], 4 * cells[1], 4 * cells[2] + 3, 4 * cells[3] + 3]


def test_a_box_that_is_not_there_is_no_prompt() -> None:
    boxes = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [torch.nan] * 4]])
    assert box_prompts(boxes).valid.tolist() == [[True, False]]


def test_points_are_followed_by_sams_padding_token() -> None:
    prompts = point_prompts(torch.zeros(1, 1, 2, 2), torch.tensor([[[1, 0]]]))
    assert prompts.labels.tolist() == [[[1, 0, -1]]]
