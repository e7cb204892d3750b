"""`sam-distill evaluate`."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from sam_distill.cli.teacher import teacher_for
from sam_distill.data.base import DataSource, Split
from sam_distill.evaluate.evaluation import judge
from sam_distill.evaluate.everything import Everything, judge_everything
from sam_distill.evaluate.protocol import Protocol
from sam_distill.fastsam.model import FastSam, Judged, is_fastsam
from sam_distill.models.checkpoints import load_sam
from sam_distill.runs import status
from sam_distill.runs.hardware import Hardware
from sam_distill.teachers import LiveTeacher

log = logging.getLogger(__name__)


def evaluate(
    *,
    checkpoint: Judged,
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
    """Judge `checkpoint` by `teacher`; conf/evaluate.yaml says what each option means."""
    del scale  # only experiments read it
    trained_on = _data_path(Path(checkpoint).expanduser())
    if split == "all" and trained_on and trained_on == _data_path(run_dir):
        log.warning("split=all judges on images that %s was trained on, too; split=val does not", checkpoint)
    if split == "val" and data.shortage:
        log.warning(data.shortage)
    options: dict[str, Any] = {"source": data, "split": split, "hardware": trainer, "batch_size": batch_size}
    student = fastsam(checkpoint) if is_fastsam(checkpoint) else load_sam(checkpoint)
    if isinstance(protocol, Everything):
        judge_everything(student=student, teacher=teacher, protocol=protocol, run_dir=run_dir, **options)
    else:
        judge(student=student, teacher=teacher_for(teacher, data), protocol=protocol, run_dir=run_dir, **options)


def _data_path(run_dir: Path) -> list[str]:
    """What data.path named in a run folder's config.yaml; empty if there is no such thing."""
    data = status.config(run_dir).get("data")
    path = data.get("path") if isinstance(data, dict) else None
    return [os.path.abspath(p) for p in ([path] if isinstance(path, str) else path or [])]
