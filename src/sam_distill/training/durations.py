"""Training durations in epochs, steps or images: `8 epochs`, `50000 steps`, `400000 images`."""

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(epoch|step|image)s?")


def _parse(duration: Any) -> tuple[float, str]:
    match = _PATTERN.fullmatch(str(duration).strip())
    if match is None or float(match[1]) == 0:
        raise ValueError("should be a duration like '8 epochs', '50000 steps' or '400000 images'")
    return float(match[1]), match[2]


Duration = Annotated[str, BeforeValidator(lambda duration: _parse(duration) and duration)]


def in_steps(duration: str, images_per_step: int, images_per_epoch: int) -> int:
    """Return the duration in optimizer steps, rounded up, at least 1. Raise ValueError if it is not a duration.

    images_per_step: counts all devices and accumulated batches.
    """
    amount, unit = _parse(duration)
    images = {"epoch": amount * images_per_epoch, "step": amount * images_per_step, "image": amount}[unit]
    return max(1, math.ceil(images / images_per_step - 1e-9))
