"""Checks of the arguments of `SamPredictor`: refuse those that would give wrong masks, and name the right call."""

import warnings
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_distill.images import Size, frame_size
from sam_distill.types import BACKGROUND, FOREGROUND, FRAME, LOW_RES, NOT_A_POINT

_SEVERAL = "several prompts on one image are for predict_torch, one on each of several images for predict_batch"
_LOGITS = "the low-res logits that an earlier predict returned third"


def check_transformed(image: Tensor, original_size: Size) -> None:
    """Raise ValueError unless the image for `set_torch_image` has its size in the frame and colours of 0 to 255."""
    shape = list(image.shape)
    if len(shape) != 4 or shape[:2] != [1, 3] or max(shape[2:]) != FRAME:
        raise ValueError(f"a transformed image is [1, 3, h, w] with a long side of {FRAME}, not {shape}")
    if tuple(shape[2:]) != frame_size(original_size):
        expected = [1, 3, *frame_size(original_size)]
        raise ValueError(
            f"an image of (H, W) = {original_size} is {expected} when transformed, not {shape}: original_image_size is"
            " (height, width)"
        )
    least, most = torch.stack(image.aminmax()).tolist()
    if not (least > -1 and most < 256) or (image.is_floating_point() and 0 < most <= 1):  # resizing may overshoot
        raise ValueError(
            f"a transformed image has colours of 0 to 255, not {least:g} to {most:g}: they are normalised here"
        )


def check_one(point_coords: Any, point_labels: Any, box: Any, mask_input: Any) -> None:
    """Raise ValueError unless the arguments of `predict` go together and have the right shapes and dtypes."""
    if (point_coords is None) != (point_labels is None):
        raise ValueError("point_coords and point_labels belong together: give both or neither")
    if point_coords is not None:
        shape, label_shape = np.shape(point_coords), np.shape(point_labels)
        if len(shape) != 2 or shape[1] != 2 or not shape[0]:
            raise ValueError(f"point_coords is [N, 2], such as [[320, 240]], not {list(shape)}; {_SEVERAL}")
        if label_shape != shape[:1]:
            raise ValueError(f"point_labels is [{shape[0]}], one for each point, not {list(label_shape)}")
    if box is not None and prod(np.shape(box)) != 4:
        raise ValueError(f"box is [4], (x0, y0, x1, y1), not {list(np.shape(box))}; {_SEVERAL}")
    if mask_input is not None:
        shape, dtype = np.shape(mask_input), np.asarray(mask_input).dtype
        if shape[-2:] != (LOW_RES, LOW_RES) or prod(shape) != LOW_RES**2:
            raise ValueError(f"mask_input is [1, {LOW_RES}, {LOW_RES}], one of {_LOGITS}, not {list(shape)}")
        if not np.issubdtype(dtype, np.floating):
            raise ValueError(f"mask_input is {dtype}, a mask, but logits are expected: one of {_LOGITS}")


def check_several(points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, masks: Tensor | None) -> None:
    """Raise ValueError unless the arguments of `predict_torch` go together and have the right shapes."""
    if (points is None) != (labels is None):
        raise ValueError("point_coords and point_labels belong together: give both or neither")
    wanted = {
        "point_coords": (points, "[P, N, 2]", points is None or (points.ndim == 3 and points.shape[2] == 2)),
        "point_labels": (labels, "[P, N]", labels is None or points is None or labels.shape == points.shape[:2]),
        "boxes": (boxes, "[P, 4]", boxes is None or (boxes.ndim == 2 and boxes.shape[1] == 4)),
        "mask_input": (masks, "[P, 1, 256, 256]", masks is None or masks.shape[1:] == (1, LOW_RES, LOW_RES)),
    }
    for name, (given, expected, right) in wanted.items():
        if given is not None and not right:
            raise ValueError(f"{name} is {expected}, not {list(given.shape)}; predict takes one prompt, without P")
    counts = {name: len(given) for name, (given, _, _) in wanted.items() if given is not None}
    if len(set(counts.values())) > 1:
        raise ValueError(f"P differs: {', '.join(f'{count} in {name}' for name, count in counts.items())}")


def check_values(
    points: Tensor | None, labels: Tensor | None, boxes: Tensor | None, masks: Tensor | None, size: Size
) -> None:
    """Raise ValueError if prompts hold invalid values; only warn if a point or box lies outside the image.

    Any number of prompts, in pixels of the frame; size: (h, w) of the image in it. The device is read only once.
    """
    given = next((part for part in (points, boxes, masks) if part is not None), None)
    if given is None:
        return
    wrong: dict[str, Tensor] = {}
    outside = torch.zeros((), dtype=torch.bool, device=given.device)
    corner = torch.tensor([size[1], size[0]], device=given.device) + 0.5  # scaling to the frame may have added this
    if points is not None and labels is not None:
        known = torch.tensor([FOREGROUND, BACKGROUND, NOT_A_POINT], dtype=torch.float32, device=given.device)
        wrong["point_coords holds NaN or infinity: (x, y) are expected"] = ~points.isfinite().all()
        unknown = ~torch.isin(labels.float(), known).all()  # torch.isin does not take bool
        wrong["point_labels are 1 (foreground), 0 (background) or -1 (no point), nothing else"] = unknown
        inside = ((points >= 0) & (points <= corner)).all(-1)
        outside |= (~inside & (labels != NOT_A_POINT)).any()
    if boxes is not None:
        start, end = boxes[..., :2], boxes[..., 2:]
        wrong["a box holds NaN or infinity: (x0, y0, x1, y1) are expected"] = ~boxes.isfinite().all()
        wrong["a box is (x0, y0, x1, y1), its top left and bottom right; one has x1 < x0 or y1 < y0"] = (
            end < start
        ).any()
        outside |= ((end < 0) | (start > corner)).any()
    if masks is not None:
        top = masks.amax()
        is_mask = ((masks == 0) | (masks == top)).all() & ((top == 1) | (top == 255))
        wrong["mask_input holds NaN or infinity: logits are expected"] = ~masks.isfinite().all()
        wrong[f"mask_input is a mask of 0 and 1 or 255, but logits are expected: one of {_LOGITS}"] = is_mask
    *answers, lies_outside = torch.stack([*wrong.values(), outside]).tolist()
    message = next((line for line, found in zip(wrong, answers, strict=True) if found), None)
    if message:
        raise ValueError(message)
    if lies_outside:
        warnings.warn("a point or box lies outside the image: SAM was trained on none that do", stacklevel=4)
