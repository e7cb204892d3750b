"""The command `sam-distill export`: write a model for use elsewhere, complete and checked, or write nothing."""

import logging
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from sam_distill.cli.resume import is_record
from sam_distill.data.base import DataSource
from sam_distill.errors import UserError
from sam_distill.export import check
from sam_distill.export.contract import Normalize, Quantize, Settings
from sam_distill.export.formats import FORMATS, load_format
from sam_distill.export.official import save_official, save_safetensors
from sam_distill.export.target import atomic_target
from sam_distill.export.write import export_graphs
from sam_distill.models.checkpoints import Checkpoint, find_checkpoint, load_sam
from sam_distill.types import FRAME

log = logging.getLogger(__name__)

MAX_CHECKED_IMAGES = 10  # photographs, at most, on which the runtime's masks must agree with PyTorch's


def export(
    *,
    checkpoint: Checkpoint,
    format: Literal["mobile_sam", "sam", "safetensors", "onnx", "litert", "executorch", "coreml", "web"],
    quantize: Quantize | None,
    points: Annotated[int, Field(ge=1)],
    normalize: Normalize,
    least_iou: Annotated[float, Field(ge=0, le=1)] | None,
    data: DataSource,
    path: str,
) -> None:
    """Write `checkpoint` to `path`; conf/export.yaml says what each option means."""
    target = Path(path).expanduser()
    if target.is_file() and target.samefile(find_checkpoint(checkpoint)):
        raise UserError(f"path={path} is the checkpoint itself: give another")
    if target.is_file() and is_record(target):
        raise UserError(f"path={path} belongs to a run, which needs it as it is: give another")
    if format in FORMATS:
        load_format(format)
        sam = load_sam(checkpoint).requires_grad_(False)
        settings = Settings(format, quantize, sam.image_size, points, normalize)
        floor = check.LEAST_IOU[quantize] if least_iou is None else least_iou
        with atomic_target(target, folder=True) as draft:
            export_graphs(sam, draft, settings, floor, data.val_samples()[:MAX_CHECKED_IMAGES])
            files = sorted(target / file.relative_to(draft) for file in draft.rglob("*") if file.is_file())
    else:
        if quantize and (format, quantize) != ("safetensors", "fp16"):
            raise UserError(f"quantize={quantize} goes with format={', '.join(FORMATS)}, not with format={format}")
        sam = load_sam(checkpoint).requires_grad_(False)
        with atomic_target(target, folder=False) as draft:
            if format == "safetensors":
                save_safetensors(sam, draft, half=quantize == "fp16")
            elif format == "mobile_sam" or format == "sam":
                name = save_official(sam, draft, format)
                log.info('for sam_model_registry["%s"](checkpoint="%s")', name, path)
                if sam.image_size != FRAME:
                    log.warning(
                        "this student sees images at %d pixels, but MobileSAM's and SAM's code run every encoder at"
                        " 1024, where its masks are worse: train at image_size=1024 for use there, or take format=onnx",
                        sam.image_size,
                    )
        files = [target]
    for file in files:
        log.info("%s: %.1f MB", file, file.stat().st_size / 1e6)
