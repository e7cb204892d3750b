"""Training of a student: build the LightningModule, data, callbacks and Trainer, run them, write the run folder."""

import copy
import json
import logging
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import pytorch_lightning as pl
from pydantic import Field
from rich.console import Console
from rich.table import Table

from sam_distill.data.base import DataSource
from sam_distill.errors import UserError
from sam_distill.evaluate.agreement import Agreement
from sam_distill.evaluate.evaluator import BLIND
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
from sam_distill.runs.overrides import quoted_override
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
    strategy, student, teacher, source = setup.strategy, setup.student, setup.teacher, setup.source
    hardware, resume = setup.hardware, None if options.resume is None else Path(options.resume)
    checkpoint = None if resume is None else resume / LAST_CHECKPOINT
    if checkpoint is not None and not checkpoint.is_file():
        why = "the run may have stopped before its first checkpoint"
        raise UserError(f"resume={resume}: there is no {checkpoint}; {why}")
    processes = hardware.processes
    sync_batchnorm = hardware.sync_batchnorm and processes > 1
    if strategy.finetunes and options.init is None and resume is None:
        raise UserError(f"strategy={strategy.name} starts from a distilled student: give init=RUN_DIR or a checkpoint")
    if options.compile and sync_batchnorm:
        raise UserError("compile=true does not go with synchronised BatchNorm: give trainer.sync_batchnorm=false")
    if "annotations" in requirements(strategy, setup.prompts):
        source.load_annotations(setup.prompts.count, options.seed)
    strategy.prepare(student)
    if options.init is not None and resume is None and not options.plan:  # else it may not exist yet, or no longer
        load_weights(student, options.init)
    if options.compile:
        student.image_encoder.compile()  # in place: parameters keep their names

    images_per_step = options.batch_size * options.accumulate * processes
    steps = in_steps(options.budget, images_per_step, source.num_train_images)
    interval = -(-steps // VALIDATIONS)
    if options.validate_every:
        interval = min(steps, in_steps(options.validate_every, images_per_step, source.num_train_images))
    module = Distillation(
        student, strategy, teacher, setup.prompts, setup.optim, setup.protocol, sync_batchnorm, options.seed
    )
    loaders = DistillationData(source, options.batch_size, options.seed, hardware)
    if options.plan:
        _check_held_out(source, processes)
        plan_training(module, loaders, hardware, steps, options.accumulate)
        return {}
    facts: dict[str, Any] = {
        "images_per_step": images_per_step,
        "workers": hardware.num_workers,  # the order of images in tars depends on them
        "parameters": student.parameter_counts["parameters"],
        "precision": hardware.resolved_precision,
        "device": hardware.device_name,
        "teacher_sha256": teacher.sha256,
        "data_keys": source.fingerprint,
        **setup.protocol.description,
    }
    if resume is not None:
        _check_same_run(resume, facts, source)
    history = History(run_dir / "history.csv", resume=checkpoint is not None)
    folder = RunFolder(run_dir, history, source, facts)
    _log_start(module, source, hardware, steps, images_per_step)
    with all_processes(hardware, run_dir):  # reports a launcher's mistake first
        _check_held_out(source, processes)
        trainer = _trainer(setup, options, run_dir, steps, interval, folder)
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
            _print_summary(folder, module, run_dir)
        return module.metrics


def _check_held_out(source: DataSource, processes: int) -> None:
    if source.val_images < processes:
        raise UserError(
            f"data.val_images: {source.val_images} images are held out to judge the student on (of a cache, when it"
            f" was written), but every device needs one: {processes}"
        )


def _trainer(setup: Setup, options: Options, run_dir: Path, steps: int, interval: int, folder: RunFolder) -> pl.Trainer:
    """Return the Trainer. Arguments that the user gives by `trainer=` take precedence; callbacks are added to ours."""
    silence_lightning()
    given = setup.hardware.trainer_arguments()
    callbacks: list[pl.Callback] = [Throughput(), folder]  # the run folder before `Averaged`: it saves the average
    if options.progressive_resizing:
        callbacks.append(ProgressiveResizing(options.progressive_resizing, setup.student.image_size))
    if options.ema:
        callbacks.append(Averaged(decay=options.ema))
    if options.step_times:
        callbacks.append(StepTimes())
    last = run_dir / LAST_CHECKPOINT
    saved: dict[str, Any] = {"dirpath": last.parent, "filename": last.stem, "enable_version_counter": False}
    saved["save_on_train_epoch_end"] = False
    callbacks += [
        Stopping(last),
        CheckpointCallback(**saved, every_n_train_steps=interval),
        CheckpointCallback(**saved, train_time_interval=timedelta(minutes=10)),
    ]
    if Console().is_terminal:
        callbacks.append(TrainingBar())
    arguments: dict[str, Any] = {
        "max_steps": steps,
        "max_epochs": -1,
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


def _log_start(module: Distillation, source: DataSource, hardware: Hardware, steps: int, images_per_step: int) -> None:
    student, teacher, images = module.student, module.teacher, source.num_train_images
    log.info(
        "%s, %s, %.1fM parameters at %d px: %d steps of %d images (%.1f epochs of %d), %s on %s", module.strategy.name,
        type(student.image_encoder).__name__, student.parameter_counts["parameters"] / 1e6, student.image_size, steps,
        images_per_step, steps * images_per_step / images, images, hardware.resolved_precision, hardware.kind,
    )  # fmt: skip
    if module.requires & teacher.provides and teacher.capacity >= images:
        message = (
            "The first %d images wait for the teacher, whose answers are then remembered: it gets faster after them"
        )
        if hardware.processes > 1:
            message += (
                ", little by little: each process remembers only what it has asked itself, and images are dealt anew"
            )
        log.info(message, images)
    if source.shortage:
        log.warning(source.shortage)


def _print_summary(folder: RunFolder, module: Distillation, run_dir: Path) -> None:
    """Print the scores before and after training, and commands to try the student."""
    skipped = folder.source.skipped
    table = Table("", "before", "blind", "after", title="Agreement with the teacher on images the student never saw")
    for kind in module.evaluator.protocol.kinds:
        name = f"miou/{kind}"
        scores = folder.before.get(f"before/{name}"), folder.before.get(f"blind/{name}"), module.metrics.get(name)
        table.add_row(f"mIoU, one {kind}", *("" if score is None else f"{score:.3f}" for score in scores))
    console = Console()
    console.print(table)
    console.print(f"blind: {BLIND}")
    console.print(f"{folder.seconds:.0f} seconds" + (f"; {skipped} damaged images or tars skipped" if skipped else ""))
    for tar, images in folder.source.skipped_by_tar.items():
        console.print(f"  {images} of {tar}", highlight=False, soft_wrap=True)
    student = _option("checkpoint", run_dir)
    try_it = "sam-distill segment image=PHOTO.jpg 'point=[x,y]' path=seen.png"
    for name, what in {
        "picture": run_dir / "pictures" / f"masks_{module.validated_at:07d}.png",
        "student": run_dir / "student.pt",
        "try it": f"{try_it} {student}",
        "a better one": f"{try_it} checkpoint=pocket_sam, the student that comes with sam-distill",
        "in a browser": f"sam-distill demo compare=mobile_sam {student}",
    }.items():
        console.print(f"{name:14}{what}", highlight=False, soft_wrap=True, markup=False)


def _option(key: str, path: Path) -> str:
    """Return KEY=PATH, quoted for a shell and for Hydra if the path needs it."""
    plain = re.fullmatch(r"[\w./-]+", str(path))
    return f"{key}={path}" if plain else shlex.quote(quoted_override(key, str(path)))


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
