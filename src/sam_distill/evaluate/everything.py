"""Everything protocol: compare all masks that student and teacher find in an image without prompts (paper, Figure 6).

Scores: IoU of each teacher mask with the nearest student mask; AP and recall of the student's masks as detections.
"""

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sam_distill.data.base import DataSource, EvalStream, Split, collate
from sam_distill.evaluate.evaluation import facts, prepare
from sam_distill.evaluate.protocol import Comparison, write_prompts
from sam_distill.evaluate.views import OtherModel
from sam_distill.files import write_json, write_text
from sam_distill.metrics import bootstrap
from sam_distill.models.sam import Sam
from sam_distill.models.weights import home
from sam_distill.predict.mask_generator import SamAutomaticMaskGenerator
from sam_distill.predict.overlays import column, masks_overlay, side_by_side
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.progress import CountProgress
from sam_distill.teachers import LiveTeacher
from sam_distill.types import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT

Records = list[dict[str, Any]]  # masks in SA-1B's format: segmentation (COCO run lengths), area, bbox, predicted_iou
MAX_MASKS = 1000  # masks per image that count for AP and recall, at most
PICTURES = 8  # images to draw


@dataclass(frozen=True)
class Everything:
    """Protocol that segments everything. generator: builds the mask generator of a SAM; holds its options."""

    generator: partial[SamAutomaticMaskGenerator]

    @property
    def description(self) -> dict[str, Any]:
        """Return the settings that must be equal for two scores to be comparable."""
        return {"generator": ", ".join(f"{name} {value}" for name, value in self.generator.keywords.items())}

    def masks(self, model: Sam | OtherModel, frame: np.ndarray, device: str = "cpu") -> Records:
        """Return the non-empty masks, at the size of `frame`: [h, w, 3] uint8, an unpadded image in the frame.

        device: to run a model on that is no SAM.
        """
        if isinstance(model, Sam):
            records = self.generator(model, output_mode="coco_rle").generate(frame)
        else:
            records = _records(model.everything(torch.from_numpy(frame).permute(2, 0, 1).to(device)))
        return [record for record in records if record["area"] > 0]

    def cached_masks(self, teacher: str, sam: Sam, frame: np.ndarray) -> Records:
        """Return `masks` of the teacher, cached in $SAM_DISTILL_HOME/everything. teacher: its sha256 and precision."""
        cache_key = f"{teacher} {self.description['generator']} {frame.shape}".encode() + frame.tobytes()
        file = home() / "everything" / f"{hashlib.sha256(cache_key).hexdigest()[:32]}.json"
        if file.is_file():
            records: Records = json.loads(file.read_text())
            return records
        records = self.masks(sam, frame)
        with contextlib.suppress(OSError):  # without a cache file, the masks are computed again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(records))
        return records


@dataclass
class Detections:
    """Masks found in all images so far. teacher, student: the masks of each image. rows: one per teacher mask."""

    teacher: list[Records] = field(default_factory=list)
    student: list[Records] = field(default_factory=list)
    rows: list[Comparison] = field(default_factory=list)

    def add(self, image: str, teacher: Records, student: Records) -> None:
        self.teacher.append(teacher)
        self.student.append(student)
        self.rows += match_masks(image, teacher, student)

    def compute(self) -> dict[str, float]:
        """Return flat metrics by their names in metrics.json; scores only if the teacher has found a mask."""
        ious = np.array([row.iou for row in self.rows])
        lists = {"masks": self.student, "teacher/masks": self.teacher}
        metrics = {name: float(np.mean(list(map(len, records)))) for name, records in lists.items()}
        metrics["prompts/everything"] = len(ious)
        if interval := bootstrap([row.image for row in self.rows], ious.tolist()):
            metrics["miou/everything"] = float(ious.mean())
            metrics["miou/everything/low"], metrics["miou/everything/high"] = interval
            metrics |= {f"recall/{percent}": float((ious >= percent / 100).mean()) for percent in (50, 75)}
            metrics |= average_precision(self.teacher, self.student)
        return metrics


def match_masks(image: str, teacher: Records, student: Records) -> list[Comparison]:
    """Compare each teacher mask with the student mask of the highest IoU; the prompt is the teacher mask's box."""
    iou = _iou(teacher, student)
    rows = []
    for number, record in enumerate(teacher):
        best = int(iou[number].argmax()) if student else -1
        x, y, width, height = record["bbox"]
        rows.append(
            Comparison(
                image=image,
                kind="everything",
                prompt=(x, y, x + width, y + height),
                labels=(BOX_TOP_LEFT, BOX_BOTTOM_RIGHT),
                iou=float(iou[number, best]) if student else 0.0,
                teacher_area=int(record["area"]),
                student_area=int(student[best]["area"]) if student else 0,
            )
        )
    return rows


def average_precision(teacher: Sequence[Records], student: Sequence[Records]) -> dict[str, float]:
    """Return COCO's AP and AR of the student's masks against the teacher's: one class, predicted IoU as confidence.

    Means over the IoU thresholds 0.5 to 0.95; `ap/50` at 0.5 alone. At most `MAX_MASKS` masks per image count.
    """
    images = [{"id": number, "height": 0, "width": 0} for number in range(len(teacher))]  # run lengths hold the size
    truth, found = COCO(), COCO()
    for dataset, masks in ((truth, teacher), (found, student)):
        annotations = [
            {"image_id": number, "category_id": 1, "iscrowd": 0, "segmentation": record["segmentation"],
             "area": record["area"], "bbox": record["bbox"], "score": record["predicted_iou"]}
            for number, records in enumerate(masks) for record in records
        ]  # fmt: skip
        for index, annotation in enumerate(annotations, 1):
            annotation["id"] = index
        dataset.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth.createIndex()
        found.createIndex()
        evaluator = COCOeval(truth, found, "segm")
        evaluator.params.maxDets = [MAX_MASKS]
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.evaluate()
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"][..., 0, 0, 0], evaluator.eval["recall"][:, 0, 0, 0]
    means = {"ap": precision.mean(), "ap/50": precision[0].mean(), "recall": recall.mean()}
    return {name: round(float(value), 9) for name, value in means.items()}  # COCOeval adds a tiny number to a divisor


def _records(masks: Tensor) -> Records:
    """Return records of masks, [N, h, w] bool, most confident first; `predicted_iou` only encodes that order."""
    records = []
    for number, mask in enumerate(masks.cpu().numpy()):
        runs = coco.encode(np.asfortranarray(mask, np.uint8))
        bbox, area = coco.toBbox(runs).tolist(), int(coco.area(runs))
        record = {"segmentation": runs, "area": area, "bbox": [int(side) for side in bbox]}
        records.append(record | {"predicted_iou": 1 - number / len(masks)})
    return records


def _iou(first: Records, second: Records) -> np.ndarray:
    """Return the IoU of each pair of masks: [first, second]."""
    masks = [[record["segmentation"] for record in records] for records in (first, second)]
    return np.asarray(coco.iou(*masks, [0] * len(second))).reshape(len(first), len(second))


@torch.inference_mode()
def evaluate_everything(
    *, student: Sam | OtherModel, teacher: LiveTeacher, source: DataSource, split: Split, protocol: Everything,
    hardware: Hardware, batch_size: int, run_dir: Path,
) -> dict[str, Any]:  # fmt: skip
    """Compare `student` and `teacher`; write metrics.json, prompts.csv with a row per teacher mask, and pictures/."""
    started, total = time.perf_counter(), prepare(source, split, student, teacher, hardware)
    teacher_id, detections = f"{teacher.sha256} {hardware.resolved_precision}", Detections()
    rows: list[Image.Image] = []
    with CountProgress(total, "Segmenting everything") as progress, hardware.autocast():
        for batch in hardware.loader(EvalStream(source, split), batch_size=batch_size, collate_fn=collate):
            for key, image, (height, width) in zip(batch.keys, batch.images, batch.sizes.tolist(), strict=True):
                frame = image[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
                theirs, ours = (
                    protocol.cached_masks(teacher_id, teacher.sam, frame),
                    protocol.masks(student, frame, hardware.kind),
                )
                detections.add(key, theirs, ours)
                if len(rows) < PICTURES:
                    rows.append(_row(frame, ours, theirs))
                progress.add(1)
    about = facts(student, hardware, len(detections.teacher), total, time.perf_counter() - started)
    metrics = detections.compute() | about
    write_json(run_dir / "metrics.json", metrics | protocol.description)
    write_prompts(run_dir / "prompts.csv", detections.rows)
    (run_dir / "pictures").mkdir(exist_ok=True)
    column(rows).save(run_dir / "pictures" / "everything.png")
    _print_scores(metrics, run_dir)
    return metrics


def _row(frame: np.ndarray, ours: Records, theirs: Records) -> Image.Image:
    image = Image.fromarray(frame)
    captions = ["image", f"teacher   {len(theirs)} masks", f"student   {len(ours)} masks"]
    return side_by_side([image, masks_overlay(image, theirs), masks_overlay(image, ours)], captions)


def _print_scores(metrics: dict[str, Any], run_dir: Path) -> None:
    table = Table("", "student", title=f"Everything, by the teacher's masks on {metrics['images']} images")
    table.add_row("masks per image", f"{metrics['masks']:.1f} (teacher {metrics['teacher/masks']:.1f})")
    about = {"miou/everything": "mIoU of the teacher's masks with the nearest", "recall/50": "of them met with IoU 0.5",
            "recall/75": "of them met with IoU 0.75", "ap": "AP, IoU 0.5 to 0.95", "ap/50": "AP, IoU 0.5"}  # fmt: skip
    for name, label in about.items():
        if name in metrics:
            table.add_row(label, f"{metrics[name]:.4f}")
    console = Console()
    console.print(table)
    console.print(f"a row per mask  {run_dir / 'prompts.csv'}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"pictures        {run_dir / 'pictures'}", highlight=False, soft_wrap=True, markup=False)
