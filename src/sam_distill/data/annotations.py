"""Annotations in SA-1B's JSON: COCO run-length masks, a few of them drawn and rasterised at a time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco
from torch import Tensor

from sam_distill.images import frame_size
from sam_distill.prompts.draws import generator
from sam_distill.types import FRAME, LOW_RES, UserError


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


def _at_low_res(segmentation: dict[str, Any]) -> np.ndarray:
    """[256, 256] bool."""
    height, width = segmentation["size"]
    if isinstance(segmentation["counts"], list):
        segmentation = coco.frPyObjects(segmentation, height, width)
    original = Image.fromarray(coco.decode(segmentation) * np.uint8(255))
    frame = Image.new("L", (FRAME, FRAME))
    frame.paste(original.resize(frame_size((height, width))[::-1], Image.Resampling.BILINEAR))
    return np.asarray(frame.reduce(FRAME // LOW_RES)) >= 128
