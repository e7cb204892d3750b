"""Our mask generator compared with segment-anything's, which runs MobileSAM's own model with the same weights."""

import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import segment_anything
import torch
from PIL import Image
from pycocotools import mask as coco
from skimage import data

from sam_distill.models.sam import Sam
from sam_distill.predict.mask_generator import SamAutomaticMaskGenerator


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """[300, 451, 3] uint8: a cat."""
    return data.chelsea()


@pytest.fixture(scope="module")
def reference(mobile_sam: ModuleType, mobile_sam_weights: str) -> Any:
    return mobile_sam.sam_model_registry["vit_t"](checkpoint=mobile_sam_weights).train().eval()


def assert_same_records(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Assert that the records agree, in the same order, up to a pixel or two per mask."""
    assert len(ours) == len(theirs) > 0
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        assert our["point_coords"] == their["point_coords"]
        assert our["crop_box"] == their["crop_box"]
        assert np.abs(np.subtract(our["bbox"], their["bbox"])).max() <= 1
        assert our["area"] == pytest.approx(their["area"], rel=1e-3, abs=2)
        assert our["predicted_iou"] == pytest.approx(their["predicted_iou"], abs=1e-4)
        assert our["stability_score"] == pytest.approx(their["stability_score"], abs=1e-3)
        assert coco.iou([our["segmentation"]], [their["segmentation"]], [0])[0, 0] > 0.995


@pytest.mark.parametrize(
    "options",
    [
        {"points_per_side": 7, "points_per_batch": 20},
        {"points_per_side": 2, "crop_n_layers": 1, "pred_iou_thresh": 0.7, "stability_score_thresh": 0.8},
        {"points_per_side": None, "point_grids": [np.array([[0.5, 0.5], [0.3, 0.6]])], "pred_iou_thresh": 0,
         "stability_score_thresh": 0, "stability_score_offset": 2.0, "box_nms_thresh": 0.9},
    ],
    ids=["one grid", "crops", "own grid, no thresholds"],
)  # fmt: skip
def test_records_match_segment_anything(
    reference: Any, teacher: Sam, photograph: np.ndarray, options: dict[str, Any]
) -> None:
    options = {"output_mode": "coco_rle", **options}
    theirs = segment_anything.SamAutomaticMaskGenerator(reference, **options).generate(photograph)
    assert_same_records(SamAutomaticMaskGenerator(teacher, **options).generate(photograph), theirs)


def test_three_notations_of_one_mask(teacher: Sam, photograph: np.ndarray) -> None:
    image = Image.fromarray(photograph)
    results = {
        mode: SamAutomaticMaskGenerator(teacher, points_per_side=2, output_mode=mode).generate(image)
        for mode in ("binary_mask", "uncompressed_rle", "coco_rle")
    }
    for binary, uncompressed, compressed in zip(*results.values(), strict=True):
        mask = binary["segmentation"]
        assert (mask.dtype, mask.shape) == (np.bool_, photograph.shape[:2])
        assert mask.sum() == binary["area"]
        for record in (uncompressed, compressed):
            json.dumps(record)
        rle = coco.frPyObjects(uncompressed["segmentation"], *mask.shape)
        np.testing.assert_array_equal(coco.decode(rle), mask)
        np.testing.assert_array_equal(coco.decode(compressed["segmentation"]), mask)


def test_min_mask_region_area_removes_small_regions(teacher: Sam, photograph: np.ndarray) -> None:
    options: dict[str, Any] = {"points_per_side": 4, "stability_score_thresh": 0.85}
    before = SamAutomaticMaskGenerator(teacher, **options).generate(photograph)
    after = SamAutomaticMaskGenerator(teacher, min_mask_region_area=400, **options).generate(photograph)
    assert 0 < len(after) <= len(before)
    assert sorted(r["area"] for r in before) != sorted(r["area"] for r in after)
    for record in after:
        rows, columns = record["segmentation"].nonzero()
        box = [columns.min(), rows.min(), np.ptp(columns), np.ptp(rows)]
        assert record["bbox"] == box
        assert record["area"] == len(rows)


def test_within_autocast_masks_are_nearly_the_same(teacher: Sam, photograph: np.ndarray) -> None:
    generator = SamAutomaticMaskGenerator(teacher, points_per_side=2, output_mode="coco_rle")
    precise = generator.generate(photograph)
    with torch.autocast("cpu", torch.bfloat16):
        rough = generator.generate(photograph)
    overlaps = coco.iou([r["segmentation"] for r in precise], [r["segmentation"] for r in rough], [0] * len(rough))
    assert np.median(overlaps.max(1)) > 0.9


def test_fast_asks_fewer_points_for_nearly_the_same_masks(
    teacher: Sam, photograph: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = Sam.decode
    monkeypatch.setattr(
        Sam, "decode", lambda sam, e, p, *more: decoded.append(p.points.shape[1]) or decode(sam, e, p, *more)
    )
    full, fast = (
        SamAutomaticMaskGenerator(teacher, points_per_side=8, output_mode="coco_rle", fast=fast, points_per_batch=16)
        for fast in (False, True)
    )
    expected, before = full.generate(photograph), sum(decoded)
    found = fast.generate(photograph)
    assert before == 64
    assert sum(decoded) - before < 50
    overlaps = coco.iou([r["segmentation"] for r in expected], [r["segmentation"] for r in found], [0] * len(found))
    assert (overlaps.max(1) > 0.9).mean() >= 0.95


def test_nothing_found_is_no_mistake(teacher: Sam, photograph: np.ndarray) -> None:
    generator = SamAutomaticMaskGenerator(teacher, points_per_side=1, pred_iou_thresh=9, min_mask_region_area=5)
    assert generator.generate(photograph) == []


def test_wrong_arguments_raise_value_error(teacher: Sam) -> None:
    with pytest.raises(ValueError, match="points_per_side or point_grids"):
        SamAutomaticMaskGenerator(teacher, point_grids=[np.zeros((1, 2))])
    with pytest.raises(ValueError, match="output_mode"):
        SamAutomaticMaskGenerator(teacher, output_mode="png")  # type: ignore[arg-type]
    for option, value in {
        "points_per_side": 0, "points_per_batch": 0, "crop_n_layers": -1, "crop_n_points_downscale_factor": 0,
        "crop_overlap_ratio": 2.0,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=option):
            SamAutomaticMaskGenerator(teacher, **{option: value})


@pytest.mark.parametrize(
    ("grids", "layers", "message"),
    [
        ([[[60, 45]]], 0, "in 0..1, shares of the image's width and height, not pixels"),
        ([[[np.nan, 0.5]]], 0, "in 0..1"),
        ([[0.5, 0.5]], 0, r"a list of \[n, 2\], one for each layer of crops, not of \[2\]"),
        ([[[0.5, 0.5]]], 1, "1 point_grids for 2 layers"),
    ],
)
def test_point_grids_are_checked(teacher: Sam, grids: Any, layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamAutomaticMaskGenerator(teacher, points_per_side=None, point_grids=grids, crop_n_layers=layers)


def test_point_grids_may_be_lists(teacher: Sam, photograph: np.ndarray) -> None:
    options: dict[str, Any] = {"pred_iou_thresh": -9.0, "stability_score_thresh": 0.0, "output_mode": "coco_rle"}
    listed = SamAutomaticMaskGenerator(teacher, None, point_grids=[[[0.5, 0.5]]], **options)  # type: ignore[list-item]
    assert listed.generate(photograph) == SamAutomaticMaskGenerator(teacher, 1, **options).generate(photograph)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3)])
def test_the_smallest_images_have_crops(teacher: Sam, size: tuple[int, int]) -> None:
    options = {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2, "pred_iou_thresh": -9.0}
    generator = SamAutomaticMaskGenerator(teacher, points_per_side=1, stability_score_thresh=0.0, **options)  # type: ignore[arg-type]
    found = generator.generate(np.full((*size, 3), 200, np.uint8))
    assert found
    assert all(record["segmentation"].shape == size for record in found)


SCRIPT = """
import numpy as np
from {package} import SamAutomaticMaskGenerator, SamPredictor, sam_model_registry

sam = sam_model_registry["vit_t"](checkpoint=checkpoint)
sam.to(device="cpu")
sam.eval()

predictor = SamPredictor(sam)
predictor.set_image(image)
masks, scores, logits = predictor.predict(
    point_coords=np.array([[230, 130]]), point_labels=np.array([1]), multimask_output=True
)
masks, _, _ = predictor.predict(
    point_coords=np.array([[230, 130]]),
    point_labels=np.array([1]),
    mask_input=logits[np.argmax(scores), :, :][None, :, :],
    multimask_output=False,
)
boxes = torch.tensor([[100, 20, 350, 280], [200, 100, 300, 200]], device=predictor.device)
batch, _, _ = predictor.predict_torch(
    point_coords=None,
    point_labels=None,
    boxes=predictor.transform.apply_boxes_torch(boxes, image.shape[:2]),
    multimask_output=False,
)
mask_generator = SamAutomaticMaskGenerator(
    model=sam,
    points_per_side=3,
    pred_iou_thresh=0.86,
    stability_score_thresh=0.92,
    crop_n_points_downscale_factor=2,
)
everything = mask_generator.generate(image)
everything = sorted(everything, key=(lambda x: x["area"]), reverse=True)
"""


def test_a_script_for_segment_anything_runs_with_another_import(
    mobile_sam: ModuleType, mobile_sam_weights: str, photograph: np.ndarray
) -> None:
    """The examples for predictor and generator in segment-anything's documentation."""
    namespaces: list[dict[str, Any]] = []
    for package in ("mobile_sam", "sam_distill"):
        namespaces.append({"checkpoint": mobile_sam_weights, "image": photograph, "torch": torch})
        exec(SCRIPT.format(package=package), namespaces[-1])
    theirs, ours = namespaces
    assert (ours["masks"] != theirs["masks"]).mean() < 1e-4
    assert (ours["batch"] != theirs["batch"]).float().mean() < 1e-4
    np.testing.assert_allclose(ours["scores"], theirs["scores"], atol=1e-4)
    assert len(ours["everything"]) == len(theirs["everything"]) > 0
    for our, their in zip(ours["everything"], theirs["everything"], strict=True):
        assert (our["segmentation"] != their["segmentation"]).mean() < 1e-4
