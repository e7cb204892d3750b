"""`sam-distill train`, which is `python train.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sam_distill.cli.models import teacher_for
from sam_distill.data.base import DataSource
from sam_distill.evaluate.agreement import Agreement
from sam_distill.models.checkpoints import Checkpoint
from sam_distill.models.encoders import ImageEncoder
from sam_distill.prompts.samplers import PromptSampler
from sam_distill.runs.hardware import Hardware
from sam_distill.strategies.base import Strategy
from sam_distill.teachers import LiveTeacher
from sam_distill.training.durations import Duration
from sam_distill.training.fit import fit, new_student
from sam_distill.training.loggers import CsvOnly, WandB
from sam_distill.training.optimizers import AdamW

ImageSize = Annotated[int, Field(ge=64, le=1024, multiple_of=64)]


def train(
    *,
    strategy: Strategy,
    encoder: ImageEncoder,
    teacher: LiveTeacher,
    prompts: PromptSampler,
    data: DataSource,
    optim: AdamW,
    protocol: Agreement,
    trainer: Hardware,
    logger: WandB | CsvOnly,
    budget: Duration,
    validate_every: Duration | None,
    batch_size: Annotated[int, Field(gt=0)],
    accumulate: Annotated[int, Field(gt=0)],
    ema: Annotated[float, Field(gt=0, lt=1)] | None,
    progressive_resizing: dict[ImageSize, Annotated[float, Field(gt=0, lt=1)]] | None,
    step_times: bool,
    seed: Annotated[int, Field(ge=0, lt=2**32)],
    image_size: ImageSize,
    neck_from_teacher: bool,
    init: Checkpoint | None,
    resume: str | None,
    scale: Literal["paper", "small"],
    plan: bool,
    run_dir: Path,
) -> None:
    """Distil `teacher` into `encoder`; conf/train.yaml says what each option means. Only experiments read `scale`."""
    whose = teacher_for(teacher, data)
    fit(
        strategy=strategy,
        student=new_student(encoder, whose.sam, image_size, neck_from_teacher),
        teacher=whose,
        prompts=prompts,
        source=data,
        optim=optim,
        protocol=protocol,
        hardware=trainer,
        logger=logger,
        budget=budget,
        validate_every=validate_every,
        batch_size=batch_size,
        accumulate=accumulate,
        ema=ema,
        progressive_resizing=progressive_resizing,
        step_times=step_times,
        seed=seed,
        init=init,
        resume=resume,
        plan=plan,
        run_dir=run_dir,
    )
