"""The command `sam-distill evaluate`: score a checkpoint against the teacher's masks or the ground truth."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sam_distill.cli.teacher import teacher_for
from sam_distill.data.base import DataSource, Split
from sam_distill.evaluate.evaluation import evaluate_prompts
from sam_distill.evaluate.everything import Everything, evaluate_everything
from sam_distill.evaluate.protocol import Protocol
from sam_distill.fastsam.model import FastSam, SamOrFastSam, is_fastsam
from sam_distill.models.checkpoints import load_sam
from sam_distill.runs import status
from sam_distill.runs.hardware import Hardware
from sam_distill.teachers import LiveTeacher

log = logging.getLogger(__name__)


def evaluate(
    *,
    checkpoint: SamOrFastSam,
    teacher: LiveTeacher,
    data: DataSource,
    split: Split,
    protocol: Protocol | Everything,
    fastsam: partial[FastSam],
    trainer: Hardware,
    batch_size: Annotated[int, Field(gt=0)],
    scale: Literal["paper", "small"],
    run_dir: Path,
) -> None:
    """Evaluate `checkpoint` against `teacher` or the ground truth; conf/evaluate.yaml says what each option means."""
    del scale  # only experiments read it
    if doubt := _seen_in_training(checkpoint, split, run_dir):
        log.warning(doubt)
    if split == "val" and data.shortage:
        log.warning(data.shortage)
    student = fastsam(checkpoint) if is_fastsam(checkpoint) else load_sam(checkpoint)
    options: dict[str, Any] = {"student": student, "source": data, "split": split, "hardware": trainer}
    options |= {"batch_size": batch_size, "run_dir": run_dir}
    if isinstance(protocol, Everything):
        evaluate_everything(teacher=teacher, protocol=protocol, **options)
    else:
        evaluate_prompts(teacher=teacher_for(teacher, data), protocol=protocol, **options)


def _seen_in_training(checkpoint: str, split: Split, run_dir: Path) -> str:
    """Return a warning if `checkpoint` may have been trained on images of this evaluation; "" if not, or if unknown."""
    (path, held_out), (path_now, held_out_now) = _data(Path(checkpoint).expanduser()), _data(run_dir)
    if not path or path != path_now:
        return ""
    if split == "all":
        return f"split=all judges on images that {checkpoint} was trained on, too; split=val does not"
    if held_out != held_out_now:
        return (
            f"split=val holds {held_out_now} images out, but {checkpoint} was trained with data.val_images={held_out}:"
            " say that here, too, or some of them may be images that it was trained on"
        )
    return ""


def _data(run_dir: Path) -> tuple[list[str], int | None]:
    """Return data.path, made absolute, and data.val_images of a run folder's config.yaml; [] and None if missing."""
    data = status.config(run_dir).get("data")
    data = data if isinstance(data, dict) else {}
    path = data.get("path")
    return [os.path.abspath(p) for p in ([path] if isinstance(path, str) else path or [])], data.get("val_images")
