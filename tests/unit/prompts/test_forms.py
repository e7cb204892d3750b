import torch
from torchvision.ops import masks_to_boxes

from sam_distill.prompts.forms import add_points, box_prompts, boxes_of, join, point_prompts
from sam_distill.types import ABSENT, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NOT_A_POINT, valid_area


def test_boxes_are_tight_and_ignore_the_padding() -> None:
    logits = torch.full((1, 3, 256, 256), -1.0)
    logits[0, 0, 10:20, 30:50] = 1
    logits[0, 1, 100:250, 5:9] = 1  # reaches into the padding below row 128
    area = valid_area(torch.tensor([[512, 1024]]), 256)
    boxes = boxes_of(logits > 0, area)[0]
    assert boxes[0].tolist() == [120, 40, 199, 79]
    assert boxes[1].tolist() == [20, 400, 35, 511]
    assert boxes[2].isnan().all()
    cells = masks_to_boxes(logits[0, :1] > 0)[0]
    assert boxes[0].tolist() == [4 * cells[0], 4 * cells[1], 4 * cells[2] + 3, 4 * cells[3] + 3]


def test_nan_box_is_no_valid_prompt() -> None:
    boxes = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [torch.nan] * 4]])
    assert box_prompts(boxes).valid.tolist() == [[True, False]]


def test_points_are_followed_by_sams_padding_token() -> None:
    prompts = point_prompts(torch.zeros(1, 1, 2, 2), torch.tensor([[[1, 0]]]))
    assert prompts.labels.tolist() == [[[1, 0, -1]]]


def test_prompts_of_different_length_are_joined_with_absent_points() -> None:
    one = point_prompts(torch.tensor([[[[5.0, 6.0]]]]), torch.tensor([[[1]]]))
    box = box_prompts(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[[7.0, 8.0]]]]), torch.tensor([[[0]]]))
    both = join([one, box])
    assert both.labels.tolist() == [[[1, NOT_A_POINT, ABSENT], [0, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]]]
    assert both.points[0, 1].tolist() == [[7, 8], [1, 2], [3, 4]]
    more = add_points(both, torch.tensor([[[9.0, 9.0], [0.0, 0.0]]]), torch.tensor([[0, ABSENT]]))
    assert more.labels.tolist() == [[[0, 1, NOT_A_POINT, ABSENT], [ABSENT, 0, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]]]
