"""The built-in default data source: enough to distil a student that works, with no download and no dataset.

scikit-image and matplotlib contain a few photographs. Four of them, whole and as close-ups, are the validation set; the
training images are made from the others. Most are scenes after the "dead leaves" model (Lee, Mumford and Huang, 2001:
objects that occlude one another have the statistics of natural images): shaded shapes with soft shadows, cut out of
photographs or painted. The teacher decides what an object is, so a scene need not look realistic.

Licences, as stated by the packages. Public domain or "no known copyright restrictions": astronaut and
hubble_deep_field (NASA), rocket (SpaceX), coins, ihc. CC0: brick, camera (Lav Varshney),
chelsea (Stefan van der Walt), coffee (Rachel Michetti), grass, gravel, retina.
matplotlib states none for grace_hopper, the US Navy's official portrait: public domain as a federal work.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import skimage
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from pydantic import Field

from sam_distill.data.indexed import IndexedSource
from sam_distill.images import to_frame
from sam_distill.selection import Fraction, ValImages
from sam_distill.types import Sample

VAL_PHOTOS = ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg")
TRAIN_PHOTOS = ("camera.png", "coins.png", "grace_hopper.jpg")  # photographs with objects
SURFACES = ("brick.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg")  # textures
SIDE = 512  # long side of a generated image, pixels

Pixels = NDArray[np.float32]  # [h, w, 3] in 0..1


class Photos(IndexedSource[str]):
    """Photographs and collages of them, generated on the fly from the key and, except for validation, the seed."""

    def __init__(
        self,
        images: Annotated[int, Field(ge=1)] = 160,
        fraction: Fraction = None,
        val_images: ValImages = 12,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        self.train = [f"train_{number:05d}" for number in range(max(1, round(images * (fraction or 1))))]
        shown = [Path(VAL_PHOTOS[number % len(VAL_PHOTOS)]).stem for number in range(val_images)]
        self.val = [f"val_{number:03d}_{name}" for number, name in enumerate(shown)]

    def keys(self, items: Sequence[str]) -> list[str]:
        return list(items)

    def load(self, item: str) -> Sample:
        split, number = item.split("_")[0], int(item.split("_")[1])
        image = val_image(number) if split == "val" else train_image(self.seed, number)
        return Sample(item, to_frame(image), (image.height, image.width))


def val_image(number: int) -> Image.Image:
    image = photo(VAL_PHOTOS[number % len(VAL_PHOTOS)])
    return image if number < len(VAL_PHOTOS) else crop(image, np.random.default_rng(number), 0.5, 0.8)


@lru_cache(maxsize=500)
def train_image(seed: int, number: int) -> Image.Image:
    """Return a part of a photograph (one in four) or a scene. Cached: generating an image costs as much as training."""
    rng = np.random.default_rng([seed, number])
    pixels = close_up(rng) if rng.random() < 0.25 else scene(rng)
    return Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))


@cache
def photo(name: str) -> Image.Image:
    """Return a photograph from the installed packages as RGB, its long side at most 2 * SIDE."""
    folder = Path(skimage.__file__).parent / "data"
    if name == "grace_hopper.jpg":
        folder = Path(matplotlib.get_data_path()) / "sample_data"
    with Image.open(folder / name) as image:
        rgb = image.convert("RGB")
    rgb.thumbnail((2 * SIDE, 2 * SIDE))
    return rgb


def crop(image: Image.Image, rng: np.random.Generator, smallest: float, largest: float) -> Image.Image:
    """Return a random part of the image; each side is between `smallest` and `largest` times that of the image."""
    w, h = (round(side * rng.uniform(smallest, largest)) for side in image.size)
    x, y = int(rng.integers(image.width - w + 1)), int(rng.integers(image.height - h + 1))
    return image.crop((x, y, x + w, y + h))


def fill(image: Image.Image, size: tuple[int, int]) -> Pixels:
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32) / np.float32(255)


def enlarge(values: NDArray[np.float64], size: tuple[int, int]) -> Pixels:
    """Interpolate values [h, w, channels] to `size` (width, height). Pillow resizes floats one channel at a time."""
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(values, 2, 0)]
    return np.stack([np.asarray(plane.resize(size, Image.Resampling.BICUBIC)) for plane in planes], 2)


def recolour(pixels: Pixels, rng: np.random.Generator, strength: float) -> Pixels:
    """Return the pixels in other material and light: colour channels mixed and tinted, gamma and contrast changed."""
    mix = ((1 - strength) * np.eye(3) + strength * rng.dirichlet([0.7] * 3, size=3)).astype(np.float32)
    tint = np.exp(rng.normal(0, 0.5 * strength, 3)).clip(0.3, 1.6).astype(np.float32)
    mixed: Pixels = (pixels @ mix.T).clip(0, 1) ** np.float32(np.exp(rng.normal(0, 0.35)))
    return ((mixed - 0.5) * np.float32(rng.uniform(0.6, 1.2)) + 0.5).clip(0, 1) * tint


def material(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    """Return a fill of `size` (width, height): part of a photograph, or grainy paint shaded in both directions."""
    kind = rng.random()
    if kind < 0.65:
        names = TRAIN_PHOTOS if kind < 0.25 else SURFACES
        part = crop(photo(names[rng.integers(len(names))]), rng, 0.15, 0.9)
        if rng.random() < 0.5:
            part = part.transpose(Image.Transpose(int(rng.integers(5))))
        return recolour(fill(part, size), rng, rng.uniform(0, 0.8))
    grey, colour = rng.uniform(0, 0.9), rng.normal(0, 0.18, 3)
    paint = grey + colour + rng.uniform(-1, 1, (2, 2, 1)) * rng.uniform(0, 0.3) + rng.normal(0, 0.04, (2, 2, 3))
    h, w = (max(2, side // int(rng.integers(1, 12))) for side in size[::-1])
    grain = rng.normal(0, rng.uniform(0, 0.12), (h, w, 1))
    return enlarge(paint, size) + enlarge(grain, size)


def outline(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a closed curve around (0, 0): [n, 2], largest absolute coordinate 1; a polygon, an ellipse or a blob."""
    kind = rng.random()
    if kind < 0.3:
        corners = int(rng.choice([3, 4, 4, 4, 5, 6]))
        angles = (np.arange(corners) + rng.uniform(-0.2, 0.2, corners)) * 2 * np.pi / corners
        radius = np.ones(corners)
    else:
        angles, waves = np.linspace(0, 2 * np.pi, 64, endpoint=False), np.arange(2, 8)
        height = rng.normal(0, 0 if kind < 0.5 else 0.5, 6) / waves
        radius = (1 + (height * np.cos(angles[:, None] * waves + rng.uniform(0, 7, 6))).sum(1)).clip(0.15)
    curve = np.stack([np.cos(angles), np.sin(angles) * rng.uniform(0.2, 1)], 1) * radius[:, None]
    turn = rng.uniform(0, 2 * np.pi)
    curve = curve @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return curve / np.abs(curve).max()


def put_object(canvas: Pixels, radius: float, light: NDArray[np.float64], rng: np.random.Generator) -> None:
    """Draw a shaded shape on the canvas, in place, and its shadow on what lies below."""
    side = 2 * int(1.3 * radius + 3)  # side of a square around the shape and its shadow
    left, top = (int(rng.uniform(0, length) - side / 2) for length in canvas.shape[1::-1])
    below = canvas[max(top, 0) : top + side, max(left, 0) : left + side]
    y, x = max(-top, 0), max(-left, 0)
    inside = np.s_[y : y + below.shape[0], x : x + below.shape[1]]  # the part of the square that lies on the canvas
    mask = Image.new("L", (2 * side, 2 * side))  # drawn at twice the size, for smooth edges
    ImageDraw.Draw(mask).polygon([(x, y) for x, y in (outline(rng) * 2 * radius + side).tolist()], fill=255)
    mask = mask.resize((side, side), Image.Resampling.BOX)
    blurred = np.asarray(mask.filter(ImageFilter.GaussianBlur(1 + radius * 0.08)), np.float32)
    shadow = np.roll(blurred, (light * radius).astype(int).tolist(), (0, 1))[inside][..., None] / 255
    below *= 1 - rng.uniform(0, 0.7) * shadow
    surface = material(rng, (side, side)) * enlarge(rng.uniform(0.4, 1.25, (2, 2, 1)), (side, side))
    alpha = np.asarray(mask, np.float32)[inside][..., None] / 255
    below += alpha * (surface[inside].clip(0, 1) - below)


def close_up(rng: np.random.Generator) -> Pixels:
    """Return a part of a training photograph in another light."""
    part = crop(photo(TRAIN_PHOTOS[rng.integers(len(TRAIN_PHOTOS))]), rng, 0.35, 1)
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    w, h = (round(length * SIDE / max(part.size)) for length in part.size)
    return recolour(fill(part, (w, h)), rng, 0.3)


def scene(rng: np.random.Generator) -> Pixels:
    """Return a scene: objects in front of one surface, or of ground and sky; large ones first, many small ones last."""
    short = int(SIDE * rng.choice([2 / 3, 3 / 4, 1.0], p=[0.5, 0.3, 0.2]))
    w, h = (SIDE, short) if rng.random() < 0.7 else (short, SIDE)
    canvas = material(rng, (w, h)).clip(0, 1)
    if rng.random() < 0.5:
        horizon = int(h * rng.uniform(0.2, 0.8))
        canvas[horizon:] = material(rng, (w, h - horizon)).clip(0, 1)
    light = rng.uniform(-0.25, 0.25, 2)
    radii = SIDE * (0.04 * (1 - rng.random(rng.integers(3, 25))) ** -0.7).clip(0, 0.4)  # power law, as in nature
    for radius in np.sort(radii)[::-1].tolist():
        put_object(canvas, radius, light, rng)
    return canvas
