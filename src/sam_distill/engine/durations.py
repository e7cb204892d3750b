"""Lengths of training in any unit: `8 epochs`, `50000 steps`, `400000 images`."""

from __future__ import annotations

import math
import re

from sam_distill.types import UserError

_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*(epoch|step|image)s?")


def in_steps(duration: str, images_per_step: int, images_per_epoch: int) -> int:
    """Optimizer steps, at least 1. images_per_step counts all devices and gradient accumulation."""
    match = _FORM.fullmatch(duration.strip())
    if match is None or float(match[1]) == 0:
        raise UserError(f"'{duration}' is not a duration; write it like '8 epochs', '50000 steps' or '400000 images'")
    amount, unit = float(match[1]), match[2]
    images = {"epoch": amount * images_per_epoch, "step": amount * images_per_step, "image": amount}[unit]
    return max(1, math.ceil(images / images_per_step - 1e-9))
