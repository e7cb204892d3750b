"""The command `sam-distill segment`: segment one object or everything, in one image or many."""

import glob
import json
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from pydantic import Field

from sam_distill.data.folder import image_files
from sam_distill.errors import UserError
from sam_distill.files import atomic_write, write_text
from sam_distill.images import decode
from sam_distill.inference.optimize import Runtime, optimize_for_inference
from sam_distill.models.checkpoints import Checkpoint, load_sam
from sam_distill.predict.mask_generator import SamAutomaticMaskGenerator
from sam_distill.predict.overlays import masks_overlay, overlay
from sam_distill.predict.predictor import SamPredictor
from sam_distill.runs.hardware import Hardware
from sam_distill.runs.progress import CountProgress
from sam_distill.selection import IMAGE_SUFFIXES, is_image, unique_keys

log = logging.getLogger(__name__)

NO_MASK_HINT = "of a student try generator.pred_iou_thresh=0.5 generator.stability_score_thresh=0.7"

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
    everything: bool,
    generator: partial[SamAutomaticMaskGenerator],
    runtime: Runtime,
    trainer: Hardware,
    path: str,
) -> None:
    """Segment one object or everything in `image`; conf/segment.yaml says what each option means."""
    jobs = _jobs(image, Path(path))
    _refuse_overwriting(jobs)
    coordinates, signs = _points(point, points, labels)
    _check_prompts(coordinates, box, everything)
    sam = optimize_for_inference(load_sam(checkpoint), runtime).to(trainer.kind)
    make, predictor = generator(sam, output_mode="coco_rle"), SamPredictor(sam)
    progress = CountProgress(len(jobs), "segmenting") if len(jobs) > 1 else nullcontext()
    skipped = 0
    with trainer.autocast(), progress:
        for number, (file, target) in enumerate(jobs):
            try:
                picture, _ = decode(file, full=True)
                if everything:
                    records, result, summary = _everything(make, picture)
                else:
                    records, result, summary = _one_thing(predictor, picture, file, coordinates, signs, box)
            except UserError as error:
                if len(jobs) == 1:
                    raise
                skipped += 1
                log.warning("skipped: %s", error)
            else:
                try:
                    _save(result, target)
                    _write_json(target.with_suffix(".json"), file, number, picture, records)
                except OSError as error:
                    raise UserError(f"path={path}: cannot be written ({error.strerror or error})") from error
                log.info("%s: %s", target, summary)
            if isinstance(progress, CountProgress):
                progress.add(1)
    if skipped:
        raise UserError(f"{skipped} of {len(jobs)} images were skipped, see above; {path} holds the others")


def _check_prompts(points: Sequence[Point], box: Box | None, everything: bool) -> None:
    prompted = bool(points) or box is not None
    if everything and prompted:
        raise UserError("everything=true takes no prompts: leave out point, points and box")
    if not everything and not prompted:
        raise UserError(
            "nothing to segment: give point=[x,y], points=[[x,y],...], box=[x0,y0,x1,y1] or everything=true"
        )
    if box is not None and not (box[0] < box[2] and box[1] < box[3]):
        raise UserError(f"box={list(box)}: expected [x0,y0,x1,y1] with x0 < x1 and y0 < y1")


def _jobs(image: str, path: Path) -> list[tuple[Path, Path]]:
    """Return pairs (image, picture to write): `path`, or a file in that folder if `image` is a folder or a glob."""
    if "://" in image:
        raise UserError(f"image={image} is an address: download it, and give the file")
    source = Path(image).expanduser()
    if not (source.is_dir() or (glob.has_magic(image) and not source.exists())):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise UserError(f"path={path}: pictures end in .png or .jpg")
        return [(source, path)]
    if path.suffix.lower() in IMAGE_SUFFIXES or path.is_file():
        raise UserError(f"path={path}: image={image} is more than one, so path= is the folder for the results")
    named = map(Path, sorted(glob.glob(str(source), recursive=True)))
    files = image_files(source) if source.is_dir() else [file for file in named if is_image(file.name)]
    if not files:
        raise UserError(f"image={image}: there is no image; expected jpg, png, webp, bmp or tif files")
    base = source if source.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
    keys = unique_keys([file.relative_to(base).as_posix() for file in files])
    return [(file, path / f"{key}.jpg") for file, key in zip(files, keys, strict=True)]


def _refuse_overwriting(jobs: Sequence[tuple[Path, Path]]) -> None:
    """Raise UserError if a picture or its JSON would overwrite an input image or the JSON beside one."""
    images = {file.resolve().with_suffix("") for file, _ in jobs}
    for _, target in jobs:
        if target.resolve().with_suffix("") in images:
            raise UserError(f"{target} and its JSON would lie over an image or its JSON: give another path")


def _one_thing(
    predictor: SamPredictor,
    picture: Image.Image,
    file: Path,
    coordinates: Sequence[Point],
    signs: Sequence[int],
    box: Box | None,
) -> tuple[list[dict[str, Any]], Image.Image, str]:
    """Return a record in SA-1B's format, the picture with mask and prompts drawn in, and a line that sums it up."""
    for x, y in [*coordinates, *([] if box is None else [box[:2], box[2:]])]:
        if not (0 <= x <= picture.width and 0 <= y <= picture.height):
            raise UserError(f"({x:g}, {y:g}) lies outside {file}, which is {picture.width} x {picture.height} pixels")
    predictor.set_image(picture)
    mask, iou = predictor.predict_best(coordinates, signs, box)
    estimate = min(1.0, iou)  # the mask decoder's estimate, which may exceed 1
    drawn = overlay(picture, mask, points=coordinates, labels=signs, box=box)
    runs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    record = {"area": int(mask.sum()), "bbox": coco.toBbox(runs).tolist(), "predicted_iou": iou}
    record["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
    return [record], drawn, f"{100 * mask.mean():.1f}% of the image, predicted IoU {estimate:.2f}"


def _everything(
    generator: SamAutomaticMaskGenerator, picture: Image.Image
) -> tuple[list[dict[str, Any]], Image.Image, str]:
    """Return a record for each mask, the picture with all masks drawn in, and a line that sums it up."""
    records = generator.generate(picture)
    summary = f"{len(records)} masks" if records else f"no mask that the model trusts; {NO_MASK_HINT}"
    return records, masks_overlay(picture, records), summary


def _save(picture: Image.Image, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as draft:
        picture.save(draft, Image.registered_extensions()[target.suffix.lower()])


def _write_json(target: Path, file: Path, number: int, picture: Image.Image, records: Sequence[dict[str, Any]]) -> None:
    """Write an image's masks in the format of SA-1B's JSON files."""
    described = {"image_id": number, "width": picture.width, "height": picture.height, "file_name": file.name}
    annotations = [{"id": index, **record} for index, record in enumerate(records)]
    write_text(target, json.dumps({"image": described, "annotations": annotations}))


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
