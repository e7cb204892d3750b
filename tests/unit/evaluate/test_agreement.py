"""Agreement protocol against an independent recomputation: MobileSAM's own code and up-sampling, IoU in NumPy."""

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch

from sam_distill.evaluate.agreement import Agreement
from sam_distill.evaluate.evaluator import Evaluator
from sam_distill.models.sam import Sam
from sam_distill.types import Batch


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Return two images of different shapes, a 3:2 landscape and a portrait."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(2, 3, 1024, 1024, dtype=torch.uint8)
    sizes = torch.tensor([[683, 1024], [1024, 640]])
    for image, (height, width) in zip(images, sizes.tolist(), strict=True):
        coarse = torch.rand(1, 3, 6, 6, generator=generator) * 255
        image[:, :height, :width] = torch.nn.functional.interpolate(coarse, (height, width))[0].byte()
    return Batch(["landscape", "portrait"], images, sizes, torch.tensor([[200, 300], [320, 200]]), [0, 0])


@pytest.fixture(scope="module")
def embedding(teacher: Sam, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return teacher.encode(batch.images, batch.sizes)


@pytest.mark.parametrize("token", ["single", "best"])
def test_scores_equal_an_independent_recomputation(
    teacher: Sam, batch: Batch, embedding: torch.Tensor, mobile_sam: ModuleType, mobile_sam_weights: str, token: str
) -> None:
    reference = mobile_sam.sam_model_registry["vit_t"](checkpoint=mobile_sam_weights)
    agreement = Agreement(points=2, token=token)  # type: ignore[arg-type]
    noisy = embedding + 0.05 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
    for target in agreement.make_targets(agreement.view(teacher, embedding, batch)):
        for outcome in agreement.compare(agreement.view(teacher, noisy, batch), target):
            found = outcome.comparison
            i = batch.keys.index(found.image)
            masks = []
            for features in (embedding, noisy):
                coordinates = torch.tensor(found.prompt, dtype=torch.float64).view(1, -1, 2) * (
                    1024 / 300 if i == 0 else 3.2
                )
                kind = (
                    {"points": (coordinates.float(), torch.ones(1, 1))} if found.kind == "point" else {"points": None}
                )
                boxes = coordinates.flatten(1).float() if found.kind == "box" else None
                sparse, dense = reference.prompt_encoder(**kind, boxes=boxes, masks=None)
                with torch.no_grad():
                    low_res, iou = reference.mask_decoder(
                        image_embeddings=features[i : i + 1], image_pe=reference.prompt_encoder.get_dense_pe(),
                        sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense,
                        multimask_output=token == "best",
                    )  # fmt: skip
                low_res = low_res[:, iou[0].argmax()].unsqueeze(1)
                size, original = tuple(batch.sizes[i].tolist()), tuple(batch.original_sizes[i].tolist())
                masks.append((reference.postprocess_masks(low_res, size, original)[0, 0] > 0).numpy())
            theirs, ours = masks
            assert found.iou == pytest.approx(np.sum(theirs & ours) / np.sum(theirs | ours), abs=0.02)
            assert found.teacher_area == pytest.approx(theirs.sum(), rel=0.01, abs=20)


def test_a_model_agrees_with_itself(teacher: Sam, batch: Batch, embedding: torch.Tensor) -> None:
    agreement = Agreement(points=3)
    view = agreement.view(teacher, embedding, batch)
    found = [
        outcome.comparison for target in agreement.make_targets(view) for outcome in agreement.compare(view, target)
    ]
    assert [c.iou for c in found] == [1.0] * len(found)
    assert {(c.image, c.kind) for c in found} == {(i, k) for i in batch.keys for k in ("point", "box")}
    for c in found:
        height, width = (200, 300) if c.image == "landscape" else (320, 200)
        x, y = c.prompt[:2]
        assert 0 <= x < width
        assert 0 <= y < height


def test_boxes_enclose_the_teachers_masks(teacher: Sam, batch: Batch, embedding: torch.Tensor) -> None:
    agreement = Agreement(points=3)
    view = agreement.view(teacher, embedding, batch)
    points, boxes = agreement.make_targets(view)
    low_res = view.low_res(points.prompts)
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        inside = (low_res[i] > 0)[:, : height // 4, : width // 4]
        for mask, corners in zip(inside, boxes.prompts.points[i], strict=True):
            rows, columns = torch.nonzero(mask.any(1)), torch.nonzero(mask.any(0))
            (x0, y0), (x1, y1) = corners.tolist()
            assert (x0 // 4, y0 // 4) == (columns.min().item(), rows.min().item())
            assert (x1 // 4, y1 // 4) == (
                pytest.approx(columns.max().item(), abs=1),
                pytest.approx(rows.max().item(), abs=1),
            )


def test_empty_reference_masks_have_no_score(teacher: Sam, batch: Batch, embedding: torch.Tensor) -> None:
    """If all reference masks are empty, no prompt counts, and no score is NaN."""
    evaluator, sizes = Evaluator(Agreement(points=2)), batch.original_sizes.tolist()
    view = evaluator.protocol.view(teacher, embedding, batch)
    with torch.no_grad():
        points, _ = evaluator.protocol.make_targets(view)
        empty = replace(points, masks=lambda image, _: torch.zeros(sizes[image], dtype=torch.bool))
        evaluator.update(view, embedding, [empty])
    metrics = evaluator.compute()
    assert (metrics["prompts"], metrics["prompts_skipped"]) == (0, 4)
    assert not [name for name in metrics if name.startswith(("miou", "empty"))]
    assert all(np.isfinite(value) for value in metrics.values())


def test_a_kind_named_twice_counts_once() -> None:
    assert Agreement(kinds=("point", "point")).kinds == ("point",)
