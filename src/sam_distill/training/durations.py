"""Lengths of training in any unit: `8 epochs`, `50000 steps`, `400000 images`."""

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*(epoch|step|image)s?")


def _parse(duration: Any) -> tuple[float, str]:
    match = _FORM.fullmatch(str(duration).strip())
    if match is None or float(match[1]) == 0:
        raise ValueError("should be a duration like '8 epochs', '50000 steps' or '400000 images'")
    return float(match[1]), match[2]


Duration = Annotated[str, BeforeValidator(lambda duration: _parse(duration) and duration)]


def in_steps(duration: str, images_per_step: int, images_per_epoch: int) -> int:
    """Optimizer steps, at least 1. images_per_step counts all devices and gradient accumulation.

    Raises ValueError for what is not a duration.
    """
    amount, unit = _parse(duration)
    images = {"epoch": amount * images_per_epoch, "step": amount * images_per_step, "image": amount}[unit]
    return max(1, math.ceil(images / images_per_step - 1e-9))
