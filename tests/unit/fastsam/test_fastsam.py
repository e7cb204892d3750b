"""Tests of FastSAM: the rules on masks made by hand, the model with an untrained YOLO that is built here."""

from __future__ import annotations

import csv
import json
import logging
import socket
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sam_distill.cli import app
from sam_distill.errors import UserError
from sam_distill.fastsam import model as fastsam
from sam_distill.fastsam.mappings import RULES, best_for_box, official
from sam_distill.fastsam.model import FastSam, FastSamView, is_fastsam
from sam_distill.files import file_sha256
from sam_distill.models import weights
from sam_distill.types import BACKGROUND, BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, FOREGROUND, NOT_A_POINT, Batch, Prompts


def squares(*squares: tuple[int, int, int]) -> Tensor:
    """Return a mask for each square (left, top, side): [N, 20, 24] bool."""
    masks = torch.zeros(len(squares), 20, 24, dtype=torch.bool)
    for mask, (left, top, side) in zip(masks, squares, strict=True):
        mask[top : top + side, left : left + side] = True
    return masks


LARGE, MIDDLE, SMALL, APART = (0, 0, 16), (2, 2, 10), (4, 4, 4), (18, 2, 3)
IN_SMALL, IN_MIDDLE, IN_LARGE, IN_APART, NOWHERE = (5, 5), (10, 10), (14, 14), (19, 3), (23, 19)
F, B = FOREGROUND, BACKGROUND


def predict(rule: str, masks: Tensor, *clicks: tuple[tuple[int, int], int]) -> Tensor:
    points, labels = zip(*clicks, strict=True)
    return RULES[rule](masks, torch.tensor(points), torch.tensor(labels))  # type: ignore[index]


@pytest.mark.parametrize("rule", RULES)
def test_one_foreground_point_is_the_union_of_the_masks_that_hold_it(rule: str) -> None:
    large, small, apart = masks = squares(LARGE, SMALL, APART)
    assert torch.equal(predict(rule, masks, (IN_SMALL, F)), large | small)
    assert torch.equal(predict(rule, masks, (IN_LARGE, F)), large)
    assert torch.equal(predict(rule, masks, (IN_APART, F)), apart)
    assert torch.equal(predict(rule, masks, (IN_LARGE, F), (IN_APART, F)), large | apart)
    assert not predict(rule, masks, (NOWHERE, F)).any()


@pytest.mark.parametrize("rule", RULES)
def test_no_masks_give_an_empty_mask(rule: str) -> None:
    for labels in ((F, B), (F, F), (B, B)):
        found = predict(rule, squares(), *zip((IN_SMALL, IN_LARGE), labels, strict=True))
        assert found.shape == (20, 24)
        assert not found.any()
    assert not best_for_box(squares(), torch.tensor([0.0, 0, 9, 9])).any()


def test_official_takes_smaller_masks_out_of_larger_ones() -> None:
    large, over_its_corner, _ = masks = squares(LARGE, (12, 12, 6), SMALL)
    corner = (17, 17)
    for order in ([0, 1, 2], [2, 1, 0]):
        assert torch.equal(predict("official", masks[order], (IN_MIDDLE, F), (corner, B)), large & ~over_its_corner)
    for rule in ("ultralytics_old", "ultralytics_new"):
        assert torch.equal(predict(rule, masks, (IN_MIDDLE, F), (corner, B)), large)


def test_official_erases_a_mask_that_holds_both() -> None:
    masks = squares(LARGE, MIDDLE, SMALL)
    # the smallest mask with the foreground point holds the background point as well: nothing is left
    assert not predict("official", masks[:2], (IN_SMALL, F), (IN_MIDDLE, B)).any()
    # a smaller mask without the background point survives: it is painted after the larger ones are erased
    assert torch.equal(predict("official", masks, (IN_SMALL, F), (IN_MIDDLE, B)), masks[2])
    # a background point alone paints nothing
    assert not predict("official", masks, (IN_SMALL, B)).any()


def test_official_depends_on_the_order_of_the_points() -> None:
    masks = squares(LARGE, MIDDLE)
    assert not predict("official", masks, (IN_SMALL, F), (IN_MIDDLE, B)).any()
    assert torch.equal(predict("official", masks, (IN_MIDDLE, B), (IN_SMALL, F)), masks[0])


def test_official_equals_painting_point_by_point() -> None:
    """Compare it with the rule's description implemented literally, on random masks and points."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        corners = torch.randint(0, 12, (6, 2), generator=generator)
        masks = squares(*((int(x), int(y), 2 + i) for i, (x, y) in enumerate(corners)))
        masks = masks[torch.randperm(6, generator=generator)]
        points, labels = torch.randint(0, 20, (3, 2), generator=generator), torch.tensor([F, B, F])
        canvas = np.zeros((20, 24), bool)
        for mask in sorted(masks.numpy(), key=lambda mask: -mask.sum()):
            for (x, y), label in zip(points.tolist(), labels.tolist(), strict=True):
                if mask[y, x]:
                    canvas[mask] = label == F
        assert np.array_equal(official(masks, points, labels), canvas)


def test_the_rules_of_ultralytics_choose_among_masks() -> None:
    large, small, apart = masks = squares(LARGE, SMALL, APART)
    for rule in ("ultralytics_old", "ultralytics_new"):
        assert torch.equal(predict(rule, masks, (IN_SMALL, F), (IN_LARGE, B)), small)
        assert not predict(rule, masks, (IN_LARGE, F), (IN_SMALL, B)).any()
        assert torch.equal(predict(rule, masks, (IN_SMALL, B), (IN_LARGE, B)), apart), "all that is not hit"
    assert torch.equal(predict("ultralytics_old", masks, (IN_SMALL, B), (IN_LARGE, F)), large), "the last point decides"
    assert not predict("ultralytics_new", masks, (IN_SMALL, B), (IN_LARGE, F)).any(), "any background point does"


def test_a_box_gets_the_mask_with_the_highest_iou() -> None:
    large, middle, small = masks = squares(LARGE, MIDDLE, SMALL)
    for box, expected in (((0, 0, 16, 15), large), ((3, 3, 12, 12), middle), ((4.9, 4.2, 7, 8), small)):
        assert torch.equal(best_for_box(masks, torch.tensor(box)), expected)


def test_view_returns_masks_at_the_original_size() -> None:
    masks = torch.zeros(2, 512, 1024, dtype=torch.bool)
    masks[0, :, :512], masks[1, 100:140, 600:640] = True, True
    batch = Batch(["a"], torch.zeros(1, 3, 1024, 1024), torch.tensor([[512, 1024]]), torch.tensor([[1024, 2048]]), [0])
    points = torch.tensor([[[[10.9, 20], [620, 120], [0, 0]], [[590, 90], [650, 150], [0, 0]]]])
    labels = torch.tensor([[[F, B, NOT_A_POINT], [BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, NOT_A_POINT]]])
    view = FastSamView([masks], batch, "official")
    assert view.embedding is None
    mask_of = view.masks(Prompts(points, labels))
    for prompt, expected in enumerate(masks):
        assert torch.equal(mask_of(0, prompt), expected.repeat_interleave(2, 0).repeat_interleave(2, 1))


@pytest.fixture(scope="module")
def yolo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an untrained YOLOv8n-seg; its last layers have large random weights, so that it detects many objects."""
    path = tmp_path_factory.mktemp("yolo") / "yolo.pt"
    fastsam._ultralytics()
    from ultralytics import YOLO

    torch.manual_seed(0)
    model = YOLO("yolov8n-seg.yaml")
    for branch in (*model.model.model[-1].cv3, *model.model.model[-1].cv4):  # classes, coefficients of masks
        torch.nn.init.normal_(branch[-1].weight)
    model.save(path)
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for i, (height, width) in enumerate(((120, 200), (200, 150))):
        pixels = np.random.default_rng(i).integers(0, 255, (height // 10, width // 10, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{i}.png")
    return folder


def test_evaluate_command_with_a_fastsam(
    yolo: Path, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"checkpoint={yolo}", "protocol=point_pairs", "protocol.distances=[20,50]", "protocol.pairs=3"]
    words += ["data=folder", f"data.path={photographs}", "trainer=cpu", "trainer.workers=0"]
    words += ["fastsam.conf=1e-5", "fastsam.mapping=ultralytics_old", "hydra.run.dir=judged"]
    assert app.main(["evaluate", *words]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["judged"]

    metrics = json.loads(Path("judged/metrics.json").read_text())
    with Path("judged/prompts.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["teacher_area"])]
    for kind in ("pair_20", "pair_50"):
        empty = [int(row["student_area"]) == 0 for row in rows if row["kind"] == kind]
        assert 0 < metrics[f"prompts/{kind}"] == len(empty)
        assert metrics[f"empty/{kind}"] == pytest.approx(np.mean(empty))
        assert f"blind/miou/{kind}" in metrics
    assert any(int(row["student_area"]) for row in rows)
    assert metrics["parameters/model"] == sum(p.numel() for p in FastSam(str(yolo)).network.model.parameters())
    assert not {"parameters", "embedding_mse", "embedding_cosine"} & metrics.keys()
    assert (metrics["fastsam/mapping"], metrics["fastsam/conf"]) == ("ultralytics_old", 1e-5)
    said = capsys.readouterr().out
    assert "miou/pair_20" in said
    assert "embedding MSE" not in said


def test_everything_and_its_time(yolo: Path, photographs: Path, tmp_path: Path) -> None:
    """FastSAM's results for Figure 6 and Table 6 of the paper."""
    words = ["data=folder", f"data.path={photographs}", f"checkpoint={yolo}", "trainer=cpu"]
    grid = ["protocol=everything", "protocol.generator.points_per_side=2", "fastsam.conf=0.0001"]
    assert app.main(["evaluate", *words, *grid, f"hydra.run.dir={tmp_path / 'a'}"]) == 0
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["masks"] > 0
    assert metrics["fastsam/conf"] == 0.0001
    assert app.main(["bench", "image", *words, "seconds=0.01", f"hydra.run.dir={tmp_path / 'b'}"]) == 0
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["image_ms"] > 0
    assert app.main(["bench", "encoder", *words, f"hydra.run.dir={tmp_path / 'c'}"]) == 1


def test_masks_of_everything_lie_in_the_image(yolo: Path) -> None:
    image = torch.randint(0, 255, (3, 683, 1024), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = FastSam(str(yolo), conf=1e-5).everything(image)
    assert masks.dtype == torch.bool
    assert masks.shape == (300, 683, 1024)
    assert FastSam(str(yolo), conf=0.99).everything(image).shape == (0, 683, 1024)


def test_metrics_of_a_sam_hold_its_parameters(photographs: Path, tmp_path: Path) -> None:
    words = ["protocol.points=1", "data=folder", f"data.path={photographs}", "data.images=1", "trainer=cpu"]
    assert app.main(["evaluate", "checkpoint=mobile_sam", *words, f"hydra.run.dir={tmp_path}"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["empty/point"] == 0
    assert metrics["embedding_mse"] < 1e-9, "the teacher's layers are folded"
    # paper, Tables 3, 1 and 6
    assert metrics["parameters"] == pytest.approx(5.78e6, rel=0.01)
    assert metrics["parameters/prompt_encoder"] == pytest.approx(0.006e6, rel=0.05)
    assert metrics["parameters/model"] == pytest.approx(9.66e6, rel=0.02)


def test_is_fastsam(yolo: Path, mobile_sam_weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for checkpoint in ("fastsam_s", "fastsam_x", "FastSAM-s.pt", "FastSAM-x.pt", str(yolo)):
        assert is_fastsam(checkpoint), checkpoint
    Path("FastSAM-s.pt").write_bytes(Path(mobile_sam_weights).read_bytes())
    for checkpoint in ("mobile_sam", mobile_sam_weights, "FastSAM-s.pt", "nowhere.pt", str(tmp_path)):
        assert not is_fastsam(checkpoint), checkpoint


def test_ultralytics_uses_no_network_and_changes_no_global_state(yolo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("it looks for the network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    state = torch.save, Image.open, list(logging.getLogger().handlers), warnings.filters[:], torch.get_num_threads()
    image = torch.zeros(3, 64, 1024, dtype=torch.uint8)
    FastSam(str(yolo)).everything(image)
    assert state == (torch.save, Image.open, logging.getLogger().handlers, warnings.filters, torch.get_num_threads())
    assert torch.save.__module__ == "torch.serialization"
    assert Image.open.__module__ == "PIL.Image"


def test_only_a_file_of_known_hash_is_unpickled_in_full(
    yolo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastsam._ultralytics()
    from ultralytics import YOLO

    model, bad = YOLO(str(yolo)), tmp_path / "bad.pt"
    model.model.trap = Trap(tmp_path / "sprung")
    model.save(bad)
    with pytest.raises(UserError, match="is no YOLO that loads safely"):
        FastSam(str(bad))
    assert not (tmp_path / "sprung").exists()
    monkeypatch.setattr(weights, "sha256", lambda name: file_sha256(bad))
    FastSam(str(bad))
    assert (tmp_path / "sprung").exists()


class Trap:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))

    def __deepcopy__(self, _: object) -> Trap:
        return self


def test_mistakes_are_one_line(
    yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics import YOLO

    monkeypatch.chdir(tmp_path)
    YOLO("yolov8n.yaml").save("boxes.pt")
    for words, status, complaint in (
        (["checkpoint=fastsam_m"], 2, "did you mean fastsam_"),
        (["checkpoint=fastsam_s", "fastsam.mapping=oficial"], 2, "did you mean official?"),
        (["checkpoint=fastsam_s", "fastsam.conf=2"], 2, "fastsam.conf=2"),
        (["checkpoint=boxes.pt", "hydra.run.dir=a"], 1, "boxes.pt is a YOLO for the task detect: it makes no masks"),
        (["checkpoint=mobile_sam", "teacher.checkpoint=fastsam_s"], 2, "fastsam_s is no SAM"),
    ):
        assert app.main(["evaluate", *words]) == status
        (line,) = capsys.readouterr().err.splitlines()
        assert complaint in line
    monkeypatch.setitem(sys.modules, "ultralytics.models", None)  # as if it were not installed
    assert app.main(["evaluate", f"checkpoint={yolo}", "hydra.run.dir=b"]) == 1
    assert "pip install 'sam-distill[fastsam]'" in capsys.readouterr().err
