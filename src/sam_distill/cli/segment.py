"""`sam-distill segment`: one image, one prompt, one picture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from sam_distill.engine.hardware import Hardware
from sam_distill.images import decode
from sam_distill.models.checkpoints import Checkpoint, load_sam
from sam_distill.predict.overlays import overlay
from sam_distill.predict.predictor import SamPredictor
from sam_distill.types import UserError

log = logging.getLogger(__name__)

Point = Annotated[Sequence[float], Field(min_length=2, max_length=2)]
Box = Annotated[Sequence[float], Field(min_length=4, max_length=4)]


def segment(
    *,
    image: str,
    checkpoint: Checkpoint,
    point: Point | None,
    points: Sequence[Point] | None,
    labels: Sequence[Literal[0, 1]] | None,
    box: Box | None,
    trainer: Hardware,
    path: str,
) -> None:
    """Cut one thing out of `image`; conf/segment.yaml says what each option means."""
    target = Path(path)
    if target.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"path={path}: pictures end in .png or .jpg")
    picture, _ = decode(Path(image), full=True)
    coordinates, signs = _points(point, points, labels)
    if not coordinates and box is None:
        raise UserError("nothing to segment: give point=[x,y], points=[[x,y],...] or box=[x0,y0,x1,y1]")
    corners = [] if box is None else [box[:2], box[2:]]
    if box is not None and not (box[0] < box[2] and box[1] < box[3]):
        raise UserError(f"box={list(box)}: expected [x0,y0,x1,y1] with x0 < x1 and y0 < y1")
    for x, y in [*coordinates, *corners]:
        if not (0 <= x <= picture.width and 0 <= y <= picture.height):
            raise UserError(f"({x:g}, {y:g}) lies outside {image}, which is {picture.width} x {picture.height} pixels")
    predictor = SamPredictor(load_sam(checkpoint).to(trainer.kind))
    predictor.set_image(np.asarray(picture))
    # SAM's advice: a single click is ambiguous, so ask for three masks and take the best; else ask for one.
    masks, iou, _ = predictor.predict(
        np.array(coordinates) if coordinates else None,
        np.array(signs) if coordinates else None,
        None if box is None else np.array(box),
        multimask_output=box is None and len(coordinates) == 1,
    )
    mask = masks[iou.argmax()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        overlay(picture, mask, points=coordinates, labels=signs, box=box).save(target)
    except OSError as error:
        raise UserError(f"path={path}: cannot be written ({error.strerror or error})") from error
    estimate = min(1.0, float(iou.max()))  # the decoder's own, which may overshoot
    log.info("%s: %.1f%% of the image, predicted IoU %.2f", target, 100 * mask.mean(), estimate)


def _points(
    point: Point | None, points: Sequence[Point] | None, labels: Sequence[int] | None
) -> tuple[list[Point], list[int]]:
    if point is not None and points is not None:
        raise UserError("point and points exclude each other: give one of them")
    coordinates = [point] if point is not None else list(points or [])
    signs = [1] * len(coordinates) if labels is None else list(labels)
    if len(signs) != len(coordinates):
        raise UserError(f"{len(signs)} labels for {len(coordinates)} points: give one (1 or 0) for each")
    return coordinates, signs
