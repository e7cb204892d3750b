"""The command `sam-distill train`, the same as `python train.py`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from sam_distill.cli.teacher import teacher_for
from sam_distill.data.base import DataSource
from sam_distill.evaluate.agreement import Agreement
from sam_distill.loggers.history import CsvOnly
from sam_distill.loggers.wandb import WandB
from sam_distill.models.encoders import ImageEncoder
from sam_distill.prompts.samplers import PromptSampler
from sam_distill.runs.hardware import Hardware
from sam_distill.strategies.base import Strategy
from sam_distill.teachers import LiveTeacher
from sam_distill.training.fit import ImageSize, Options, Setup, fit, new_student
from sam_distill.training.optimizers import AdamW


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
    image_size: ImageSize,
    neck_from_teacher: bool,
    scale: Literal["paper", "small"],
    run_dir: Path,
    **options: Annotated[Any, "sam_distill.training.fit.Options"],
) -> None:
    """Distil `teacher` into `encoder`; conf/train.yaml says what each option means. Only experiments read `scale`."""
    learned_from = teacher_for(teacher, data)
    student = new_student(encoder, learned_from.sam, image_size, neck_from_teacher)
    setup = Setup(strategy, student, learned_from, prompts, data, optim, protocol, trainer, logger)
    fit(setup, Options(**options), run_dir)
