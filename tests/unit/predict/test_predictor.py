"""Our predictor compared with segment-anything's, which runs MobileSAM's own model with the same weights."""

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sam_distill.errors import UserError
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
def test_masks_match_segment_anything(predictors: tuple[Any, Any], prompt: dict[str, Any]) -> None:
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


def test_every_public_member_is_there(predictors: tuple[Any, Any]) -> None:
    ours, theirs = predictors
    absent = {"orig_h", "orig_w", "input_h", "input_w"}  # always None in segment-anything
    assert {name for name in dir(theirs) if not name.startswith("_")} - absent <= set(dir(ours))
    assert ours.model.mask_threshold == theirs.model.mask_threshold
    assert ours.model.image_encoder.img_size == theirs.model.image_encoder.img_size
    assert ours.is_image_set
    assert ours.device == theirs.device
    assert (ours.original_size, ours.input_size) == (tuple(theirs.original_size), tuple(theirs.input_size))
    for embedding in (ours.features, ours.get_image_embedding()):
        np.testing.assert_allclose(embedding, theirs.get_image_embedding(), atol=1e-4)


BOXES = torch.tensor([[195.0, 35, 245, 165], [35, 45, 145, 155]])
POINTS = torch.tensor([[[90.0, 100], [220, 100]], [[220, 100], [10, 10]]])
POINT_LABELS = torch.tensor([[1, 0], [1, -1]])  # -1 is padding, as in segment-anything


@pytest.mark.parametrize(
    ("points", "labels", "boxes"),
    [(None, None, BOXES), (POINTS, POINT_LABELS, None), (POINTS, POINT_LABELS, BOXES)],
    ids=["boxes", "points", "points and boxes"],
)
@pytest.mark.parametrize("return_logits", [False, True])
def test_predict_torch_matches_segment_anything(
    predictors: tuple[Any, Any], points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, return_logits: bool
) -> None:
    results = []
    for predictor in predictors:
        size, to_frame = predictor.original_size, predictor.transform
        prompt = (
            None if points is None else to_frame.apply_coords_torch(points, size),
            labels,
            None if boxes is None else to_frame.apply_boxes_torch(boxes, size),
        )
        results.append(predictor.predict_torch(*prompt, multimask_output=False, return_logits=return_logits))
    (masks, iou, low_res), (their_masks, their_iou, their_low_res) = results
    assert masks.dtype == their_masks.dtype
    torch.testing.assert_close(low_res, their_low_res, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(iou, their_iou, rtol=0, atol=1e-4)
    difference = (masks.float() - their_masks.float()).abs()
    assert difference.max() < 1e-2 if return_logits else difference.mean() < 1e-4


@pytest.fixture
def recorded(teacher: Sam, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Replace the image encoder by a fake one; return the list of its inputs, (images, sizes) per call."""
    calls: list[tuple[Tensor, Tensor]] = []

    def encode(images: Tensor, sizes: Tensor) -> Tensor:
        calls.append((images, sizes))
        return torch.zeros(len(images), 256, 64, 64)

    monkeypatch.setattr(teacher, "encode", encode)
    return calls


def test_all_kinds_of_image_input_give_the_same_pixels(
    teacher: Sam, photograph: np.ndarray, recorded: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    Image.fromarray(photograph).save(tmp_path / "photograph.png")
    predictor = SamPredictor(teacher)
    predictor.set_image(photograph)
    predictor.set_image(Image.fromarray(photograph))
    predictor.set_image(torch.from_numpy(photograph).permute(2, 0, 1))
    predictor.set_image(tmp_path / "photograph.png")
    predictor.set_image(str(tmp_path / "photograph.png"))
    predictor.set_image(photograph[..., ::-1], image_format="BGR")
    framed = torch.from_numpy(predictor.transform.apply_image(photograph)).permute(2, 0, 1)
    predictor.set_torch_image(framed[None], photograph.shape[:2])
    (first, _), *others = recorded
    assert len(others) == 6
    for images, sizes in others:
        assert sizes.tolist() == [[683, 1024]]
        assert (images == first).all()


def test_gray_and_rgba_arrays_are_read_like_their_files(
    teacher: Sam, photograph: np.ndarray, recorded: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    gray, alpha = photograph[..., 1], np.dstack([photograph, photograph[..., :1]])
    predictor = SamPredictor(teacher)
    for array, others in ((gray, [gray[..., None]]), (alpha, [])):
        Image.fromarray(array).save(tmp_path / "array.png")
        tensors = [torch.from_numpy(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)]
        recorded.clear()
        for image in (tmp_path / "array.png", array, *others, *tensors):
            predictor.set_image(image)
        (first, _), *rest = recorded
        assert all((images == first).all() for images, _ in rest)
    recorded.clear()
    predictor.set_image(alpha[..., [2, 1, 0, 3]], image_format="BGR")
    predictor.set_image(torch.from_numpy(gray))
    assert (recorded[0][0] == first).all()


def _sixteen_bit(photograph: np.ndarray) -> Image.Image:
    return Image.fromarray(photograph[..., 0].astype(np.uint16) * 256)


def _transparent(photograph: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([photograph, photograph[..., :1]]))


@pytest.mark.parametrize(
    ("make", "name", "options"),
    [
        (_sixteen_bit, "deep.png", {}),
        (_transparent, "clear.png", {}),
        (
            Image.fromarray,
            "turned.png",
            {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
        ),
    ],
    ids=["16 bits", "alpha", "EXIF"],
)
def test_pillow_image_is_read_like_its_file(
    teacher: Sam, photograph: np.ndarray, recorded: list[Any], tmp_path: Path, make: Any, name: str, options: Any
) -> None:
    make(photograph).save(tmp_path / name, **options)
    predictor = SamPredictor(teacher)
    for image in (tmp_path / name, Image.open(tmp_path / name)):
        predictor.set_image(image)
    (theirs, their_sizes), (ours, our_sizes) = recorded
    assert their_sizes.tolist() == our_sizes.tolist()
    assert (theirs == ours).all()


def test_images_of_several_sizes(teacher: Sam, photograph: np.ndarray) -> None:
    """The results are those of each image alone."""
    images = [photograph, photograph.transpose(1, 0, 2)[:, 50:]]
    prompts: list[dict[str, Any]] = [POINT, {"box": np.array([0, 40, 110, 145])}]
    predictor = SamPredictor(teacher)
    predictor.set_images(images)
    together = predictor.predict_batch(prompts, multimask_output=False)
    for image, prompt, answer in zip(images, prompts, together, strict=True):
        predictor.set_image(image)
        for alone, batched in zip(predictor.predict(**prompt, multimask_output=False), answer, strict=True):
            np.testing.assert_allclose(alone, batched, atol=1e-3)


def test_several_images_need_several_prompts(teacher: Sam, recorded: list[Any]) -> None:
    predictor = SamPredictor(teacher)
    predictor.set_images([Image.new("RGB", (40, 30)), Image.new("RGB", (30, 40))])
    with pytest.raises(RuntimeError, match="2 are set: use predict_batch"):
        predictor.predict(**POINT)
    with pytest.raises(ValueError, match="1 prompts for 2 images"):
        predictor.predict_batch([POINT])
    predictor.reset_image()
    assert not predictor.is_image_set


def test_wrong_use_raises_a_clear_error(teacher: Sam, photograph: np.ndarray) -> None:
    predictor = SamPredictor(teacher)
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(**POINT)
    for image in (photograph[..., :2], photograph.transpose(2, 0, 1), photograph.astype(np.float32), photograph[:0]):
        with pytest.raises(ValueError, match="uint8"):
            predictor.set_image(image)
    with pytest.raises(ValueError, match="RGB or BGR"):
        predictor.set_image(photograph, "HSV")
    with pytest.raises(TypeError, match=r"load_sam\('mobile_sam'\)"):
        SamPredictor("mobile_sam")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"\.float\(\) mends it"):
        SamPredictor(copy.deepcopy(teacher).half()).set_image(photograph)
    with pytest.raises(ValueError, match="long side of 1024"):
        predictor.set_torch_image(torch.zeros(1, 3, 100, 200), (100, 200))
    with pytest.raises(ValueError, match="an image has pixels"):
        predictor.set_image(Image.new("RGB", (0, 0)))
    with pytest.raises(TypeError, match="set_image takes one"):
        predictor.set_images(photograph)  # type: ignore[arg-type]  # its rows would be taken for gray images


def test_zero_prompts_give_empty_results(teacher: Sam, photograph: np.ndarray) -> None:
    """A detector may find nothing, so zero boxes or points are no error."""
    predictor = SamPredictor(teacher)
    predictor.set_image(photograph)
    shape = photograph.shape[:2]
    masks, iou, low_res = predictor.predict_torch(None, None, torch.zeros(0, 4))
    assert (masks.shape, masks.dtype) == ((0, 3, *shape), torch.bool)
    assert (iou.shape, low_res.shape) == ((0, 3), (0, 3, 256, 256))
    points = torch.zeros(0, 1, 2), torch.zeros(0, 1)
    assert predictor.predict_torch(*points, multimask_output=False, return_logits=True)[0].dtype == torch.float32


def test_labels_of_any_dtype(teacher: Sam, photograph: np.ndarray) -> None:
    predictor = SamPredictor(teacher)
    predictor.set_image(photograph)
    points, labels = torch.tensor([[[30, 40], [50, 20]]]), torch.tensor([[1, 0]])
    expected = predictor.predict_torch(points, labels)[1]
    for dtype in (torch.bool, torch.uint8, torch.float64):
        assert torch.equal(predictor.predict_torch(points, labels.to(dtype))[1], expected)


def test_failed_set_image_clears_the_earlier_image(teacher: Sam, photograph: np.ndarray, tmp_path: Path) -> None:
    predictor, broken = SamPredictor(teacher), tmp_path / "broken.png"
    broken.write_text("no picture")
    for fails in (
        lambda: predictor.set_image(broken),
        lambda: predictor.set_image(photograph.astype(np.float32)),
        lambda: predictor.set_torch_image(torch.zeros(1, 3, 100, 200), (100, 200)),
    ):
        predictor.set_image(photograph)
        with pytest.raises((UserError, ValueError)):
            fails()
        with pytest.raises(RuntimeError, match="set_image"):
            predictor.predict(**POINT)


def test_set_torch_image_checks_size_and_colours(teacher: Sam, photograph: np.ndarray) -> None:
    predictor = SamPredictor(teacher)
    framed = torch.from_numpy(predictor.transform.apply_image(photograph)).permute(2, 0, 1)[None]
    size = photograph.shape[:2]
    with pytest.raises(ValueError, match=r"original_image_size is \(height, width\)"):
        predictor.set_torch_image(framed, size[::-1])
    for wrong in (framed / 255, (framed - 120.0) / 58, framed * NAN):
        with pytest.raises(ValueError, match="colours of 0 to 255"):
            predictor.set_torch_image(wrong, size)
    predictor.set_torch_image(framed.float(), size)
    assert predictor.is_image_set


NAN = float("nan")
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"point_coords": [[NAN, 5]], "point_labels": [1]}, "point_coords holds NaN or infinity"),
    ({"point_coords": [[90, 100]], "point_labels": [5]}, r"point_labels are 1 \(foreground\), 0 \(background\)"),
    ({"point_coords": [90, 100], "point_labels": 1}, r"point_coords is \[N, 2\], such as \[\[320, 240\]\], not \[2\]"),
    ({"point_coords": [[[90, 100]]], "point_labels": [[1]]}, "several prompts on one image are for predict_torch"),
    ({"point_coords": [[90, 100]], "point_labels": [1, 0]}, r"point_labels is \[1\], one for each point, not \[2\]"),
    ({"point_coords": [[90, 100]]}, "give both or neither"),
    (
        {"box": [[35, 45, 145, 155], [195, 35, 245, 165]]},
        r"box is \[4\], .* not \[2, 4\]; several prompts on one image",
    ),
    ({"box": [145, 45, 35, 155]}, "one has x1 < x0 or y1 < y0"),
    ({"box": [35, NAN, 145, 155]}, "a box holds NaN"),
    ({"mask_input": np.ones((1, 200, 300), np.float32)}, r"mask_input is \[1, 256, 256\], one of the low-res logits"),
    ({"mask_input": np.zeros((3, 256, 256), np.float32)}, r"not \[3, 256, 256\]"),
    ({"mask_input": np.eye(256, dtype=np.uint8)}, "mask_input is uint8, a mask, but logits are expected"),
    ({"mask_input": np.eye(256, dtype=bool)[None]}, "mask_input is bool, a mask"),
    ({"mask_input": 255 * np.eye(256, dtype=np.float32)[None]}, "a mask of 0 and 1 or 255, but logits are expected"),
    ({"mask_input": np.full((1, 256, 256), NAN)}, "mask_input holds NaN"),
]


@pytest.mark.parametrize(("prompt", "message"), WRONG, ids=[message for _, message in WRONG])
def test_predict_refuses_a_wrong_prompt(predictors: tuple[Any, Any], prompt: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictors[0].predict(**prompt)
    with pytest.raises(ValueError, match=message):
        predictors[0].predict_batch([prompt])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((None, None, BOXES[:, [2, 1, 0, 3]]), "one has x1 < x0"),
        ((None, None, BOXES * NAN), "a box holds NaN"),
        ((POINTS, POINT_LABELS + 4), "point_labels are 1"),
        ((POINTS[0], POINT_LABELS[0]), r"point_coords is \[P, N, 2\], not \[2, 2\]; predict takes one prompt"),
        ((POINTS, POINT_LABELS[0]), r"point_labels is \[P, N\]"),
        ((POINTS, POINT_LABELS, BOXES[:1]), "P differs: 2 in point_coords, 2 in point_labels, 1 in boxes"),
        ((None, None, None, torch.zeros(2, 256, 256)), r"mask_input is \[P, 1, 256, 256\]"),
    ],
)
def test_predict_torch_refuses_wrong_prompts(predictors: tuple[Any, Any], prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictors[0].predict_torch(*prompt)


@pytest.mark.filterwarnings("error")
def test_prompts_outside_the_image_cause_a_warning(predictors: tuple[Any, Any]) -> None:
    predictor, _ = predictors
    for prompt in ({"point_coords": [[310, 100]], "point_labels": [1]}, {"box": [310, 210, 350, 250]}):
        with pytest.warns(UserWarning, match="a point or box lies outside the image"):
            predictor.predict(**prompt)
    predictor.predict(
        point_coords=[[300, 200], [-9, -9]], point_labels=[1, -1]
    )  # a corner of the image; label -1 is no point
    predictor.predict(box=torch.tensor([-5, -5, 305, 205]))  # detectors return boxes that reach a little outside
