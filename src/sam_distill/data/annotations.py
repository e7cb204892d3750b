"""Annotations in SA-1B's JSON, and in COCO's and LVIS's: run lengths or polygons, rasterised a few at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from torch import Tensor

from sam_distill.images import frame_size
from sam_distill.prompts.sampling import generator
from sam_distill.types import FRAME, LOW_RES, RunLengths, Sample, UserError


def draw_annotations(content: bytes, key: str, name: str, count: int, seed: int, epoch: int) -> Tensor:
    """`count` masks drawn from an image's JSON, without repetition: [count, 256, 256] bool in the frame.

    Empty masks at the end where there are fewer. A cell is in a mask if at least half of it is. Each epoch draws anew.
    name: of the file, for the UserError that says that it is damaged.
    """
    try:
        found = json.loads(content)["annotations"]
        order = generator(seed, key, epoch, "annotations").permutation(len(found))[:count]
        masks = [_at_low_res(found[index]["segmentation"]) for index in order]
    except Exception as error:  # JSON, a missing key, or what pycocotools makes of bytes that are no run lengths
        raise UserError(f"{name}: the annotations can't be read ({type(error).__name__}: {error})") from None
    empty = [np.zeros((LOW_RES, LOW_RES), bool)] * (count - len(masks))
    return torch.from_numpy(np.stack([*masks, *empty]))


def run_lengths(sample: Sample) -> list[RunLengths]:
    """All masks of an image, from its JSON; COCO's crowds and empty masks are left out."""
    if not sample.json:
        raise UserError(f"{sample.key}: it has no annotations")
    try:
        found = [one["segmentation"] for one in json.loads(sample.json)["annotations"] if not one.get("iscrowd")]
        masks = [_compressed(segmentation, sample.original_size) for segmentation in found]
        kept = [mask for mask in masks if coco.area(mask) > 0]
        wrong = next((mask["size"] for mask in kept if tuple(mask["size"]) != sample.original_size), None)
        if wrong or not kept:
            raise ValueError(f"a mask of {wrong} pixels for an image of {sample.original_size}" if wrong else "none")
    except Exception as error:  # JSON, a missing key, or what pycocotools makes of bytes that are no run lengths
        raise UserError(f"{sample.key}: the annotations can't be used ({type(error).__name__}: {error})") from None
    return kept


def coco_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A dataset's file of annotations, COCO's or LVIS's: those of each image, by the image's file name."""
    try:
        content = json.loads(path.read_bytes())
        names = {image["id"]: _file_name(image) for image in content["images"]}
        found: dict[str, list[dict[str, Any]]] = {}
        for one in content["annotations"]:
            kept = {key: one[key] for key in ("segmentation", "iscrowd") if key in one}
            found.setdefault(names[one["image_id"]], []).append(kept)
    except OSError as error:
        raise UserError(f"data.annotations={path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"data.annotations={path}: not a JSON of COCO or LVIS ({why})") from None
    return found


def _file_name(image: dict[str, Any]) -> str:
    """LVIS has COCO's address instead."""
    return str(image.get("file_name") or image["coco_url"]).rpartition("/")[2]


def _compressed(segmentation: Any, size: tuple[int, int]) -> RunLengths:
    """segmentation: polygons, or run lengths as a list or as text."""
    if isinstance(segmentation, list):
        return coco.merge(coco.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return coco.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def _at_low_res(segmentation: dict[str, Any]) -> np.ndarray:
    """[256, 256] bool."""
    height, width = segmentation["size"]
    original = Image.fromarray(coco.decode(_compressed(segmentation, (height, width))) * np.uint8(255))
    frame = Image.new("L", (FRAME, FRAME))
    frame.paste(original.resize(frame_size((height, width))[::-1], Image.Resampling.BILINEAR))
    return np.asarray(frame.reduce(FRAME // LOW_RES)) >= 128
