import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from skimage import data

from sam_distill.cli.app import main
from sam_distill.evaluate.everything import Detections, average_precision, match_masks


def square(x: int, y: int, side: int, score: float = 0.9) -> dict:
    """Return the record of a square mask in an image of 60 x 80 pixels, as the mask generator returns it."""
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[y : y + side, x : x + side] = 1
    runs = coco.encode(mask)
    runs["counts"] = runs["counts"].decode()
    return {"segmentation": runs, "area": side * side, "bbox": [x, y, side, side], "predicted_iou": score}


def test_each_teacher_mask_is_compared_with_the_nearest_student_mask() -> None:
    teacher, student = [square(0, 0, 10), square(40, 20, 20)], [square(0, 5, 10), square(42, 20, 20), square(0, 0, 8)]
    first, second = match_masks("a", teacher, student)
    assert first.iou == pytest.approx(64 / 100)
    assert (first.teacher_area, first.student_area) == (100, 64)
    assert second.iou == pytest.approx(18 * 20 / (22 * 20))
    assert second.prompt == (40, 20, 60, 40)


def test_average_precision_equals_cocos() -> None:
    """One of two masks found, after a more confident wrong one: precision 1/2 up to recall 1/2, 51 of 101 points."""
    scores = average_precision([[square(0, 0, 10), square(40, 20, 20)]], [[square(20, 40, 10, 0.95), square(0, 0, 10)]])
    assert scores == {
        k: pytest.approx(v) for k, v in {"ap": 51 / 101 / 2, "ap/50": 51 / 101 / 2, "recall": 0.5}.items()
    }
    imprecise = average_precision([[square(0, 0, 20)]], [[square(0, 0, 16)]])  # IoU 0.64: found at 0.5, 0.55 and 0.6
    assert imprecise == pytest.approx({"ap": 0.3, "ap/50": 1.0, "recall": 0.3})


def test_score_is_0_without_student_masks_and_none_without_teacher_masks() -> None:
    detections = Detections()
    detections.add("a", [square(0, 0, 10)], [])
    metrics = detections.compute()
    assert (metrics["miou/everything"], metrics["recall/50"], metrics["ap"], metrics["masks"]) == (0, 0, 0, 0)
    nothing = Detections()
    nothing.add("a", [], [square(0, 0, 10)])
    assert "miou/everything" not in nothing.compute()


def test_a_model_against_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mobile_sam_weights: str) -> None:
    """All scores are 1. The teacher's masks are computed once and cached for later runs."""
    home, images = tmp_path / "home", tmp_path / "images"
    (home / "weights").mkdir(parents=True)
    for file in Path(mobile_sam_weights).parent.glob("mobile_sam*"):
        (home / "weights" / file.name).symlink_to(file)
    monkeypatch.setenv("SAM_DISTILL_HOME", str(home))
    images.mkdir()
    Image.fromarray(data.chelsea()).resize((150, 100)).save(images / "cat.png")
    words = ["evaluate", "checkpoint=mobile_sam", "protocol=everything", "protocol.generator.points_per_side=3",
             "data=folder", f"data.path={images}", "protocol.generator.pred_iou_thresh=0.5"]  # fmt: skip
    assert main([*words, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["miou/everything"] == metrics["ap"] == metrics["recall"] == 1
    assert metrics["masks"] == metrics["teacher/masks"] == metrics["prompts/everything"] > 0
    assert (tmp_path / "run" / "pictures" / "everything.png").is_file()
    (cache_file,) = (home / "everything").iterdir()
    cache_file.write_text("[]")  # a cached teacher without masks
    assert main([*words, f"hydra.run.dir={tmp_path / 'again'}"]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["teacher/masks"] == 0
    assert again["masks"] == metrics["masks"]
