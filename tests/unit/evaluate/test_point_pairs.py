import copy
from pathlib import Path

import pytest
import torch
from PIL import Image

from sam_distill.data.folder import Folder
from sam_distill.errors import UserError
from sam_distill.evaluate.evaluation import evaluate_prompts
from sam_distill.evaluate.point_pairs import PointPairs
from sam_distill.models.sam import Sam
from sam_distill.runs.hardware import Hardware
from sam_distill.teachers import LiveTeacher
from sam_distill.types import Batch


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Return two images of coloured tiles: one twice the frame's size, one too small for a distance of 500."""
    tiles = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 255
    images = torch.nn.functional.interpolate(tiles, (1024, 1024)).byte()
    sizes = torch.tensor([[683, 1024], [1024, 683]])
    images[0, :, 683:], images[1, :, :, 683:] = 0, 0
    return Batch(["large", "small"], images, sizes, torch.tensor([[1366, 2048], [480, 320]]), [0, 0])


@pytest.fixture(scope="module")
def embedding(teacher: Sam, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return teacher.encode(batch.images, batch.sizes)


@pytest.mark.parametrize("pixels", ["original", "frame"])
def test_pairs_have_the_requested_distance(teacher: Sam, batch: Batch, embedding: torch.Tensor, pixels: str) -> None:
    protocol = PointPairs((50, 500), pairs=3, pixels=pixels)  # type: ignore[arg-type]
    view = protocol.view(teacher, embedding, batch)
    near, far = protocol.make_targets(view)
    for target, distance in ((near, 50), (far, 500)):
        pairs = [o.comparison for o in protocol.compare(view, target)]
        small = 3 if pixels == "frame" or distance == 50 else 0
        assert [pair.image for pair in pairs] == ["large"] * 3 + ["small"] * small
        for pair in pairs:
            x, y, other_x, other_y = pair.prompt  # original pixels
            to_frame = 1 if pixels == "original" else {"large": 0.5, "small": 1024 / 480}[pair.image]
            length = to_frame * ((x - other_x) ** 2 + (y - other_y) ** 2) ** 0.5
            assert length == pytest.approx(distance, abs=5)
            assert pair.iou == 1 or pair.teacher_area == 0, "a model against itself"


def test_outside_drops_second_points_on_the_object(teacher: Sam, batch: Batch, embedding: torch.Tensor) -> None:
    anywhere, beside = (PointPairs((150,), pairs=40, outside=outside) for outside in (False, True))
    (all_pairs,), (fewer,) = (p.make_targets(p.view(teacher, embedding, batch)) for p in (anywhere, beside))
    assert torch.equal(all_pairs.prompts.points, fewer.prompts.points)
    dropped = all_pairs.prompts.valid & ~fewer.prompts.valid
    assert 0 < dropped.sum() < all_pairs.prompts.valid.sum()


def test_where_no_prompt_counts_nothing_is_written(teacher: Sam, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "small.png")
    student = copy.deepcopy(teacher)
    with pytest.raises(UserError, match="not one prompt counts: 1 images are too small"):
        evaluate_prompts(
            student=student, teacher=LiveTeacher("mobile_sam"), source=Folder(str(tmp_path), val_images=0), split="all",
            protocol=PointPairs(), hardware=Hardware("cpu", precision="fp32", workers=0), batch_size=1,
            run_dir=tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
    assert not any(weight.is_inference() for weight in student.parameters()), "it can still be trained"
