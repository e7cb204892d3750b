"""Decoding and resizing of images and masks, the same for caching, training, evaluation and prediction.

Resizing is equal to segment-anything's to the last bit (utils/transforms.py, Sam.postprocess_masks). Images are handled
by Pillow only, so that loader workers start no threads of their own.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sam_distill.errors import UserError
from sam_distill.types import FRAME, LOW_RES, upload

Size = tuple[int, int]  # (height, width), pixels

_ORIENTATION = 0x0112  # EXIF tag; 1 to 8, other values are ignored
_SIDES_SWAPPED = (5, 6, 7, 8)  # orientations that swap height and width


def decode(data: bytes | Path, name: str | None = None, full: bool = False) -> tuple[Image.Image, Size]:
    """Return an image, encoded or given by its path, as upright 8-bit RGB, and its original (H, W).

    A JPEG is decoded at 1/2, 1/4 or 1/8 size if that covers the frame: 1.5 to 2 times faster, resize included.
    The (H, W) is the file's own, after EXIF rotation, whatever size is decoded. `full=True` decodes every pixel.
    Transparent parts become white; 16-bit values are scaled, not clipped; an animation is reduced to its first picture.
    """
    name = name or (str(data) if isinstance(data, Path) else "image")
    try:
        with Image.open(BytesIO(data) if isinstance(data, bytes) else data) as image:
            stored = image.height, image.width
            if not full:
                height, width = frame_size(stored)
                image.draft(None, (width, height))  # JPEG only: other formats ignore it
            turned = image.getexif().get(_ORIENTATION) in _SIDES_SWAPPED
            rgb = to_rgb(image)
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise UserError(f"{name}: larger than {limit} megapixels, which no photograph is; scale it down") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: cannot be decoded (neither a JPEG nor any other kind that Pillow knows)") from None
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged data
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or repr(error)
        raise UserError(f"{name}: cannot be decoded ({' '.join(reason.split())})") from None
    return rgb, stored[::-1] if turned else stored


def to_frame(image: Image.Image, original_size: Size | None = None) -> Tensor:
    """Resize the image to the frame, unpadded: [3, h, w] uint8, antialiased bilinear as in ResizeLongestSide(1024).

    original_size: (H, W) from `decode`, needed for a JPEG decoded at a smaller size; by default the image's own.
    """
    height, width = frame_size(original_size or (image.height, image.width))
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def to_jpeg(image: Tensor, quality: int) -> bytes:
    """Return the JPEG file of an image [3, h, w] uint8 RGB."""
    buffer = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def frame_size(original_size: Size) -> Size:
    """Return the (h, w) of an (H, W) image in the frame: long side 1024, the other rounded half up (at least 1)."""
    scale = FRAME / max(original_size)
    height, width = (max(1, int(side * scale + 0.5)) for side in original_size)
    return height, width


def scale_points(points: Tensor, original_size: Size) -> Tensor:
    """Convert [..., 2] (x, y) from pixels of the original to pixels of the frame. Corners of boxes are points too."""
    (height, width), (frame_height, frame_width) = original_size, frame_size(original_size)
    return points * upload([frame_width / width, frame_height / height], points.device)


def upscale_masks(low_res: Tensor, size: Size, original_size: Size) -> Tensor:
    """Return low-res logits resized to the original size: [..., 256, 256] -> [..., H, W]; a mask is where they are > 0.

    size: (h, w) of the image within the frame. Steps: resize to 1024 x 1024, crop the padding away, resize to (H, W).
    """
    framed = F.interpolate(low_res.reshape(-1, 1, *low_res.shape[-2:]), (FRAME, FRAME), mode="bilinear")
    masks = F.interpolate(framed[..., : size[0], : size[1]], original_size, mode="bilinear")
    return masks.reshape(*low_res.shape[:-2], *original_size)


def upscale_weights(size: Size, original_size: Size) -> tuple[Tensor, Tensor]:
    """Return `upscale_masks` as matrices, rows [H, 256] and columns [W, 256]: masks = rows @ low_res @ columns.T."""
    rows, columns = (
        F.interpolate(
            F.interpolate(torch.eye(LOW_RES)[None], FRAME, mode="linear")[..., :inside], original, mode="linear"
        )[0].T
        for inside, original in zip(size, original_size, strict=True)
    )
    return rows, columns


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to upright 8-bit RGB, as `decode` does with a file."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16-bit and 32-bit integers, floats
        image = _to_8_bit(np.asarray(image, np.float32), ranges=(1, 255, 65535) if image.mode == "F" else (65535,))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(gray: np.ndarray, ranges: tuple[int, ...]) -> Image.Image:
    """Scale [H, W] float32 of unknown range to 0..255: by the first of `ranges` that holds its values, or its maximum.

    So a dark 16-bit image stays dark, and a float image may be in 0..1 as well as in 0..255. Values may exceed a
    range by a tenth, because resizing may overshoot.
    """
    gray = np.nan_to_num(gray).clip(min=0)
    top = next((top for top in ranges if gray.max() <= 1.1 * top), gray.max())
    return Image.fromarray(np.uint8(gray.clip(max=top) * (255 / top) + 0.5))
