from dataclasses import replace

import pytest
import torch

from sam_distill.prompts.samplers import Boxes, Grid, MaskPoints, Mixture, PointPairs, Points, PromptSampler
from sam_distill.types import ABSENT, BACKGROUND, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND, Batch, Masks, Prompts

SIZES = torch.tensor([[640, 1024], [1024, 512]])
PADDING = -1  # label of the token that SAM adds after points without a box


def object_logits() -> torch.Tensor:
    """Return [1, 1, 1, 256, 256] logits: a mask inside both images, and a wrong one where both have padding."""
    logits = torch.full((1, 1, 1, 256, 256), -3.0)
    logits[..., 40:80, 50:100] = 3
    logits[..., 161:, 129:] = 5
    return logits


def fake_masks(prompts: Prompts) -> Masks:
    """Return the masks of a fake teacher, which finds the same object for every prompt."""
    images, count = prompts.points.shape[:2]
    return Masks(object_logits().repeat(images, count, 4, 1, 1), torch.ones(images, count, 4))


def batch(epoch: int = 0) -> Batch:
    annotations = torch.zeros(2, 3, 256, 256, dtype=torch.bool)
    annotations[:, 0, 10:20, 10:30] = True
    annotations[:, 1, 100:140, 60:70] = True  # the third annotation is missing
    return Batch(
        ["a", "b"], torch.zeros(2, 3, 8, 8, dtype=torch.uint8), SIZES, SIZES, [epoch] * 2,
        annotations=annotations, ask_teacher=fake_masks,
    )  # fmt: skip


SAMPLERS = [
    Points(3, 0), PointPairs(3, 0), Grid(2), MaskPoints(3, 0), Boxes(3, 0), MaskPoints(3, 0, "annotations"),
    Boxes(3, 0, "annotations"), Mixture({"a": Points(2, 0), "b": Boxes(1, 0), "c": PointPairs(2, 0)}),
]  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{type(s).__name__}{'-of-annotations' * s.of_annotations}")
def test_prompts_lie_inside_the_image_and_depend_on_key_and_epoch_alone(sampler: PromptSampler) -> None:
    """`count` prompts lie inside each image, and are the same for the same epoch whatever else is in the batch."""
    prompts = sampler.draw(batch())
    assert prompts.points.shape[:2] == prompts.labels.shape[:2] == (2, sampler.count)
    real = prompts.labels >= 0
    limit = (SIZES.flip(-1) - 1)[:, None, None].expand_as(prompts.points)
    assert ((prompts.points >= 0) & (prompts.points <= limit))[real].all()
    second = replace(
        batch(), keys=["b"], epochs=[0], sizes=SIZES[1:], images=batch().images[1:], annotations=batch().annotations[1:]
    )
    again = sampler.draw(second)
    assert torch.equal(again.points, prompts.points[1:])
    assert torch.equal(again.labels, prompts.labels[1:])
    if not isinstance(sampler, Grid):
        assert not torch.equal(sampler.draw(batch(epoch=1)).points, prompts.points)


def test_labels() -> None:
    assert Points(1, 0).draw(batch()).labels[0, 0].tolist() == [FOREGROUND, PADDING]
    assert PointPairs(1, 0).draw(batch()).labels[0, 0].tolist() == [FOREGROUND, BACKGROUND, PADDING]
    assert Boxes(1, 0).draw(batch()).labels[0, 0].tolist() == [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT]


def test_boxes_without_noise_are_those_of_the_teachers_masks() -> None:
    boxes = Boxes(2, 0, noise=0, most=0).draw(batch()).points.flatten(2)
    assert boxes.tolist() == [[[200, 160, 399, 319]] * 2] * 2


def test_points_of_annotations_follow_their_order() -> None:
    prompts = MaskPoints(3, 0, "annotations").draw(batch())
    assert prompts.valid.tolist() == [[True, True, False]] * 2
    assert (prompts.labels[:, 2] == ABSENT).all()
    cells = prompts.points[:, :2, 0] // 4
    assert ((cells[:, 0] >= 10) & (cells[:, 0] < torch.tensor([30, 20]))).all()
    assert ((cells[:, 1] >= torch.tensor([60, 100])) & (cells[:, 1] < torch.tensor([70, 140]))).all()


def test_a_grid_is_regular() -> None:
    points = Grid(2).draw(batch()).points[:, :, 0]
    assert points[0].tolist() == [[256, 160], [768, 160], [256, 480], [768, 480]]
    assert points[1].tolist() == [[128, 256], [384, 256], [128, 768], [384, 768]]


def test_parts_of_a_mixture_draw_different_points() -> None:
    points = Mixture({"a": Points(1, 0), "b": Points(1, 0)}).draw(batch()).points[:, :, 0]
    assert not torch.equal(points[:, 0], points[:, 1])


def test_a_mixture_requires_what_its_parts_require() -> None:
    assert Mixture({"a": Points(1, 0), "b": Boxes(1, 0), "c": MaskPoints(1, 0, "annotations")}).requires == {
        "ask_teacher",
        "annotations",
    }
    assert not Mixture({"a": Points(1, 0), "b": Boxes(1, 0, "annotations")}).of_annotations
