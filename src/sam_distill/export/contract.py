"""Inputs and outputs of every exported graph, for the checks in code and, as contract.json, for apps."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sam_distill.models.sam import PIXEL_MEAN, PIXEL_STD
from sam_distill.types import EMBED_DIM, FRAME, GRID, LOW_RES

Normalize = Literal["inside", "outside"]
Quantize = Literal["fp16", "int8"]

CONTRACT = "contract.json"

EMBEDDINGS, IOUS, LOW_RES_MASKS = "image_embeddings", "iou_predictions", "low_res_masks"


@dataclass(frozen=True)
class Settings:
    """Settings of an export, the first entries of its contract.json. points: the most that a prompt can have."""

    format: str
    quantize: Quantize | None
    image_size: int
    points: int
    normalize: Normalize

    @classmethod
    def read(cls, file: Path) -> tuple["Settings", dict[str, Any]]:
        """Return the settings in a contract.json, and its whole content."""
        content = json.loads(file.read_text())
        return cls(**{field.name: content[field.name] for field in fields(cls)}), content


def contracts(folder: Path) -> list[Path]:
    """Return the path of the contract.json of an export, or of each export in a folder of several."""
    return sorted({*folder.glob(CONTRACT), *folder.glob(f"*/{CONTRACT}")})


@dataclass(frozen=True)
class TensorSpec:
    """Input or output tensor of a graph. A dimension with a name instead of a number is dynamic.

    example: the shape to trace the graph with if a dimension is dynamic; no size in it may be a special case.
    """

    name: str
    shape: tuple[int | str, ...]
    meaning: str
    dtype: Literal["float32", "uint8"] = "float32"
    example: tuple[int, ...] | None = None

    def zeros(self) -> Tensor:
        return torch.zeros([int(side) for side in self.example or self.shape], dtype=getattr(torch, self.dtype))

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "example"}


def image(side: int, normalize: Normalize) -> TensorSpec:
    colour = ", ".join(str(value) for value in PIXEL_MEAN)
    colours = f"RGB, 0 to 255, contiguous; padded at the right and the bottom with the colour ({colour})"
    if normalize == "outside":
        deviation = ", ".join(str(value) for value in PIXEL_STD)
        colours = f"RGB as (value - ({colour})) / ({deviation}), contiguous; padded at the right and bottom with 0"
    return TensorSpec("image", (1, 3, side, side), f"the picture, its long side resized to {side}; {colours}")


EMBEDDING = TensorSpec(EMBEDDINGS, (1, EMBED_DIM, GRID, GRID), "what the encoder makes of a picture, once per picture")
MASK_INPUT = TensorSpec("mask_input", (1, 1, LOW_RES, LOW_RES), "logits of an earlier answer to go on from, or zeros")
HAS_MASK_INPUT = TensorSpec("has_mask_input", (1,), "1 if there is a mask_input, else 0")
COORDINATES = f"(x, y) in pixels of the picture with its long side resized to {FRAME}, 0 to {FRAME}"
LABELS = "1 foreground, 0 background, 2 and 3 a box's top left and bottom right corner, -1 no point"
MASK_ORDER = "0 for boxes and several points; of 1 to 3 the one with the highest predicted IoU for a single click"


def prompt(points: int) -> list[TensorSpec]:
    fill = f"fill up to {points} points with label -1: the answer is that for the others alone"
    unknown = "any other label is answered with empty masks and predicted IoUs far below 0"
    return [
        TensorSpec("point_coords", (1, points, 2), f"{COORDINATES}; a box is two points"),
        TensorSpec("point_labels", (1, points), f"{LABELS}; {fill}; {unknown}"),
    ]


DECODER_OUTPUTS = [
    TensorSpec(LOW_RES_MASKS, (1, 4, LOW_RES, LOW_RES), f"logits of four masks; {MASK_ORDER}"),
    TensorSpec(IOUS, (1, 4), "the model's own estimate of each mask's IoU, about 0 to 1"),
]
UPSCALING = (
    f"bilinear (half-pixel centres) to {FRAME} x {FRAME}, cut off the padding, bilinear to the picture's size; a mask"
    " is where the result is above 0"
)


def graph_as_json(file: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Return a graph's part of contract.json; the tensors are in the order of the graph's inputs and outputs."""
    return {"file": file, "inputs": [t.as_json() for t in inputs], "outputs": [t.as_json() for t in outputs]}
