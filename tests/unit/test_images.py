"""Tests of images.py: the same results as segment-anything's own code, and every kind of image file that users have."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from sam_distill.errors import UserError
from sam_distill.images import decode, frame_size, scale_points, to_frame, upscale_masks

SIZES = [(333, 500), (1500, 2250), (1024, 1024), (1999, 37), (64, 64), (1, 7)]
ORIENTATION = 0x0112  # EXIF tag


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", SIZES)
def test_to_frame_equals_segment_anything(size: tuple[int, int]) -> None:
    image = photo(*size)
    expected = ResizeLongestSide(1024).apply_image(np.array(image))
    assert np.array_equal(to_frame(image).permute(1, 2, 0).numpy(), expected)
    assert frame_size(size) == expected.shape[:2]


def test_frame_size_is_never_empty() -> None:
    assert frame_size((1, 10_000)) == (1, 1024)


@pytest.mark.parametrize("size", SIZES)
def test_scale_points_equals_segment_anything(size: tuple[int, int]) -> None:
    points = torch.rand(3, 2, 2) * torch.tensor([size[1], size[0]])
    expected = ResizeLongestSide(1024).apply_coords(points.numpy(), size)
    assert torch.allclose(scale_points(points, size).double(), torch.from_numpy(expected), atol=1e-4)
    assert torch.equal(scale_points(torch.tensor([4, 2]), (512, 512)), torch.tensor([8.0, 4.0]))


def test_upscale_masks_equals_segment_anything() -> None:
    low_res, size, original = torch.randn(2, 3, 256, 256), (683, 1024), (321, 481)

    class FrameOnly:  # all that postprocess_masks needs of a Sam
        class image_encoder:  # noqa: N801
            img_size = 1024

    expected = Sam.postprocess_masks(FrameOnly(), low_res, size, original)
    torch.testing.assert_close(upscale_masks(low_res, size, original), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(upscale_masks(low_res[0, 0], size, original), expected[0, 0], rtol=0, atol=1e-5)


def test_scaled_jpeg_covers_the_frame_and_keeps_its_size() -> None:
    for size, decoded in {(1500, 2250): (750, 1125), (4096, 3000): (1024, 750), (1500, 2000): (1500, 2000)}.items():
        data = encoded(photo(*size), "JPEG", quality=95)
        image, original_size = decode(data)
        assert original_size == size
        assert (image.height, image.width) == decoded
        scaled, whole = to_frame(image, original_size), to_frame(decode(data, full=True)[0])
        assert scaled.shape == whole.shape
        assert (scaled.float() - whole.float()).abs().mean() < 1


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_rotation(orientation: int, full: bool) -> None:
    turn = {3: 180, 6: 90, 8: 270}[orientation]  # degrees, counter-clockwise, from upright to stored
    upright = photo(3000, 2200)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(upright.rotate(turn, expand=True), "JPEG", exif=exif, quality=95)
    image, original_size = decode(data, full=full)
    assert original_size == (3000, 2200)
    assert (image.height, image.width) == ((3000, 2200) if full else (1500, 1100))
    difference = to_frame(image, original_size).float() - to_frame(upright).float()
    assert difference.abs().mean() < 1


RAMP = np.arange(256, dtype=np.uint8).repeat(16).reshape(64, 64)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    gray = Image.fromarray(RAMP)
    source = gray.quantize(256) if mode == "P" else gray.convert("RGB").convert(mode)
    # Pillow 12.3 can't read the YCbCr that it writes uncompressed.
    tiff = {"format": "TIFF", "compression": "tiff_lzw"}
    image, size = decode(encoded(source, **(tiff if mode in ("CMYK", "YCbCr") else {})))
    assert (image.mode, size) == ("RGB", (64, 64))
    if mode != "1":
        error = np.array(image).astype(int) - RAMP[..., None]
        assert np.abs(error).max() <= 2


@pytest.mark.parametrize(
    ("format", "dtype", "top"),
    [("PNG", np.uint16, 65535), ("TIFF", np.uint16, 65535), ("TIFF", np.float32, 1.0), ("TIFF", np.float32, 255.0)],
)
def test_16_bit_and_float_gray_is_scaled_not_clipped(format: str, dtype: type, top: float) -> None:
    deep = (RAMP.astype(np.float64) / 255 * top).astype(dtype)
    image, _ = decode(encoded(Image.fromarray(deep), format))
    assert np.abs(np.array(image).astype(int) - RAMP[..., None]).max() <= 1


def test_float_image_may_exceed_its_range_a_little() -> None:
    """A bicubic resize overshoots: an image of 0..1 with values up to 1.05 is not read as a black image of 0..255."""
    image, _ = decode(encoded(Image.fromarray((RAMP / 255 * 1.05).astype(np.float32)), "TIFF"))
    assert np.abs(np.array(image).astype(int) - (RAMP[..., None] * 1.05).clip(max=255)).max() <= 1


def test_transparent_parts_become_white() -> None:
    for mode, clear in {"RGBA": (10, 20, 30, 0), "LA": (10, 0)}.items():
        image, _ = decode(encoded(Image.new(mode, (8, 8), clear)))
        assert np.array(image).min() == 255
    palette = Image.new("P", (8, 8), 0)
    assert np.array(decode(encoded(palette, transparency=0))[0]).min() == 255


def test_damaged_files_raise_a_one_line_error(tmp_path: Path) -> None:
    data = encoded(photo(300, 300), "JPEG")
    flipped = bytearray(encoded(photo(300, 300)))
    flipped[60] ^= 255
    for broken in (b"", b"not an image", data[: len(data) // 2], data[:20], bytes(flipped)):
        with pytest.raises(UserError, match=r"^sa_1: cannot be decoded \(.+\)$") as caught:
            decode(broken, "sa_1")
        assert "\n" not in str(caught.value)
        assert " at 0x" not in str(caught.value)
    with pytest.raises(UserError, match=r"gone\.jpg: cannot be decoded \(No such file"):
        decode(tmp_path / "gone.jpg")


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo(300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 300 // 3)
    with pytest.raises(UserError, match=r"^image: larger than .* megapixels"):
        decode(data)


def test_24_megapixel_photo_is_decoded() -> None:
    image, size = decode(encoded(photo(4000, 6000), "JPEG"))
    assert size == (4000, 6000)
    assert (image.height, image.width) == (1000, 1500)


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_invalid_exif_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image, original_size = decode(encoded(photo(40, 60), "JPEG", exif=exif))
    assert (image.height, image.width) == original_size == (40, 60)
