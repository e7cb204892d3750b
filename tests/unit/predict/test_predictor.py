"""Our predictor against segment-anything's, with MobileSAM's weights in MobileSAM's own model."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sam_distill.models.sam import Sam
from sam_distill.predict.predictor import SamPredictor


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    """[200, 300, 3] uint8: a disc and a bar on a gradient."""
    y, x = np.mgrid[:200, :300]
    image = np.stack([x * 0.6, y, 255 - x * 0.5], axis=-1)
    image[(x - 90) ** 2 + (y - 100) ** 2 < 50**2] = (230, 60, 40)
    image[40:160, 200:240] = (30, 160, 80)
    return image.astype(np.uint8)


@pytest.fixture(scope="module")
def predictors(
    mobile_sam: ModuleType, mobile_sam_weights: str, teacher: Sam, photograph: np.ndarray
) -> tuple[Any, Any]:
    reference = mobile_sam.sam_model_registry["vit_t"](checkpoint=mobile_sam_weights).train().eval()
    both = SamPredictor(teacher), mobile_sam.SamPredictor(reference)
    for predictor in both:
        predictor.set_image(photograph)
    return both


POINT = {"point_coords": np.array([[90, 100]]), "point_labels": np.array([1])}
PROMPTS: list[dict[str, Any]] = [
    POINT,
    POINT | {"multimask_output": False},
    {"point_coords": np.array([[90, 100], [220, 100]]), "point_labels": np.array([1, 0]), "multimask_output": False},
    {"box": np.array([195, 35, 245, 165]), "multimask_output": False},
    POINT | {"box": np.array([35, 45, 145, 155])},
    POINT | {"return_logits": True},
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: " ".join(prompt))
def test_same_masks(predictors: tuple[Any, Any], prompt: dict[str, Any]) -> None:
    (masks, iou, low_res), (their_masks, their_iou, their_low_res) = (p.predict(**prompt) for p in predictors)
    assert masks.dtype == their_masks.dtype
    assert masks.shape == their_masks.shape
    np.testing.assert_allclose(low_res, their_low_res, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(iou, their_iou, atol=1e-4)
    if prompt.get("return_logits"):
        np.testing.assert_allclose(masks, their_masks, rtol=1e-3, atol=1e-3)
    else:
        assert (masks != their_masks).mean() < 1e-4


def test_an_earlier_mask_is_a_prompt(predictors: tuple[Any, Any]) -> None:
    results = []
    for predictor in predictors:
        _, _, low_res = predictor.predict(**POINT, multimask_output=False)
        results.append(predictor.predict(**POINT, mask_input=low_res, multimask_output=False)[2])
    np.testing.assert_allclose(*results, rtol=1e-3, atol=2e-3)


def test_it_cuts_out_the_disc(predictors: tuple[Any, Any]) -> None:
    masks, iou, _ = predictors[0].predict(**POINT)
    y, x = np.mgrid[:200, :300]
    disc = (x - 90) ** 2 + (y - 100) ** 2 < 50**2
    best = masks[iou.argmax()]
    assert (best & disc).sum() / (best | disc).sum() > 0.95


def test_wrong_use_is_told(teacher: Sam, photograph: np.ndarray) -> None:
    predictor = SamPredictor(teacher)
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(**POINT)
    for image in (photograph[..., 0], photograph.astype(np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            predictor.set_image(image)
    with pytest.raises(ValueError, match="RGB or BGR"):
        predictor.set_image(photograph, "HSV")
