"""Evaluate a finished model by a protocol with prompts."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from sam_distill.data.base import DataSource, EvalStream, Split, collate
from sam_distill.errors import UserError
from sam_distill.evaluate.evaluator import BLIND, Evaluator, TeacherBatch, blind
from sam_distill.evaluate.protocol import Protocol, write_prompts
from sam_distill.evaluate.views import OtherModel, View
from sam_distill.files import write_json
from sam_distill.models.sam import Sam
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.progress import CountProgress
from sam_distill.teachers import Teacher
from sam_distill.types import Batch

BLIND_IMAGES = 100  # the blind baseline uses at most this many images and holds them in memory (9 MB each)


@torch.inference_mode()
def evaluate_prompts(
    *,
    student: Sam | OtherModel,
    teacher: Teacher,
    source: DataSource,
    split: Split,
    protocol: Protocol,
    hardware: Hardware,
    batch_size: int,
    run_dir: Path,
) -> dict[str, Any]:
    """Compare `student` and `teacher` on the images of `source`; write metrics.json, prompts.csv and pictures/."""
    started = time.perf_counter()
    total = prepare(source, split, student, teacher, hardware)
    annotated, images = protocol.reference != "teacher", 0
    if annotated:
        source.load_json()
    result, teacher_result = Evaluator(protocol).to(hardware.kind), Evaluator(protocol).to(hardware.kind)
    teacher_batches: list[TeacherBatch] = []
    with CountProgress(total, "Evaluating") as progress:
        stream = EvalStream(source, split, truth=annotated)
        for batch in hardware.loader(stream, batch_size=batch_size, collate_fn=collate):
            batch = batch.to(hardware.kind)
            with hardware.autocast():  # as in validation during training; SamView decodes in float32 all the same
                teacher_view = protocol.view(teacher.sam, teacher.embed(batch), batch)
                targets = protocol.make_targets(teacher_view)
                if annotated:
                    teacher_result.update(teacher_view, teacher_view.embedding, targets)
                result.update(_student_view(student, protocol, batch), teacher_view.embedding, targets)
            if images < BLIND_IMAGES:
                teacher_batches.append((batch, teacher_view.embedding, targets))
            images += len(batch)
            progress.add(len(batch))
    about = facts(student, hardware, images, total, time.perf_counter() - started)
    metrics: dict[str, Any] = result.compute()
    if not metrics["prompts"]:
        raise UserError(
            f"not one prompt counts: {images} images are too small for them, or the {protocol.reference}'s masks are"
            " all empty"
        )
    with hardware.autocast():
        metrics |= result.intervals() | _blind_scores(Evaluator(protocol).to(hardware.kind), teacher, teacher_batches)
    if annotated:
        metrics |= {f"teacher/{n}": value for n, value in teacher_result.compute().items() if n.startswith("miou/")}
    metrics |= about
    write_json(run_dir / "metrics.json", metrics | protocol.description)
    write_prompts(run_dir / "prompts.csv", result.comparisons)
    (run_dir / "pictures").mkdir(exist_ok=True)
    result.sheet().save(run_dir / "pictures" / "masks.png")
    _print_scores(metrics, protocol, run_dir)
    return metrics


@torch.inference_mode(False)  # weights that are loaded or moved in inference mode can't be trained any more
def prepare(source: DataSource, split: Split, student: Sam | OtherModel, teacher: Teacher, hardware: Hardware) -> int:
    """Move the models to the device and return the number of images to evaluate on. UserError if there is none."""
    total = source.count(source.eval_items(split))
    if not total:
        raise UserError(f"split={split}: there is no such image; are any held out, by data.val_images?")
    for model in (student, teacher.sam):
        if isinstance(model, Sam):
            model.to(hardware.kind).to(memory_format=torch.channels_last)
    return total


def _student_view(student: Sam | OtherModel, protocol: Protocol, batch: Batch) -> View:
    if isinstance(student, Sam):
        return protocol.view(student, student.encode(batch.images, batch.sizes), batch)
    return student.view(batch)


def _blind_scores(evaluator: Evaluator, teacher: Teacher, batches: Sequence[TeacherBatch]) -> dict[str, float]:
    """Return the scores of the blind baseline on these batches, and the number of their images."""
    images = sum(len(batch) for batch, _, _ in batches)
    total = torch.stack([embedding.float().sum(0) for _, embedding, _ in batches]).sum(0)
    scores = blind(evaluator, teacher.sam, batches, total, images)
    return scores | {"blind/images": images} if scores else {}


def facts(student: Sam | OtherModel, hardware: Hardware, images: int, total: int, seconds: float) -> dict[str, Any]:
    """Return the entries of metrics.json that are not scores. total: number of images, damaged ones included."""
    if not images:
        raise UserError("not one image could be read: there is nothing to evaluate")
    about = student.parameter_counts if isinstance(student, Sam) else student.description
    return about | {
        "images": images,
        "images_skipped": total - images,
        "seconds": round(seconds, 1),
        "images_per_second": round(images / seconds, 2),
        "precision": hardware.resolved_precision,
        "device": hardware.device_name,
    }


def _print_scores(metrics: Mapping[str, Any], protocol: Protocol, run_dir: Path) -> None:
    others = [name for name in ("teacher", "blind") if any(key.startswith(f"{name}/miou") for key in metrics)]
    title = f"Agreement with the {protocol.reference}'s masks on {metrics['images']} images"
    table = Table("", "student", "95% interval", *others, "empty", "prompts", title=title)
    for kind in protocol.kinds:
        name = f"miou/{kind}"
        if name not in metrics:
            table.add_row(name, "no prompt counts: images are too small, or right masks empty")
            continue
        ours, low, high = (f"{metrics[name + end]:.4f}" for end in ("", "/low", "/high"))
        scores = [metrics.get(f"{other}/{name}") for other in others]
        beside = ["" if score is None else f"{score:.4f}" for score in scores]
        empty = f"{metrics[f'empty/{kind}']:.1%}"
        table.add_row(name, ours, f"{low} to {high}", *beside, empty, str(metrics[f"prompts/{kind}"]))
    if "embedding_mse" in metrics:
        table.add_row("embedding MSE", f"{metrics['embedding_mse']:.5f}")
        table.add_row("embedding cosine", f"{metrics['embedding_cosine']:.4f}")
    skipped = metrics["prompts_skipped"]
    if skipped:
        table.add_row("left out", f"{skipped} prompts whose right mask is empty")
    console = Console()
    console.print(table)
    part = metrics.get("blind/images", 0)
    console.print(f"blind: {BLIND}" + (f"; on the first {part}" if 0 < part < metrics["images"] else ""))
    console.print(f"a row per prompt  {run_dir / 'prompts.csv'}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"pictures          {run_dir / 'pictures'}", highlight=False, soft_wrap=True, markup=False)
