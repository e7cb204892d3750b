"""`sam-distill export`: a model for use elsewhere, whole and checked, or nothing."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from sam_distill.data.base import DataSource
from sam_distill.export import check
from sam_distill.export.contract import CONTRACT, UPSCALING, Normalize, Quantize, Settings
from sam_distill.export.formats import FORMATS, load_format
from sam_distill.export.official import save_official, save_safetensors
from sam_distill.files import write_json
from sam_distill.models.checkpoints import Checkpoint, load_sam
from sam_distill.models.sam import Sam
from sam_distill.types import FRAME, Sample, UserError

log = logging.getLogger(__name__)

CHECKED = 10  # photographs at most that the runtime and PyTorch must agree on


def export(
    *,
    checkpoint: Checkpoint,
    format: Literal["mobile_sam", "sam", "safetensors", "onnx", "litert", "web"],
    quantize: Quantize | None,
    points: Annotated[int, Field(ge=1)],
    normalize: Normalize,
    least_iou: Annotated[float, Field(ge=0, le=1)] | None,
    data: DataSource,
    path: str,
) -> None:
    """Write `checkpoint` to `path`; conf/export.yaml says what each option means."""
    target = Path(path).expanduser()
    if format in FORMATS:
        load_format(format)
        sam = load_sam(checkpoint).requires_grad_(False)
        settings = Settings(format, quantize, sam.image_size, points, normalize)
        floor = check.LEAST_IOU[quantize] if least_iou is None else least_iou
        with _arriving(target, folder=True) as draft:
            _export_graphs(sam, draft, settings, floor, data.val_samples()[:CHECKED])
        files = sorted(file for file in target.rglob("*") if file.is_file())
    else:
        if quantize and (format, quantize) != ("safetensors", "fp16"):
            raise UserError(f"quantize={quantize} goes with format={', '.join(FORMATS)}, not with format={format}")
        sam = load_sam(checkpoint).requires_grad_(False)
        with _arriving(target, folder=False) as draft:
            if format == "safetensors":
                save_safetensors(sam, draft, half=quantize == "fp16")
            elif format == "mobile_sam" or format == "sam":
                name = save_official(sam, draft, format)
                log.info('for sam_model_registry["%s"](checkpoint="%s")', name, path)
                _warn_of_image_size(sam)
        files = [target]
    for file in files:
        log.info("%s: %.1f MB", file, file.stat().st_size / 1e6)


def _export_graphs(sam: Sam, folder: Path, settings: Settings, least_iou: float, samples: list[Sample]) -> None:
    """Write, run in the format's own runtime, compare with PyTorch, and say what came of it."""
    module, runtime = load_format(settings.format), FORMATS[settings.format].runtime
    if not samples:
        raise UserError("data= has no held-out photograph to run the export on: it needs one at least")
    graphs = module.write(sam, folder, settings)
    found = check.compare(sam, module.open_runner(folder, settings), samples)
    _show(found, runtime, least_iou)
    if not found.good(least_iou):
        agree = f"agree to a mask IoU of {found.mask_iou:.4f} and a cosine of {found.cosine:.4f} only"
        mend = "take another quantize= or a smaller least_iou="
        raise UserError(f"{runtime} and PyTorch {agree}, less than {least_iou:g}, so nothing was written: {mend}")
    checked = {"runtime": runtime, "least_iou": least_iou} | found.as_json()
    write_json(folder / CONTRACT, asdict(settings) | graphs | {"upscaling": UPSCALING, "checked": checked})


def _show(found: check.Agreement, runtime: str, least_iou: float) -> None:
    title = f"{runtime} beside PyTorch, {found.images} photographs, {found.prompts} prompts"
    table = Table("", "", title=title, show_header=False)
    table.add_row("embeddings: largest difference, least cosine", f"{found.embedding:.1e}, {found.cosine:.5f}")
    table.add_row("masks: mean IoU, worst", f"{found.mask_iou:.4f}, {found.worst_mask_iou:.4f} ({least_iou:g} wanted)")
    table.add_row("predicted IoUs: largest difference", f"{found.predicted_iou:.1e}")
    speeds = found.pytorch_encoder_seconds / found.encoder_seconds, found.encoder_seconds * 1000
    table.add_row("a picture: time, against PyTorch's", f"{speeds[1]:.0f} ms, {speeds[0]:.2f}x as fast")
    speeds = found.pytorch_decoder_seconds / found.decoder_seconds, found.decoder_seconds * 1000
    table.add_row("a prompt: time, against PyTorch's", f"{speeds[1]:.0f} ms, {speeds[0]:.2f}x as fast")
    Console().print(table)


def _warn_of_image_size(sam: Sam) -> None:
    if sam.image_size != FRAME:
        log.warning(
            "this student sees images at %d pixels, but MobileSAM's and SAM's code run every encoder at 1024, where its"
            " masks are worse: train at image_size=1024 for use there, or take format=onnx",
            sam.image_size,
        )


@contextmanager
def _arriving(target: Path, folder: bool) -> Iterator[Path]:
    """A draft of a file or folder beside its final place, where it is moved when all went well."""
    if target.exists() and target.is_dir() != folder:
        is_one, expected = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UserError(f"path={target} is {is_one}: expected {expected}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            draft = Path(place) / target.name
            if folder:
                draft.mkdir()
            yield draft
            if folder:
                target.mkdir(exist_ok=True)
                for file in sorted(draft.iterdir(), reverse=True):  # weights before the graph that names them
                    if file.is_dir():
                        shutil.rmtree(target / file.name, ignore_errors=True)
                    file.replace(target / file.name)
            else:
                draft.replace(target)
    except OSError as error:
        raise UserError(f"path={target}: cannot be written ({error.strerror or error})") from error
