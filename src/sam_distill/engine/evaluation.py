"""Judge a finished model by a protocol."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader

from sam_distill.data.base import DataSource, EvalStream, Split, collate
from sam_distill.engine.hardware import Hardware
from sam_distill.engine.judge import KINDS, Judge
from sam_distill.engine.record import write_json, write_prompts
from sam_distill.evaluate.agreement import Agreement
from sam_distill.models.sam import Sam
from sam_distill.predict.overlays import column
from sam_distill.types import UserError

log = logging.getLogger(__name__)


@torch.inference_mode()
def judge(
    *,
    student: Sam,
    teacher: Sam,
    source: DataSource,
    split: Split,
    protocol: Agreement,
    hardware: Hardware,
    batch_size: int,
    run_dir: Path,
) -> dict[str, Any]:
    """Compare `student` and `teacher` on all images of `source`; writes metrics.json, prompts.csv and pictures/."""
    started = time.perf_counter()
    stream = EvalStream(source, split)
    loader = DataLoader(stream, batch_size=batch_size, collate_fn=collate, num_workers=hardware.num_workers)
    total = source.num_eval_images(split)
    for sam in (student, teacher):
        sam.to(hardware.kind).to(memory_format=torch.channels_last)
    result, images = Judge(protocol).to(hardware.kind), 0
    for batch in track(loader, description="Evaluating", total=-(-total // batch_size)):
        batch = batch.to(hardware.kind)
        with hardware.autocast():
            theirs, ours = (sam.encode(batch.images, batch.sizes) for sam in (teacher, student))
        targets = protocol.ask(teacher, theirs, batch)
        result.update(student, ours, batch, theirs, targets)
        images += len(batch)
    if not images:
        raise UserError("not one image could be read: there is nothing to evaluate")
    seconds = time.perf_counter() - started
    metrics: dict[str, Any] = result.compute() | {
        "images": images,
        "images_skipped": total - images,
        "seconds": round(seconds, 1),
    }
    metrics |= {"images_per_second": round(images / seconds, 2), "precision": hardware.num_format}
    write_json(run_dir / "metrics.json", metrics | protocol.description)
    write_prompts(run_dir / "prompts.csv", result.comparisons)
    (run_dir / "pictures").mkdir(exist_ok=True)
    column([row for _, row in result.pictures]).save(run_dir / "pictures" / "masks.png")
    _tell(metrics, run_dir)
    return metrics


def _tell(metrics: Mapping[str, Any], run_dir: Path) -> None:
    table = Table("", "", show_header=False, title=f"Agreement with the teacher on {metrics['images']} images")
    for kind in KINDS:
        table.add_row(f"mIoU, one {kind}", f"{metrics[f'miou/{kind}']:.4f}")
    table.add_row("embedding MSE", f"{metrics['embedding_mse']:.5f}")
    table.add_row("embedding cosine", f"{metrics['embedding_cosine']:.4f}")
    skipped = metrics["prompts_skipped"]
    table.add_row("prompts", f"{metrics['prompts']}" + (f" ({skipped} without a teacher's mask)" if skipped else ""))
    console = Console()
    console.print(table)
    console.print(f"a row per prompt  {run_dir / 'prompts.csv'}", highlight=False, soft_wrap=True)
    console.print(f"pictures          {run_dir / 'pictures'}", highlight=False, soft_wrap=True)
