"""`sam-distill evaluate`."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator

from sam_distill.cli.answers import answering
from sam_distill.data.base import DataSource, Split
from sam_distill.engine.evaluation import judge
from sam_distill.engine.hardware import Hardware
from sam_distill.evaluate.fastsam import FastSam, is_fastsam
from sam_distill.evaluate.protocol import Protocol
from sam_distill.models.checkpoints import Checkpoint, load_sam
from sam_distill.teachers import LiveTeacher

log = logging.getLogger(__name__)


def _or_fastsam(checkpoint: Any, as_sam: ValidatorFunctionWrapHandler) -> Any:
    return checkpoint if isinstance(checkpoint, str) and is_fastsam(checkpoint) else as_sam(checkpoint)


def evaluate(
    *,
    checkpoint: Annotated[Checkpoint, WrapValidator(_or_fastsam)],
    teacher: LiveTeacher,
    data: DataSource,
    split: Split,
    protocol: Protocol,
    fastsam: partial[FastSam],
    trainer: Hardware,
    batch_size: Annotated[int, Field(gt=0)],
    run_dir: Path,
) -> None:
    """Judge `checkpoint` by `teacher`; conf/evaluate.yaml says what each option means."""
    trained_on = _data_path(Path(checkpoint).expanduser())
    if split == "all" and trained_on and trained_on == _data_path(run_dir):
        log.warning("split=all judges on images that %s was trained on, too; split=val does not", checkpoint)
    if split == "val" and data.shortage:
        log.warning(data.shortage)
    judge(
        student=fastsam(checkpoint) if is_fastsam(checkpoint) else load_sam(checkpoint),
        teacher=answering(teacher, data),
        source=data,
        split=split,
        protocol=protocol,
        hardware=trainer,
        batch_size=batch_size,
        run_dir=run_dir,
    )


def _data_path(run_dir: Path) -> list[str]:
    """What data.path named in a run folder's config.yaml; empty if there is no such thing."""
    file = run_dir / "config.yaml"
    path = yaml.safe_load(file.read_text())["data"].get("path") if file.is_file() else None
    return [os.path.abspath(p) for p in ([path] if isinstance(path, str) else path or [])]
