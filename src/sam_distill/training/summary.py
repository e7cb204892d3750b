"""Console output of a training run: the lines it starts with, the table and commands it ends with."""

import logging
import re
import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sam_distill.data.base import DataSource
from sam_distill.evaluate.evaluator import BLIND
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.overrides import quoted_override
from sam_distill.training.callbacks import RunFolder
from sam_distill.training.lightning_module import Distillation

log = logging.getLogger(__name__)


def log_start(module: Distillation, source: DataSource, hardware: Hardware, steps: int, images_per_step: int) -> None:
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


def print_summary(folder: RunFolder, module: Distillation) -> None:
    """Print the scores before and after training, and commands to try the student."""
    skipped, run_dir = folder.source.skipped, folder.run_dir
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
        console.print(f"  {images} of {tar}", highlight=False, soft_wrap=True, markup=False)
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
