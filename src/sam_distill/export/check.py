"""Exported ONNX files against PyTorch, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onnxruntime import InferenceSession
from torch import Tensor
from torch.nn import functional as F

from sam_distill.export.onnx import EMBEDDINGS, IOUS, LOW_RES_MASKS, MASKS, encoder_input
from sam_distill.images import upscale_masks
from sam_distill.models.sam import Sam
from sam_distill.types import (
    ALL,
    BACKGROUND,
    BOX_BOTTOM_RIGHT,
    BOX_TOP_LEFT,
    FOREGROUND,
    FRAME,
    LOW_RES,
    NOT_A_POINT,
    Prompts,
    Sample,
)

TOLERANCE = {EMBEDDINGS: 1e-3, IOUS: 1e-3, LOW_RES_MASKS: 1e-2, MASKS: 1e-2}  # fp32 stays well below


@dataclass(frozen=True)
class Difference:
    """The largest one between ONNX Runtime and PyTorch, in an output's own units."""

    output: str
    largest: float
    allowed: float

    @property
    def tolerated(self) -> bool:
        return self.largest <= self.allowed  # not if it is NaN


@torch.no_grad()
def compare(
    sam: Sam, encoder: InferenceSession, decoder: InferenceSession, samples: Sequence[Sample]
) -> list[Difference]:
    """Both files against `sam` itself, on real images and prompts of every kind."""
    largest = dict.fromkeys(TOLERANCE, 0.0)
    for sample in samples:
        height, width = sample.image.shape[-2:]
        frame = F.pad(sample.image, (0, FRAME - width, 0, FRAME - height)).unsqueeze(0)
        embedding = sam.encode(frame, torch.tensor([[height, width]]))
        theirs = encoder.run(None, encoder_input(sample))
        pairs = [(EMBEDDINGS, theirs[0], embedding)]
        for prompts in _prompts(sam, embedding, height, width):
            theirs = decoder.run([LOW_RES_MASKS, IOUS, MASKS], _decoder_inputs(embedding, prompts, sample))
            ours = sam.decode(embedding, prompts, ALL)
            upscaled = upscale_masks(ours.low_res[0], (height, width), sample.original_size)
            expected = (ours.low_res[0], ours.iou[0], upscaled)
            pairs += zip((LOW_RES_MASKS, IOUS, MASKS), theirs, expected, strict=True)
        for name, one, other in pairs:
            largest[name] = float(np.maximum(largest[name], np.abs(one - other.numpy()).max()))  # keeps NaN
    return [Difference(name, value, TOLERANCE[name]) for name, value in largest.items()]


def _prompts(sam: Sam, embedding: Tensor, height: int, width: int) -> Iterator[Prompts]:
    """Three prompts together (a click, two clicks, a box); and one that corrects a mask with three clicks."""
    x, y = torch.tensor([0.25, 0.5, 0.75]) * width, torch.tensor([0.25, 0.5, 0.75]) * height
    low, middle, high = torch.stack([x, y], dim=-1)
    points = torch.stack([torch.stack(pair) for pair in ((middle, 0 * low), (low, high), (low, high))])
    kinds = [(FOREGROUND, NOT_A_POINT), (FOREGROUND, BACKGROUND), (BOX_TOP_LEFT, BOX_BOTTOM_RIGHT)]
    several = Prompts(points.unsqueeze(0), torch.tensor([kinds]))
    yield several
    labels = torch.tensor([[[FOREGROUND, BACKGROUND, FOREGROUND]]])
    earlier = sam.decode(embedding, several, ALL).low_res[:, :1, :1]
    yield Prompts(torch.stack([low, middle, high])[None, None], labels, earlier)


def _decoder_inputs(embedding: Tensor, prompts: Prompts, sample: Sample) -> dict[str, np.ndarray]:
    masks = torch.zeros(1, 1, LOW_RES, LOW_RES) if prompts.masks is None else prompts.masks[0]
    inputs = {
        EMBEDDINGS: embedding,
        "point_coords": prompts.points[0],
        "point_labels": prompts.labels[0].float(),
        "mask_input": masks,
        "has_mask_input": torch.tensor([float(prompts.masks is not None)]),
        "orig_im_size": torch.tensor(sample.original_size).float(),
    }
    return {name: value.numpy() for name, value in inputs.items()}
