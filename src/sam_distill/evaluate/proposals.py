"""Judge a finished model by what it finds when it segments everything."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sam_distill.data.base import DataSource, Split
from sam_distill.evaluate.evaluation import facts, loader
from sam_distill.evaluate.everything import Detections, Everything, Records
from sam_distill.evaluate.protocol import write_prompts
from sam_distill.evaluate.views import OtherModel
from sam_distill.files import write_json
from sam_distill.models.sam import Sam
from sam_distill.predict.overlays import coloured, column, side_by_side
from sam_distill.runs.hardware import Hardware
from sam_distill.teachers import LiveTeacher
from sam_distill.types import UserError

PICTURES = 8  # images drawn


@torch.inference_mode()
def judge_everything(
    *, student: Sam | OtherModel, teacher: LiveTeacher, source: DataSource, split: Split, protocol: Everything,
    hardware: Hardware, batch_size: int, run_dir: Path,
) -> dict[str, Any]:  # fmt: skip
    """Writes metrics.json, prompts.csv with a row for each of the teacher's masks, and pictures/."""
    started, total = time.perf_counter(), source.num_eval_images(split)
    for model in (student, teacher.sam):
        if isinstance(model, Sam):
            model.to(hardware.kind).to(memory_format=torch.channels_last)
    who, detections = f"{teacher.sha256} {hardware.num_format}", Detections()
    rows: list[Image.Image] = []
    with Progress(auto_refresh=False) as bar, hardware.autocast():
        task = bar.add_task("Segmenting everything", total=total)
        for batch in loader(source, split, hardware, batch_size):
            for key, image, (height, width) in zip(batch.keys, batch.images, batch.sizes.tolist(), strict=True):
                frame = image[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
                theirs, ours = protocol.remembered(who, teacher.sam, frame), protocol.masks(student, frame)
                detections.add(key, theirs, ours)
                if len(rows) < PICTURES:
                    rows.append(_row(frame, ours, theirs))
                bar.update(task, advance=1, refresh=True)
        bar.update(task, total=len(detections.images))  # the rest is damaged
    images = len(detections.images)
    if not images:
        raise UserError("not one image could be read: there is nothing to evaluate")
    metrics = detections.compute() | facts(student, hardware, images, total, time.perf_counter() - started)
    write_json(run_dir / "metrics.json", metrics | protocol.description)
    write_prompts(run_dir / "prompts.csv", detections.rows)
    (run_dir / "pictures").mkdir(exist_ok=True)
    column(rows).save(run_dir / "pictures" / "everything.png")
    _tell(metrics, run_dir)
    return metrics


def _row(frame: np.ndarray, ours: Records, theirs: Records) -> Image.Image:
    image = Image.fromarray(frame)
    captions = ["image", f"teacher   {len(theirs)} masks", f"student   {len(ours)} masks"]
    return side_by_side([image, coloured(image, theirs), coloured(image, ours)], captions)


def _tell(metrics: dict[str, Any], run_dir: Path) -> None:
    table = Table("", "student", title=f"Everything, by the teacher's masks on {metrics['images']} images")
    table.add_row("masks per image", f"{metrics['masks']:.1f} (teacher {metrics['teacher/masks']:.1f})")
    about = {"miou/everything": "mIoU of the teacher's masks with the nearest", "recall/50": "of them met with IoU 0.5",
            "recall/75": "of them met with IoU 0.75", "ap": "AP, IoU 0.5 to 0.95", "ap/50": "AP, IoU 0.5"}  # fmt: skip
    for name, label in about.items():
        if name in metrics:
            table.add_row(label, f"{metrics[name]:.4f}")
    console = Console()
    console.print(table)
    console.print(f"a row per mask  {run_dir / 'prompts.csv'}", highlight=False, soft_wrap=True)
    console.print(f"pictures        {run_dir / 'pictures'}", highlight=False, soft_wrap=True)
