"""Training of a student: build the LightningModule, data, callbacks and Trainer, run them, write the run folder."""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
from pydantic import Field
from rich.console import Console

from sam_distill.data.base import DataSource
from sam_distill.errors import UserError
from sam_distill.evaluate.agreement import Agreement
from sam_distill.evaluate.protocol import write_prompts
from sam_distill.files import LAST_CHECKPOINT
from sam_distill.loggers.history import CsvOnly, History
from sam_distill.loggers.wandb import WandB, close
from sam_distill.models.checkpoints import Checkpoint, load_weights
from sam_distill.models.encoders import ImageEncoder
from sam_distill.models.sam import Sam
from sam_distill.prompts.samplers import PromptSampler
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.launch import all_processes
from sam_distill.selection import legacy_fingerprint
from sam_distill.strategies.base import Strategy
from sam_distill.teachers import Teacher
from sam_distill.training.callbacks import Averaged, ProgressiveResizing, RunFolder, Throughput
from sam_distill.training.checkpoint_io import AtomicCheckpointIO
from sam_distill.training.datamodule import DistillationData
from sam_distill.training.durations import Duration, in_steps
from sam_distill.training.lightning_module import Distillation, requirements, silence_lightning
from sam_distill.training.optimizers import AdamW
from sam_distill.training.plan import plan_training
from sam_distill.training.progress import TrainingBar
from sam_distill.training.step_times import StepTimes
from sam_distill.training.stopping import Checkpoint as CheckpointCallback
from sam_distill.training.stopping import Stopping
from sam_distill.training.summary import log_start, print_summary

log = logging.getLogger(__name__)

VALIDATIONS = 10  # per run, unless `validate_every` is given
LOG_LINES = 50  # per run, but at least one every 50 steps

ImageSize = Annotated[int, Field(ge=64, le=1024, multiple_of=64)]


def new_student(encoder: ImageEncoder, teacher: Sam, image_size: int, neck_from_teacher: bool) -> Sam:
    """Return a SAM of the student's encoder and copies of the teacher's prompt encoder and mask decoder.

    neck_from_teacher: the neck's norms and 3x3 convolution, which have the same shape in every encoder, start as copies
    of the teacher's, so that embeddings have the right statistics from the first step. The paper does not mention it.
    """
    if neck_from_teacher:
        for part in ("norm1", "conv", "norm2"):
            theirs = getattr(teacher.image_encoder.neck, part)
            getattr(encoder.neck, part).load_state_dict(theirs.state_dict())
    return Sam(encoder, copy.deepcopy(teacher.prompt_encoder), copy.deepcopy(teacher.mask_decoder), image_size)


@dataclass(frozen=True)
class Setup:
    """Components of a training run: strategy, models, prompts, data, optimizer, protocol, hardware and logger."""

    strategy: Strategy
    student: Sam
    teacher: Teacher
    prompts: PromptSampler
    source: DataSource
    optim: AdamW
    protocol: Agreement
    hardware: Hardware
    logger: WandB | CsvOnly


@dataclass(frozen=True)
class Options:
    """Options of a training run, such as its budget, batch size and starting point; conf/train.yaml explains each."""

    budget: Duration
    validate_every: Duration | None = None
    batch_size: Annotated[int, Field(gt=0)] = 8
    accumulate: Annotated[int, Field(gt=0)] = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    progressive_resizing: dict[ImageSize, Annotated[float, Field(gt=0, lt=1)]] | None = None
    step_times: bool = False
    compile: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    init: Checkpoint | None = None
    resume: str | None = None
    plan: bool = False


def fit(setup: Setup, options: Options, run_dir: Path) -> dict[str, Any]:
    """Train the student and return the metrics of the last validation, which are also in metrics.json in `run_dir`.

    With `plan`, only measure a few steps: write nothing and return {}.
    """
    source, hardware = setup.source, setup.hardware
    checkpoint = _checkpoint_to_resume(options.resume)
    _prepare_student(setup, options)
    images_per_step = options.batch_size * options.accumulate * hardware.processes
    steps = in_steps(options.budget, images_per_step, source.num_train_images)
    module = Distillation(
        setup.student, setup.strategy, setup.teacher, setup.prompts, setup.optim, setup.protocol,
        hardware.synchronises_batchnorm, options.seed,
    )  # fmt: skip
    loaders = DistillationData(source, options.batch_size, options.seed, hardware)
    if options.plan:
        _check_held_out(source, hardware.processes)
        plan_training(module, loaders, hardware, steps, options.accumulate)
        return {}
    facts = _facts(setup, images_per_step)
    if options.resume is not None:
        _check_same_run(Path(options.resume), facts, source)
    history = History(run_dir / "history.csv", resume=checkpoint is not None)
    folder = RunFolder(run_dir, history, source, facts)
    log_start(module, source, hardware, steps, images_per_step)
    with all_processes(hardware, run_dir):  # reports a launcher's mistake first
        _check_held_out(source, hardware.processes)
        trainer = _trainer(setup, options, run_dir, steps, folder)
        first = trainer.is_global_zero
        trainer.loggers = [history, *(setup.logger.build(run_dir, facts) if first else [])]
        try:
            if checkpoint is None:
                log.info("Validating before the first step (the teacher answers %d images)", source.val_images)
                trainer.validate(module, loaders, verbose=False)
            trainer.fit(module, loaders, ckpt_path=checkpoint, weights_only=True)
            if module.validated_at != trainer.global_step:
                trainer.validate(module, loaders, verbose=False)
        finally:
            close(trainer.loggers)
        if first:
            write_prompts(run_dir / "prompts.csv", module.evaluator.comparisons)
            print_summary(folder, module)
        return module.metrics


def _checkpoint_to_resume(run_dir: str | None) -> Path | None:
    if run_dir is None:
        return None
    checkpoint = Path(run_dir) / LAST_CHECKPOINT
    if not checkpoint.is_file():
        why = "the run may have stopped before its first checkpoint"
        raise UserError(f"resume={run_dir}: there is no {checkpoint}; {why}")
    return checkpoint


def _prepare_student(setup: Setup, options: Options) -> None:
    """Check options that depend on each other; load annotations, initial weights; compile the encoder, if wanted."""
    strategy, student = setup.strategy, setup.student
    if strategy.finetunes and options.init is None and options.resume is None:
        raise UserError(f"strategy={strategy.name} starts from a distilled student: give init=RUN_DIR or a checkpoint")
    if options.compile and setup.hardware.synchronises_batchnorm:
        raise UserError("compile=true does not go with synchronised BatchNorm: give trainer.sync_batchnorm=false")
    if "annotations" in requirements(strategy, setup.prompts):
        setup.source.load_annotations(setup.prompts.count, options.seed)
    strategy.prepare(student)
    if options.init is not None and options.resume is None and not options.plan:  # else it need not exist
        load_weights(student, options.init)
    if options.compile:
        student.image_encoder.compile()  # in place: parameters keep their names


def _facts(setup: Setup, images_per_step: int) -> dict[str, Any]:
    """Return what metrics.json says of a run beside its scores."""
    return {
        "images_per_step": images_per_step,
        "workers": setup.hardware.num_workers,  # the order of images in tars depends on them
        "parameters": setup.student.parameter_counts["parameters"],
        "precision": setup.hardware.resolved_precision,
        "device": setup.hardware.device_name,
        "teacher_sha256": setup.teacher.sha256,
        "data_keys": setup.source.fingerprint,
        **setup.protocol.description,
    }


def _check_held_out(source: DataSource, processes: int) -> None:
    if source.val_images < processes:
        raise UserError(
            f"data.val_images: {source.val_images} images are held out to judge the student on (of a cache, when it"
            f" was written), but every device needs one: {processes}"
        )


def _trainer(setup: Setup, options: Options, run_dir: Path, steps: int, folder: RunFolder) -> pl.Trainer:
    """Return the Trainer. Arguments that the user gives by `trainer=` take precedence; callbacks are added to ours."""
    silence_lightning()
    interval = -(-steps // VALIDATIONS)
    if options.validate_every:
        images_per_step = folder.facts["images_per_step"]
        interval = min(steps, in_steps(options.validate_every, images_per_step, setup.source.num_train_images))
    given = setup.hardware.trainer_arguments()
    callbacks: list[pl.Callback] = [folder]  # before `Averaged`: it saves the average
    if options.progressive_resizing:
        callbacks.append(ProgressiveResizing(options.progressive_resizing, setup.student.image_size))
    if options.ema:
        callbacks.append(Averaged(decay=options.ema))
    if options.step_times:
        callbacks.append(StepTimes())
    callbacks.append(Throughput())
    last = run_dir / LAST_CHECKPOINT
    saved: dict[str, Any] = {"dirpath": last.parent, "filename": last.stem, "enable_version_counter": False}
    callbacks += [
        Stopping(last),
        CheckpointCallback(**saved, every_n_train_steps=interval),
        CheckpointCallback(**saved, train_time_interval=timedelta(minutes=10)),
    ]
    if Console().is_terminal:
        callbacks.append(TrainingBar())
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "val_check_interval": interval * options.accumulate,  # in batches
        "accumulate_grad_batches": options.accumulate,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": max(1, min(50, steps // LOG_LINES)),
        "gradient_clip_val": setup.optim.clip or None,
        "plugins": [AtomicCheckpointIO()],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": run_dir,
    }
    return pl.Trainer(**arguments | given | {"callbacks": [*callbacks, *given.get("callbacks", [])]})


def _check_same_run(run_dir: Path, facts: Mapping[str, Any], source: DataSource) -> None:
    """Raise UserError if training images, teacher weights or images per step are not the run's, even if options are."""
    metrics = run_dir / "metrics.json"
    before = json.loads(metrics.read_text()) if metrics.is_file() else {}
    keys = before.get("data_keys")
    if keys != facts["data_keys"] and keys == legacy_fingerprint(source.keys(source.train)):
        before["data_keys"] = facts["data_keys"]
    new_run = f"init={run_dir} starts a new run from its weights"
    for name, message in {
        "data_keys": f"the images to train on are not those that the run began with; {new_run}",
        "teacher_sha256": f"the teacher's weights are not those that the run began with; {new_run}",
        "images_per_step": f"{before.get('images_per_step')} images per step then, {facts['images_per_step']} now:"
        " batch_size x accumulate x trainer.devices has to stay the same",
    }.items():
        if name in before and before[name] != facts[name]:
            raise UserError(f"resume={run_dir}: {message}")
