import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from sam_distill.cli.app import main
from sam_distill.data.base import EvalStream, collate
from sam_distill.data.folder import Folder
from sam_distill.errors import UserError
from sam_distill.evaluate.ground_truth import GroundTruth
from sam_distill.evaluate.views import MaskOf, SamView, View
from sam_distill.types import Batch, Prompts

HEIGHT, WIDTH = 120, 160


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder: two images of a white disc and bar on grey, and their COCO masks as run lengths and polygons."""
    images, annotations = [], []
    for number in (1, 2):
        disc, bar = truth()
        pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        pixels[disc | bar] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number:012}.png")
        images.append({"id": number, "file_name": f"{number:012}.png", "height": HEIGHT, "width": WIDTH})
        runs = coco.encode(np.asfortranarray(disc))
        polygon = [[100, 20, 140, 20, 140, 100, 100, 100]]
        annotations += [
            {"image_id": number, "segmentation": runs | {"counts": runs["counts"].decode()}, "iscrowd": 0},
            {"image_id": number, "segmentation": polygon, "iscrowd": 0},
            {"image_id": number, "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 19200]}, "iscrowd": 1},
        ]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    lvis = [{k: v for k, v in image.items() if k != "file_name"} | {"coco_url": f"http://x/{image['file_name']}"}
            for image in images]  # fmt: skip
    (tmp_path / "lvis.json").write_text(json.dumps({"images": lvis, "annotations": annotations}))
    return tmp_path


def truth() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    bar = (y >= 20) & (y < 100) & (x >= 100) & (x < 140)
    return (y - 60) ** 2 + (x - 50) ** 2 < 30**2, bar


def batch_of(folder: Path, name: str = "coco.json") -> Batch:
    source = Folder(str(folder), val_images=0, annotations=str(folder / name))
    source.load_json()
    return collate(list(EvalStream(source, "all", truth=True)))


class FixedMaskView(View):
    """View that returns the same mask for every prompt, and records the prompts."""

    embedding = None

    def __init__(self, batch: Batch, mask: np.ndarray) -> None:
        self.batch = batch
        self.mask = torch.from_numpy(mask)
        self.prompts_seen: list[Prompts] = []

    def masks(self, prompts: Prompts) -> MaskOf:
        self.prompts_seen.append(prompts)
        return lambda image, prompt: self.mask


@pytest.mark.parametrize("name", ["coco.json", "lvis.json"])
def test_annotations_of_coco_and_lvis(folder: Path, name: str) -> None:
    batch = batch_of(folder, name)
    for found in batch.truth:
        assert len(found) == 2, "a crowd is no thing"
        for mask, expected in zip((coco.decode(m).astype(bool) for m in found), truth(), strict=True):
            assert (mask == expected).mean() > 0.99


def test_clicks_and_boxes_lie_where_the_masks_are(folder: Path) -> None:
    batch = batch_of(folder)
    clicks, boxes = GroundTruth(annotations=None).make_targets(SamView(None, torch.zeros(2, 1), batch, "single"))  # type: ignore[arg-type]
    to_original = WIDTH / 1024
    middles = {(50, 60), (120, 60)}
    for prompt in range(2):
        x, y = (clicks.prompts.points[0, prompt, 0] * to_original).tolist()
        assert any(abs(x - a) < 3 and abs(y - b) < 22 for a, b in middles)
        x0, y0, x1, y1 = (boxes.prompts.points[0, prompt].flatten() * to_original).tolist()
        rows, columns = np.nonzero(clicks.masks(0, prompt).numpy())
        assert (x0, y0, x1, y1) == pytest.approx(
            (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), abs=0.5
        )


def test_the_next_click_is_in_the_middle_of_the_largest_error(folder: Path) -> None:
    """The annotation is the disc or the bar; the student's mask is always the bar, with a hole."""
    batch = batch_of(folder)
    _, bar = truth()
    student_mask = bar.copy()
    student_mask[25:35, 105:115] = False
    protocol, student = GroundTruth(annotations=None, clicks=(2,)), FixedMaskView(batch, student_mask)
    clicks, _ = protocol.make_targets(SamView(None, torch.zeros(2, 1), batch, "single"))  # type: ignore[arg-type]
    found = [o.comparison for o in protocol.compare(student, clicks)]
    assert {c.kind for c in found} == {"click_2"}
    second = student.prompts_seen[1]
    for prompt in range(2):
        reference = clicks.masks(0, prompt).numpy()
        (x, y), label = (second.points[0, prompt, 0] * WIDTH / 1024).tolist(), int(second.labels[0, prompt, 0])
        if reference[60, 120]:  # the bar: only the hole is missing
            assert label == 1
            assert 105 <= x < 115
            assert 25 <= y < 35
        else:  # the disc: all of it is missing, as deep as its radius; the bar is surplus, as deep as half its width
            assert label == 1
            assert (x - 50) ** 2 + (y - 60) ** 2 < 10**2
    for c in found:
        expected = (student_mask & truth()[1]).sum() / bar.sum() if c.iou > 0 else 0
        assert c.iou == pytest.approx(expected)


def test_perfect_masks_score_1(folder: Path) -> None:
    batch = batch_of(folder)
    protocol = GroundTruth(annotations=1, clicks=(1, 3))
    for target in protocol.make_targets(SamView(None, torch.zeros(2, 1), batch, "single")):  # type: ignore[arg-type]
        for outcome in protocol.compare(PerfectView(batch, target.masks), target):
            assert outcome.comparison.iou == 1


class PerfectView(FixedMaskView):
    def __init__(self, batch: Batch, reference: MaskOf) -> None:
        super().__init__(batch, np.zeros((HEIGHT, WIDTH), bool))
        self.reference = reference

    def masks(self, prompts: Prompts) -> MaskOf:
        return self.reference


def test_evaluate(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A model that is its own teacher has its teacher's scores; images without annotations are left out and counted."""
    content = json.loads((folder / "coco.json").read_text())
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] == 1]
    (folder / "half.json").write_text(json.dumps(content))
    words = ["checkpoint=mobile_sam", "protocol=ground_truth", "data=folder", f"data.path={folder}"]
    assert (
        main(["evaluate", *words, f"data.annotations={folder / 'half.json'}", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["images"], metrics["images_skipped"]) == (1, 1)
    for kind in ("click_1", "click_3", "box"):
        assert metrics[f"miou/{kind}"] == metrics[f"teacher/miou/{kind}"] > 0.5
        assert metrics[f"prompts/{kind}"] == 2
    assert "000000000002: it has no annotations" in capfd.readouterr().out
    assert (tmp_path / "run" / "pictures" / "masks.png").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a JSON of COCO or LVIS"), ('{"images": []}', "not a JSON of COCO or LVIS"), (None, "cannot be read")],
)
def test_bad_annotation_file_is_an_error(tmp_path: Path, content: str | None, message: str) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=f"data.annotations=.*{message}"):
        Folder(str(tmp_path), val_images=0, annotations=str(tmp_path / "a.json")).load_json()


def square(number: int) -> dict[str, Any]:
    """Return an annotation of image `number`: a square with sides of 10 * number pixels."""
    side = 10 * number
    return {"image_id": number, "segmentation": [[5, 5, 5 + side, 5, 5 + side, 5 + side, 5, 5 + side]]}


def areas(folder: Path, names: list[str], files: list[str]) -> dict[str, int]:
    """Return the area of the annotations that each file gets, if images with these `names` have a square each."""
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (80, 60)).save(folder / file)
    images = [{"id": number, "file_name": name} for number, name in enumerate(names, 1)]
    annotations = [square(number) for number in range(1, len(names) + 1)]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    source = Folder(str(folder), val_images=0, annotations=str(folder / "coco.json"))
    source.load_json()
    found = {sample.key: sample for sample in EvalStream(source, "all", truth=True)}
    return {key: int(sum(coco.area(mask) for mask in sample.truth)) for key, sample in found.items()}


@pytest.mark.parametrize(
    ("names", "files", "expected"),
    [
        (["a/1.png", "b/1.png"], ["a/1.png", "b/1.png"], {"a/1": 100, "b/1": 400}),
        (["val/a/1.png", "val/b/1.png"], ["b/1.png"], {"b/1": 400}),
        (["train/1.png", "1.png"], ["train/1.png"], {"train/1": 100}),
        (["1.png", "2.png"], ["deep/down/2.png"], {"deep/down/2": 400}),
    ],
)
def test_files_of_the_same_name(tmp_path: Path, names: list[str], files: list[str], expected: dict[str, int]) -> None:
    """Each gets only its own annotations, by its folder. Once it got those of all."""
    assert areas(tmp_path, names, files) == expected


@pytest.mark.parametrize(
    ("names", "files", "message"),
    [
        (["1.png"], ["a/1.png", "b/1.png"], "1.png may be .*/a/1.png or .*/b/1.png"),
        (["a/1.png", "b/1.png"], ["1.png"], ".*/1.png may be its a/1.png or its b/1.png"),
        (["1.png"], ["2.png"], "it names not one of the images in"),
    ],
)
def test_ambiguous_and_unknown_names_fail(tmp_path: Path, names: list[str], files: list[str], message: str) -> None:
    with pytest.raises(UserError, match=rf"data.annotations=.*coco.json: {message}"):
        areas(tmp_path, names, files)


def test_annotations_of_another_image_are_refused(folder: Path) -> None:
    content = json.loads((folder / "coco.json").read_text())
    content["images"][0] |= {"height": WIDTH, "width": HEIGHT}
    (folder / "turned.json").write_text(json.dumps(content))
    assert batch_of(folder, "turned.json").keys == ["000000000002"], "polygons would lie anywhere"
    content["annotations"][1]["image_id"] = 77
    (folder / "wrong.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="annotation 1 is of an image 77, which is not among its images"):
        batch_of(folder, "wrong.json")
