"""`sam-distill evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from sam_distill.data.base import DataSource, Split
from sam_distill.engine.evaluation import judge
from sam_distill.engine.hardware import Hardware
from sam_distill.evaluate.agreement import Agreement
from sam_distill.models.checkpoints import Checkpoint, load_sam
from sam_distill.teachers import LiveTeacher


def evaluate(
    *,
    checkpoint: Checkpoint,
    teacher: LiveTeacher,
    data: DataSource,
    split: Split,
    protocol: Agreement,
    trainer: Hardware,
    batch_size: Annotated[int, Field(gt=0)],
    run_dir: Path,
) -> None:
    """Judge `checkpoint` by `teacher`; conf/evaluate.yaml says what each option means."""
    judge(
        student=load_sam(checkpoint),
        teacher=teacher.sam,
        source=data,
        split=split,
        protocol=protocol,
        hardware=trainer,
        batch_size=batch_size,
        run_dir=run_dir,
    )
