"""Judge a finished model by a protocol."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from sam_distill.data.base import DataSource, EvalStream, Split, collate
from sam_distill.engine.hardware import Hardware
from sam_distill.engine.judge import BLIND, Answer, Judge, blind
from sam_distill.engine.record import write_prompts
from sam_distill.evaluate.fastsam import FastSam
from sam_distill.evaluate.protocol import Protocol
from sam_distill.evaluate.views import View
from sam_distill.files import write_json
from sam_distill.models.sam import Sam
from sam_distill.predict.overlays import column
from sam_distill.teachers import Teacher
from sam_distill.types import Batch, Sample, UserError

BLIND_IMAGES = 100  # the blind baseline is computed on so many images at most, which it holds in memory (9 MB each)


@torch.inference_mode()
def judge(
    *,
    student: Sam | FastSam,
    teacher: Teacher,
    source: DataSource,
    split: Split,
    protocol: Protocol,
    hardware: Hardware,
    batch_size: int,
    run_dir: Path,
) -> dict[str, Any]:
    """Compare `student` and `teacher` on the images of `source`; writes metrics.json, prompts.csv and pictures/."""
    started = time.perf_counter()
    total = source.num_eval_images(split)
    for model in (student, teacher.sam):
        if isinstance(model, Sam):
            model.to(hardware.kind).to(memory_format=torch.channels_last)
    result, images = Judge(protocol).to(hardware.kind), 0
    answers: list[Answer] = []
    with Progress(auto_refresh=False) as bar:  # without a thread, whose locks the loader's workers would inherit
        task = bar.add_task("Evaluating", total=total)
        for batch in _loader(source, split, hardware, batch_size):
            batch = batch.to(hardware.kind)
            with hardware.autocast():
                theirs, view = teacher.embed(batch), _look(student, batch, protocol)
            targets = protocol.ask(protocol.see(teacher.sam, theirs, batch))
            result.update(view, theirs, targets)
            if images < BLIND_IMAGES:
                answers.append((batch, theirs, targets))
            images += len(batch)
            bar.update(task, completed=images, refresh=True)
        bar.update(task, total=images)  # the rest is damaged
        if not images:
            raise UserError("not one image could be read: there is nothing to evaluate")
        seconds = time.perf_counter() - started
        baseline = _never_looking(Judge(protocol).to(hardware.kind), teacher.sam, answers, bar)
    metrics: dict[str, Any] = result.compute() | baseline | {"images": images, "images_skipped": total - images}
    metrics |= {"seconds": round(seconds, 1), "images_per_second": round(images / seconds, 2)}
    metrics |= {"precision": hardware.num_format, "device": hardware.device_name}
    write_json(run_dir / "metrics.json", metrics | _facts(student) | protocol.description)
    write_prompts(run_dir / "prompts.csv", result.comparisons)
    (run_dir / "pictures").mkdir(exist_ok=True)
    column([row for _, row in result.pictures]).save(run_dir / "pictures" / "masks.png")
    _tell(metrics, protocol.kinds, run_dir)
    return metrics


def _look(student: Sam | FastSam, batch: Batch, protocol: Protocol) -> View:
    if isinstance(student, FastSam):
        return student.see(batch)
    return protocol.see(student, student.encode(batch.images, batch.sizes), batch)


def _facts(student: Sam | FastSam) -> dict[str, Any]:
    """Its size. A FastSAM has no parts to tell apart, but options that must be known to compare two numbers."""
    if isinstance(student, FastSam):
        return {"parameters/model": student.parameters} | student.description

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    parts = {"": student.image_encoder, "/prompt_encoder": student.prompt_encoder, "/model": student}
    return {f"parameters{name}": count(part) for name, part in parts.items()}


def _loader(source: DataSource, split: Split, hardware: Hardware, batch_size: int) -> DataLoader[Sample]:
    stream = EvalStream(source, split)
    return DataLoader(stream, batch_size=batch_size, collate_fn=collate, num_workers=hardware.num_workers)


def _never_looking(judge: Judge, teacher: Sam, answers: list[Answer], bar: Progress) -> dict[str, Any]:
    images = sum(len(batch) for batch, _, _ in answers)
    total = torch.stack([embedding.float().sum(0) for _, embedding, _ in answers]).sum(0)
    scores = blind(judge, teacher, bar.track(answers, description="Blind baseline"), total, images)
    return scores | ({"blind/images": images} if scores else {})


def _tell(metrics: Mapping[str, Any], kinds: Sequence[str], run_dir: Path) -> None:
    table = Table(
        "", "student", "blind", "empty", "prompts", title=f"Agreement with the teacher on {metrics['images']} images"
    )
    for kind in kinds:
        never_looking = metrics.get(f"blind/miou/{kind}")
        shown = "" if never_looking is None else f"{never_looking:.4f}"
        ours = metrics.get(f"miou/{kind}")
        empty = metrics.get(f"empty/{kind}")
        row = ["images too small" if ours is None else f"{ours:.4f}", shown, "" if empty is None else f"{empty:.1%}"]
        table.add_row(f"miou/{kind}", *row, str(metrics.get(f"prompts/{kind}", 0)))
    if "embedding_mse" in metrics:
        table.add_row("embedding MSE", f"{metrics['embedding_mse']:.5f}")
        table.add_row("embedding cosine", f"{metrics['embedding_cosine']:.4f}")
    skipped = metrics["prompts_skipped"]
    if skipped:
        table.add_row("left out", f"{skipped} prompts without a teacher's mask")
    console = Console()
    console.print(table)
    part = metrics.get("blind/images", 0)
    console.print(f"blind: {BLIND}" + (f"; on the first {part}" if 0 < part < metrics["images"] else ""))
    console.print(f"a row per prompt  {run_dir / 'prompts.csv'}", highlight=False, soft_wrap=True)
    console.print(f"pictures          {run_dir / 'pictures'}", highlight=False, soft_wrap=True)
