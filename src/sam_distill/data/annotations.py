"""Annotations in the JSON of SA-1B, COCO and LVIS: read run lengths or polygons, and rasterise a few at a time."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from torch import Tensor

from sam_distill.errors import UserError
from sam_distill.images import Size, frame_size
from sam_distill.prompts.sampling import generator
from sam_distill.types import CELL, FRAME, LOW_RES, RunLengths, Sample


@contextmanager
def _user_error_if_unreadable(name: str) -> Iterator[None]:
    """Turn any exception raised inside into a UserError: the annotations of `name` can't be read."""
    try:
        yield
    except Exception as error:  # bad JSON, a missing key, or anything pycocotools raises on bad run lengths
        raise UserError(f"{name}: the annotations can't be read ({type(error).__name__}: {error})") from None


def draw_annotations(sample: Sample, name: str, count: int, seed: int) -> Tensor:
    """Return `count` masks drawn without repetition from a sample's JSON: [count, 256, 256] bool in the frame.

    If there are fewer, the last masks are empty. A cell is True if the mask covers at least half of it. The draw
    depends on (seed, key, epoch). name: of the file, for the UserError raised if it is damaged.
    """
    drawn = np.zeros((count, LOW_RES, LOW_RES), bool)
    with _user_error_if_unreadable(name):
        annotations = json.loads(sample.json)["annotations"]
        order = generator(seed, sample.key, sample.epoch, "annotations").permutation(len(annotations))[:count]
        for place, index in enumerate(order):
            drawn[place] = _at_low_res(annotations[index]["segmentation"], sample.original_size)
    return torch.from_numpy(drawn)


def check_json(content: bytes, name: str) -> None:
    """Raise UserError if `content`, the JSON file `name` of an image, is damaged or not a JSON object."""
    with _user_error_if_unreadable(name):
        if not isinstance(found := json.loads(content), dict):
            raise TypeError(f"a {type(found).__name__}")


def run_lengths(sample: Sample) -> list[RunLengths]:
    """Return all masks in an image's JSON, without COCO's crowds and empty masks; raise UserError if there are none."""
    if not sample.json:
        raise UserError(f"{sample.key}: it has no annotations")
    with _user_error_if_unreadable(sample.key):
        found = [one["segmentation"] for one in json.loads(sample.json)["annotations"] if not one.get("iscrowd")]
        masks = [mask for each in found if coco.area(mask := _compressed(each, sample.original_size)) > 0]
        for mask in masks:
            if tuple(mask["size"]) != sample.original_size:
                raise ValueError(f"a mask of {mask['size']} pixels for an image of {sample.original_size}")
        if not masks:
            raise ValueError("none")
        return masks


@dataclass(frozen=True)
class AnnotatedImage:
    """Image in an annotation file. name: with the folders that the file gives. size: (H, W), or None if not given."""

    name: PurePosixPath
    size: Size | None
    annotations: list[dict[str, Any]]


def coco_json(path: Path) -> list[AnnotatedImage]:
    """Return the images of a COCO or LVIS annotation file that have annotations; raise UserError if it is damaged."""
    images: dict[Any, AnnotatedImage] = {}
    try:
        content = json.loads(path.read_bytes())
        for one in content["images"]:
            name = PurePosixPath(one.get("file_name") or one["coco_url"])  # LVIS gives only the COCO URL
            size = one.get("height"), one.get("width")
            images[one["id"]] = AnnotatedImage(name, size if all(size) else None, [])
        for number, one in enumerate(content["annotations"]):
            if one["image_id"] not in images:
                raise ValueError(f"annotation {number} is of an image {one['image_id']}, which is not among its images")
            kept = {key: one[key] for key in ("segmentation", "iscrowd") if key in one}
            images[one["image_id"]].annotations.append(kept)
    except OSError as error:
        raise UserError(f"data.annotations={path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"data.annotations={path}: not a JSON of COCO or LVIS ({why})") from None
    return [image for image in images.values() if image.annotations]


def annotations_by_file(files: Sequence[Path], annotated: Sequence[AnnotatedImage]) -> dict[Path, AnnotatedImage]:
    """Return the annotations of each file, matched by its name, or also by its folders if several have the same name.

    Raise ValueError if the folders leave it ambiguous. Files without annotations are left out.
    """
    deepest = max((len(image.name.parts) for image in annotated), default=0)
    files_by_ending: dict[tuple[str, ...], list[Path]] = {}  # ending of a path: its last part, its last two, ...
    for file in files:
        for depth in range(1, min(deepest, len(file.parts)) + 1):
            files_by_ending.setdefault(file.parts[-depth:], []).append(file)
    found: dict[Path, tuple[int, AnnotatedImage]] = {}
    for image in annotated:
        parts = image.name.parts
        depth = next((depth for depth in range(len(parts), 0, -1) if parts[-depth:] in files_by_ending), 0)
        if not depth:
            continue
        file, *others = files_by_ending[parts[-depth:]]
        if others:
            raise ValueError(f"{image.name} may be {file} or {others[0]}")
        known, other = found.get(file, (0, image))
        if known == depth:
            raise ValueError(f"{file} may be its {other.name} or its {image.name}")
        if known < depth:
            found[file] = depth, image
    return {file: image for file, (_, image) in found.items()}


def _compressed(segmentation: Any, size: tuple[int, int]) -> RunLengths:
    """Return compressed run lengths. segmentation: polygons, or run lengths as a list or as text."""
    if isinstance(segmentation, list):
        return coco.merge(coco.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return coco.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def _at_low_res(segmentation: dict[str, Any], original_size: Size) -> np.ndarray:
    """Return a mask in the frame: [256, 256] bool. It may differ from its image in resolution, not in aspect ratio."""
    height, width = segmentation["size"]
    if np.abs(np.subtract(frame_size((height, width)), frame_size(original_size))).max() > FRAME / 100:
        raise ValueError(f"a mask of {[height, width]} pixels for an image of {original_size}")
    original = Image.fromarray(coco.decode(_compressed(segmentation, (height, width))) * np.uint8(255))
    frame = Image.new("L", (FRAME, FRAME))
    frame.paste(original.resize(frame_size((height, width))[::-1], Image.Resampling.BILINEAR))
    return np.asarray(frame.reduce(CELL)) >= 128
