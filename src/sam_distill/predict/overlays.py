"""Draw masks and prompts over images, side by side as in the paper (Figures 4 and 5)."""

from collections.abc import Iterable, Mapping, Sequence
from colorsys import hsv_to_rgb
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco

from sam_distill.types import BACKGROUND, FOREGROUND

TEACHER, STUDENT = (30, 144, 255), (255, 30, 150)  # blue and pink
_PANEL = 384  # long side of a panel, pixels
_GAP, _CAPTION = 6, 24


def overlay(
    image: Image.Image,
    mask: np.ndarray | None = None,
    colour: tuple[int, int, int] = TEACHER,
    points: Sequence[Sequence[float]] = (),
    labels: Sequence[int] = (),
    box: Sequence[float] | None = None,
) -> Image.Image:
    """Return `image` with a mask ([H, W] bool) tinted and outlined and the prompt drawn; coordinates are its pixels."""
    picture = image.convert("RGB")
    if mask is not None:
        pixels = np.asarray(picture).astype(np.float32)
        pixels[mask] = 0.45 * pixels[mask] + 0.55 * np.asarray(colour, np.float32)
        pixels[_outline(mask)] = 255
        picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    unit = max(2, round(max(picture.size) / 130))
    if box is not None:
        draw.rectangle(_stretched(box, 4 * unit), outline=(80, 255, 80), width=max(2, unit // 2))
    for (x, y), label in zip(points, labels, strict=True):
        fill = (80, 255, 80) if label else (255, 60, 60)
        draw.ellipse((x - unit, y - unit, x + unit, y + unit), fill=fill, outline="white", width=max(1, unit // 3))
    return picture


def masks_overlay(image: Image.Image, records: Iterable[Mapping[str, Any]]) -> Image.Image:
    """Return `image` with many masks, each in a different colour, small masks above large ones.

    records: from `SamAutomaticMaskGenerator`, as binary_mask or coco_rle.
    """
    pixels = np.array(image.convert("RGB"))
    for number, record in enumerate(sorted(records, key=lambda record: -record["area"])):
        (x, y, width, height), mask = record["bbox"], record["segmentation"]
        mask = coco.decode(mask).astype(bool) if isinstance(mask, dict) else mask
        inside = slice(y, y + height + 1), slice(x, x + width + 1)
        part, region = mask[inside], pixels[inside]
        hue = number * 0.618034 % 1  # steps of the golden ratio: the next masks get distant hues
        colour = np.array(hsv_to_rgb(hue, 0.75, 1.0)) * 255
        region[part] = (0.45 * region[part] + 0.55 * colour).astype(np.uint8)
        region[_outline(part)] = colour.astype(np.uint8)
    return Image.fromarray(pixels)


def prompt_overlay(
    image: Image.Image,
    prompt: Sequence[float],
    labels: Sequence[int],
    mask: np.ndarray | None = None,
    colour: tuple[int, int, int] = TEACHER,
) -> Image.Image:
    """Return `overlay` with the prompt and labels of a `Comparison`, in pixels of `image`."""
    points = zip(zip(prompt[::2], prompt[1::2], strict=True), labels, strict=True)
    clicks = [(point, label) for point, label in points if label in (BACKGROUND, FOREGROUND)]
    if not clicks:
        return overlay(image, mask, colour, box=prompt)
    return overlay(image, mask, colour, [point for point, _ in clicks], [label for _, label in clicks])


def side_by_side(panels: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Return a row of pictures, resized to the same long side, each under its caption."""
    panels = [resize_long_side(panel, _PANEL, Image.Resampling.LANCZOS) for panel in panels]
    font = ImageFont.load_default(15)
    widths = [max(panel.width, int(font.getlength(text)) + 5) for panel, text in zip(panels, captions, strict=True)]
    width = sum(widths) + _GAP * (len(panels) - 1)
    row = Image.new("RGB", (width, panels[0].height + _CAPTION + _GAP), "white")
    draw = ImageDraw.Draw(row)
    x = 0
    for panel, caption, column_width in zip(panels, captions, widths, strict=True):
        draw.text((x + 2, 2), caption, fill="black", font=font)
        row.paste(panel, (x, _CAPTION))
        x += column_width + _GAP
    return row


def resize_long_side(picture: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """Resize to this long side, and 1 pixel at least: ImageOps.contain rounds the short side of a thin picture to 0."""
    width, height = (max(1, round(length * side / max(picture.size))) for length in picture.size)
    return picture.resize((width, height), resample)


def column(rows: Sequence[Image.Image]) -> Image.Image:
    """Return the rows below each other on white."""
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    y = 0
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height
    return sheet


def _stretched(box: Sequence[float], least: float) -> tuple[float, float, float, float]:
    """Return the box, sides shorter than `least` stretched about their middle: an outline would hide a few pixels."""
    x0, y0, x1, y1 = box
    x, y = max(0.0, least - (x1 - x0)) / 2, max(0.0, least - (y1 - y0)) / 2
    return x0 - x, y0 - y, x1 + x, y1 + y


def _outline(mask: np.ndarray) -> np.ndarray:
    """Return the mask's pixels that touch its outside: [H, W] bool. scipy's binary_erosion takes five times as long."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner
